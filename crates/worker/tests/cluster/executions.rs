use std::time::Duration;

use aether_drivers::sim::SimConfig;
use aether_events::Event;
use aether_store::CancelOutcome;
use aether_streams::{SessionInput, SessionOutput};
use aether_types::{
    ErrorCode, ExecutionId, ExecutionSpec, ExecutionState, ExitStatus, OutputStream, TaskKind,
    TaskState,
};
use bytes::Bytes;

use crate::rig::{Rig, command};

#[tokio::test]
async fn a_command_that_exits_3_is_completed_and_not_run_again() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("exits").await;
    let execution = rig.execute(vm, command(&["exit", "3"])).await;
    assert_eq!(execution.state, ExecutionState::Completed);
    assert_eq!(execution.exit, Some(ExitStatus::Code(3)));
    let task = rig.ended(execution.task_id).await;
    assert_eq!((task.state, task.attempts), (TaskState::Completed, 1));
}

#[tokio::test]
async fn what_is_not_found_is_127_with_a_word_on_stderr() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("missing").await;
    let execution = rig.execute(vm, command(&["no-such-program"])).await;
    assert_eq!(execution.exit, Some(ExitStatus::Code(127)));
    let stderr = rig.store().output(execution.id, OutputStream::Stderr).await.unwrap();
    assert!(!stderr.head.is_empty());
}

#[tokio::test]
async fn commands_see_the_vms_environment_and_their_own() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("env").await;
    let spec = ExecutionSpec {
        env: [("OWN".to_owned(), "1".to_owned())].into(),
        stdin: Some("given".into()),
        ..command(&["sh", "-c", "echo $GREETING $OWN; cat"])
    };
    let execution = rig.execute(vm, spec).await;
    assert_eq!(rig.stdout(&execution).await, "hello 1\ngiven");
}

#[tokio::test]
async fn a_command_sent_before_the_vm_runs_waits_for_it() {
    let rig = Rig::new(SimConfig::default()).await;
    let creation = rig.request_create("soon").await;
    let execution = rig.execute(creation.vm_id.unwrap(), command(&["echo", "ran"])).await;
    assert_eq!(rig.stdout(&execution).await, "ran\n");
}

#[tokio::test]
async fn long_output_is_kept_at_both_ends_and_the_cut_is_counted() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("long").await;
    let bytes = 3 * 1024 * 1024;
    let execution = rig.execute(vm, command(&["spew", &bytes.to_string()])).await;
    let kept = rig.store().output(execution.id, OutputStream::Stdout).await.unwrap();
    assert_eq!(kept.total_bytes, bytes);
    assert_eq!(kept.cut_bytes(), bytes - 1024 * 1024);
}

#[tokio::test]
async fn a_follower_gets_every_byte_in_order_and_the_end_last() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("follow").await;
    let id = ExecutionId::new();
    let mut client = rig.parts.sessions.open(id);
    let bytes = 5 * 1024 * 1024;
    rig.request_execution_as(id, vm, command(&["spew", &bytes.to_string()])).await;
    assert_eq!(client.output.recv().await, Some(SessionOutput::Started));
    let mut received = 0;
    let end = loop {
        match client.output.recv().await.unwrap() {
            SessionOutput::Data { stream: OutputStream::Stdout, data } => received += data.len(),
            SessionOutput::End { exit, .. } => break exit,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((received, end), (bytes, Some(ExitStatus::Code(0))));
    assert_eq!(client.output.recv().await, None);
}

#[tokio::test]
async fn a_reader_that_stalls_holds_back_only_its_own_command() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("stall").await;
    let id = ExecutionId::new();
    let client = rig.parts.sessions.open(id);
    let stalled = rig.request_execution_as(id, vm, command(&["spew", "50000000"])).await;
    rig.execution_begun(&stalled).await;
    let other = rig.execute(vm, command(&["echo", "free"])).await;
    assert_eq!(rig.stdout(&other).await, "free\n");
    assert!(!rig.store().task(stalled.task_id).await.unwrap().unwrap().state.is_end());
    // A follower that leaves does not end a command that is not its own.
    drop(client);
    let execution = rig.execution_ended(&stalled).await;
    assert_eq!(execution.exit, Some(ExitStatus::Code(0)));
}

#[tokio::test]
async fn an_interactive_command_is_fed_and_ends_with_its_client() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("feed").await;
    let id = ExecutionId::new();
    let mut client = rig.parts.sessions.open(id);
    let spec = ExecutionSpec { interactive: true, ..command(&["cat"]) };
    let execution = rig.request_execution_as(id, vm, spec).await;
    client.input.send(SessionInput::Stdin(Bytes::from_static(b"echo me"))).await.unwrap();
    let mut echoed = Vec::new();
    while echoed != b"echo me" {
        if let SessionOutput::Data { data, .. } = client.output.recv().await.unwrap() {
            echoed.extend_from_slice(&data);
        }
    }
    drop(client);
    let execution = rig.execution_ended(&execution).await;
    assert_eq!(execution.state, ExecutionState::Cancelled);
}

