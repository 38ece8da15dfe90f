//! Quotas as clients meet them.

use aether_api::{
    CreateKey, CreateProject, CreateVm, ForkVm,
    client::{CallOptions, Client},
};
use aether_types::{
    ErrorCode, Role,
    project::{Quota, QuotaResource, Shortage, Usage},
};
use reqwest::Method;

use crate::rig::{Rig, done, problem, waiting};

/// A project of this quota, and an admin of it.
async fn bounded(rig: &Rig, quota: Quota) -> (String, Client) {
    let new = CreateProject { name: "bounded".into(), quota };
    assert_eq!(rig.client.create_project(&new).await.unwrap().quota, quota);
    let key = CreateKey {
        name: "admin".into(),
        role: Role::Admin,
        scopes: Vec::new(),
        expires_in_s: None,
        project: Some(new.name),
    };
    let key = rig.client.create_key(&key).await.unwrap().key;
    let client = Client::new(&rig.base, Some(&key)).unwrap();
    (key, client)
}

fn vm(name: &str, vcpus: u32) -> CreateVm {
    CreateVm { name: Some(name.into()), vcpus: Some(vcpus), ..CreateVm::default() }
}

#[tokio::test]
async fn more_than_the_quota_is_refused_with_the_numbers() {
    let rig = Rig::new().await;
    let quota = Quota { vcpus: Some(3), ..Quota::default() };
    let (key, client) = bounded(&rig, quota).await;
    done(client.create_vm(&vm("a", 2), &waiting()).await.unwrap());
    let body = serde_json::json!({"name": "b", "vcpus": 2});
    let request = rig.bare(Method::POST, "/vms").bearer_auth(&key).json(&body);
    let refusal = problem(request.send().await.unwrap()).await;
    assert_eq!((refusal.status, refusal.error_code()), (403, Some(ErrorCode::QuotaExceeded)));
    let shortage = Shortage { resource: QuotaResource::Vcpus, limit: 3, used: 2, asked: 2 };
    assert_eq!(refusal.quota, Some(shortage));
    assert_eq!(
        refusal.detail,
        "the project's quota of vcpus is 3; 2 are used, and 2 more are asked for"
    );
    let clones = ForkVm { count: Some(2), ..ForkVm::default() };
    let refused = client.fork_vm("a", &clones, &CallOptions::default()).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::QuotaExceeded));
    let seen = client.quota().await.unwrap();
    assert_eq!(seen.quota, quota);
    let used = Usage { vms: 1, vcpus: 2, memory_mb: 256, waiting_tasks: 0 };
    assert_eq!(seen.used, used);

    // Others are not held by it, and a stop makes room.
    rig.vm("b").await;
    done(client.stop_vm("a", &waiting()).await.unwrap());
    done(client.create_vm(&vm("b", 2), &waiting()).await.unwrap());
    let refused = client.start_vm("a", &waiting()).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::QuotaExceeded));
}

#[tokio::test]
async fn only_admins_of_the_platform_set_quotas() {
    let rig = Rig::new().await;
    let (_, client) = bounded(&rig, Quota { vms: Some(0), ..Quota::default() }).await;
    let refused = client.create_vm(&vm("a", 1), &waiting()).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::QuotaExceeded));
    let more = Quota { vms: Some(1), ..Quota::default() };
    let refused = client.set_quota("bounded", &more).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::Forbidden));
    let set = rig.client.set_quota("bounded", &more).await.unwrap();
    assert_eq!((set.quota, set.used), (more, Some(Usage::default())));
    done(client.create_vm(&vm("a", 1), &waiting()).await.unwrap());
    let unknown = rig.client.set_quota("nothing", &more).await.unwrap_err();
    assert_eq!(unknown.code(), Some(ErrorCode::ProjectNotFound));
    let body = serde_json::json!({"vms": -1});
    let request = rig.call(Method::PUT, "/projects/bounded/quota").json(&body);
    let refusal = problem(request.send().await.unwrap()).await;
    assert_eq!(refusal.error_code(), Some(ErrorCode::MalformedBody));
}
