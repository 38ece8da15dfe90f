//! Commands in a real guest, through the whole platform.

use std::time::{Duration, Instant};

use aether_api::{
    ExecuteRequest, LogEvent, QueryLogs, StreamEvent,
    client::{CallOptions, LogsFrom, PageQuery, WriteOptions},
};
use aether_tests::{
    Platform, Setup,
    platform::{can_run_guests, small_vm},
};
use aether_types::{ErrorCode, ExecutionState, LogStream, PreciseTime, VmState};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use futures::future::try_join_all;

fn shell(script: &str) -> ExecuteRequest {
    ExecuteRequest {
        command: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        ..ExecuteRequest::default()
    }
}

#[tokio::test]
async fn commands_do_what_their_users_expect() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    let mut request = small_vm("exec");
    request.disk_mb = Some(64);
    request.env.insert("GREETING".into(), "hello".into());
    let vm = platform.create(&request).await?.id.to_string();

    exit_codes(&platform, &vm).await?;
    surroundings(&platform, &vm).await?;
    binary_output_survives(&platform, &vm).await?;
    many_at_once(&platform, &vm).await?;
    a_stalled_reader_holds_back_only_its_own(&platform, &vm).await?;
    a_full_disk_is_said(&platform, &vm).await?;
    let page = platform.client().executions(&vm, &PageQuery::default()).await?;
    ensure!(page.items.len() >= 50, "the history is short: {}", page.items.len());

    platform.delete(&vm).await?;
    platform.finish()
}

async fn exit_codes(platform: &Platform, vm: &str) -> Result<()> {
    let execution = platform.execute_request(vm, &shell("echo out; echo err >&2; exit 3")).await?;
    ensure!(execution.status == ExecutionState::Completed && execution.exit_code == Some(3));
    ensure!(execution.stdout.as_deref() == Some("out\n"), "{execution:?}");
    ensure!(execution.stderr.as_deref() == Some("err\n"), "{execution:?}");
    let task = platform.client().task(execution.task_id, None).await?;
    ensure!(task.attempts == 1, "a command that exits with 3 was run again");
    let missing = platform.execute(vm, &["no-such-program"]).await?;
    ensure!(missing.exit_code == Some(127), "{missing:?}");
    let denied = platform.execute(vm, &["/etc/passwd"]).await?;
    ensure!(denied.exit_code == Some(126), "{denied:?}");
    let killed = platform.execute_request(vm, &shell("kill -9 $$")).await?;
    ensure!(killed.signal == Some(9), "{killed:?}");
    let request = ExecuteRequest { timeout_s: Some(1), ..shell("sleep 100") };
    let overdue = platform.execute_request(vm, &request).await?;
    let code = overdue.error.map(|fault| fault.code);
    ensure!(code == Some(ErrorCode::ExecutionTimeout), "{code:?}");
    Ok(())
}

async fn surroundings(platform: &Platform, vm: &str) -> Result<()> {
    let request = ExecuteRequest {
        user: Some("user".into()),
        cwd: Some("/tmp".into()),
        stdin: Some("fed".into()),
        env: [("OWN".to_owned(), "own".to_owned())].into(),
        ..shell("id -un; pwd; echo $GREETING $OWN; cat; hostname")
    };
    let execution = platform.execute_request(vm, &request).await?;
    let expected = "user\n/tmp\nhello own\nfedexec\n";
    ensure!(execution.stdout.as_deref() == Some(expected), "{execution:?}");
    // The clock is the host's, and the generator of random numbers is seeded.
    let execution = platform
        .execute_request(vm, &shell("date +%s; head -c 8 /dev/urandom | od -An -tx8"))
        .await?;
    let stdout = execution.stdout.unwrap_or_default();
    let guest: u64 = stdout.lines().next().context("no time")?.parse()?;
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    ensure!(host.abs_diff(guest) <= 5, "the guest's clock is {guest}, the host's {host}");
    Ok(())
}

/// 100 MB through a stream: whole, in order, and the platform's memory stays small.
async fn binary_output_survives(platform: &Platform, vm: &str) -> Result<()> {
    const BYTES: u64 = 100_000_000;
    // Every byte value, and a length that fits no buffer.
    let script = format!(
        "seq 0 255 | awk '{{printf \"%c\", $1}}' > /dev/null; \
         yes '0123456789abcdef\u{1}\u{7f}' | head -c {BYTES}"
    );
    let before = resident_kib(platform)?;
    let mut follow = platform.client().execute_stream(vm, &shell(&script), None).await?;
    let pattern = "0123456789abcdef\u{1}\u{7f}\n".as_bytes();
    let (mut received, mut most) = (0_usize, 0);
    let mut ended = false;
    while let Some(event) = follow.next().await? {
        match event {
            StreamEvent::Stdout { data } => {
                for (at, byte) in data.iter().enumerate() {
                    ensure!(*byte == pattern[(received + at) % pattern.len()], "at {received}");
                }
                received += data.len();
                if received % (16 * 1024 * 1024) < data.len() {
                    most = most.max(resident_kib(platform)?);
                }
            }
            StreamEvent::End(end) => {
                ensure!(end.status == ExecutionState::Completed, "{end:?}");
                ended = true;
            }
            _ => {}
        }
    }
    ensure!(ended && received as u64 == BYTES, "{received} bytes came");
    ensure!(most < before + 32 * 1024, "memory grew from {before} to {most} KiB");
    let raw = platform.execute_request(vm, &shell("printf '\\000\\377\\200'")).await?;
    ensure!(raw.stdout_base64.as_deref() == Some("AP+A"), "{raw:?}");
    Ok(())
}

