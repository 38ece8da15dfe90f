//! Keys, and what they may do.

use std::time::Duration;

use aether_api::{
    CreateKey, CreateVm, Problem, TerminalStart,
    client::{Client, ClientError, KeyQuery, VmQuery},
};
use aether_gateway::{Gateway, NewKey};
use aether_types::{Access, ErrorCode, KeyId, ProjectId, Role, Scope, TaskId, VmId};
use reqwest::{Method, StatusCode};

use crate::rig::{Options, Rig, command, problem, waiting};

fn asking(role: Role, scopes: &[&str]) -> CreateKey {
    let scopes = scopes.iter().map(|scope| scope.parse().unwrap()).collect();
    CreateKey { name: "ci".into(), role, scopes, expires_in_s: None, project: None }
}

async fn client(rig: &Rig, role: Role, scopes: &[&str]) -> Client {
    let made = rig.client.create_key(&asking(role, scopes)).await.unwrap();
    Client::new(&rig.base, Some(&made.key)).unwrap()
}

fn refused<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> Problem {
    match answer.unwrap_err() {
        ClientError::Problem(problem) => *problem,
        other => panic!("{other:?}"),
    }
}

/// With ids of things that there are not.
fn filled(path: &str) -> String {
    path.replace("{vm}", "a")
        .replace("{execution}", &VmId::new().to_string())
        .replace("{task}", &TaskId::new().to_string())
        .replace("{snapshot}", "a")
        .replace("{template}", "a")
        .replace("{tool}", "go")
        .replace("{key}", &KeyId::new().to_string())
        .replace("{project}", "a")
        .replace("{worker}", "a")
        .replace("{queue}", "shared")
}

#[tokio::test]
async fn every_route_has_a_rule_and_is_closed_to_keys_without_it() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    let mut keys = Vec::new();
    for scope in Scope::all() {
        let access = Access { project: ProjectId::DEFAULT, role: Role::Admin, scopes: vec![scope] };
        let made = rig.client.create_key(&asking(Role::Admin, &[&scope.to_string()])).await;
        keys.push((access, made.unwrap().key));
    }
    let rules = Gateway::rules();
    let routes: Vec<_> = rules.iter().map(|(m, path, _)| (m.clone(), path.clone())).collect();
    assert_eq!(routes, Gateway::routes());
    for (method, path, rule) in rules {
        let Some(needed) = rule else {
            assert!(["/api/v1/health", "/openapi.json"].contains(&&*path), "{path} is open");
            continue;
        };
        assert_eq!(
            needed.verb == aether_types::Verb::Read,
            path.ends_with("/logs/query") || method == Method::GET && !path.ends_with("/terminal"),
            "{method} {path}"
        );
        for (access, key) in &keys {
            let request = rig.bare(method.clone(), &filled(&path)).bearer_auth(key);
            let response = request.send().await.unwrap();
            let may = access.allows(needed);
            let scope = access.scopes[0];
            assert_eq!(response.status() != StatusCode::FORBIDDEN, may, "{method} {path} {scope}");
            if !may {
                let refusal = problem(response).await;
                assert_eq!(refusal.error_code(), Some(ErrorCode::Forbidden));
                assert!(refusal.detail.contains(&format!("`{needed}`")), "{}", refusal.detail);
            }
        }
    }
}

#[tokio::test]
async fn a_viewer_looks_an_operator_works_and_neither_gives_keys() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let viewer = client(&rig, Role::Viewer, &[]).await;
    let operator = client(&rig, Role::Operator, &[]).await;
    for one in [&viewer, &operator] {
        assert_eq!(one.vms(&VmQuery::default()).await.unwrap().items.len(), 1);
        let answer = one.keys(&KeyQuery::default()).await;
        assert_eq!(refused(answer).error_code(), Some(ErrorCode::Forbidden));
        let answer = one.create_key(&asking(Role::Viewer, &[])).await;
        assert_eq!(refused(answer).error_code(), Some(ErrorCode::Forbidden));
    }
    let answer = viewer.execute("a", &command("echo", &[]), &waiting()).await;
    assert_eq!(
        refused(answer).detail,
        "`executions:write` is needed here; the role of this key is viewer"
    );
    let made = CreateVm { name: Some("b".into()), ..CreateVm::default() };
    assert_eq!(refused(viewer.create_vm(&made, &waiting()).await).status, 403);
    assert_eq!(rig.client.vms(&VmQuery::default()).await.unwrap().items.len(), 1);
    operator.create_vm(&made, &waiting()).await.unwrap();
    operator.delete_vm("b", &waiting()).await.unwrap();
    let Err(refusal) = viewer.terminal("a", &TerminalStart::default()).await else {
        panic!("a viewer has a terminal");
    };
    assert_eq!(refusal.code(), Some(ErrorCode::Forbidden));
}

