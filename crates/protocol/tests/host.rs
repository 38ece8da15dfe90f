//! The host client against guests that behave and guests that do not.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

use std::time::Duration;

use aether_protocol::codec::{DataHeader, encode};
use aether_protocol::host::{
    self, ClientError, GuestAcceptor, GuestSession, ProtocolError, RunEvent, RunSession,
};
use aether_protocol::limits::{
    DATA_BYTES_MAX, MESSAGE_BYTES_MAX, STDIN_WINDOW_BYTES, WARNINGS_MAX,
};
use aether_protocol::{
    Cause, Configure, Configured, ErrorCode, Exited, Failed, FileKind, FileStat, FromGuest, Output,
    ReadFile, Refused, RequestBody, Run, Started, StdinTaken, Stream, ToGuestBody, Token, Welcome,
    WriteFile,
};
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

const LIMIT: Duration = Duration::from_secs(10);

fn token() -> Token {
    Token::from_bytes([3; 32])
}

fn command() -> Run {
    Run { command: "true".into(), stdin: true, ..Run::default() }
}

/// A run with a guest that the test plays.
async fn begin() -> (RunSession, GuestSession) {
    let (near, far) = duplex(1 << 20);
    let token = token();
    let guest = async {
        let (acceptor, request) = GuestAcceptor::read(far, &token).await.unwrap();
        assert!(matches!(request, RequestBody::Run(_)));
        let mut session = acceptor.welcome("1.0", "boot").await.unwrap();
        let stdin_window = STDIN_WINDOW_BYTES;
        session.send(Started { pid: 7, stdin_window, ..Started::default() }).await.unwrap();
        session
    };
    let (run, guest) = tokio::join!(host::run(near, &token, command(), LIMIT), guest);
    (run.unwrap(), guest)
}

fn output(offset: u64, data: &'static [u8]) -> Output {
    Output { stream: Stream::Stdout.into(), offset, data: Bytes::from_static(data) }
}

fn exited(stdout_bytes: u64) -> Exited {
    let cause = Cause::Exited.into();
    Exited { exit_code: Some(0), cause, stdout_bytes, ..Exited::default() }
}

#[tokio::test]
async fn run_goes_from_start_to_end() {
    let (mut run, mut guest) = begin().await;
    assert_eq!((run.boot_id(), run.started().pid), ("boot", 7));
    guest.send(output(0, b"ab")).await.unwrap();
    guest.send(output(2, b"c")).await.unwrap();
    guest.send(exited(3)).await.unwrap();
    let data = Bytes::from_static(b"ab");
    let first = RunEvent::Output { stream: Stream::Stdout, offset: 0, data };
    assert_eq!(run.next().await.unwrap(), first);
    assert!(matches!(run.next().await.unwrap(), RunEvent::Output { offset: 2, .. }));
    assert_eq!(run.next().await.unwrap(), RunEvent::Exited(exited(3)));
    assert!(run.next().await.is_err());
}

#[tokio::test]
async fn next_can_be_dropped_at_any_byte() {
    let (near, far) = duplex(1);
    let token = token();
    let guest = tokio::spawn(async move {
        let (acceptor, _) = GuestAcceptor::read(far, &Token::from_bytes([3; 32])).await.unwrap();
        let mut session = acceptor.welcome("1", "b").await.unwrap();
        session.send(Started::default()).await.unwrap();
        for at in 0..20 {
            session.send(output(at, b"x")).await.unwrap();
        }
        session.send(exited(20)).await.unwrap();
        session
    });
    let mut run = host::run(near, &token, command(), LIMIT).await.unwrap();
    let mut count = 0;
    loop {
        // One byte at a time comes through, and each time the future is dropped.
        let event = tokio::select! {
            biased;
            event = run.next() => event.unwrap(),
            () = tokio::task::yield_now() => continue,
        };
        match event {
            RunEvent::Output { offset, .. } => assert_eq!(offset, count),
            RunEvent::Exited(_) => break,
        }
        count += 1;
    }
    assert_eq!(count, 20);
    drop(guest.await.unwrap());
}

