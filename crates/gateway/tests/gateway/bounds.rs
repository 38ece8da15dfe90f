//! Too much at once, too slow, too strange.

use std::{sync::Arc, time::Duration};

use aether_api::{ComponentHealth, HealthStatus, StreamEvent, client::VmQuery};
use aether_gateway::{GatewayConfig, Probe};
use aether_types::ErrorCode;
use async_trait::async_trait;
use reqwest::{Method, StatusCode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::rig::{Options, Rig, command, problem, soon, waiting};

fn with(config: GatewayConfig) -> Options {
    Options { config, ..Options::default() }
}

#[tokio::test]
async fn a_full_server_answers_503_at_once_and_health_still_answers() {
    let rig = Rig::with(with(GatewayConfig { requests_max: 1, ..GatewayConfig::default() })).await;
    rig.vm("a").await;
    let client = rig.client.clone();
    let waiter = tokio::spawn(async move {
        client.execute("a", &command("gate", &[]), &waiting()).await.unwrap()
    });
    rig.worker.saw("gate").await;
    let response = rig.call(Method::GET, "/vms").send().await.unwrap();
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(problem(response).await.error_code(), Some(ErrorCode::Unavailable));
    rig.client.health().await.unwrap();
    rig.worker.gate.add_permits(1);
    soon(waiter).await.unwrap();
    rig.client.vms(&VmQuery::default()).await.unwrap();
}

#[tokio::test]
async fn streams_have_a_bound_of_their_own_and_give_their_place_back() {
    let rig = Rig::with(with(GatewayConfig { streams_max: 1, ..GatewayConfig::default() })).await;
    rig.vm("a").await;
    let mut first = rig.client.execute_stream("a", &command("gate", &[]), None).await.unwrap();
    let second = rig.client.execute_stream("a", &command("echo", &[]), None).await;
    assert_eq!(second.unwrap_err().code(), Some(ErrorCode::Unavailable));
    rig.worker.gate.add_permits(1);
    while !matches!(soon(first.next()).await.unwrap(), None | Some(StreamEvent::End(_))) {}
    while soon(first.next()).await.unwrap().is_some() {}
    // The place is given back with the stream, a moment after its last byte.
    loop {
        let again = rig.client.execute_stream("a", &command("echo", &[]), None).await;
        match again {
            Ok(_) => break,
            Err(error) => assert_eq!(error.code(), Some(ErrorCode::Unavailable)),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_body_that_stands_still_is_refused() {
    let config =
        GatewayConfig { idle_limit: Duration::from_millis(50), ..GatewayConfig::default() };
    let rig = Rig::with(with(config)).await;
    rig.vm("a").await;
    let body = reqwest::Body::wrap_stream(futures::stream::pending::<std::io::Result<Vec<u8>>>());
    let request = rig.call(Method::PUT, "/vms/a/files?path=/f").body(body);
    let response = soon(request.send()).await.unwrap();
    assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
}

#[tokio::test]
async fn bytes_that_are_no_request_get_400_and_the_next_one_is_served() {
    let rig = Rig::new().await;
    let address = rig.base.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"\x16\x03\x01 hello\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&answer));
    rig.client.health().await.unwrap();
}

#[tokio::test]
async fn the_end_waits_no_longer_than_its_limit() {
    let config =
        GatewayConfig { shutdown_limit: Duration::from_millis(50), ..GatewayConfig::default() };
    let rig = Rig::with(with(config)).await;
    // A request that never ends by itself: its body does not come.
    let address = rig.base.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /api/v1/vms HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: 10\r\nexpect: 100-continue\r\n\r\n",
        rig.key
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // `100 Continue` says that the handler is waiting for the body.
    let mut interim = [0; 12];
    soon(stream.read_exact(&mut interim)).await.unwrap();
    rig.shutdown.cancel();
    soon(rig.served).await.unwrap().unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

/// Does what its text says.
struct Scripted(&'static str);

#[async_trait]
impl Probe for Scripted {
    async fn check(&self) -> ComponentHealth {
        match self.0 {
            "panic" => panic!("as it was told"),
            "hang" => std::future::pending().await,
            text => ComponentHealth::new(HealthStatus::Degraded, text),
        }
    }
}

fn probing(texts: &[&'static str]) -> Options {
    let probe = |text| ("other".to_owned(), Arc::new(Scripted(text)) as Arc<dyn Probe>);
    Options { probes: texts.iter().map(|&text| probe(text)).collect(), ..Options::default() }
}

#[tokio::test]
async fn a_handler_that_panics_is_a_500_and_the_server_goes_on() {
    let rig = Rig::with(probing(&["panic"])).await;
    let response = rig.bare(Method::GET, "/health").send().await.unwrap();
    assert_eq!(problem(response).await.error_code(), Some(ErrorCode::Internal));
    rig.client.vms(&VmQuery::default()).await.unwrap();
}

#[tokio::test]
async fn health_is_as_bad_as_its_worst_component_and_always_answers() {
    let rig = Rig::with(probing(&["slow"])).await;
    let health = rig.client.health().await.unwrap();
    assert_eq!(health.status, HealthStatus::Degraded);
    assert_eq!(health.components["other"].detail.as_deref(), Some("slow"));
    let rig = Rig::with(probing(&["hang"])).await;
    let response = soon(rig.bare(Method::GET, "/health").send()).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(soon(rig.client.health()).await.unwrap().status, HealthStatus::Unavailable);
}
