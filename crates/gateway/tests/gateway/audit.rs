//! Who did what, as it is written down.

use aether_api::{
    AuditView, CreateKey, CreateProject, CreateVm,
    client::{AuditQuery, Client, PageQuery, VmQuery},
};
use aether_types::{ErrorCode, Role, project::Quota};
use reqwest::{Method, StatusCode};

use crate::rig::{Rig, command, done, problem, waiting};

fn key(name: &str, role: Role, project: Option<&str>) -> CreateKey {
    CreateKey {
        name: name.into(),
        role,
        scopes: Vec::new(),
        expires_in_s: None,
        project: project.map(str::to_owned),
    }
}

async fn log(rig: &Rig, query: &AuditQuery) -> Vec<AuditView> {
    rig.client.audit(query).await.unwrap().items
}

fn line(entry: &AuditView) -> String {
    let action = entry.action.map_or("-".to_owned(), |action| action.to_string());
    let code = entry.code.as_deref().unwrap_or("-");
    let AuditView { method, path, outcome, status, .. } = entry;
    format!("{method} {path} {action} {outcome} {status} {code}")
}

#[tokio::test]
async fn what_changes_something_is_written_down_and_what_looks_is_not() {
    let rig = Rig::new().await;
    rig.vm("web").await;
    done(rig.client.execute("web", &command("echo", &["s3cret"]), &waiting()).await.unwrap());
    let taken = CreateVm { name: Some("web".into()), ..CreateVm::default() };
    rig.client.create_vm(&taken, &waiting()).await.unwrap_err();
    rig.client.vms(&VmQuery::default()).await.unwrap();
    rig.client.vm("nothing").await.unwrap_err();
    let request = rig.call(Method::DELETE, "/vms/web").header("x-request-id", "mine-1");
    assert_eq!(request.send().await.unwrap().status(), StatusCode::ACCEPTED);
    let entries = log(&rig, &AuditQuery::default()).await;
    let lines: Vec<_> = entries.iter().rev().map(line).collect();
    assert_eq!(
        lines,
        [
            "POST /vms vms:write done 201 -",
            "POST /vms/web/execute executions:write done 200 -",
            "POST /vms vms:write failed 409 name_taken",
            "DELETE /vms/web vms:write done 202 -",
        ]
    );
    let last = &entries[0];
    assert_eq!(last.request_id, "mine-1");
    assert!(last.made.as_deref().unwrap().starts_with("/tasks/"), "{last:?}");
    assert_eq!(last.address.unwrap().to_string(), "127.0.0.1");
    assert!(rig.key.starts_with(last.key_prefix.as_deref().unwrap()));
    assert!(!format!("{entries:?}").contains("s3cret"));
}

#[tokio::test]
async fn who_is_refused_is_written_down() {
    let rig = Rig::new().await;
    let viewer = rig.client.create_key(&key("viewer", Role::Viewer, None)).await.unwrap();
    let request = rig.bare(Method::DELETE, "/vms/web").bearer_auth(&viewer.key);
    assert_eq!(problem(request.send().await.unwrap()).await.status, 403);
    // Looking, too, where it is not allowed.
    let request = rig.bare(Method::GET, "/keys").bearer_auth(&viewer.key);
    assert_eq!(problem(request.send().await.unwrap()).await.status, 403);
    for _ in 0..50 {
        let request = rig.bare(Method::GET, "/vms").bearer_auth("aeth_wrong");
        assert_eq!(problem(request.send().await.unwrap()).await.status, 401);
    }
    let refused = AuditQuery { outcomes: vec!["refused".into()], ..AuditQuery::default() };
    let entries = log(&rig, &refused).await;
    assert_eq!(
        entries.iter().map(line).collect::<Vec<_>>(),
        [
            "GET /keys keys:read refused 403 forbidden",
            "DELETE /vms/web vms:write refused 403 forbidden",
        ]
    );
    assert!(entries.iter().all(|entry| entry.key_id == Some(viewer.view.id)));
    // Nobody that is known is of no project, and cannot fill the log.
    let all = AuditQuery { all: true, ..refused };
    let strangers: Vec<_> =
        log(&rig, &all).await.into_iter().filter(|entry| entry.key_id.is_none()).collect();
    assert!((1..=20).contains(&strangers.len()), "{}", strangers.len());
    assert_eq!(line(&strangers[0]), "GET /vms - refused 401 unauthorized");
}

#[tokio::test]
async fn the_log_is_for_admins_of_the_project_and_outlives_what_it_speaks_of() {
    let rig = Rig::new().await;
    let project = CreateProject { name: "other".into(), quota: Quota::default() };
    rig.client.create_project(&project).await.unwrap();
    let admin = key("admin", Role::Admin, Some("other"));
    let admin = rig.client.create_key(&admin).await.unwrap();
    let theirs = Client::new(&rig.base, Some(&admin.key)).unwrap();
    let operator = theirs.create_key(&key("op", Role::Operator, None)).await.unwrap();
    let operator = Client::new(&rig.base, Some(&operator.key)).unwrap();
    let vm = done(operator.create_vm(&CreateVm::default(), &waiting()).await.unwrap());
    done(operator.delete_vm(&vm.name, &waiting()).await.unwrap());

    let refused = operator.audit(&AuditQuery::default()).await.unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::Forbidden));
    let seen = theirs.audit(&AuditQuery::default()).await.unwrap().items;
    let lines: Vec<_> = seen.iter().rev().map(line).collect();
    let delete = format!("DELETE /vms/{} vms:write done 200 -", vm.name);
    let expected = [
        "POST /keys keys:write done 201 -",
        "POST /vms vms:write done 201 -",
        &delete,
        "GET /audit audit:read refused 403 forbidden",
    ];
    assert_eq!(lines, expected);
    for query in [
        AuditQuery { all: true, ..AuditQuery::default() },
        AuditQuery { project: Some("default".into()), ..AuditQuery::default() },
    ] {
        let refused = theirs.audit(&query).await.unwrap_err();
        assert_eq!(refused.code(), Some(ErrorCode::Forbidden));
    }
    let of_other = AuditQuery { project: Some("other".into()), ..AuditQuery::default() };
    assert!(log(&rig, &of_other).await.len() >= expected.len());

    rig.client.delete_project("other").await.unwrap();
    let all = AuditQuery { all: true, ..AuditQuery::default() };
    assert!(log(&rig, &all).await.iter().any(|entry| line(entry) == delete));
}

#[tokio::test]
async fn the_log_is_read_in_pages_and_nothing_takes_from_it() {
    let rig = Rig::new().await;
    for n in 0..5 {
        rig.client.create_key(&key(&n.to_string(), Role::Viewer, None)).await.unwrap();
    }
    let mut query = AuditQuery::default();
    let mut seen = Vec::new();
    loop {
        query.page.limit = Some(2);
        let page = rig.client.audit(&query).await.unwrap();
        seen.extend(page.items);
        match page.next_cursor {
            Some(cursor) => query.page = PageQuery { cursor: Some(cursor), limit: None },
            None => break,
        }
    }
    assert_eq!(seen.len(), 5);
    assert!(seen.windows(2).all(|pair| (pair[0].at, pair[0].id) > (pair[1].at, pair[1].id)));
    for method in [Method::DELETE, Method::POST, Method::PUT] {
        let response = rig.call(method, "/audit").send().await.unwrap();
        assert_eq!(problem(response).await.error_code(), Some(ErrorCode::MethodNotAllowed));
    }
}