#[tokio::test]
async fn guest_that_breaks_the_order_of_bytes_is_found_out() {
    let (mut run, mut guest) = begin().await;
    guest.send(output(1, b"x")).await.unwrap();
    let error = run.next().await.unwrap_err();
    let ClientError::Protocol(ProtocolError::Offset { expected: 0, actual: 1 }) = error else {
        panic!("{error:?}")
    };
    let (mut run, mut guest) = begin().await;
    guest.send(exited(5)).await.unwrap();
    assert!(matches!(run.next().await, Err(ClientError::Protocol(_))));
    let (mut run, mut guest) = begin().await;
    let stream = Stream::Unspecified.into();
    guest.send(Output { stream, ..output(0, b"x") }).await.unwrap();
    assert!(matches!(run.next().await, Err(ClientError::Protocol(_))));
    let (mut run, mut guest) = begin().await;
    guest.send(FileStat::default()).await.unwrap();
    assert!(matches!(run.next().await, Err(ClientError::Protocol(_))));
    let (mut run, mut guest) = begin().await;
    let data = Bytes::from(vec![0; DATA_BYTES_MAX + 1]);
    guest.send(Output { data, ..output(0, b"") }).await.unwrap();
    assert!(matches!(run.next().await, Err(ClientError::Protocol(_))));
}

#[tokio::test]
async fn guest_that_goes_away_is_told_from_one_that_fails() {
    let (mut run, guest) = begin().await;
    drop(guest);
    let error = run.next().await.unwrap_err();
    assert!(matches!(error, ClientError::Closed { .. }) && error.is_connection_lost());
    let (mut run, mut guest) = begin().await;
    guest.send(Failed::new(ErrorCode::Replaced, "x".repeat(100_000))).await.unwrap();
    let error = run.next().await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Replaced));
    assert!(error.to_string().len() < 5000);
}

#[tokio::test]
async fn stdin_waits_for_credit_and_other_messages_do_not() {
    let (run, mut guest) = begin().await;
    let (mut input, mut output) = run.split();
    let window = usize::try_from(STDIN_WINDOW_BYTES).unwrap();
    let data = Bytes::from(vec![1; window + 10]);
    let mut stdin = Box::pin(input.stdin(data));
    let mut received = 0;
    while received < window {
        tokio::select! {
            sent = &mut stdin => panic!("{sent:?}"),
            message = guest.next() => match message.unwrap() {
                Some(ToGuestBody::Stdin(stdin)) => received += stdin.data.len(),
                other => panic!("{other:?}"),
            },
        }
    }
    assert_eq!(received, window);
    guest.send(StdinTaken { bytes: 4 }).await.unwrap();
    let read = async { while output.next().await.is_ok() {} };
    let more = async {
        let Some(ToGuestBody::Stdin(four)) = guest.next().await.unwrap() else { panic!() };
        assert_eq!(four.data.len(), 4);
        guest.send(StdinTaken { bytes: 1000 }).await.unwrap();
        let Some(ToGuestBody::Stdin(six)) = guest.next().await.unwrap() else { panic!() };
        assert_eq!(six.data.len(), 6);
    };
    tokio::select! {
        ((), sent) = async { tokio::join!(more, stdin) } => sent.unwrap(),
        () = read => panic!("the run has ended"),
    }
    input.cancel().await.unwrap();
    assert!(matches!(guest.next().await.unwrap(), Some(ToGuestBody::Cancel(_))));
    drop(output);
    let error = input.stdin(Bytes::from(vec![0; window * 2])).await.unwrap_err();
    assert!(matches!(error, ClientError::Closed { .. }));
}

/// Answers whatever comes with these bytes.
async fn canned(mut far: DuplexStream, bytes: Vec<u8>) -> DuplexStream {
    far.write_all(&bytes).await.unwrap();
    far
}

fn frames(messages: &[FromGuest]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        encode(message, &mut bytes).unwrap();
    }
    bytes
}

#[tokio::test]
async fn first_exchange_has_a_limit() {
    let (near, _far) = duplex(1 << 16);
    let limit = Duration::from_millis(10);
    let error = host::ping(near, &token(), limit).await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }));
}

#[tokio::test]
async fn hostile_welcomes_are_refused() {
    let welcome = Welcome { generation: 1, agent_version: "1".into(), boot_id: "b".into() };
    let long = Welcome { boot_id: "b".repeat(1000), ..welcome.clone() };
    let control = Welcome { agent_version: "\x1b[31m".into(), ..welcome.clone() };
    let future = Welcome { generation: 2, ..welcome };
    for welcome in [long, control, future] {
        let (near, far) = duplex(1 << 16);
        let far = canned(far, frames(&[welcome.into()])).await;
        let error = host::ping(near, &token(), LIMIT).await.unwrap_err();
        assert!(matches!(error, ClientError::Protocol(_)), "{error:?}");
        drop(far);
    }
}

