//! Snapshots, forks and kept memories of real guests: what a clone has of its source, and what it
//! must not have.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aether_api::{
    CreateSnapshot, CreateVm, ExecuteRequest, ForkVm, Forked, SnapshotView, StreamEvent, VmView,
    client::{CallOptions, ClientError, Waited},
};
use aether_tests::{
    Platform, Setup,
    platform::{can_run_guests, small_vm},
};
use aether_types::{ErrorCode, NetworkPolicy, StartKind, VmState};
use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;

const LONG: Duration = Duration::from_mins(4);

async fn sh(platform: &Platform, vm: &str, script: &str) -> Result<String> {
    let execution = platform.execute(vm, &["/bin/bash", "-c", script]).await?;
    let (code, error) = (execution.exit_code, execution.stderr.unwrap_or_default());
    ensure!(code == Some(0), "{script} in {vm}: {code:?} {error}");
    Ok(execution.stdout.unwrap_or_default())
}

async fn fork(platform: &Platform, vm: &str, request: &ForkVm) -> Result<Forked> {
    match platform.client().fork_vm(vm, request, &CallOptions::waiting(LONG)).await? {
        Waited::Done(forked) => Ok(forked),
        Waited::Accepted(accepted) => anyhow::bail!("the fork is not done in time: {accepted:?}"),
    }
}

async fn snapshot(platform: &Platform, vm: &str, name: &str) -> Result<SnapshotView> {
    let request = CreateSnapshot { name: Some(name.to_owned()) };
    match platform.client().create_snapshot(vm, &request, &CallOptions::waiting(LONG)).await? {
        Waited::Done(snapshot) => Ok(snapshot),
        Waited::Accepted(accepted) => anyhow::bail!("no snapshot in time: {accepted:?}"),
    }
}

fn from_snapshot(name: &str, snapshot: &str) -> CreateVm {
    CreateVm {
        name: Some(name.to_owned()),
        snapshot: Some(snapshot.to_owned()),
        ..CreateVm::default()
    }
}

/// Seconds since 1970 by the host's clock.
fn host_time() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?)
}

async fn ensure_clock(platform: &Platform, vm: &str) -> Result<()> {
    let before = host_time()?;
    let guest: i64 = sh(platform, vm, "date +%s").await?.trim().parse()?;
    let after = host_time()?;
    ensure!((before - 1..=after + 1).contains(&guest), "{vm}: {guest}, not {before} to {after}");
    Ok(())
}

/// Everything by which a guest is told from another.
const IDENTITY: &str = "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; \
     cat /proc/sys/kernel/random/uuid /etc/machine-id /etc/hostname \
     /sys/class/net/eth0/address /proc/sys/kernel/random/boot_id; \
     ip -o -4 address show dev eth0 | tr -s ' ' | cut -d' ' -f4";

#[tokio::test]
async fn fifty_clones_share_no_randomness_and_no_identity() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    platform.await_default_template().await?;
    let mut request = small_vm("source");
    request.env = [("SECRET".to_owned(), "of-the-source".to_owned())].into();
    platform.create(&request).await?;
    let mut clones = Vec::new();
    for round in 0..5 {
        let request = ForkVm {
            count: Some(10),
            name_prefix: Some(format!("clone{round}")),
            env: Some([("SECRET".to_owned(), format!("of-{round}"))].into()),
            ..ForkVm::default()
        };
        clones.extend(fork(&platform, "source", &request).await?.vms);
    }
    ensure!(clones.len() == 50, "{} clones", clones.len());
    let names = ["source".to_owned()].into_iter().chain(clones.iter().map(|vm| vm.name.clone()));
    let names: Vec<String> = names.collect();
    let answers = names.iter().map(|name| sh(&platform, name, IDENTITY));
    let answers = try_join_all(answers).await?;
    let lines: Vec<Vec<&str>> = answers.iter().map(|answer| answer.lines().collect()).collect();
    // The boot id is the kernel's, which did not boot again; the agent's own is not seen here.
    let kinds =
        ["random bytes", "uuid", "machine id", "host name", "MAC", "kernel's boot id", "address"];
    for (index, kind) in kinds.into_iter().enumerate() {
        let values: BTreeSet<&str> =
            lines.iter().filter_map(|lines| lines.get(index)).copied().collect();
        let expected = if kind == "kernel's boot id" { 1 } else { names.len() };
        ensure!(values.len() == expected, "{kind}: {} values of {expected}", values.len());
    }
    for (name, lines) in names.iter().zip(&lines) {
        ensure!(lines.get(3) == Some(&name.as_str()), "{name} is called {:?}", lines.get(3));
    }
    for name in ["clone0-1", "clone4-10"] {
        let round = &name[5..6];
        let env = sh(&platform, name, "printf %s \"$SECRET\"").await?;
        ensure!(env == format!("of-{round}"), "{name} has the environment {env}");
    }
    ensure!(sh(&platform, "source", "printf %s \"$SECRET\"").await? == "of-the-source");
    // No clone and not the source has the other's word in any environment of a process.
    let found =
        sh(&platform, "clone0-1", "cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'").await?;
    ensure!(!found.contains("of-the-source"), "the clone knows the source's secret");
    try_join_all(names.iter().map(|name| platform.delete(name))).await?;
    platform.finish()
}

