//! Peers that must not get in, and bytes that are no protocol.

use aether_protocol::codec::frame;
use aether_protocol::host::{self, FrameReader};
use aether_protocol::limits::FRAME_BYTES_MAX;
use aether_protocol::{
    ErrorCode, FromGuest, FromGuestBody, Hello, Ping, Request, Stdin, ToGuest, Token, handshake,
};
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{LIMIT, TestAgent, gone, sh, wait_for};

/// Sends bytes and gives the code of the refusal.
async fn refusal(agent: &TestAgent, bytes: &[u8]) -> ErrorCode {
    let mut stream = agent.connect().await;
    stream.write_all(bytes).await.unwrap();
    let mut reader = FrameReader::<_, FromGuest>::new(stream);
    let message = tokio::time::timeout(LIMIT, reader.next()).await.unwrap().unwrap().unwrap();
    let Some(FromGuestBody::Refused(refused)) = message.body else { panic!("{message:?}") };
    assert!(reader.next().await.unwrap().is_none());
    refused.code()
}

fn framed(message: impl Into<ToGuest>) -> Bytes {
    frame(&message.into()).unwrap()
}

#[tokio::test]
async fn wrong_token_is_refused() {
    let agent = TestAgent::start();
    let wrong = Token::from_bytes([1; 32]);
    let error = host::ping(agent.connect().await, &wrong, LIMIT).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Unauthorized));
    host::ping(agent.connect().await, &agent.token, LIMIT).await.unwrap();
}

#[tokio::test]
async fn wrong_generation_and_unknown_requests_are_refused() {
    let agent = TestAgent::start();
    let hello = handshake::hello(&agent.token);
    let later = Hello { generation: 99, generation_min: 98, ..hello.clone() };
    assert_eq!(refusal(&agent, &framed(later)).await, ErrorCode::UnsupportedGeneration);
    let unknown = [framed(hello.clone()), framed(Request::default())].concat();
    assert_eq!(refusal(&agent, &unknown).await, ErrorCode::UnknownRequest);
    let no_request = [framed(hello.clone()), framed(hello)].concat();
    assert_eq!(refusal(&agent, &no_request).await, ErrorCode::BadMessage);
    assert_eq!(refusal(&agent, &framed(Request::from(Ping {}))).await, ErrorCode::BadMessage);
}

#[tokio::test]
async fn stranger_cannot_make_the_agent_take_memory() {
    let agent = TestAgent::start();
    let length = u32::try_from(FRAME_BYTES_MAX).unwrap().to_be_bytes();
    assert_eq!(refusal(&agent, &length).await, ErrorCode::BadMessage);
}

#[tokio::test]
async fn hostile_bytes_end_their_connection_and_nothing_else() {
    let agent = TestAgent::start();
    let mut session = agent.begin(sh("echo ready; read line")).await.unwrap();
    wait_for(&mut session, "ready").await;
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for round in 0..300_usize {
        let mut bytes = if round % 2 == 0 {
            framed(handshake::hello(&agent.token)).to_vec()
        } else {
            Vec::new()
        };
        for _ in 0..round {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.push(state.to_le_bytes()[0]);
        }
        if round % 4 == 0 && bytes.len() > 40 {
            // A length that is right, so that the body is looked at.
            let body = u32::try_from(bytes.len() - 4).unwrap().to_be_bytes();
            bytes[..4].copy_from_slice(&body);
        }
        let mut stream = agent.connect().await;
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // It may be reset, as the agent reads no more than it must.
        let _ = tokio::time::timeout(LIMIT, stream.read_to_end(&mut answer)).await.unwrap();
    }
    host::ping(agent.connect().await, &agent.token, LIMIT).await.unwrap();
    session.input().stdin(Bytes::from_static(b"\n")).await.unwrap();
}

#[tokio::test]
async fn host_that_passes_its_window_loses_its_run() {
    let agent = TestAgent::start();
    let mut stream = agent.connect().await;
    let run = aether_protocol::Run { stdin: true, ..sh("echo $$; exec sleep 1000") };
    stream.write_all(&framed(handshake::hello(&agent.token))).await.unwrap();
    stream.write_all(&framed(Request::from(run))).await.unwrap();
    let (read, mut write) = stream.into_split();
    let mut reader = FrameReader::<_, FromGuest>::new(read);
    let flood = async {
        let data = Bytes::from(vec![0; 65_536]);
        let frame = framed(Stdin { data });
        while write.write_all(&frame).await.is_ok() {}
    };
    let watch = async {
        let (mut pid, mut code) = (0, None);
        while let Ok(Some(message)) = reader.next().await {
            match message.body {
                Some(FromGuestBody::Started(started)) => pid = started.pid,
                Some(FromGuestBody::Failed(failed)) => code = Some(failed.code()),
                _ => {}
            }
        }
        (pid, code)
    };
    let ((), (pid, code)) =
        tokio::time::timeout(LIMIT, async { tokio::join!(flood, watch) }).await.unwrap();
    // The reset may overtake the reason, not the end.
    assert!(matches!(code, Some(ErrorCode::BadMessage) | None));
    gone(&pid.to_string()).await;
}
