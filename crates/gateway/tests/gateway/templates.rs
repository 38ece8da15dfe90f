//! Templates: their builds, their news, and VMs that begin as one.

use std::{collections::BTreeMap, time::Duration};

use aether_api::{
    BuildTemplate, CreateVm, OriginKind, Problem, TemplateView,
    client::{CallOptions, ClientError, Since, TemplateQuery, VmQuery, Waited},
};
use aether_streams::PoolStatus;
use aether_types::{
    ErrorCode, StartKind, TaskState, TemplateFile, TemplateState, TemplateStep, limits,
};
use reqwest::{Method, StatusCode};

use crate::rig::{Options, Rig, SOON, done, soon, waiting};

fn template(name: &str, steps: &[&str]) -> BuildTemplate {
    let step = |run: &&str| TemplateStep { run: (*run).to_owned(), timeout_s: None };
    BuildTemplate {
        name: name.into(),
        steps: steps.iter().map(step).collect(),
        ..BuildTemplate::default()
    }
}

async fn built(rig: &Rig, request: &BuildTemplate) -> TemplateView {
    done(rig.client.build_template(request, &waiting()).await.unwrap())
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> Problem {
    match answer {
        Err(ClientError::Problem(problem)) => *problem,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_template_is_built_seen_and_deleted() {
    let rig = Rig::new().await;
    let request = BuildTemplate {
        env: BTreeMap::from([("TOKEN".into(), "s3cret".into())]),
        files: vec![TemplateFile { path: "/a".into(), content: "s3cret".into(), mode: 0o600 }],
        tag: Some("v1".into()),
        ..template("web", &["one", "two"])
    };
    let view = built(&rig, &request).await;
    assert_eq!((view.state, view.full_name().as_str()), (TemplateState::Ready, "web:v1"));
    assert_eq!((view.progress.done, view.progress.steps), (2, 2));
    assert_eq!(view.digest.as_deref(), Some(&*"d".repeat(64)));
    assert_eq!(view.spec.env, ["TOKEN"]);
    assert_eq!(view.spec.files.as_ref().unwrap()[0].size_bytes, 6);
    assert_eq!(view.spec.steps.as_ref().unwrap().len(), 2);
    for path in ["/templates", "/templates/web%3Av1", "/vms?name=web"] {
        let answer = rig.call(Method::GET, path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        assert!(!answer.text().await.unwrap().contains("s3cret"), "{path}");
    }
    // In a list what can be long is left out, and the VM that builds is in none.
    let list = rig.client.templates(&TemplateQuery::default()).await.unwrap().items;
    assert_eq!(list.len(), 1);
    assert!(list[0].spec.steps.is_none() && list[0].progress.log.is_empty());
    assert!(rig.client.vms(&VmQuery::default()).await.unwrap().items.is_empty());

    // A name alone means its latest.
    let missing = refusal(rig.client.template("web").await);
    assert_eq!(missing.error_code(), Some(ErrorCode::TemplateNotFound));
    let deleted = rig.client.delete_template("web:v1").await.unwrap();
    assert_eq!(deleted.state, TemplateState::Deleted);
    assert!(rig.client.template("web:v1").await.is_err());
    let by_id = rig.client.template(&view.id.to_string()).await.unwrap();
    assert_eq!(by_id.state, TemplateState::Deleted);
}

#[tokio::test]
async fn a_build_that_failed_says_why() {
    let rig = Rig::new().await;
    let answer = rig.client.build_template(&template("a", &["exit 1"]), &waiting()).await;
    let failed = refusal(answer);
    assert_eq!(failed.error_code(), Some(ErrorCode::TemplateBuildFailed));
    assert_eq!((failed.status, failed.detail.as_str()), (422, "step 1 exited with 1"));
    let view = rig.client.template("a").await.unwrap();
    assert_eq!(
        (view.state, view.reason.unwrap().code),
        (TemplateState::Failed, ErrorCode::TemplateBuildFailed)
    );
    let vm = CreateVm { template: Some("a".into()), ..CreateVm::default() };
    let refused = refusal(rig.client.create_vm(&vm, &waiting()).await);
    assert_eq!(refused.error_code(), Some(ErrorCode::SnapshotStateConflict));
    assert_eq!(refused.field.as_deref(), Some("template"));
}

#[tokio::test]
async fn news_of_a_build_come_as_it_goes() {
    let rig = Rig::new().await;
    let request = template("a", &["one", "gate", "three"]);
    let answer = rig.client.build_template(&request, &CallOptions::default()).await.unwrap();
    let Waited::Accepted(accepted) = answer else { panic!("{answer:?}") };
    let id = accepted.template_id.unwrap().to_string();
    assert!(accepted.snapshot_id.is_some());
    rig.worker.saw("gate").await;
    let now = rig.client.template(&id).await.unwrap();
    assert_eq!((now.progress.done, now.progress.log.as_str()), (1, "one\n"));
    // What is known is not news, and a wait ends with its time.
    let since = Since::Generation(now.generation);
    let short = Duration::from_millis(20);
    assert_eq!(rig.client.template_wait(&id, since, short).await.unwrap(), now);
    let old = Since::Generation(now.generation - 1);
    assert_eq!(rig.client.template_wait(&id, old, SOON).await.unwrap(), now);
    // Its VMs have to wait, and are told how.
    let vm = CreateVm { template: Some("a".into()), ..CreateVm::default() };
    let refused = refusal(rig.client.create_vm(&vm, &waiting()).await);
    assert_eq!(refused.error_code(), Some(ErrorCode::SnapshotStateConflict));
    assert!(refused.detail.contains(&format!("/templates/{id}?wait=")), "{}", refused.detail);
    let refused = refusal(rig.client.delete_template("a").await);
    assert_eq!(refused.error_code(), Some(ErrorCode::SnapshotStateConflict));
    // The same again is the same build.
    let again = rig.client.build_template(&request, &CallOptions::default()).await.unwrap();
    assert_eq!(again.task_id(), Some(accepted.task_id));

    let (client, of) = (rig.client.clone(), id.clone());
    let news = tokio::spawn(async move { client.template_wait(&of, since, SOON).await.unwrap() });
    let (client, of) = (rig.client.clone(), id.clone());
    let end =
        tokio::spawn(async move { client.template_wait(&of, Since::Build, SOON).await.unwrap() });
    rig.worker.gate.add_permits(1);
    assert!(soon(news).await.unwrap().generation > now.generation);
    assert_eq!(soon(end).await.unwrap().state, TemplateState::Ready);
}

#[tokio::test]
async fn a_build_that_has_not_begun_can_be_cancelled() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    let request = template("a", &["one"]);
    let answer = rig.client.build_template(&request, &CallOptions::default()).await.unwrap();
    let Waited::Accepted(accepted) = answer else { panic!("{answer:?}") };
    let client = rig.client.clone();
    let waiter = tokio::spawn(async move { client.template_wait("a", Since::Build, SOON).await });
    let task = rig.client.cancel_task(accepted.task_id, None).await.unwrap();
    assert_eq!(task.status, TaskState::Cancelled);
    assert_eq!(soon(waiter).await.unwrap().unwrap().state, TemplateState::Failed);
}

#[tokio::test]
async fn a_vm_of_a_template_is_what_the_template_is() {
    let rig = Rig::new().await;
    let env = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect::<BTreeMap<_, _>>()
    };
    let request = BuildTemplate {
        memory_mb: Some(512),
        disk_mb: Some(4096),
        env: env(&[("A", "1"), ("B", "1")]),
        ..template("web", &[])
    };
    let built = built(&rig, &request).await;
    let request = CreateVm {
        template: Some("web".into()),
        env: env(&[("B", "2"), ("C", "2")]),
        disk_mb: Some(4096),
        ..CreateVm::default()
    };
    let vm = done(rig.client.create_vm(&request, &waiting()).await.unwrap());
    assert_eq!((vm.memory_mb, vm.disk_mb), (512, 4096));
    assert_eq!(vm.env, ["A", "B", "C"]);
    assert_eq!(vm.start.unwrap().kind, StartKind::Pool);
    assert_eq!((vm.origin.kind, vm.origin.template_id), (OriginKind::Template, Some(built.id)));
    assert_eq!(vm.origin.template.as_deref(), Some("web:latest"));
    let kept = rig.store.vm(vm.id).await.unwrap().unwrap().spec.env;
    assert_eq!(kept, env(&[("A", "1"), ("B", "2"), ("C", "2")]));
    // Other processors and another memory are allowed: it boots on the template's disk then.
    let request = CreateVm {
        template: Some(built.id.to_string()),
        vcpus: Some(2),
        memory_mb: Some(1024),
        ..CreateVm::default()
    };
    let vm = done(rig.client.create_vm(&request, &waiting()).await.unwrap());
    assert_eq!((vm.vcpus, vm.memory_mb, vm.disk_mb), (2, 1024, 4096));
}

#[tokio::test]
async fn a_vm_that_asks_for_nothing_else_begins_as_the_default_template() {
    let rig = Rig::new().await;
    let origin = async |request: &CreateVm| {
        done(rig.client.create_vm(request, &waiting()).await.unwrap()).origin
    };
    let nothing = CreateVm::default();
    assert_eq!(origin(&nothing).await.kind, OriginKind::Image);
    let first = built(&rig, &template("default", &[])).await;
    let as_default = origin(&nothing).await;
    assert_eq!(as_default.template_id, Some(first.id));
    assert_eq!(as_default.template.as_deref(), Some("default:latest"));
    // Where it says what the template is, it is the same VM; else it is another, and boots.
    let same = CreateVm {
        image: Some("debian".into()),
        memory_mb: Some(limits::MEMORY_MB_DEFAULT),
        ..CreateVm::default()
    };
    assert_eq!(origin(&same).await.kind, OriginKind::Template);
    for other in [
        CreateVm { memory_mb: Some(512), ..CreateVm::default() },
        CreateVm { vcpus: Some(2), ..CreateVm::default() },
        CreateVm { disk_mb: Some(4096), ..CreateVm::default() },
    ] {
        assert_eq!(origin(&other).await.kind, OriginKind::Image, "{other:?}");
    }
    // A newer one is used as soon as it is ready, and none where it is deleted.
    let second = built(&rig, &template("default", &["one"])).await;
    assert_eq!(origin(&nothing).await.template_id, Some(second.id));
    rig.client.delete_template("default").await.unwrap();
    assert_eq!(origin(&nothing).await.kind, OriginKind::Image);
}

/// An event that never came: what the gateway remembers is refused by the store, and nobody
/// notices.
#[tokio::test]
async fn a_default_template_that_went_unheard_of_is_done_without() {
    let rig = Rig::new().await;
    let built = built(&rig, &template("default", &[])).await;
    let create = async || {
        done(rig.client.create_vm(&CreateVm::default(), &waiting()).await.unwrap()).origin.kind
    };
    assert_eq!(create().await, OriginKind::Template);
    rig.store.delete_template(built.id).await.unwrap();
    assert_eq!(create().await, OriginKind::Image);
    assert_eq!(create().await, OriginKind::Image);
}

#[tokio::test]
async fn pools_are_shown_with_their_templates() {
    let options = Options::default();
    let pools = options.pools.clone();
    let rig = Rig::with(options).await;
    let built = built(&rig, &template("web", &[])).await;
    assert!(rig.client.pools().await.unwrap().items.is_empty());
    assert_eq!(built.pool, None);
    pools.0.lock().unwrap().push(PoolStatus {
        template_id: built.id,
        template: "web:latest".into(),
        ready: 1,
        target: 2,
        min: 1,
        max: 4,
        hits: 7,
        misses: 3,
    });
    let shown = rig.client.pools().await.unwrap().items.remove(0);
    assert_eq!((shown.ready, shown.hits, shown.template.as_str()), (1, 7, "web:latest"));
    assert_eq!(rig.client.template("web").await.unwrap().pool, Some(shown.clone()));
    let list = rig.client.templates(&TemplateQuery::default()).await.unwrap().items;
    assert_eq!(list[0].pool, Some(shown));
}