#[tokio::test]
async fn a_fork_goes_on_with_memory_and_disk_and_the_source_never_notices() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    platform.await_default_template().await?;
    let server = TcpListener::bind((platform.host_address()?, 0))?;
    let address = server.local_addr()?;
    let mut request = small_vm("source");
    let rule = format!("{address}").parse()?;
    request.network = Some(NetworkPolicy { allow: vec![rule], ..NetworkPolicy::default() });
    platform.create(&request).await?;
    // A process that counts, and a connection that stays open.
    let script = format!(
        "exec 3<>/dev/tcp/{}/{}; echo up; n=0; while read -r -t 0.05 x <&3 || true; do \
         n=$((n + 1)); echo $n > /root/count; \
         [ -n \"$x\" ] && {{ all=$all$x; echo \"got $all\" > /root/got; }}; x=; done",
        address.ip(),
        address.port()
    );
    let counter = ExecuteRequest {
        command: "/bin/bash".into(),
        args: vec!["-c".into(), script],
        ..ExecuteRequest::default()
    };
    let mut counting = platform.client().execute_stream("source", &counter, None).await?;
    while !matches!(counting.next().await?, Some(StreamEvent::Stdout { .. })) {}
    let (mut connection, _) = server.accept()?;
    sh(&platform, "source", "echo before > /root/file; until [ -s /root/count ]; do :; done")
        .await?;

    let options = ForkVm { count: Some(2), name_prefix: Some("c".into()), ..ForkVm::default() };
    let forked = fork(&platform, "source", &options).await?;
    let paused = forked.paused_ms.context("the pause was not measured")?;
    ensure!(paused > 0.0 && paused < 2000.0, "the source stood still for {paused} ms");
    ensure!(forked.vms.iter().all(|vm| vm.state == VmState::Running), "{forked:?}");
    let started = |vm: &VmView| vm.start.as_ref().map(|start| start.kind);
    ensure!(forked.vms.iter().all(|vm| started(vm) == Some(StartKind::Restore)), "{forked:?}");

    // Both count on, each for itself.
    // The file is empty for a moment whenever it is written.
    let advances = "a=; while [ -z \"$a\" ]; do a=$(cat /root/count); done; \
         for i in $(seq 200); do b=$(cat /root/count); \
         [ -n \"$b\" ] && [ \"$b\" -gt \"$a\" ] && exit 0; read -r -t 0.05 < <(:) || true; done; exit 1";
    for name in ["source", "c-1", "c-2"] {
        sh(&platform, name, advances).await.with_context(|| format!("{name} counts no more"))?;
        ensure!(sh(&platform, name, "cat /root/file").await? == "before\n");
    }
    sh(&platform, "c-1", "echo clone > /root/file").await?;
    sh(&platform, "source", "echo source > /root/file").await?;
    ensure!(sh(&platform, "c-1", "cat /root/file").await? == "clone\n");
    ensure!(sh(&platform, "c-2", "cat /root/file").await? == "before\n");

    // The connection is the source's; the clones have none.
    connection.write_all(b"word\n")?;
    let got = "for i in $(seq 200); do grep -q 'got word' /root/got 2>/dev/null && exit 0; \
         read -r -t 0.05 < <(:) || true; done; exit 1";
    sh(&platform, "source", got).await.context("the source lost its connection")?;
    for clone in ["c-1", "c-2"] {
        ensure!(sh(&platform, clone, "cat /root/got 2>/dev/null; true").await?.is_empty());
        let tcp =
            sh(&platform, clone, "cat /proc/net/tcp | tail -n +2 | tr -s ' ' | cut -d' ' -f4,5")
                .await?;
        let open: Vec<&str> = tcp.lines().filter(|line| line.ends_with(" 01")).collect();
        ensure!(open.is_empty(), "{clone} still has {open:?}");
    }
    connection.set_nonblocking(true)?;
    let mut word = [0; 1];
    let read = connection.read(&mut word);
    ensure!(
        read.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock),
        "the clones disturbed the source's connection: {read:?}"
    );
    drop(counting);
    for name in ["source", "c-1", "c-2"] {
        platform.delete(name).await?;
    }
    platform.finish()
}

