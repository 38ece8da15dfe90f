//! The contract on simulated machines, and what only they can be told to do.

use std::{sync::Arc, time::Duration};

use aether_drivers::{
    AfterSnapshot, Driver, DriverError, ExitReason, MachineSpec, SnapshotDisk, SnapshotFiles,
    Start,
    sim::{ManualClock, SimClock, SimConfig, SimDriver, SimHost, SimLatency},
};
use aether_protocol::{
    AGENT_PORT, Attach, Cause, Configure, EnvVar, Environment, ErrorCode, ExitStatus, Run,
    RunState, RunSummary, Token, WriteFile, host,
};
use bytes::Bytes;

use crate::{
    rig::{Kind, Rig, Vm, run_on},
    snapshots, suite,
};

const SOON: Duration = Duration::from_secs(5);

async fn rig() -> Rig {
    Rig::open(Kind::Sim).await.unwrap()
}

#[tokio::test]
async fn lifecycle() {
    suite::lifecycle(rig().await).await;
}

#[tokio::test]
async fn delete_from_every_state() {
    suite::delete_from_every_state(rig().await).await;
}

#[tokio::test]
async fn exit_reasons() {
    suite::exit_reasons(rig().await).await;
}

#[tokio::test]
async fn adoption() {
    suite::adoption(rig().await).await;
}

#[tokio::test]
async fn faults() {
    suite::faults(rig().await).await;
}

#[tokio::test]
async fn snapshot_clones() {
    snapshots::clones(rig().await, snapshots::clone_count(Kind::Sim)).await;
}

#[tokio::test]
async fn snapshot_generations() {
    snapshots::generations(rig().await).await;
}

#[tokio::test]
async fn snapshot_suspension() {
    snapshots::suspension(rig().await).await;
}

#[tokio::test]
async fn snapshot_refusals() {
    snapshots::refusals(rig().await).await;
}

#[tokio::test]
async fn snapshot_claims() {
    snapshots::claims(rig().await).await;
}

#[tokio::test]
async fn snapshot_faults() {
    snapshots::faults(rig().await, |_| true).await;
}

#[tokio::test]
async fn start_is_bounded() {
    suite::start_is_bounded(rig().await).await;
}

#[tokio::test]
async fn channel() {
    suite::channel(rig().await, 16, 64).await;
}

/// A simulated host with one VM that runs.
struct One {
    host: Arc<SimHost>,
    driver: SimDriver,
    vm: Vm,
}

async fn one(config: SimConfig) -> One {
    let host = SimHost::new(config);
    let driver = SimDriver::new(Arc::clone(&host));
    let spec = rig().await.spec();
    let vm = Vm { id: spec.id, token: Token::from_hex(&spec.token).unwrap() };
    driver.create(spec).await.unwrap();
    driver.start(vm.id, Start::Boot, SOON).await.unwrap();
    One { host, driver, vm }
}

impl One {
    async fn connect(&self) -> host::BoxStream {
        self.driver.connect(self.vm.id, AGENT_PORT, SOON).await.unwrap()
    }

    async fn run(&self, run: Run) -> host::RunSession {
        host::run(self.connect().await, &self.vm.token, run, SOON).await.unwrap()
    }
}

fn command(line: &str) -> Run {
    let mut words = line.split(' ').map(str::to_owned);
    Run { command: words.next().unwrap(), args: words.collect(), ..Run::default() }
}

async fn end(session: &mut host::RunSession) -> aether_protocol::Exited {
    loop {
        if let host::RunEvent::Exited(exited) = session.next().await.unwrap() {
            return exited;
        }
    }
}

