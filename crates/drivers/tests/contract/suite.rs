//! The contract. Each function is one promise; it leaves the rig without VMs.

use std::{
    os::unix::process::ExitStatusExt as _,
    time::{Duration, Instant},
};

use aether_drivers::{DriverError, ExitReason, MachineState, Start};
use aether_protocol::{AGENT_PORT, ExitStatus, Run, Shutdown, WriteFile, host};

use crate::{
    rig::{Kind, Rig, Vm, kill_process, run_on, setting},
    shot::{Shot, shot_file},
    snapshots,
};

/// For what a host does, not a guest.
const SOON: Duration = Duration::from_secs(20);

async fn state(rig: &Rig, vm: &Vm) -> MachineState {
    rig.driver().inspect(vm.id).await.expect("inspect").expect("known").state
}

async fn exited(rig: &Rig, vm: &Vm) -> ExitReason {
    let exited = tokio::time::timeout(rig.guest_limit(), rig.driver().exited(vm.id)).await;
    exited.expect("the VMM ends in time").expect("exited")
}

/// Create, start, connect, run; pause, resume; shut down; start again with the same files.
pub(crate) async fn lifecycle(rig: Rig) {
    let driver = rig.driver();
    let spec = rig.spec();
    let vm = Vm { id: spec.id, token: spec.token.parse_token() };
    assert!(driver.inspect(vm.id).await.unwrap().is_none());
    assert!(matches!(driver.start(vm.id, Start::Boot, SOON).await, Err(DriverError::UnknownVm(_))));
    assert!(matches!(
        driver.connect(vm.id, AGENT_PORT, SOON).await.map(drop),
        Err(DriverError::UnknownVm(_))
    ));

    let network = driver.create(spec.clone()).await.expect("create");
    assert!(!network.addresses.is_empty());
    assert_eq!(driver.create(spec.clone()).await.expect("create again"), network);
    let other = aether_drivers::MachineSpec { memory_mb: 256, ..spec.clone() };
    assert!(matches!(driver.create(other).await, Err(DriverError::WrongState { .. })));
    assert_eq!(state(&rig, &vm).await, MachineState::Created);
    assert!(driver.pause(vm.id).await.is_err());

    let begun = Instant::now();
    driver.start(vm.id, Start::Boot, rig.boot_limit()).await.expect("start");
    println!("{:?}: boot {} ms", rig.kind(), begun.elapsed().as_millis());
    let found = driver.inspect(vm.id).await.unwrap().unwrap();
    assert_eq!(found.state, MachineState::Running);
    assert_eq!(found.network.as_ref(), Some(&network));
    assert_eq!(found.spec.as_ref(), Some(&spec));
    assert!(found.pid.is_some());
    assert!(matches!(
        driver.start(vm.id, Start::Boot, SOON).await,
        Err(DriverError::WrongState { .. })
    ));
    assert_eq!(driver.list().await.unwrap().len(), 1);

    let pong = host::ping(rig.connect(&vm).await, &vm.token, rig.guest_limit()).await.unwrap();
    let (out, end) = rig.sh(&vm, "echo hello; exit 3").await;
    assert_eq!((out.as_slice(), end.status()), (&b"hello\n"[..], ExitStatus::Code(3)));

    driver.pause(vm.id).await.expect("pause");
    assert_eq!(state(&rig, &vm).await, MachineState::Paused);
    let paused = async {
        let stream = driver.connect(vm.id, AGENT_PORT, Duration::from_millis(300)).await.ok()?;
        host::ping(stream, &vm.token, Duration::from_millis(300)).await.ok()
    };
    assert!(paused.await.is_none(), "a paused guest answers");
    driver.resume(vm.id).await.expect("resume");
    assert_eq!(state(&rig, &vm).await, MachineState::Running);
    let (out, _) = rig.sh(&vm, "echo kept >/root/file; sync; cat /root/file").await;
    assert_eq!(out, b"kept\n");

    shut_down(&rig, &vm).await;
    assert_eq!(exited(&rig, &vm).await, ExitReason::GuestShutdown);
    assert_eq!(state(&rig, &vm).await, MachineState::Exited(ExitReason::GuestShutdown));
    assert!(matches!(
        driver.connect(vm.id, AGENT_PORT, SOON).await.map(drop),
        Err(DriverError::WrongState { .. })
    ));

    driver.start(vm.id, Start::Boot, rig.boot_limit()).await.expect("start again");
    let again = host::ping(rig.connect(&vm).await, &vm.token, rig.guest_limit()).await.unwrap();
    assert_ne!(again.boot_id, pong.boot_id);
    let (out, _) = rig.sh(&vm, "cat /root/file").await;
    assert_eq!(out, b"kept\n");

    driver.kill(vm.id).await.expect("kill");
    assert_eq!(exited(&rig, &vm).await, ExitReason::Killed);
    driver.kill(vm.id).await.expect("kill again");
    // Links are given back and made anew.
    driver.release().await.expect("release");
    driver.start(vm.id, Start::Boot, rig.boot_limit()).await.expect("start after release");
    assert_eq!(rig.sh(&vm, "cat /root/file").await.0, b"kept\n");
    driver.delete(vm.id).await.expect("delete");
    rig.close().await;
}

