//! Keys that are asked for at their address, and a server of them that does not always answer well.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aether_gateway::JwksTimes;
use axum::{
    Router, extract::State, http::StatusCode as Code, response::IntoResponse as _, routing,
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::AbortHandle};

use super::{claims, keys::Signer, refused, rig_with_jwks, status};
use crate::rig::problem;

#[derive(Clone)]
enum Answer {
    Keys(Value),
    Fails,
    Redirects,
    Never,
    Text(String),
}

struct Shared {
    answer: Mutex<Answer>,
    asked: AtomicUsize,
}

pub(super) struct Peer {
    pub(super) url: String,
    shared: Arc<Shared>,
    served: AbortHandle,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.served.abort();
    }
}

async fn answer(State(shared): State<Arc<Shared>>) -> axum::response::Response {
    shared.asked.fetch_add(1, Ordering::SeqCst);
    let answer = shared.answer.lock().unwrap().clone();
    match answer {
        Answer::Keys(keys) => axum::Json(json!({"keys": keys})).into_response(),
        Answer::Fails => Code::INTERNAL_SERVER_ERROR.into_response(),
        Answer::Redirects => axum::response::Redirect::temporary("/").into_response(),
        Answer::Never => std::future::pending().await,
        Answer::Text(text) => text.into_response(),
    }
}