#[tokio::test]
async fn nobody_gives_more_than_they_have() {
    let rig = Rig::new().await;
    let narrow = client(&rig, Role::Admin, &["keys:write", "vms:read"]).await;
    for (role, scopes, lacks) in [
        (Role::Admin, &[][..], "vms:write"),
        (Role::Viewer, &[], "executions:read"),
        (Role::Admin, &["vms:read", "files:write"], "files:read"),
    ] {
        let refusal = refused(narrow.create_key(&asking(role, scopes)).await);
        assert_eq!(refusal.error_code(), Some(ErrorCode::Forbidden));
        assert!(refusal.detail.contains(&format!("lacks `{lacks}`")), "{}", refusal.detail);
    }
    let made = narrow.create_key(&asking(Role::Viewer, &["vms:read", "vms:read"])).await.unwrap();
    assert_eq!(made.view.scopes.len(), 1);
    let maker = rig.client.keys(&KeyQuery::default()).await.unwrap().items;
    let of_narrow = maker.iter().find(|key| key.scopes.len() == 2).unwrap();
    assert_eq!(made.view.created_by, Some(of_narrow.id));
}

#[tokio::test]
async fn a_key_is_shown_once_and_is_nowhere_in_the_store() {
    let rig = Rig::new().await;
    let made = rig.client.create_key(&asking(Role::Operator, &["vms:read"])).await.unwrap();
    assert!(made.key.starts_with(&made.view.prefix) && made.key.len() == 77);
    assert!(!format!("{made:?}").contains(&made.key));
    let shown = rig.call(Method::GET, "/keys?revoked=true").send().await.unwrap();
    let shown = shown.text().await.unwrap();
    assert!(shown.contains(&made.view.prefix) && !shown.contains(&made.key[20..]), "{shown}");
    let random = &made.key.as_bytes()[20..];
    for file in std::fs::read_dir(rig.folder()).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        assert!(!bytes.windows(random.len()).any(|window| window == random));
    }
}

#[tokio::test]
async fn a_key_that_is_revoked_anywhere_opens_nothing_at_once() {
    let rig = Rig::new().await;
    let here = rig.client.create_key(&asking(Role::Viewer, &[])).await.unwrap();
    let elsewhere = rig.client.create_key(&asking(Role::Viewer, &[])).await.unwrap();
    let status = async |key: &str| {
        let request = rig.bare(Method::GET, "/vms").bearer_auth(key);
        request.send().await.unwrap().status()
    };
    for made in [&here, &elsewhere] {
        assert_eq!(status(&made.key).await, StatusCode::OK);
    }
    let revoked = rig.client.revoke_key(here.view.id).await.unwrap();
    assert!(revoked.revoked_at.is_some());
    // As another gateway on the same store does it.
    rig.store.revoke_key(elsewhere.view.id).await.unwrap();
    for made in [&here, &elsewhere] {
        assert_eq!(status(&made.key).await, StatusCode::UNAUTHORIZED);
    }
    let again = rig.client.revoke_key(here.view.id).await.unwrap();
    assert_eq!(again, revoked);
    assert_eq!(rig.client.key(here.view.id).await.unwrap(), revoked);
    assert_eq!(rig.client.keys(&KeyQuery::default()).await.unwrap().items.len(), 1);
    let all = KeyQuery { revoked: true, ..KeyQuery::default() };
    assert_eq!(rig.client.keys(&all).await.unwrap().items.len(), 3);
}

#[tokio::test]
async fn a_key_past_its_time_is_told_so_and_opens_nothing() {
    let rig = Rig::new().await;
    let access = Access { project: ProjectId::DEFAULT, role: Role::Admin, scopes: Vec::new() };
    let new =
        NewKey { name: "short".into(), access, created_by: None, expires_in: Some(Duration::ZERO) };
    let (text, _) = rig.keys.create(&*rig.store, new).await.unwrap();
    let request = rig.bare(Method::GET, "/vms").bearer_auth(&text);
    let refusal = problem(request.send().await.unwrap()).await;
    assert_eq!(refusal.error_code(), Some(ErrorCode::Unauthorized));
    assert_eq!(refusal.detail, "the key is past its time; make another");
    let day = CreateKey { expires_in_s: Some(86_400), ..asking(Role::Viewer, &[]) };
    let made = rig.client.create_key(&day).await.unwrap().view;
    assert_eq!(made.expires_at, Some(made.created_at.plus_ms(86_400_000)));
}

#[tokio::test]
async fn the_use_of_a_key_is_noted() {
    let rig = Rig::new().await;
    let made = rig.client.create_key(&asking(Role::Viewer, &[])).await.unwrap();
    assert_eq!(made.view.last_used_at, None);
    let viewer = Client::new(&rig.base, Some(&made.key)).unwrap();
    viewer.vms(&VmQuery::default()).await.unwrap();
    // Its end waits for what is still being written.
    rig.shutdown.cancel();
    rig.served.await.unwrap().unwrap();
    let key = rig.store.key(made.view.id).await.unwrap().unwrap();
    assert!(key.last_used_at.unwrap() >= key.created_at);
}