#[tokio::test]
async fn commands_end_as_in_a_real_guest() {
    let one = one(SimConfig::default()).await;
    for (line, code) in [("true", 0), ("false", 1), ("exit 7", 7), ("no-such-thing", 127)] {
        let (_, exited) = run_on(one.connect().await, &one.vm, command(line), SOON).await;
        assert_eq!(exited.status(), ExitStatus::Code(code), "{line}");
    }
    let spew = run_on(one.connect().await, &one.vm, command("spew 1000000"), SOON).await;
    assert_eq!((spew.0.len(), spew.1.stdout_bytes), (1_000_000, 1_000_000));

    let mut session = one.run(Run { timeout_ms: 20, ..command("sleep 100") }).await;
    let exited = end(&mut session).await;
    assert_eq!((exited.signal, exited.cause()), (Some(15), Cause::TimedOut));

    let mut session = one.run(command("sleep infinity")).await;
    session.input().cancel().await.unwrap();
    assert_eq!(end(&mut session).await.cause(), Cause::Cancelled);

    let mut session = one.run(command("yes")).await;
    session.input().signal(9).await.unwrap();
    assert_eq!(end(&mut session).await.signal, Some(9));

    let wrong = Token::from_bytes([1; 32]);
    let refused = host::ping(one.connect().await, &wrong, SOON).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::Unauthorized));
}

#[tokio::test]
async fn standard_input_comes_back_whole() {
    let one = one(SimConfig::default()).await;
    let session = one.run(Run { stdin: true, ..command("cat") }).await;
    let (mut input, mut output) = session.split();
    let data: Vec<u8> = (0..3_000_000_u32).map(|i| u8::try_from(i % 256).unwrap()).collect();
    let sent = Bytes::from(data.clone());
    let writing = tokio::spawn(async move {
        input.stdin(sent).await.unwrap();
        input.stdin_eof().await.unwrap();
        input
    });
    let mut back = Vec::new();
    while let host::RunEvent::Output { data, .. } = output.next().await.unwrap() {
        back.extend_from_slice(&data);
    }
    assert!(back == data);
    writing.await.unwrap();
}

#[tokio::test]
async fn a_detached_run_outlives_its_connection_and_others_do_not() {
    let one = one(SimConfig::default()).await;
    let script = "echo before; sleep 0.05; echo after; exit 4";
    let run = Run {
        run_id: "r".to_owned(),
        detached: true,
        command: "sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        ..Run::default()
    };
    drop(one.run(run).await);
    let attach = Attach { run_id: "r".to_owned(), ..Attach::default() };
    let mut session = host::attach(one.connect().await, &one.vm.token, attach, SOON).await.unwrap();
    let exited = end(&mut session).await;
    assert_eq!((exited.exit_code, exited.stdout_bytes), (Some(4), 13));
    let forget = aether_protocol::Forget { run_id: "r".to_owned() };
    host::forget(one.connect().await, &one.vm.token, forget, SOON).await.unwrap();

    drop(one.run(Run { run_id: "s".to_owned(), ..command("sleep infinity") }).await);
    loop {
        let runs = host::list_runs(one.connect().await, &one.vm.token, SOON).await.unwrap();
        if runs.runs.iter().all(|run| run.state() == aether_protocol::RunState::Exited) {
            break;
        }
    }
}

#[tokio::test]
async fn faults_are_seen_by_who_is_connected() {
    let one = one(SimConfig::default()).await;
    let id = one.vm.id;
    let mut session = one.run(command("sleep infinity")).await;
    one.host.kill_agent(id);
    assert!(session.next().await.unwrap_err().is_connection_lost());
    let refused = one.driver.connect(id, AGENT_PORT, SOON).await.map(drop);
    assert!(matches!(refused, Err(DriverError::ConnectRefused { .. })));

    one.driver.kill(id).await.unwrap();
    one.driver.start(id, Start::Boot, SOON).await.unwrap();
    one.host.set_reachable(id, false);
    let limit = Duration::from_millis(20);
    let silent = one.driver.connect(id, AGENT_PORT, limit).await.map(drop);
    assert!(matches!(silent, Err(DriverError::ConnectTimeout { .. })));
    one.host.set_reachable(id, true);

    one.host.set_disk_full(id, true);
    let request = WriteFile { path: "/root/x".to_owned(), ..WriteFile::default() };
    let mut writer =
        host::write_file(one.connect().await, &one.vm.token, request, SOON).await.unwrap();
    writer.write(Bytes::from_static(b"data")).await.unwrap();
    let full = writer.finish().await.unwrap_err();
    assert_eq!(full.code(), Some(ErrorCode::NoSpace));

    let mut session = one.run(command("sleep infinity")).await;
    one.host.panic_guest(id);
    assert!(session.next().await.unwrap_err().is_connection_lost());
    assert_eq!(one.driver.exited(id).await.unwrap(), ExitReason::GuestPanic);
    assert!(one.driver.last_words(id).await.contains("Kernel panic"));
}