/// What a host makes of a guest's answer to this request.
async fn configured(request: Configure, answer: Configured) -> Result<Configured, ClientError> {
    let welcome = Welcome { generation: 1, boot_id: "before".into(), ..Welcome::default() };
    let (near, far) = duplex(1 << 20);
    let _far = canned(far, frames(&[welcome.into(), answer.into()])).await;
    host::configure(near, &token(), request, LIMIT).await
}

#[tokio::test]
async fn boot_id_of_a_configured_guest_is_the_newest_that_it_said() {
    let plain = Configure::default;
    let after = Configured { boot_id: "after".into(), ..Configured::default() };
    assert_eq!(configured(plain(), after.clone()).await.unwrap().boot_id, "after");
    let older = Configured::default();
    assert_eq!(configured(plain(), older.clone()).await.unwrap().boot_id, "before");

    let new_token = Some(Bytes::from_static(&[4; 32]));
    let with_token = Configure { new_token, ..plain() };
    let entropy = Bytes::from_static(&[5; 32]);
    let restored = Configure { restored: true, entropy, ..plain() };
    for request in [with_token, restored] {
        assert!(!format!("{request:?}").contains('4'), "secrets are not printed");
        assert_eq!(configured(request.clone(), after.clone()).await.unwrap().boot_id, "after");
        // It has ignored what must not be ignored.
        let error = configured(request, older.clone()).await.unwrap_err();
        let ClientError::Protocol(ProtocolError::Outdated { .. }) = error else {
            panic!("{error:?}")
        };
    }
    let hostile = Configured { boot_id: "b".repeat(1000), ..older.clone() };
    assert!(matches!(configured(plain(), hostile).await, Err(ClientError::Protocol(_))));
    let talkative = Configured { warnings: vec!["é".repeat(3000); 100], ..older };
    let kept = configured(plain(), talkative).await.unwrap().warnings;
    assert_eq!(kept.len(), WARNINGS_MAX);
    assert!(kept.iter().all(|warning| warning.len() <= MESSAGE_BYTES_MAX));
}

#[tokio::test]
async fn refusal_of_a_guest_that_read_nothing_is_seen() {
    let (near, far) = duplex(64);
    let refused = Refused::new(ErrorCode::TooManyConnections, "full");
    drop(canned(far, frames(&[refused.into()])).await);
    let error = host::ping(near, &token(), LIMIT).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::TooManyConnections));
}

#[tokio::test]
async fn request_past_a_limit_is_not_even_sent() {
    let (near, mut far) = duplex(64);
    let run = Run { args: vec!["x".repeat(200_000)], ..command() };
    let error = host::run(near, &token(), run, LIMIT).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::TooLarge));
    assert_eq!(far.read(&mut [0; 8]).await.unwrap(), 0);
}

#[tokio::test]
async fn reader_takes_no_more_than_it_asked_for() {
    let welcome = Welcome { generation: 1, ..Welcome::default() };
    let stat = FileStat { kind: FileKind::File.into(), size: 3, ..FileStat::default() };
    let mut bytes = frames(&[welcome.into(), stat.into()]);
    bytes.extend_from_slice(DataHeader::data(4).as_slice());
    bytes.extend_from_slice(b"data");
    let (near, far) = duplex(1 << 16);
    let _far = canned(far, bytes).await;
    let request = ReadFile { path: "/f".into(), limit: Some(3), ..ReadFile::default() };
    let mut reader = host::read_file(near, &token(), request, LIMIT).await.unwrap();
    assert_eq!(reader.stat().size, 3);
    assert!(matches!(reader.next_chunk().await, Err(ClientError::Protocol(_))));
}

#[tokio::test]
async fn failure_of_a_guest_that_stops_reading_ends_a_write() {
    let welcome = Welcome { generation: 1, ..Welcome::default() };
    let failed = Failed::new(ErrorCode::NoSpace, "full");
    let (near, far) = duplex(1 << 14);
    let _far = canned(far, frames(&[welcome.into(), failed.into()])).await;
    let request = WriteFile { path: "/f".into(), ..WriteFile::default() };
    let mut writer = host::write_file(near, &token(), request, LIMIT).await.unwrap();
    let error = writer.write(Bytes::from(vec![0; 1 << 20])).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NoSpace));
}