pub(crate) trait ParseToken {
    fn parse_token(&self) -> aether_protocol::Token;
}

impl ParseToken for String {
    fn parse_token(&self) -> aether_protocol::Token {
        aether_protocol::Token::from_hex(self).unwrap()
    }
}

async fn shut_down(rig: &Rig, vm: &Vm) {
    let request = Shutdown { grace_ms: 1000, reboot: true };
    host::shutdown(rig.connect(vm).await, &vm.token, request, rig.guest_limit())
        .await
        .expect("shutdown");
}

/// Delete works from every state, twice, and leaves nothing.
pub(crate) async fn delete_from_every_state(rig: Rig) {
    let driver = rig.driver();
    driver.delete(rig.spec().id).await.expect("delete the unknown");

    let created = rig.spec();
    driver.create(created.clone()).await.unwrap();
    delete_twice(&rig, created.id).await;

    let vm = rig.boot().await;
    delete_twice(&rig, vm.id).await;

    let vm = rig.boot().await;
    driver.pause(vm.id).await.unwrap();
    delete_twice(&rig, vm.id).await;

    let vm = rig.boot().await;
    driver.kill(vm.id).await.unwrap();
    delete_twice(&rig, vm.id).await;

    // While it starts: the start ends with an error, in time.
    let spec = rig.spec();
    driver.create(spec.clone()).await.unwrap();
    let starting = rig.shared();
    let limit = rig.boot_limit();
    let start = tokio::spawn(async move { starting.start(spec.id, Start::Boot, limit).await });
    until_running(&rig, spec.id).await;
    delete_twice(&rig, spec.id).await;
    let started = tokio::time::timeout(SOON, start).await.expect("the start ends").unwrap();
    // A container may be up before its deletion.
    assert!(started.is_err() || [Kind::Sim, Kind::Docker].contains(&rig.kind()), "{started:?}");
    rig.close().await;
}

async fn until_running(rig: &Rig, id: aether_types::MachineId) {
    let deadline = Instant::now() + SOON;
    loop {
        let machine = rig.driver().inspect(id).await.unwrap().unwrap();
        if machine.pid.is_some() {
            return;
        }
        assert!(Instant::now() < deadline, "no process appears");
        tokio::task::yield_now().await;
    }
}

async fn delete_twice(rig: &Rig, id: aether_types::MachineId) {
    tokio::time::timeout(SOON, rig.driver().delete(id)).await.expect("in time").expect("delete");
    rig.driver().delete(id).await.expect("delete again");
    assert!(rig.driver().inspect(id).await.unwrap().is_none());
    assert_eq!(rig.leftovers(), Vec::<String>::new());
}

/// Why a VMM ended is told, and told apart.
pub(crate) async fn exit_reasons(rig: Rig) {
    let driver = rig.driver();

    let vm = rig.boot().await;
    // A container has no kernel of its own that could panic.
    if rig.kind() != Kind::Docker {
        panics(&rig, &vm).await;
    }

    rig.kill_vmm(&vm).await;
    assert_eq!(exited(&rig, &vm).await, ExitReason::VmmDied);
    driver.start(vm.id, Start::Boot, rig.boot_limit()).await.expect("start after the VMM died");

    // Whoever is connected hears of it, and soon.
    let sleeping =
        Run { command: "sleep".to_owned(), args: vec!["1000".to_owned()], ..Run::default() };
    let stream = rig.connect(&vm).await;
    let mut session = host::run(stream, &vm.token, sleeping, rig.guest_limit()).await.unwrap();
    shut_down(&rig, &vm).await;
    let heard = tokio::time::timeout(rig.guest_limit(), async {
        while session.next().await.is_ok_and(|event| !matches!(event, host::RunEvent::Exited(_))) {}
    });
    heard.await.expect("a stream to a guest that is gone ends");
    assert_eq!(exited(&rig, &vm).await, ExitReason::GuestShutdown);
    driver.delete(vm.id).await.unwrap();
    rig.close().await;
}