#[tokio::test]
async fn configuration_reaches_commands() {
    let one = one(SimConfig::default()).await;
    let configure = Configure {
        hostname: Some("web-1".to_owned()),
        env: Some(Environment { vars: vec![EnvVar::new("GREETING", "hi")] }),
        ..Configure::default()
    };
    host::configure(one.connect().await, &one.vm.token, configure, SOON).await.unwrap();
    let run = Run {
        command: "sh".to_owned(),
        args: vec!["-c".to_owned(), "echo $GREETING $NAME; hostname".to_owned()],
        env: vec![EnvVar::new("NAME", "you")],
        ..Run::default()
    };
    let (out, _) = run_on(one.connect().await, &one.vm, run, SOON).await;
    assert_eq!(out, b"hi you\nweb-1\n");
}

/// A clone on another host, from the files alone.
#[tokio::test]
async fn programs_go_on_in_a_clone_and_do_nothing_twice() {
    let one = one(SimConfig::default()).await;
    let run = |id: &str, script: &str, detached: bool| Run {
        run_id: id.to_owned(),
        detached,
        command: "sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        ..Run::default()
    };
    let script = "echo a >>/root/log; sh -c 'echo b >>/root/log; sleep 0.3; echo c'; echo d $X";
    let env = Environment { vars: vec![EnvVar::new("X", "x")] };
    let configure = Configure { env: Some(env), ..Configure::default() };
    host::configure(one.connect().await, &one.vm.token, configure, SOON).await.unwrap();
    drop(one.run(run("script", script, true)).await);
    let attached = one.run(run("attached", "sleep infinity", false)).await;
    let folder = tempfile::tempdir().unwrap();
    while run_on(one.connect().await, &one.vm, command("cat /root/log"), SOON).await.0 != b"a\nb\n"
    {
    }
    let taken = one
        .driver
        .snapshot(one.vm.id, folder.path(), SnapshotDisk::Include, AfterSnapshot::End)
        .await
        .unwrap();
    drop(attached);

    let driver = SimDriver::new(SimHost::new(SimConfig::default()));
    let files = SnapshotFiles { directory: folder.path().to_owned(), machine: taken.machine };
    let spec = MachineSpec { disk_from: Some(files.clone()), ..rig().await.spec() };
    let vm = Vm { id: spec.id, token: Token::from_hex(&spec.token).unwrap() };
    driver.create(spec).await.unwrap();
    driver.start(vm.id, Start::Restore(files), SOON).await.unwrap();
    let connect = async || driver.connect(vm.id, AGENT_PORT, SOON).await.unwrap();
    // The clone has the token and the boot id of the other until it is told its own.
    let before = host::ping(connect().await, &one.vm.token, SOON).await.unwrap();
    let configure = Configure {
        new_token: Some(Bytes::copy_from_slice(vm.token.as_bytes())),
        restored: true,
        entropy: Bytes::from(vec![7; 32]),
        ..Configure::default()
    };
    let mut open = host::attach(
        connect().await,
        &one.vm.token,
        Attach { run_id: "script".to_owned(), ..Attach::default() },
        SOON,
    )
    .await
    .unwrap();
    let configured =
        host::configure(connect().await, &one.vm.token, configure, SOON).await.unwrap();
    assert_ne!(configured.boot_id, before.boot_id);
    while let Ok(event) = open.next().await {
        assert!(!matches!(event, host::RunEvent::Exited(_)), "the connection has survived");
    }
    let attach = |id: &str| Attach { run_id: id.to_owned(), ..Attach::default() };
    let mut session =
        host::attach(connect().await, &vm.token, attach("script"), SOON).await.unwrap();
    let mut out = Vec::new();
    while let host::RunEvent::Output { data, .. } = session.next().await.unwrap() {
        out.extend_from_slice(&data);
    }
    assert_eq!(out, b"c\nd x\n");
    let (log, _) = run_on(connect().await, &vm, command("cat /root/log"), SOON).await;
    assert_eq!(log, b"a\nb\n");
    // What was bound to a connection has ended with it; what later runs get is forgotten.
    let runs = host::list_runs(connect().await, &vm.token, SOON).await.unwrap().runs;
    let runs_on = |run: &RunSummary| run.state() == RunState::Running;
    assert!(!runs.iter().any(|run| run.run_id == "attached" && runs_on(run)), "{runs:?}");
    let (out, _) = run_on(connect().await, &vm, command("env"), SOON).await;
    assert!(!String::from_utf8(out).unwrap().contains("X=x"));
}

