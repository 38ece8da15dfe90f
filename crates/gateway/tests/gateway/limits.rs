//! How many requests are taken, and from whose pages.

use std::time::Duration;

use aether_api::{CreateKey, client::Client};
use aether_gateway::{GatewayConfig, Origins, Rate, RateLimits};
use aether_types::{ErrorCode, Role};
use reqwest::{Method, Response, StatusCode};

use crate::rig::{Options, Rig, problem};

async fn rig(limits: RateLimits, origins: &[&str]) -> Rig {
    let origins = Origins::new(origins).unwrap();
    let config = GatewayConfig { limits, origins, ..GatewayConfig::default() };
    Rig::with(Options { has_worker: false, config, ..Options::default() }).await
}

/// None comes back while a test runs.
fn slow(burst: u32) -> Option<Rate> {
    Rate::every(Duration::from_secs(100), burst)
}

fn header<'r>(response: &'r Response, name: &str) -> &'r str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn a_key_sends_its_burst_and_is_then_told_when_to_come_again() {
    let limits = RateLimits { key: slow(3), address: None };
    let rig = rig(limits, &[]).await;
    for left in [2, 1, 0] {
        let response = rig.call(Method::GET, "/vms").send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(header(&response, "ratelimit-policy"), "\"key\";q=3;w=300");
        let told = header(&response, "ratelimit");
        assert!(told.starts_with(&format!("\"key\";r={left};t=")), "{told}");
    }
    let response =
        rig.call(Method::POST, "/vms").json(&serde_json::json!({})).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = header(&response, "retry-after").parse().unwrap();
    assert!((90..=100).contains(&wait), "{wait}");
    assert!(header(&response, "ratelimit").starts_with("\"key\";r=0;t="));
    let refusal = problem(response).await;
    assert_eq!(refusal.error_code(), Some(ErrorCode::RateLimited));
    assert_eq!(refusal.retry_after_s, Some(wait));
    // Health is for whoever asks.
    assert_eq!(rig.call(Method::GET, "/health").send().await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn keys_are_counted_apart_and_an_address_together() {
    let limits = RateLimits { key: slow(2), address: None };
    let apart = rig(limits, &[]).await;
    let new = CreateKey {
        name: "other".into(),
        role: Role::Viewer,
        scopes: Vec::new(),
        expires_in_s: None,
        project: None,
    };
    let other = apart.client.create_key(&new).await.unwrap().key;
    apart.call(Method::GET, "/vms").send().await.unwrap();
    let full = apart.call(Method::GET, "/vms").send().await.unwrap();
    assert_eq!(full.status(), StatusCode::TOO_MANY_REQUESTS);
    let client = Client::new(&apart.base, Some(&other)).unwrap();
    client.vms(&aether_api::client::VmQuery::default()).await.unwrap();

    let limits = RateLimits { key: None, address: slow(3) };
    let together = rig(limits, &[]).await;
    for _ in 0..3 {
        let wrong = together.bare(Method::GET, "/vms").bearer_auth("aeth_wrong");
        assert_eq!(wrong.send().await.unwrap().status(), StatusCode::UNAUTHORIZED);
    }
    let good = together.call(Method::GET, "/vms").send().await.unwrap();
    assert_eq!(good.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(header(&good, "ratelimit-policy"), "\"address\";q=3;w=300");
}

#[tokio::test]
async fn without_limits_nothing_is_said_of_them() {
    let rig = rig(RateLimits::default(), &[]).await;
    let response = rig.call(Method::GET, "/vms").send().await.unwrap();
    assert!(response.headers().get("ratelimit").is_none());
}

#[tokio::test]
async fn every_answer_is_data_and_nothing_else() {
    let rig = rig(RateLimits::default(), &[]).await;
    for response in [
        rig.call(Method::GET, "/vms").send().await.unwrap(),
        rig.bare(Method::GET, "/vms").send().await.unwrap(),
        rig.bare(Method::GET, "/health").send().await.unwrap(),
    ] {
        for (name, value) in [
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
            ("referrer-policy", "no-referrer"),
        ] {
            assert_eq!(header(&response, name), value);
        }
    }
}

#[tokio::test]
async fn only_pages_on_the_list_read_answers() {
    let rig = rig(RateLimits::default(), &["https://board.example"]).await;
    let ask = async |method: Method, origin: &str| {
        let mut request = rig.call(method.clone(), "/vms").header("origin", origin);
        if method == Method::OPTIONS {
            request = request.header("access-control-request-method", "POST");
        }
        request.send().await.unwrap()
    };
    let ours = ask(Method::GET, "https://board.example").await;
    assert_eq!(ours.status(), StatusCode::OK);
    assert_eq!(header(&ours, "access-control-allow-origin"), "https://board.example");
    assert_eq!(header(&ours, "vary"), "origin");
    assert!(header(&ours, "access-control-allow-credentials").is_empty());
    let asked = ask(Method::OPTIONS, "https://board.example").await;
    assert_eq!(asked.status(), StatusCode::NO_CONTENT);
    assert_eq!(header(&asked, "access-control-allow-methods"), "GET, POST, PUT, DELETE");
    assert!(header(&asked, "access-control-allow-headers").contains("authorization"));
    for stranger in ["https://evil.example", "null", "https://board.example.evil.example"] {
        let answer = ask(Method::GET, stranger).await;
        assert!(header(&answer, "access-control-allow-origin").is_empty(), "{stranger}");
        assert_eq!(header(&answer, "vary"), "origin");
        let asked = ask(Method::OPTIONS, stranger).await;
        assert_eq!(asked.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}

#[tokio::test]
async fn where_there_is_no_list_no_page_reads_answers() {
    let rig = rig(RateLimits::default(), &[]).await;
    let request = rig.call(Method::GET, "/vms").header("origin", "https://board.example");
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    for name in ["access-control-allow-origin", "vary"] {
        assert!(response.headers().get(name).is_none(), "{name}");
    }
}
