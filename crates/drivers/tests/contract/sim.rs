//! The contract on simulated machines, and what only they can be told to do.

use std::{sync::Arc, time::Duration};

use aether_drivers::{
    Driver, DriverError, ExitReason, Start,
    sim::{ManualClock, SimClock, SimConfig, SimDriver, SimHost, SimLatency},
};
use aether_protocol::{
    AGENT_PORT, Attach, Cause, Configure, EnvVar, Environment, ErrorCode, ExitStatus, Run, Token,
    WriteFile, host,
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
    snapshots::faults(rig().await).await;
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
