//! Interactive executions.

use aether_api::{
    STDIN_WINDOW_BYTES, StreamEnd, StreamEvent, TerminalControl, TerminalStart,
    client::{ClientError, TerminalInput, TerminalOutput},
};
use aether_types::{ErrorCode, ExecutionState, TtySize};
use bytes::{Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use tokio_tungstenite::tungstenite::{
    Message, client::IntoClientRequest as _, protocol::CloseFrame,
};

use crate::rig::{Rig, soon};

fn start(command: &str) -> TerminalStart {
    TerminalStart { command: command.into(), ..TerminalStart::default() }
}

async fn open(rig: &Rig, start: &TerminalStart) -> (TerminalInput, TerminalOutput) {
    let (input, mut output) = rig.client.terminal("a", start).await.unwrap();
    assert!(matches!(soon(output.next()).await, Ok(Some(StreamEvent::Accepted { .. }))));
    assert!(matches!(soon(output.next()).await, Ok(Some(StreamEvent::Started))));
    (input, output)
}

async fn to_end(output: &mut TerminalOutput) -> (BytesMut, StreamEnd) {
    let mut stdout = BytesMut::new();
    loop {
        match soon(output.next()).await.unwrap().expect("cut off") {
            StreamEvent::Stdout { data } => stdout.extend_from_slice(&data),
            StreamEvent::End(end) => {
                assert_eq!(soon(output.next()).await.unwrap(), None);
                return (stdout, end);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn input_sizes_and_the_end_of_input_reach_the_command_in_order() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let tty = Some(TtySize { rows: 24, cols: 80 });
    let (mut input, mut output) = open(&rig, &TerminalStart { tty, ..start("cat") }).await;
    input.stdin(Bytes::from_static(b"typed ")).await.unwrap();
    let Ok(Some(StreamEvent::Stdout { data })) = soon(output.next()).await else { panic!() };
    assert_eq!(&data[..], b"typed ");
    input.resize(50, 132).await.unwrap();
    input.stdin_eof().await.unwrap();
    let (stdout, end) = to_end(&mut output).await;
    assert_eq!(&stdout[..], b"50x132");
    assert_eq!((end.status, end.exit_code), (ExecutionState::Completed, Some(0)));
}

#[tokio::test]
async fn much_input_comes_back_whole() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let (mut input, mut output) = open(&rig, &start("cat")).await;
    let sent: Bytes = (0..4_000_000u32).map(|n| (n % 251) as u8).collect();
    let content = sent.clone();
    let feeder = tokio::spawn(async move {
        input.stdin(content).await.unwrap();
        input.stdin_eof().await.unwrap();
        input
    });
    let (stdout, end) = to_end(&mut output).await;
    assert_eq!(end.exit_code, Some(0));
    assert!(stdout == sent);
    soon(feeder).await.unwrap();
}

#[tokio::test]
async fn a_signal_is_heard_though_the_command_reads_nothing() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let (mut input, mut output) = open(&rig, &start("deaf")).await;
    rig.worker.saw("deaf").await;
    // All that the window takes; the next byte would wait.
    let window = usize::try_from(STDIN_WINDOW_BYTES).unwrap();
    input.stdin(Bytes::from(vec![0; window])).await.unwrap();
    input.control(TerminalControl::Signal { signal: 2 }).await.unwrap();
    rig.worker.gate.add_permits(1);
    let (_, end) = to_end(&mut output).await;
    assert_eq!(end.signal, Some(2));
}

#[tokio::test]
async fn the_command_is_told_when_its_client_goes() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let (input, output) = open(&rig, &start("cat")).await;
    drop((input, output));
    rig.worker.saw("client left").await;
    // The polite way too.
    rig.worker.noticed.send_replace(String::new());
    let (input, _output) = open(&rig, &start("cat")).await;
    input.close().await.unwrap();
    rig.worker.saw("client left").await;
}

#[tokio::test]
async fn refusals_come_before_the_socket_where_they_can_and_as_a_message_else() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let code = |error: ClientError| error.code();
    let unknown = rig.client.terminal("nobody", &start("cat")).await;
    assert_eq!(code(unknown.unwrap_err()), Some(ErrorCode::VmNotFound));
    let stranger = aether_api::client::Client::new(&rig.base, Some("ae_no")).unwrap();
    let refused = stranger.terminal("a", &start("cat")).await;
    assert_eq!(code(refused.unwrap_err()), Some(ErrorCode::Unauthorized));
    let bad = TerminalStart { timeout_s: Some(0), ..start("cat") };
    let (_input, mut output) = rig.client.terminal("a", &bad).await.unwrap();
    assert_eq!(code(soon(output.next()).await.unwrap_err()), Some(ErrorCode::InvalidRequest));
}

/// Sends `messages` on a socket of its own and gives the last text and the close.
async fn raw(rig: &Rig, messages: Vec<Message>) -> (String, Option<CloseFrame>) {
    let url = format!("{}/api/v1/vms/a/terminal", rig.base.replace("http", "ws"));
    let mut request = url.into_client_request().unwrap();
    let key = format!("Bearer {}", rig.key).parse().unwrap();
    request.headers_mut().insert("authorization", key);
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    for message in messages {
        socket.send(message).await.unwrap();
    }
    let mut last = String::new();
    loop {
        match soon(socket.next()).await.unwrap().unwrap() {
            Message::Text(text) => last = text.to_string(),
            Message::Close(frame) => return (last, frame),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_client_that_breaks_the_rules_is_told_which() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let cat = || Message::text(r#"{"command":"cat"}"#);
    let too_much = Message::binary(vec![0; 300 * 1024]);
    for (messages, code) in [
        (vec![Message::binary(vec![0])], "malformed_body"),
        (vec![Message::text("{")], "malformed_body"),
        (vec![Message::text(r#"{"comand":"cat"}"#)], "malformed_body"),
        (vec![cat(), Message::text(r#"{"type":"dance"}"#)], "malformed_body"),
        (vec![cat(), Message::text(r#"{"type":"signal","signal":99}"#)], "invalid_request"),
        (vec![cat(), Message::text(r#"{"type":"resize","rows":0,"cols":1}"#)], "invalid_request"),
        (vec![cat(), Message::binary(vec![7, 1])], "invalid_request"),
        (vec![cat(), too_much], "invalid_request"),
    ] {
        let (text, close) = raw(&rig, messages).await;
        assert!(text.contains(&format!(r#""code":"{code}""#)), "{text}");
        assert_eq!(u16::from(close.unwrap().code), 1008);
    }
}
