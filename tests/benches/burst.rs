//! Many creates at once: the median of their times against the line that the processor time of one
//! restore predicts, and the answer past the configured bound.

use std::{
    fs,
    time::{Duration, Instant},
};

use aether_api::{
    CreateVm,
    client::{CallOptions, ClientError},
};
use aether_tests::{
    Platform, Setup,
    measure::{Times, has_flag, samples},
    wire,
};
use anyhow::{Context, Result, ensure};
use futures::future::join_all;

const AT_ONCE: usize = 16;
/// Times what the processors need for the first half of them.
const AT_MOST: f64 = 1.3;
const MEMORY_MB: u32 = 256;
/// After a guest runs: it has done by then what a restore makes it do.
const AT_REST: Duration = Duration::from_millis(500);

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(burst())
}

async fn burst() -> Result<()> {
    let bound = AT_ONCE.to_string();
    let platform = Platform::start(Setup::qemu().with(&["--max-starting", &bound]))?;
    platform.await_default_template().await?;
    let processors = std::thread::available_parallelism()?.get();
    let each = processor_time(&platform, processors).await?;
    let mut medians = Times::default();
    for round in 0..samples(5) {
        medians.push(one_burst(&platform, round).await?);
    }
    let refused = past_the_bound(&platform).await?;
    platform.finish()?;
    let median = medians.quantile(0.5).as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "small counts")]
    let line = each.as_secs_f64() * (AT_ONCE as f64 + 1.0) / 2.0 / processors as f64;
    let ratio = median / line;
    let holds = ratio <= AT_MOST;
    #[expect(clippy::print_stdout, reason = "the output of a benchmark")]
    if has_flag("--json") {
        let line = serde_json::json!({
            "name": "burst", "at_once": AT_ONCE, "median_ms": median * 1000.0,
            "line_ms": line * 1000.0, "cpu_per_restore_ms": each.as_secs_f64() * 1000.0,
            "ratio": ratio, "bar": AT_MOST, "holds": holds,
            "refused_within_ms": refused.as_secs_f64() * 1000.0,
        });
        println!("{line}");
    } else {
        println!(
            "burst                    {AT_ONCE} at once, median {:.1} ms   line {:.1} ms ({:.1} ms of processor each)   ratio {ratio:5.3} (bar {AT_MOST:.2}); refused past the bound within {:.1} ms",
            median * 1000.0,
            line * 1000.0,
            each.as_secs_f64() * 1000.0,
            refused.as_secs_f64() * 1000.0,
        );
    }
    ensure!(holds || !has_flag("--enforce"), "burst: {ratio:.3} is past {AT_MOST}");
    Ok(())
}

/// Of one restore: of the platform and of its machine, while every processor has one to do, as in
/// the burst: processors that share caches are slower together. What a guest does just after it
/// runs is part of it, as it takes the processor from the next one.
async fn processor_time(platform: &Platform, processors: usize) -> Result<Duration> {
    let pid = platform.pid().context("it does not run")?.as_raw_pid();
    platform.create(&vm("first".into())).await?;
    platform.delete("first").await?;
    let mut times = Times::default();
    for round in 0..5 {
        let names: Vec<_> = (0..processors).map(|index| format!("cpu-{round}-{index}")).collect();
        let before = used(pid)?;
        let requests: Vec<_> = names.iter().cloned().map(vm).collect();
        for created in join_all(requests.iter().map(|vm| platform.create(vm))).await {
            created?;
        }
        tokio::time::sleep(AT_REST).await;
        let mut total = used(pid)?.saturating_sub(before);
        for machine in wire::processes_in(&platform.namespace()?)? {
            total += used(machine.as_raw_pid())?;
        }
        times.push(total / u32::try_from(processors)?);
        for deleted in join_all(names.iter().map(|name| platform.delete(name))).await {
            deleted?;
        }
    }
    Ok(times.quantile(0.5))
}

/// Processor time of a process and its threads, to the nanosecond.
fn used(pid: i32) -> Result<Duration> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        total += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(total))
}

async fn one_burst(platform: &Platform, round: usize) -> Result<Duration> {
    let names: Vec<String> = (0..AT_ONCE).map(|index| format!("burst-{round}-{index}")).collect();
    let start = Instant::now();
    let created = names.iter().map(async |name| -> Result<Duration> {
        platform.create(&vm(name.clone())).await?;
        Ok(start.elapsed())
    });
    let mut times = Times::default();
    for time in join_all(created).await {
        times.push(time?);
    }
    for deleted in join_all(names.iter().map(|name| platform.delete(name))).await {
        deleted?;
    }
    Ok(times.quantile(0.5))
}

/// More creates than may be under way: the rest are refused at once, typed, with a time to come
/// back. How long the slowest refusal took.
async fn past_the_bound(platform: &Platform) -> Result<Duration> {
    let requests: Vec<CreateVm> = (0..AT_ONCE * 2).map(|i| vm(format!("past-{i}"))).collect();
    let options = CallOptions::default();
    let answers = requests.iter().map(async |request| {
        let start = Instant::now();
        (platform.client().create_vm(request, &options).await, start.elapsed())
    });
    let (mut refused, mut slowest) = (0, Duration::ZERO);
    let mut made = Vec::new();
    for (answer, took) in join_all(answers).await {
        match answer {
            Ok(accepted) => made.push(accepted.vm_id().to_string()),
            Err(ClientError::Problem(problem)) => {
                ensure!(problem.code.as_str() == "too_many_vms", "{problem:?}");
                refused += 1;
                slowest = slowest.max(took);
            }
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(refused > 0, "nothing was refused past the bound");
    for vm in &made {
        platform.delete(vm).await?;
    }
    Ok(slowest)
}

fn vm(name: String) -> CreateVm {
    CreateVm { name: Some(name), memory_mb: Some(MEMORY_MB), ..CreateVm::default() }
}