#[tokio::test]
async fn the_clock_is_right_after_a_restore_an_hour_old() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    platform.await_default_template().await?;
    platform.create(&small_vm("old")).await?;
    // The snapshot of a guest whose clock is an hour back is one that is an hour old.
    sh(&platform, "old", "date -s \"@$(($(date +%s) - 3600))\"").await?;
    let taken = snapshot(&platform, "old", "hour").await?;
    ensure!(taken.digest.is_some() && taken.size_bytes.is_some_and(|size| size > 0), "{taken:?}");
    let clone = platform.create(&from_snapshot("young", "hour")).await?;
    ensure!(clone.start.as_ref().is_some_and(|s| s.kind == StartKind::Restore), "{clone:?}");
    ensure_clock(&platform, "young").await?;

    // The same after a pause, and after a stop that kept the memory.
    sh(&platform, "young", "date -s \"@$(($(date +%s) - 3600))\"").await?;
    let waiting = CallOptions::waiting(LONG);
    platform.client().pause_vm("young", &waiting).await?;
    platform.client().resume_vm("young", &waiting).await?;
    ensure_clock(&platform, "young").await?;
    sh(&platform, "young", "(while :; do sleep 1000; done) >/dev/null 2>&1 & echo $! > /run/pid")
        .await?;
    sh(&platform, "young", "date -s \"@$(($(date +%s) - 3600))\"").await?;
    let Waited::Done(stopped) = platform.client().suspend_vm("young", &waiting).await? else {
        anyhow::bail!("not stopped in time");
    };
    ensure!(stopped.state == VmState::Stopped && stopped.memory_kept, "{stopped:?}");
    let Waited::Done(started) = platform.client().start_vm("young", &waiting).await? else {
        anyhow::bail!("not started in time");
    };
    ensure!(started.start.as_ref().is_some_and(|s| s.kind == StartKind::Restore), "{started:?}");
    ensure!(!started.memory_kept, "{started:?}");
    ensure_clock(&platform, "young").await?;
    sh(&platform, "young", "kill -0 $(cat /run/pid)").await.context("its process is gone")?;
    // A stop without it begins anew.
    platform.client().stop_vm("young", &waiting).await?;
    let Waited::Done(started) = platform.client().start_vm("young", &waiting).await? else {
        anyhow::bail!("not started in time");
    };
    ensure!(started.start.as_ref().is_some_and(|s| s.kind == StartKind::Boot), "{started:?}");
    for name in ["old", "young"] {
        platform.delete(name).await?;
    }
    platform.client().delete_snapshot("hour").await?;
    platform.finish()
}

/// The phases of a start sum to its whole.
fn ensure_phases(vm: &VmView) -> Result<()> {
    let start = vm.start.as_ref().with_context(|| format!("{}: no report", vm.name))?;
    let sum: f64 = start.phases.iter().map(|phase| phase.ms).sum();
    ensure!((sum - start.total_ms).abs() < 0.01, "{start:?}");
    ensure!(start.phases.len() > 2, "{start:?}");
    Ok(())
}

#[tokio::test]
async fn a_damaged_or_foreign_snapshot_is_named_and_never_booted() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let mut platform = Platform::start(Setup::qemu())?;
    platform.await_default_template().await?;
    ensure_phases(&platform.create(&small_vm("source")).await?)?;
    let taken = snapshot(&platform, "source", "whole").await?;
    ensure_phases(&platform.create(&from_snapshot("good", "whole")).await?)?;

    let entry = platform.data_dir().join("snapshots/entries").join(taken.id.to_string());
    let mut files: Vec<PathBuf> =
        fs::read_dir(&entry)?.map(|file| Ok(file?.path())).collect::<Result<_>>()?;
    files.sort();
    ensure!(files.len() >= 4, "{files:?}");
    for (index, file) in files.iter().enumerate() {
        let damage = Damage::to(file)?;
        let name = format!("bad-{index}");
        let refused = platform.create(&from_snapshot(&name, "whole")).await;
        let Err(error) = refused else {
            anyhow::bail!("{} is damaged and was booted", file.display())
        };
        let problem = match error.downcast_ref::<ClientError>() {
            Some(ClientError::Problem(problem)) => problem.clone(),
            _ => return Err(error),
        };
        ensure!(problem.error_code() == Some(ErrorCode::SnapshotDamaged), "{problem:?}");
        let short = file.file_name().context("a name")?.to_string_lossy();
        ensure!(problem.detail.contains(&*short), "{problem:?} does not name {short}");
        ensure!(!problem.detail.contains(&*platform.data_dir().to_string_lossy()), "{problem:?}");
        platform.delete(&name).await?;
        damage.mend()?;
    }
    ensure_phases(&platform.create(&from_snapshot("again", "whole")).await?)?;
    // After a restart nothing is believed that was checked before it.
    let damage = Damage::to(files.last().context("a file")?)?;
    platform.terminate()?;
    platform.restart()?;
    ensure!(platform.create(&from_snapshot("late", "whole")).await.is_err());
    damage.mend()?;
    // The clones have what they need of it.
    platform.client().delete_snapshot("whole").await?;
    let options = CallOptions::waiting(LONG);
    for name in ["good", "again"] {
        platform.client().start_vm(name, &options).await?;
        ensure!(sh(&platform, name, "echo lives").await? == "lives\n");
    }
    for name in ["source", "good", "again", "late"] {
        platform.delete(name).await?;
    }
    platform.finish()
}

/// A byte of a file changed, for as long as it is wanted.
struct Damage {
    file: fs::File,
    at: u64,
    byte: u8,
}

impl Damage {
    /// In the first byte that is not a hole.
    fn to(path: &std::path::Path) -> Result<Self> {
        let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
        let at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0))?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 1], at)?;
        Ok(Self { file, at, byte: byte[0] })
    }

    fn mend(self) -> Result<()> {
        Ok(self.file.write_all_at(&[self.byte], self.at)?)
    }
}
