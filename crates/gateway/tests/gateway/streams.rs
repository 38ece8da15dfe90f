//! `?stream=true`.

use aether_api::{
    CreateVm, StreamEnd, StreamEvent,
    client::{CallOptions, Follow, Waited},
};
use aether_types::{ErrorCode, ExecutionId, ExecutionState, OutputStream};
use bytes::BytesMut;

use crate::rig::{Options, Rig, SOON, command, done, soon, waiting};

struct Followed {
    execution: ExecutionId,
    stdout: BytesMut,
    skipped: u64,
    has_started: bool,
    end: Option<StreamEnd>,
}

async fn to_end(mut follow: Follow) -> Followed {
    let Some(StreamEvent::Accepted { execution_id, .. }) = soon(follow.next()).await.unwrap()
    else {
        panic!("not accepted first");
    };
    let mut followed = Followed {
        execution: execution_id,
        stdout: BytesMut::new(),
        skipped: 0,
        has_started: false,
        end: None,
    };
    while let Some(event) = soon(follow.next()).await.unwrap() {
        assert_eq!(followed.end, None, "something came after the end");
        match event {
            StreamEvent::Started => followed.has_started = true,
            StreamEvent::Stdout { data } => followed.stdout.extend_from_slice(&data),
            StreamEvent::Skipped { stream: OutputStream::Stdout, bytes } => {
                followed.skipped += bytes;
            }
            StreamEvent::End(end) => followed.end = Some(end),
            StreamEvent::Detached => break,
            other => panic!("{other:?}"),
        }
    }
    followed
}

#[tokio::test]
async fn a_stream_shows_the_command_from_its_start_to_its_end() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let follow = rig.client.execute_stream("a", &command("echo", &["hi"]), None).await.unwrap();
    let followed = to_end(follow).await;
    assert!(followed.has_started);
    assert_eq!(&followed.stdout[..], b"hi\n");
    let end = followed.end.unwrap();
    assert_eq!((end.status, end.exit_code), (ExecutionState::Completed, Some(0)));
    let follow = rig.client.execute_stream("a", &command("die", &[]), None).await.unwrap();
    let end = to_end(follow).await.end.unwrap();
    assert_eq!(end.status, ExecutionState::Failed);
    assert_eq!(end.error.unwrap().code, ErrorCode::GuestPanic);
}

#[tokio::test]
async fn much_output_comes_whole_and_in_order() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let follow = rig.client.execute_stream("a", &command("flood", &["400"]), None).await.unwrap();
    let followed = to_end(follow).await;
    assert_eq!(followed.stdout.len(), 400 * 64 * 1024);
    for (n, message) in followed.stdout.chunks(64 * 1024).enumerate() {
        assert_eq!(message[..4], u32::try_from(n).unwrap().to_be_bytes());
    }
}

#[tokio::test]
async fn a_client_that_stalls_holds_back_its_own_command_alone() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    // Far more than sockets and channels hold; nobody reads it.
    let stalled = rig.client.execute_stream("a", &command("flood", &["1000"]), None).await.unwrap();
    for n in ["1", "2", "3"] {
        let other = rig.client.execute_stream("a", &command("echo", &[n]), None).await.unwrap();
        assert_eq!(&to_end(other).await.stdout[..], format!("{n}\n").as_bytes());
    }
    let followed = to_end(stalled).await;
    assert_eq!(followed.stdout.len(), 1000 * 64 * 1024);
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_end_a_streamed_command() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let mut follow = rig.client.execute_stream("a", &command("gate", &[]), None).await.unwrap();
    let Some(StreamEvent::Accepted { task_id, execution_id, .. }) = follow.next().await.unwrap()
    else {
        panic!("not accepted first");
    };
    rig.worker.saw("gate").await;
    drop(follow);
    rig.worker.gate.add_permits(1);
    rig.client.task(task_id, Some(SOON)).await.unwrap();
    let execution = rig.client.execution(execution_id).await.unwrap();
    assert_eq!(execution.stdout.as_deref(), Some("through\n"));
}

#[tokio::test]
async fn a_session_that_breaks_goes_on_from_the_store() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let follow = rig.client.execute_stream("a", &command("break", &[]), None).await.unwrap();
    let followed = to_end(follow).await;
    assert_eq!(&followed.stdout[..], b"live kept");
    assert_eq!(followed.end.unwrap().exit_code, Some(0));
}

#[tokio::test]
async fn a_repeated_stream_shows_what_was_kept() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let flood = command("flood", &["32"]);
    let stream = || rig.client.execute_stream("a", &flood, Some("key"));
    let first = to_end(stream().await.unwrap()).await;
    let again = to_end(stream().await.unwrap()).await;
    assert_eq!(first.execution, again.execution);
    assert!(again.has_started && again.skipped > 0);
    assert_eq!(again.stdout.len() as u64 + again.skipped, first.stdout.len() as u64);
    assert_eq!(first.end, again.end);
}

#[tokio::test]
async fn a_stream_of_a_command_that_never_begins_ends_with_it() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    let created =
        rig.client.create_vm(&CreateVm::default(), &CallOptions::default()).await.unwrap();
    let vm = created.vm_id().to_string();
    let mut follow = rig.client.execute_stream(&vm, &command("echo", &[]), None).await.unwrap();
    let Some(StreamEvent::Accepted { task_id, .. }) = follow.next().await.unwrap() else {
        panic!("not accepted first");
    };
    rig.client.cancel_task(task_id, None).await.unwrap();
    let Some(StreamEvent::End(end)) = soon(follow.next()).await.unwrap() else {
        panic!("no end");
    };
    assert_eq!(end.status, ExecutionState::Cancelled);
    assert_eq!(soon(follow.next()).await.unwrap(), None);
}

#[tokio::test]
async fn a_shutdown_lets_go_of_who_follows_and_who_waits() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let follow = rig.client.execute_stream("a", &command("gate", &[]), None).await.unwrap();
    rig.worker.saw("gate").await;
    let client = rig.client.clone();
    let waiter = tokio::spawn(async move {
        client.execute("a", &command("gate", &[]), &waiting()).await.unwrap()
    });
    let mut events = rig.bus.subscribe();
    while rig.store.open_tasks().await.unwrap().len() < 2 {
        soon(events.next()).await;
    }
    rig.shutdown.cancel();
    let followed = to_end(follow).await;
    assert_eq!(followed.end, None);
    assert!(matches!(soon(waiter).await.unwrap(), Waited::Accepted(_)));
    soon(rig.served).await.unwrap().unwrap();
    // What was accepted is still there.
    assert_eq!(rig.store.open_tasks().await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_wait_ends_with_the_end_of_the_command_not_before() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let client = rig.client.clone();
    let waiter = tokio::spawn(async move {
        done(client.execute("a", &command("gate", &[]), &waiting()).await.unwrap())
    });
    rig.worker.saw("gate").await;
    assert!(!waiter.is_finished());
    rig.worker.gate.add_permits(1);
    assert_eq!(soon(waiter).await.unwrap().stdout.as_deref(), Some("through\n"));
}