fn resident_kib(platform: &Platform) -> Result<u64> {
    let pid = platform.pid().context("it runs")?.as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("no value")?.parse()?)
}

async fn many_at_once(platform: &Platform, vm: &str) -> Result<()> {
    let commands = (0..64).map(|n| async move {
        let execution = platform.execute_request(vm, &shell(&format!("sleep 1; echo {n}"))).await?;
        ensure!(execution.stdout.as_deref() == Some(&*format!("{n}\n")), "{execution:?}");
        Ok(())
    });
    try_join_all(commands).await?;
    Ok(())
}

async fn a_stalled_reader_holds_back_only_its_own(platform: &Platform, vm: &str) -> Result<()> {
    let request = shell("yes stalled | head -c 50000000; echo end >&2");
    let mut stalled = platform.client().execute_stream(vm, &request, None).await?;
    while !matches!(stalled.next().await?, Some(StreamEvent::Stdout { .. })) {}
    // It is not read any more, and the next one is not touched by that.
    let other = platform.execute(vm, &["echo", "free"]).await?;
    ensure!(other.stdout.as_deref() == Some("free\n"));
    let mut bytes = 0;
    while let Some(event) = stalled.next().await? {
        if let StreamEvent::Stdout { data } = event {
            bytes += data.len();
        }
    }
    ensure!(bytes > 40_000_000, "what was held back came: {bytes}");
    Ok(())
}

async fn a_full_disk_is_said(platform: &Platform, vm: &str) -> Result<()> {
    let fill = platform.execute_request(vm, &shell("head -c 200M /dev/zero > /root/fill")).await?;
    ensure!(fill.exit_code != Some(0), "{fill:?}");
    ensure!(fill.stderr.as_deref().unwrap_or_default().contains("No space"), "{fill:?}");
    let body = futures::stream::iter(
        (0..64).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![1; 1024 * 1024]))),
    );
    let refused =
        platform.client().write_file(vm, "/root/more", &WriteOptions::default(), body).await;
    ensure!(refused.as_ref().is_err_and(|e| e.code() == Some(ErrorCode::NoSpace)), "{refused:?}");
    let cleared = platform.execute(vm, &["rm", "/root/fill"]).await?;
    ensure!(cleared.exit_code == Some(0), "{cleared:?}");
    Ok(())
}

/// What carries a command ends: the command ends within two seconds, and says which it was.
#[tokio::test]
async fn a_command_ends_with_the_reason_of_what_carried_it() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    let cases = [
        ("panics", ErrorCode::GuestPanic, VmState::Failed),
        ("agent", ErrorCode::GuestAgentLost, VmState::Running),
        ("vmm", ErrorCode::VmmExited, VmState::Failed),
    ];
    for (name, code, state) in cases {
        let vm = platform.create(&small_vm(name)).await?.id.to_string();
        let request = shell("echo begun; sleep 1000");
        let mut follow = platform.client().execute_stream(&vm, &request, None).await?;
        while !matches!(follow.next().await?, Some(StreamEvent::Stdout { .. })) {}
        let no_wait = CallOptions::default();
        match name {
            "panics" => {
                let request = shell("echo c > /proc/sysrq-trigger");
                platform.client().execute(&vm, &request, &no_wait).await?;
            }
            "agent" => {
                // The agent proper is the child of process 1 that is called like it.
                let request = shell("kill -9 $(pgrep -P 1 | head -n 1)");
                platform.client().execute(&vm, &request, &no_wait).await?;
            }
            _ => kill_vmm(&platform)?,
        }
        let event = Instant::now();
        let end = loop {
            let event = follow.next().await?.context("the stream ended without an end")?;
            if let StreamEvent::End(end) = event {
                break end;
            }
        };
        let found = end.error.clone().map(|fault| fault.code);
        ensure!(found == Some(code), "{name}: {end:?}\n{}", platform.log());
        // The panic's own command has to be started first; the bar is two seconds from the event.
        ensure!(event.elapsed() < Duration::from_secs(4), "{name}: {:?}", event.elapsed());
        let now = platform.client().vm(&vm).await?;
        ensure!(now.state == state, "{name}: {now:?}");
        if code == ErrorCode::GuestPanic {
            panic_is_logged(&platform, &vm).await?;
        }
        if state == VmState::Running {
            let after = platform.execute(&vm, &["echo", "alive"]).await?;
            ensure!(after.exit_code == Some(0), "{after:?}");
        }
        platform.delete(&vm).await?;
    }
    platform.finish()
}

/// What the console showed last is among the VM's log lines.
async fn panic_is_logged(platform: &Platform, vm: &str) -> Result<()> {
    let filter = QueryLogs {
        vm_id: Some(vm.to_owned()),
        text: Some("Kernel panic".to_owned()),
        ..QueryLogs::default()
    };
    let start = LogsFrom::Time(PreciseTime::from_unix_ns(0));
    let mut lines = platform.client().follow_logs(&filter, start).await?;
    let line = tokio::time::timeout(Duration::from_secs(10), lines.next()).await??;
    let Some(LogEvent::Entry(entry)) = line else { bail!("no line: {line:?}") };
    ensure!(entry.stream == LogStream::Console, "{entry:?}");
    Ok(())
}

/// The VMM of the only VM.
fn kill_vmm(platform: &Platform) -> Result<()> {
    let pids = aether_tests::wire::processes_in(&platform.namespace()?)?;
    ensure!(pids.len() == 1, "{pids:?}");
    for pid in pids {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    Ok(())
}
