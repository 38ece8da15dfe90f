//! What a token that is good may do, and what is written down of it.

use std::time::Duration;

use aether_api::{
    CreateKey, CreateProject, TerminalStart,
    client::{AuditQuery, Client, EventQuery, EventsFrom, VmQuery},
};
use aether_gateway::{GatewayConfig, JwtVerifier, Rate, RateLimits};
use aether_types::{ErrorCode, Role, Scope, project::Quota};
use reqwest::{Method, StatusCode};
use serde_json::json;

use super::{claims, keys::Signer, rig_with_secret, rules, status};
use crate::rig::{Options, Rig, problem};

fn client(rig: &Rig, signer: &Signer, with: serde_json::Value) -> Client {
    Client::new(&rig.base, Some(&signer.token(&claims(with)))).unwrap()
}

#[tokio::test]
async fn jwt_a_token_of_one_project_finds_nothing_of_another() {
    let signer = Signer::secret();
    let jwt = JwtVerifier::with_secret(&[b's'; 32], rules());
    let rig = Rig::with(Options { jwt, ..Options::default() }).await;
    rig.vm("ours").await;
    let project = CreateProject { name: "other".into(), quota: Quota::default() };
    let other = rig.client.create_project(&project).await.unwrap();
    for named in [other.id.to_string(), "other".to_owned()] {
        let theirs = client(&rig, &signer, json!({"role": "admin", "project": named}));
        assert!(theirs.vms(&VmQuery::default()).await.unwrap().items.is_empty());
        let missing = theirs.vm("ours").await.unwrap_err();
        assert_eq!(missing.code(), Some(ErrorCode::VmNotFound));
        // An admin of a project, and not of the platform.
        let refused = theirs.create_project(&project).await.unwrap_err();
        assert_eq!(refused.code(), Some(ErrorCode::Forbidden));
    }
    let ours = client(&rig, &signer, json!({"role": "operator"}));
    assert_eq!(ours.vms(&VmQuery::default()).await.unwrap().items.len(), 1);
    // One that is gone lets nobody in, at once.
    rig.client.delete_project("other").await.unwrap();
    let gone = signer.token(&claims(json!({"project": "other"})));
    assert_eq!(status(&rig, &gone).await, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn jwt_roles_and_scopes_are_those_of_keys() {
    let (rig, signer) = rig_with_secret().await;
    let ask = async |method: Method, path: &str, with: serde_json::Value| {
        let token = signer.token(&claims(with));
        rig.bare(method, path).bearer_auth(token).send().await.unwrap()
    };
    let narrow = json!({"role": "operator", "scope": "vms:read"});
    assert_eq!(ask(Method::GET, "/vms", narrow.clone()).await.status(), StatusCode::OK);
    let refusal = problem(ask(Method::GET, "/tasks", narrow).await).await;
    assert_eq!(
        refusal.detail,
        "`tasks:read` is needed here; the role of this token is operator, narrowed down to vms:read"
    );
    // A scope does not widen a role.
    let wide = json!({"scope": "vms:write keys:write"});
    assert_eq!(ask(Method::DELETE, "/vms/a", wide).await.status(), StatusCode::FORBIDDEN);
    let admin = json!({"role": "admin", "project": "default"});
    assert_eq!(ask(Method::GET, "/projects", admin.clone()).await.status(), StatusCode::OK);
    // Who gives a key gives no more than they have, and the key is nobody's.
    let key = |role| CreateKey {
        name: "ci".into(),
        role,
        scopes: Vec::new(),
        expires_in_s: None,
        project: None,
    };
    let made = client(&rig, &signer, admin).create_key(&key(Role::Viewer)).await.unwrap();
    assert_eq!(made.view.created_by, None);
    let scope = Scope::all().find(|scope| scope.to_string() == "keys:write").unwrap();
    let narrow = json!({"role": "admin", "project": "default", "scope": scope.to_string()});
    let refused = client(&rig, &signer, narrow).create_key(&key(Role::Viewer)).await;
    assert_eq!(refused.unwrap_err().code(), Some(ErrorCode::Forbidden));
}

#[tokio::test]
async fn jwt_the_log_names_the_subject_and_holds_nothing_of_the_token() {
    let (rig, signer) = rig_with_secret().await;
    let token = signer.token(&claims(json!({"sub": "ann/b\nc", "role": "operator"})));
    let request = rig.bare(Method::DELETE, "/vms/none").bearer_auth(&token);
    assert_eq!(request.send().await.unwrap().status(), StatusCode::NOT_FOUND);
    let entries = rig.client.audit(&AuditQuery::default()).await.unwrap().items;
    let [entry] = &entries[..] else { panic!("{entries:?}") };
    assert_eq!(entry.key_prefix.as_deref(), Some("jwt:https://id.example/ann%2Fb%0Ac"));
    assert_eq!((entry.key_id, entry.project_id.is_some(), entry.status), (None, true, 404));
    let signature = token.rsplit_once('.').unwrap().1.as_bytes();
    for file in std::fs::read_dir(rig.folder()).unwrap() {
        let Ok(bytes) = std::fs::read(file.unwrap().path()) else { continue };
        assert!(!bytes.windows(signature.len()).any(|window| window == signature));
    }
}

#[tokio::test]
async fn jwt_each_subject_has_a_rate_of_its_own() {
    let signer = Signer::secret();
    let limits = RateLimits { key: Rate::every(Duration::from_secs(100), 2), address: None };
    let config = GatewayConfig { limits, ..GatewayConfig::default() };
    let jwt = JwtVerifier::with_secret(&[b's'; 32], rules());
    let rig = Rig::with(Options { has_worker: false, config, jwt, ..Options::default() }).await;
    // Other tokens of one subject are the same sender.
    for wanted in [StatusCode::OK, StatusCode::OK, StatusCode::TOO_MANY_REQUESTS] {
        let token = signer.token(&claims(json!({"jti": wanted.as_u16()})));
        assert_eq!(status(&rig, &token).await, wanted);
    }
    let other = signer.token(&claims(json!({"sub": "bob"})));
    let response = rig.bare(Method::GET, "/vms").bearer_auth(other).send().await.unwrap();
    assert_eq!(response.headers()["ratelimit-policy"], "\"subject\";q=2;w=200");
}

#[tokio::test]
async fn jwt_streams_and_terminals_are_no_other_way_in() {
    let (rig, signer) = rig_with_secret().await;
    let good = client(&rig, &signer, json!({"role": "operator"}));
    good.follow_events(&EventQuery::default(), EventsFrom::Now).await.unwrap();
    let Err(missing) = good.terminal("none", &TerminalStart::default()).await else { panic!() };
    assert_eq!(missing.code(), Some(ErrorCode::VmNotFound));
    let bad = client(&rig, &signer, json!({"role": "operator", "aud": "else"}));
    let Err(refused) = bad.follow_events(&EventQuery::default(), EventsFrom::Now).await else {
        panic!()
    };
    assert_eq!(refused.code(), Some(ErrorCode::Unauthorized));
    let Err(refused) = bad.terminal("none", &TerminalStart::default()).await else { panic!() };
    assert_eq!(refused.code(), Some(ErrorCode::Unauthorized));
}