impl Peer {
    pub(super) async fn new(keys: Value) -> Self {
        let shared =
            Arc::new(Shared { answer: Mutex::new(Answer::Keys(keys)), asked: AtomicUsize::new(0) });
        let router =
            Router::new().route("/jwks", routing::get(answer)).with_state(Arc::clone(&shared));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/jwks", listener.local_addr().unwrap());
        let served = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, shared, served: served.abort_handle() }
    }

    fn say(&self, answer: Answer) {
        *self.shared.answer.lock().unwrap() = answer;
    }

    fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }

    async fn asked_at_least(&self, times: usize) {
        crate::rig::soon(async {
            while self.asked() < times {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

/// Nothing gets old while a test runs.
fn calm() -> JwksTimes {
    JwksTimes { answer_max: Duration::from_secs(10), ..JwksTimes::default() }
}

/// All is old at once, and may be asked for again.
fn hasty() -> JwksTimes {
    JwksTimes { fresh: Duration::ZERO, between: Duration::ZERO, ..calm() }
}

#[tokio::test]
async fn jwt_each_kind_of_key_opens_and_is_asked_for_once() {
    let signers = [Signer::rsa(), Signer::ec(), Signer::ed()];
    let keys: Vec<_> = signers.iter().map(|signer| signer.jwk(signer.algorithm())).collect();
    let peer = Peer::new(json!(keys)).await;
    let rig = rig_with_jwks(&peer, calm()).await;
    assert_eq!(peer.asked(), 0, "nobody has come yet");
    let good: Vec<_> = signers
        .iter()
        .map(|signer| signer.token_of(signer.algorithm(), &claims(json!({}))))
        .collect();
    // At once: they all wait for the same answer.
    let statuses = futures::future::join_all(good.iter().cycle().take(12).map(|t| status(&rig, t)));
    assert!(statuses.await.iter().all(|status| *status == StatusCode::OK));
    assert_eq!(peer.asked(), 1);
}

#[tokio::test]
async fn jwt_no_token_chooses_how_it_is_checked() {
    let (rsa, ec, ed) = (Signer::rsa(), Signer::ec(), Signer::ed());
    let jwks = json!([rsa.jwk("rsa"), ec.jwk("ec"), ed.jwk("ed"), Signer::secret().jwk("oct")]);
    let peer = Peer::new(jwks).await;
    let rig = rig_with_jwks(&peer, calm()).await;
    let claims = claims(json!({}));
    let with = |signer: &Signer, header: Value| signer.token_with(&header, &claims);
    let stranger = Signer::ec();
    let mut bad = vec![
        with(&rsa, json!({"alg": "RS512", "kid": "rsa"})),
        with(&rsa, json!({"alg": "PS256", "kid": "rsa"})),
        with(&rsa, json!({"alg": "RS256"})),
        with(&rsa, json!({"alg": "RS256", "kid": "ec"})),
        with(&ed, json!({"alg": "EdDSA", "kid": "ec"})),
        with(&ed, json!({"alg": "ES256", "kid": "ec"})),
        with(&ec, json!({"alg": "ES256", "kid": "ed"})),
        with(&ec, json!({"alg": "none", "kid": "ec"})),
        with(&stranger, json!({"alg": "ES256", "kid": "ec"})),
        // Its own key, in the header.
        with(&stranger, json!({"alg": "ES256", "kid": "ec", "jwk": stranger.jwk("ec")})),
        with(&stranger, json!({"alg": "ES256", "kid": "ec", "jku": "http://127.0.0.1/"})),
        with(&Signer::secret(), json!({"alg": "HS256", "kid": "oct"})),
    ];
    // What everybody may have, as if it were a secret.
    for (signer, kid) in [(&rsa, "rsa"), (&ec, "ec"), (&ed, "ed")] {
        let jwk = signer.jwk(kid);
        let n = jwk["n"].as_str().unwrap_or_default();
        for secret in [signer.public(), jwk.to_string().into_bytes(), n.as_bytes().to_vec()] {
            for alg in ["HS256", signer.algorithm()] {
                let header = json!({"alg": alg, "kid": kid});
                bad.push(with(&Signer::Secret(secret.clone()), header));
            }
        }
    }
    for token in bad {
        assert_eq!(refused(&rig, &token).await, "the token is not accepted here", "{token}");
    }
    assert_eq!(status(&rig, &ec.token_of("ec", &claims)).await, StatusCode::OK);
}

#[tokio::test]
async fn jwt_a_key_that_is_not_known_is_asked_for_once() {
    let (old, new) = (Signer::ec(), Signer::ed());
    let peer = Peer::new(json!([old.jwk("old")])).await;
    let rig = rig_with_jwks(&peer, calm()).await;
    let claims = claims(json!({}));
    assert_eq!(status(&rig, &old.token_of("old", &claims)).await, StatusCode::OK);
    // They change, and many come with the new one.
    peer.say(Answer::Keys(json!([new.jwk("new")])));
    let token = new.token_of("new", &claims);
    let statuses = futures::future::join_all((0..8).map(|_| status(&rig, &token))).await;
    assert!(statuses.iter().all(|status| *status == StatusCode::OK), "{statuses:?}");
    assert_eq!(peer.asked(), 2);
    // What was taken back is gone, and names that are made up do not have the server asked.
    for n in 0..20 {
        refused(&rig, &new.token_of(&n.to_string(), &claims)).await;
    }
    refused(&rig, &old.token_of("old", &claims)).await;
    assert_eq!(peer.asked(), 2);
}

#[tokio::test]
async fn jwt_keys_that_are_old_are_asked_for_while_they_are_used() {
    let signer = Signer::ec();
    let peer = Peer::new(json!([signer.jwk("a")])).await;
    let rig = rig_with_jwks(&peer, hasty()).await;
    let token = signer.token_of("a", &claims(json!({})));
    assert_eq!(status(&rig, &token).await, StatusCode::OK);
    // A server that does not answer holds nobody up.
    peer.say(Answer::Never);
    assert_eq!(status(&rig, &token).await, StatusCode::OK);
    peer.asked_at_least(2).await;
    assert_eq!(status(&rig, &token).await, StatusCode::OK);
    assert_eq!(peer.asked(), 2, "one at a time");
    // One that nobody waited for is not the last.
    peer.say(Answer::Keys(json!([signer.jwk("a")])));
    let rig = rig_with_jwks(&peer, hasty()).await;
    crate::rig::soon(async {
        while peer.asked() < 6 {
            assert_eq!(status(&rig, &token).await, StatusCode::OK);
        }
    })
    .await;
}

#[tokio::test]
async fn jwt_a_server_that_fails_leaves_the_keys_that_are_known() {
    let signer = Signer::ec();
    let jwk = signer.jwk("a");
    let peer = Peer::new(json!([jwk])).await;
    let rig = rig_with_jwks(&peer, hasty()).await;
    let token = signer.token_of("a", &claims(json!({})));
    assert_eq!(status(&rig, &token).await, StatusCode::OK);
    let many: Vec<_> = (0..33).map(|n| signer.jwk(&n.to_string())).collect();
    let large = json!({"keys": [jwk], "more": "x".repeat(64 << 10)}).to_string();
    for wrong in [
        Answer::Fails,
        Answer::Redirects,
        Answer::Text("<html>".into()),
        Answer::Text(large),
        Answer::Keys(json!(many)),
        Answer::Keys(json!([jwk, jwk])),
    ] {
        peer.say(wrong);
        let before = peer.asked();
        // One that is not known waits for the answer.
        refused(&rig, &signer.token_of("0", &claims(json!({})))).await;
        assert!(peer.asked() > before);
        assert_eq!(status(&rig, &token).await, StatusCode::OK);
    }
}

#[tokio::test]
async fn jwt_without_any_key_it_is_the_server_that_cannot() {
    let signer = Signer::ec();
    let peer = Peer::new(json!([signer.jwk("a")])).await;
    let token = signer.token_of("a", &claims(json!({})));
    let slow = JwksTimes { answer_max: Duration::from_millis(50), ..hasty() };
    let rig = rig_with_jwks(&peer, slow).await;
    for wrong in [Answer::Fails, Answer::Never] {
        peer.say(wrong);
        let request = rig.bare(Method::GET, "/vms").bearer_auth(&token);
        let refusal = problem(request.send().await.unwrap()).await;
        assert_eq!((refusal.status, refusal.retry_after_s.is_some()), (503, true), "{refusal:?}");
        assert!(!refusal.detail.contains("127.0.0.1"), "{refusal:?}");
    }
    peer.say(Answer::Keys(json!([signer.jwk("a")])));
    assert_eq!(status(&rig, &token).await, StatusCode::OK);
    // Nor are keys good for ever that nobody confirms.
    let short = JwksTimes { kept: Duration::ZERO, ..hasty() };
    let rig = rig_with_jwks(&peer, short).await;
    assert_eq!(status(&rig, &token).await, StatusCode::SERVICE_UNAVAILABLE);
}
