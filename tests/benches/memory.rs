//! What the platform adds to a VM's memory: restored VMs that have run one command and are idle,
//! with their share of the platform's own process, against bare clones that have run the same, as
//! proportional set size.

use std::fs;

use aether_api::CreateVm;
use aether_tests::{
    Platform, Setup,
    bare::{Bare, From},
    measure::{has_flag, samples},
    wire,
};
use anyhow::{Context, Result, ensure};

const MEMORY_MB: u32 = 256;
const COMMAND: &[&str] = &["/bin/sh", "-c", "echo ready"];
const ADDS_KIB: i64 = 1536;

fn main() -> Result<()> {
    let count = samples(8);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ours = runtime.block_on(ours(count))?;
    let bare = bare(count)?;
    let adds = (ours.machines + ours.platform - bare) / i64::try_from(count)?;
    let holds = adds <= ADDS_KIB;
    let each = |total: i64| total / i64::try_from(count).unwrap_or(1);
    #[expect(clippy::print_stdout, reason = "the output of a benchmark")]
    if has_flag("--json") {
        let line = serde_json::json!({
            "name": "memory", "machines": count, "ours_kib": each(ours.machines),
            "platform_kib": each(ours.platform), "bare_kib": each(bare), "adds_kib": adds,
            "bar_kib": ADDS_KIB, "holds": holds,
        });
        println!("{line}");
    } else {
        println!(
            "memory                   ours {} KiB + {} KiB of the platform   bare {} KiB   adds {adds} KiB (bar {ADDS_KIB}, {count} VMs)",
            each(ours.machines),
            each(ours.platform),
            each(bare),
        );
    }
    ensure!(holds || !has_flag("--enforce"), "a VM costs {adds} KiB more than a bare one");
    Ok(())
}

/// Of all machines together, in KiB.
struct Ours {
    machines: i64,
    /// What the platform's process grew by.
    platform: i64,
}

async fn ours(count: usize) -> Result<Ours> {
    let platform = Platform::start(Setup::qemu())?;
    platform.await_default_template().await?;
    let pid = platform.pid().context("it does not run")?.as_raw_pid();
    // The first restore loads the template's memory, which belongs to all.
    run_one(&platform, "first").await?;
    platform.delete("first").await?;
    let before = pss_kib(pid)?;
    for index in 0..count {
        run_one(&platform, &format!("memory-{index}")).await?;
    }
    let grown = pss_kib(pid)? - before;
    let machines = wire::processes_in(&platform.namespace()?)?;
    ensure!(machines.len() == count, "{} machines, not {count}", machines.len());
    let sizes: Result<Vec<i64>> = machines.iter().map(|pid| pss_kib(pid.as_raw_pid())).collect();
    let machines = sizes?.iter().sum();
    for index in 0..count {
        platform.delete(&format!("memory-{index}")).await?;
    }
    platform.finish()?;
    Ok(Ours { machines, platform: grown })
}

async fn run_one(platform: &Platform, name: &str) -> Result<()> {
    let request =
        CreateVm { name: Some(name.to_owned()), memory_mb: Some(MEMORY_MB), ..CreateVm::default() };
    platform.create(&request).await?;
    let execution = platform.execute(name, COMMAND).await?;
    ensure!(execution.stdout.as_deref() == Some("ready\n"), "{execution:?}");
    Ok(())
}

fn bare(count: usize) -> Result<i64> {
    let bare = Bare::new(MEMORY_MB, count)?;
    bare.make_snapshot()?;
    let mut machines = Vec::new();
    for slot in 0..count {
        bare.prepare(From::Snapshot, slot)?;
        machines.push(bare.restore(slot)?);
        bare.command_output(slot, COMMAND)?;
    }
    let sizes: Result<Vec<i64>> =
        machines.iter().map(|machine| pss_kib(machine.pid().cast_signed())).collect();
    Ok(sizes?.iter().sum())
}

fn pss_kib(pid: i32) -> Result<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}