async fn panics(rig: &Rig, vm: &Vm) {
    let (watching, id) = (rig.shared(), vm.id);
    let watch = tokio::spawn(async move { watching.exited(id).await });
    // The test kernel has no such trigger, and panics for want of memory.
    let panic = "echo c >/proc/sysrq-trigger || { echo 2 >/proc/sys/vm/panic_on_oom; \
                 perl -e 'push @a, \"x\" x 1000000 while 1'; }";
    rig.sh_last(vm, panic).await;
    assert_eq!(exited(rig, vm).await, ExitReason::GuestPanic);
    assert_eq!(watch.await.unwrap().unwrap(), ExitReason::GuestPanic);
    let words = rig.driver().last_words(vm.id).await;
    assert!(words.contains("Kernel panic"), "{words:?}");
    let limit = rig.boot_limit();
    rig.driver().start(vm.id, Start::Boot, limit).await.expect("start after a panic");
}

/// A worker that restarts finds its VMs, running and usable, paused, stopped and made only.
pub(crate) async fn adoption(mut rig: Rig) {
    let running = rig.boot().await;
    let stopped = rig.boot().await;
    rig.driver().kill(stopped.id).await.unwrap();
    let made = rig.spec();
    rig.driver().create(made.clone()).await.unwrap();
    rig.sh(&running, "echo here >/tmp/mark").await;
    let before = rig.driver().inspect(running.id).await.unwrap().unwrap();

    rig.reopen().await;
    let after = rig.driver().inspect(running.id).await.unwrap().unwrap();
    assert_eq!((after.state, after.pid), (before.state, before.pid));
    assert_eq!((after.network, after.spec), (before.network, before.spec));
    assert_eq!(rig.sh(&running, "cat /tmp/mark").await.0, b"here\n");
    assert_eq!(state(&rig, &stopped).await, MachineState::Exited(ExitReason::Killed));
    let ids: Vec<_> = rig.driver().list().await.unwrap().iter().map(|m| m.id).collect();
    assert_eq!(ids.len(), 3);
    assert!(ids.contains(&made.id));

    rig.driver().pause(running.id).await.expect("pause an adopted VM");
    rig.reopen().await;
    assert_eq!(state(&rig, &running).await, MachineState::Paused);
    rig.driver().resume(running.id).await.unwrap();
    assert_eq!(rig.sh(&running, "cat /tmp/mark").await.0, b"here\n");

    // The end of an adopted VMM is seen, and its guest's end as well.
    shut_down(&rig, &running).await;
    assert_eq!(exited(&rig, &running).await, ExitReason::GuestShutdown);
    rig.driver().start(running.id, Start::Boot, rig.boot_limit()).await.unwrap();
    rig.reopen().await;
    rig.driver().kill(running.id).await.unwrap();
    assert_eq!(exited(&rig, &running).await, ExitReason::Killed);

    // What happens while no worker runs.
    if rig.kind() != Kind::Sim {
        rig.driver().start(running.id, Start::Boot, rig.boot_limit()).await.unwrap();
        let pid = rig.driver().inspect(running.id).await.unwrap().unwrap().pid.unwrap();
        rig.reopen_after(async || kill_process(pid)).await;
        assert_eq!(state(&rig, &running).await, MachineState::Exited(ExitReason::VmmDied));
    }
    for machine in rig.driver().list().await.unwrap() {
        rig.driver().delete(machine.id).await.unwrap();
    }
    rig.close().await;
}