#[tokio::test]
async fn a_cancelled_command_is_killed() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("cancel").await;
    let execution = rig.request_execution(vm, command(&["sleep", "3600"])).await;
    rig.execution_begun(&execution).await;
    let outcome = rig.store().cancel_task(execution.task_id).await.unwrap();
    let CancelOutcome::Requested(task) = outcome else { panic!("{outcome:?}") };
    let event = Event::CancelRequested { task_id: task.id, worker_id: task.worker_id };
    rig.parts.bus.publish(event).await.unwrap();
    let execution = rig.execution_ended(&execution).await;
    assert_eq!(execution.state, ExecutionState::Cancelled);
    assert_eq!(rig.ended(execution.task_id).await.state, TaskState::Cancelled);
}

#[tokio::test]
async fn a_command_past_its_time_limit_is_killed_and_says_so() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("limit").await;
    let spec = ExecutionSpec { timeout_s: Some(1), ..command(&["sleep", "3600"]) };
    let execution = rig.execute(vm, spec).await;
    assert_eq!(execution.error.unwrap().code, ErrorCode::ExecutionTimeout);
}

#[tokio::test]
async fn the_end_of_what_carries_a_command_ends_it_with_the_reason() {
    let rig = Rig::new(SimConfig::default()).await;
    type End = fn(&aether_drivers::sim::SimHost, aether_types::VmId);
    let ends: [(&str, End, ErrorCode); 3] = [
        ("panic", |h, id| h.panic_guest(id.into()), ErrorCode::GuestPanic),
        ("vmm", |h, id| h.kill_vmm(id.into()), ErrorCode::VmmExited),
        ("power", |h, id| h.power_off_guest(id.into()), ErrorCode::GuestShutdown),
    ];
    for (name, end, code) in ends {
        let vm = rig.create(name).await;
        let execution = rig.request_execution(vm, command(&["sleep", "3600"])).await;
        rig.execution_begun(&execution).await;
        end(&rig.host, vm);
        let ended = tokio::time::timeout(Duration::from_secs(2), rig.execution_ended(&execution));
        assert_eq!(ended.await.unwrap().error.unwrap().code, code, "{name}");
    }
}

#[tokio::test]
async fn a_stop_and_a_deletion_end_commands_as_stopped() {
    let rig = Rig::new(SimConfig::default()).await;
    for (name, kind) in [("stops", TaskKind::VmStop), ("deletes", TaskKind::VmDelete)] {
        let vm = rig.create(name).await;
        let execution = rig.request_execution(vm, command(&["sleep", "3600"])).await;
        rig.execution_begun(&execution).await;
        let task = rig.request(vm, kind).await;
        assert_eq!(rig.ended(task.id).await.state, TaskState::Completed);
        let execution = rig.execution_ended(&execution).await;
        assert!(execution.state.is_end());
        let code = execution.error.unwrap().code;
        assert!(matches!(code, ErrorCode::VmStopped | ErrorCode::Cancelled), "{code}");
    }
}

#[tokio::test]
async fn sixty_four_commands_run_at_once() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("many").await;
    let mut executions = Vec::new();
    for n in 0..64 {
        let n = n.to_string();
        executions.push(rig.request_execution(vm, command(&["echo", &n])).await);
    }
    for (n, execution) in executions.iter().enumerate() {
        rig.execution_ended(execution).await;
        assert_eq!(rig.stdout(execution).await, format!("{n}\n"));
    }
}

#[tokio::test]
async fn a_signal_passes_standard_input_that_is_not_read() {
    let rig = Rig::new(SimConfig::default()).await;
    let vm = rig.create("deaf").await;
    let id = ExecutionId::new();
    let mut client = rig.parts.sessions.open(id);
    let spec = ExecutionSpec { interactive: true, ..command(&["sleep", "3600"]) };
    let execution = rig.request_execution_as(id, vm, spec).await;
    assert_eq!(client.output.recv().await, Some(SessionOutput::Started));
    // Far more than the guest takes for a command that reads nothing.
    for _ in 0..32 {
        let chunk = Bytes::from(vec![0; 64 * 1024]);
        client.input.send(SessionInput::Stdin(chunk)).await.unwrap();
    }
    client.input.send(SessionInput::Signal(15)).await.unwrap();
    let execution = rig.execution_ended(&execution).await;
    assert_eq!(execution.exit, Some(ExitStatus::Signal(15)));
    assert!(*client.taken.borrow() < 1024 * 1024);
}
