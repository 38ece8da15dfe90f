//! Tokens: what is wrong with each in turn, and what a good one opens.

mod keys;
mod peer;
mod rights;

use std::time::Duration;

use aether_gateway::{JwksTimes, JwtRules, JwtVerifier};
use aether_types::{ErrorCode, Timestamp};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use self::keys::{Signer, encoded};
use crate::rig::{Options, Rig, problem};

const ISSUER: &str = "https://id.example";

fn rules() -> JwtRules {
    JwtRules {
        audience: "aetherium".into(),
        issuer: Some(ISSUER.into()),
        leeway: Duration::from_mins(1),
        lifetime_max: Duration::from_hours(24),
    }
}

fn now() -> i64 {
    Timestamp::now().unix_ms() / 1000
}

/// Of a token that is good, with these instead; `null` takes one out.
fn claims(other: Value) -> Value {
    let mut claims = json!({
        "iss": ISSUER, "sub": "ann", "aud": "aetherium", "role": "viewer",
        "iat": now(), "exp": now() + 600,
    });
    let Value::Object(other) = other else { panic!("{other}") };
    for (name, value) in other {
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(&name);
        } else {
            claims[name] = value;
        }
    }
    claims
}

async fn rig(jwt: JwtVerifier) -> Rig {
    Rig::with(Options { has_worker: false, jwt: Some(jwt), ..Options::default() }).await
}

async fn rig_with_secret() -> (Rig, Signer) {
    let signer = Signer::secret();
    let Signer::Secret(secret) = &signer else { panic!("no secret") };
    (rig(JwtVerifier::with_secret(secret, rules()).unwrap()).await, signer)
}

async fn rig_with_jwks(peer: &peer::Peer, times: JwksTimes) -> Rig {
    rig(JwtVerifier::with_jwks(&peer.url, times, rules()).unwrap()).await
}

async fn status(rig: &Rig, token: &str) -> StatusCode {
    let request = rig.bare(Method::GET, "/vms").bearer_auth(token);
    request.send().await.unwrap().status()
}

/// What is said to who is not let in.
async fn refused(rig: &Rig, token: &str) -> String {
    let request = rig.bare(Method::GET, "/vms").bearer_auth(token);
    let refusal = problem(request.send().await.unwrap()).await;
    assert_eq!(refusal.error_code(), Some(ErrorCode::Unauthorized), "{refusal:?}");
    refusal.detail
}

#[tokio::test]
async fn jwt_each_claim_is_looked_at() {
    let (rig, signer) = rig_with_secret().await;
    let now = now();
    for good in [
        json!({}),
        json!({"aud": ["else", "aetherium"]}),
        json!({"iat": null}),
        json!({"exp": now - 50}),
        json!({"nbf": now + 50, "iat": now + 50}),
        json!({"exp": now + 86_000}),
        json!({"project": "default", "role": "operator", "email": ["anything"]}),
    ] {
        let token = signer.token(&claims(good.clone()));
        assert_eq!(status(&rig, &token).await, StatusCode::OK, "{good}");
    }
    for (bad, why) in [
        (json!({"exp": null}), "a claim is missing"),
        (json!({"exp": "later"}), "a claim is missing"),
        (json!({"exp": now - 70}), "past its time"),
        (json!({"exp": now + 86_400 + 90, "iat": null}), "too long"),
        (json!({"exp": now + 3600, "iat": now - 86_400}), "too long"),
        (json!({"exp": 1e18}), "too long"),
        (json!({"iat": now + 70}), "`iat`"),
        (json!({"iat": "now"}), "a claim is missing"),
        (json!({"nbf": now + 70}), "`nbf`"),
        (json!({"nbf": "soon"}), "a claim is missing"),
        (json!({"aud": null}), "a claim is missing"),
        (json!({"aud": []}), "`aud`"),
        (json!({"aud": "else"}), "`aud`"),
        (json!({"aud": ["else", "aetherium2"]}), "`aud`"),
        (json!({"iss": null}), "a claim is missing"),
        (json!({"iss": "https://id.example/"}), "`iss`"),
        (json!({"iss": [ISSUER]}), "a claim is missing"),
        (json!({"sub": null}), "`sub`"),
        (json!({"sub": ""}), "`sub`"),
        (json!({"sub": "s".repeat(129)}), "`sub`"),
        (json!({"role": null}), "`role`"),
        (json!({"role": "root"}), "`role`"),
        (json!({"role": ["admin"]}), "a claim is missing"),
        (json!({"role": "admin"}), "`project`"),
        (json!({"scope": ""}), "`scope`"),
        (json!({"scope": "vms:read openid"}), "`scope`"),
        (json!({"project": "nobody"}), "`project`"),
    ] {
        let detail = refused(&rig, &signer.token(&claims(bad.clone()))).await;
        assert!(detail.contains(why), "{bad}: {detail}");
    }
}

#[tokio::test]
async fn jwt_a_secret_is_for_one_algorithm_and_a_token_is_whole() {
    let (rig, signer) = rig_with_secret().await;
    let good = signer.token(&claims(json!({})));
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let more = encoded(claims(json!({"role": "admin", "project": "default"})).to_string());
    let header = signed.split_once('.').unwrap().0;
    let of = |header: Value| signer.token_with(&header, &claims(json!({})));
    for (bad, what) in [
        (Signer::secret_of(b'x').token(&claims(json!({}))), "another secret"),
        (format!("{header}.{more}.{signature}"), "other claims"),
        (
            format!(
                "{}.{}.{signature}",
                encoded(r#"{"alg":"none"}"#),
                signed.split_once('.').unwrap().1
            ),
            "none",
        ),
        (format!("{signed}.{}", &signature[..signature.len() - 2]), "half a signature"),
        (of(json!({"alg": "none"})), "none, signed"),
        (of(json!({"alg": "HS512"})), "another hash"),
        (of(json!({"alg": "RS256"})), "another kind"),
        (of(json!({"alg": "HS256", "crit": ["b64"], "b64": false})), "critical"),
        (of(json!({})), "no algorithm"),
        (signer.token(&claims(json!({"long": "x".repeat(8192)}))), "long"),
        ("a.b.c".to_owned(), "nothing"),
    ] {
        assert_eq!(refused(&rig, &bad).await, "the token is not accepted here", "{what}");
    }
    assert_eq!(status(&rig, &good).await, StatusCode::OK);
}

#[tokio::test]
async fn jwt_without_a_verifier_a_token_is_a_key_that_is_not_known() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    let token = Signer::secret().token(&claims(json!({})));
    let of_token = refused(&rig, &token).await;
    assert_eq!(of_token, refused(&rig, "aeth_wrong").await);
    // And keys go on where tokens are accepted.
    let (rig, _) = rig_with_secret().await;
    assert_eq!(status(&rig, &rig.key).await, StatusCode::OK);
    assert_eq!(refused(&rig, "aeth_wrong").await, of_token);
}