/// Every step is made to fail, before and after it took effect: nothing is left, and the same VM
/// can be made afterwards.
pub(crate) async fn faults(mut rig: Rig) {
    whole_life(&rig).await.expect("a life without faults");
    assert_eq!(rig.leftovers(), Vec::<String>::new());
    let points = rig.fault.seen();
    assert!(points.len() >= 8, "{points:?}");
    for point in points {
        rig.fault.arm(point);
        let result = whole_life(&rig).await;
        let was_hit = !rig.fault.disarm();
        // Some lie in the opening of the driver, and so in no VM's life.
        if !was_hit {
            continue;
        }
        match result {
            Err(DriverError::Injected(failed)) => assert_eq!(failed, point),
            Err(error) => panic!("{point}: {error:?}"),
            Ok(()) => panic!("{point}: the failure was swallowed"),
        }
        // What is left is known, and can be removed: by this worker or the next.
        rig.reopen().await;
        for machine in rig.driver().list().await.unwrap() {
            rig.driver().delete(machine.id).await.expect("delete after a fault");
        }
        assert_eq!(rig.leftovers(), Vec::<String>::new(), "after {point}");
    }
    rig.close().await;
}

/// The worker is killed at every step: the next one finds what there is, can use what runs, and
/// can remove all of it. `worker` is the name of the test that is the worker.
pub(crate) async fn crashes(mut rig: Rig, worker: &str) {
    whole_life(&rig).await.expect("a life without faults");
    let mut deaths = 0;
    for point in rig.fault.seen() {
        deaths += usize::from(dies_at(&mut rig, worker, point).await);
        for machine in rig.driver().list().await.unwrap() {
            let spec = machine.spec.expect("a sound record");
            let vm = Vm { id: machine.id, token: spec.token.parse_token() };
            if machine.state == MachineState::Running {
                let limit = rig.boot_limit();
                until_it_answers(&rig, &vm, limit).await;
            }
            rig.driver().delete(vm.id).await.expect("delete after a crash");
        }
        assert_eq!(rig.leftovers(), Vec::<String>::new(), "after a crash at {point}");
    }
    println!("{:?}: {deaths} deaths", rig.kind());
    assert!(deaths >= 15, "{deaths}");
    rig.close().await;
}

/// Lets a worker live until a point; `false` where its life has no such point. The rig is open
/// again afterwards.
pub(crate) async fn dies_at(rig: &mut Rig, worker: &str, point: &str) -> bool {
    let (folder, program) = (rig.folder().to_owned(), std::env::current_exe().unwrap());
    let mut died = false;
    let dies = async || {
        let mut child = tokio::process::Command::new(program)
            .args(["--exact", worker, "--nocapture"])
            .env(CRASH_FOLDER, folder)
            .env(CRASH_POINT, point)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let status = child.wait().await.unwrap();
        // Some points lie in no worker's life but the first.
        assert!(status.signal() == Some(9) || status.success(), "{point}: {status}");
        died = !status.success();
    };
    rig.reopen_after(dies).await;
    died
}

const CRASH_FOLDER: &str = "AETHER_CONTRACT_CRASH_FOLDER";
const CRASH_POINT: &str = "AETHER_CONTRACT_CRASH_POINT";

/// The worker of [`crashes`]: lives until its point. Does nothing unless it was started for that.
pub(crate) async fn crashing_worker(kind: Kind) {
    let (Some(folder), Some(point)) = (setting(CRASH_FOLDER), setting(CRASH_POINT)) else { return };
    std::panic::set_hook(Box::new(|_| kill_process(std::process::id())));
    let rig = Rig::open_in(kind, Some(folder)).await.expect("what the parent could open");
    rig.fault.arm_crash(point.to_str().unwrap());
    let shot = shot_file(rig.folder());
    let lived = if shot.exists() {
        snapshots::second_life(&rig, &Shot::load(&shot)).await
    } else {
        whole_life(&rig).await
    };
    lived.expect("a life whose point lies elsewhere");
}

/// A guest that was adopted while it booted answers when it has.
async fn until_it_answers(rig: &Rig, vm: &Vm, limit: Duration) {
    let deadline = Instant::now() + limit;
    loop {
        let attempt = async {
            let stream = rig.driver().connect(vm.id, AGENT_PORT, SOON).await.ok()?;
            host::ping(stream, &vm.token, SOON).await.ok()
        };
        if attempt.await.is_some() {
            return;
        }
        assert!(Instant::now() < deadline, "an adopted guest does not answer");
    }
}