#[tokio::test]
async fn a_snapshot_takes_its_time_with_the_guest_standing_still() {
    let clock = ManualClock::default();
    let latency = SimLatency { snapshot: Duration::from_secs(3), ..SimLatency::default() };
    let config =
        SimConfig { clock: SimClock::Manual(clock.clone()), latency, ..SimConfig::default() };
    let one = one(config).await;
    one.driver.set_background(one.vm.id, true).await.unwrap();
    assert!(one.host.is_background(one.vm.id));
    let folder = tempfile::tempdir().unwrap();
    let (driver, id, into) = (one.driver.clone(), one.vm.id, folder.path().to_owned());
    let taking = tokio::spawn(async move {
        driver.snapshot(id, &into, SnapshotDisk::Leave, AfterSnapshot::GoOn).await
    });
    while !taking.is_finished() {
        clock.advance(Duration::from_secs(3));
        tokio::task::yield_now().await;
    }
    let taken = taking.await.unwrap().unwrap();
    assert!(taken.paused >= Duration::from_secs(3), "{taken:?}");
    // The guest's own time stood still.
    let pong = host::ping(one.connect().await, &one.vm.token, SOON).await.unwrap();
    assert!(
        u128::from(pong.uptime_ms)
            <= (SimClock::Manual(clock).now().saturating_sub(taken.paused)).as_millis()
    );
}

#[tokio::test]
async fn time_is_the_tests_own() {
    let clock = ManualClock::default();
    let hour = Duration::from_hours(1);
    let latency = SimLatency { boot: hour, ..SimLatency::default() };
    let config =
        SimConfig { clock: SimClock::Manual(clock.clone()), latency, ..SimConfig::default() };
    let host = SimHost::new(config);
    let driver = SimDriver::new(Arc::clone(&host));
    let spec = rig().await.spec();
    let id = spec.id;
    driver.create(spec).await.unwrap();
    let starting = driver.clone();
    let start = tokio::spawn(async move { starting.start(id, Start::Boot, 2 * hour).await });
    while !host.leftovers().iter().any(|held| held.starts_with("Process")) {
        tokio::task::yield_now().await;
    }
    assert!(!start.is_finished());
    // Once more than once: the sleeper may not have begun when the first hour passes.
    while !start.is_finished() {
        clock.advance(hour);
        tokio::task::yield_now().await;
    }
    start.await.unwrap().unwrap();
}