/// A creation that fails has been undone; a start that fails leaves no process.
async fn whole_life(rig: &Rig) -> Result<(), DriverError> {
    let driver = rig.driver();
    let spec = rig.spec();
    let id = spec.id;
    if let Err(error) = driver.create(spec).await {
        assert!(driver.inspect(id).await?.is_none(), "after {error}");
        assert_eq!(rig.leftovers(), Vec::<String>::new(), "after {error}");
        return Err(error);
    }
    if let Err(error) = driver.start(id, Start::Boot, rig.boot_limit()).await {
        let machine = driver.inspect(id).await?.expect("what was created stays");
        assert_eq!(machine.pid, None, "after {error}");
        let processes: Vec<_> =
            rig.leftovers().into_iter().filter(|l| l.starts_with("process")).collect();
        assert_eq!(processes, Vec::<String>::new(), "after {error}");
        return Err(error);
    }
    driver.pause(id).await?;
    driver.resume(id).await?;
    driver.kill(id).await?;
    driver.delete(id).await
}

/// A start that finds no time ends in time, and leaves no process.
pub(crate) async fn start_is_bounded(rig: Rig) {
    let spec = rig.spec();
    rig.driver().create(spec.clone()).await.unwrap();
    if rig.kind() != Kind::Sim {
        let begun = Instant::now();
        let error =
            rig.driver().start(spec.id, Start::Boot, Duration::from_millis(150)).await.unwrap_err();
        assert!(matches!(error, DriverError::StartTimeout { limit_ms: 150 }), "{error:?}");
        assert!(begun.elapsed() < SOON);
        let machine = rig.driver().inspect(spec.id).await.unwrap().unwrap();
        assert_eq!(machine.pid, None);
    }
    rig.driver().delete(spec.id).await.unwrap();
    rig.close().await;
}

/// Bytes of every value go both ways unchanged, in bulk; many connections at once do not mix.
pub(crate) async fn channel(rig: Rig, megabytes: usize, connections: usize) {
    let vm = rig.boot().await;
    let size = megabytes * 1024 * 1024;
    let data: bytes::Bytes =
        (0..size).map(|i| u8::try_from((i ^ (i >> 8)) % 256).unwrap()).collect::<Vec<_>>().into();

    let begun = Instant::now();
    let request = WriteFile { path: "/tmp/data".to_owned(), ..WriteFile::default() };
    let limit = rig.guest_limit() * 4;
    let mut writer =
        host::write_file(rig.connect(&vm).await, &vm.token, request, limit).await.unwrap();
    let mut rest = data.clone();
    while !rest.is_empty() {
        let chunk = rest.split_to(rest.len().min(64 * 1024));
        writer.write(chunk).await.unwrap();
    }
    writer.finish().await.unwrap();
    let there = begun.elapsed();

    let begun = Instant::now();
    let request = aether_protocol::ReadFile { path: "/tmp/data".to_owned(), ..Default::default() };
    let mut reader =
        host::read_file(rig.connect(&vm).await, &vm.token, request, limit).await.unwrap();
    let mut back = Vec::with_capacity(size);
    while let Some(chunk) = reader.next_chunk().await.unwrap() {
        back.extend_from_slice(&chunk);
    }
    assert!(back == data, "the bytes have changed on the way");
    let rate = |time: Duration| size as u128 / time.as_micros().max(1);
    println!("{:?}: {} MB/s there, {} back", rig.kind(), rate(there), rate(begun.elapsed()));

    let begun = Instant::now();
    for _ in 0..20 {
        drop(rig.connect(&vm).await);
    }
    println!("{:?}: connect {} µs", rig.kind(), begun.elapsed().as_micros() / 20);

    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..connections {
        let (driver, vm, limit) = (rig.shared(), vm.clone(), limit);
        tasks.spawn(async move {
            let stream = driver.connect(vm.id, AGENT_PORT, limit).await.expect("connect");
            let run = Run {
                command: "echo".to_owned(),
                args: vec![format!("number {i}")],
                ..Run::default()
            };
            let (out, end) = run_on(stream, &vm, run, limit).await;
            assert_eq!(out, format!("number {i}\n").as_bytes());
            assert_eq!(end.status(), ExitStatus::Code(0));
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    rig.driver().delete(vm.id).await.unwrap();
    rig.close().await;
}
