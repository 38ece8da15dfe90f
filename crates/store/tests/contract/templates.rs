//! Templates, and the VMs in which they are built.

use aether_store::{
    AttemptEnd, CancelOutcome, Capacity, NewTemplate, PageRequest, Store, StoreError,
    TemplateFilter, VmFilter,
};
use aether_types::{
    ErrorCode, Origin, ProjectId, SnapshotId, SnapshotPurpose, SnapshotState, TaskId, TaskKind,
    TaskState, Template, TemplateId, TemplateProgress, TemplateState, VmEvent, VmState, WorkerId,
};

use crate::support::{
    begin, build, build_as, built, carry_out, completed, create, failed, key, new_snapshot,
    new_task, new_template, new_vm, request, sealed, snapshot_now, template_made,
};

async fn now(store: &impl Store, id: TemplateId) -> Template {
    store.template(id).await.unwrap().unwrap()
}

async fn retired(store: &impl Store) -> Vec<SnapshotId> {
    store.retire_snapshots().await.unwrap().iter().map(|s| s.id).collect()
}

pub(crate) async fn a_build_is_recorded_whole_and_owed(store: &impl Store) {
    let (asked, template) = build(store, "t").await;
    assert!(!asked.repeated);
    assert_eq!(store.template(template.id).await.unwrap(), Some(template.clone()));
    assert_eq!(store.vm(asked.vm.id).await.unwrap(), Some(asked.vm.clone()));
    assert_eq!(store.task(asked.task.id).await.unwrap(), Some(asked.task.clone()));
    assert_eq!(store.undispatched(10).await.unwrap(), std::slice::from_ref(&asked.task));
    assert_eq!(template.state, TemplateState::Building);
    assert_eq!((template.builder_id, template.task_id), (asked.vm.id, asked.task.id));
    assert_eq!(asked.task.kind, TaskKind::TemplateBuild);
    assert_eq!(asked.task.snapshot_id, Some(template.snapshot_id));
    assert_eq!(asked.vm.spec.origin, Origin::Builder(template.id));
    let snapshot = snapshot_now(store, template.snapshot_id).await;
    assert_eq!(snapshot.purpose, SnapshotPurpose::Template);
    assert_eq!((snapshot.vm_id, snapshot.state), (asked.vm.id, SnapshotState::Creating));

    let wrong = (new_snapshot(SnapshotPurpose::User), new_task(TaskKind::TemplateBuild));
    let refused =
        store.build_template(new_template("u"), wrong.0, new_vm("u"), wrong.1, None).await;
    assert!(matches!(refused, Err(StoreError::WrongKind { .. })));
    let mut builder = new_vm("v");
    builder.spec.origin = Origin::Builder(template.id);
    let task = new_task(TaskKind::VmCreate);
    let refused = store.create_vm(builder, task, Capacity::default(), None).await;
    assert!(matches!(refused, Err(StoreError::WrongKind { .. })));
}

pub(crate) async fn a_vm_that_builds_is_not_listed_nor_counted_but_starts(store: &impl Store) {
    let (asked, _) = build(store, "t").await;
    let list = async |filter| store.vms(filter, PageRequest::default()).await.unwrap().items;
    assert_eq!(list(VmFilter::default()).await, []);
    let states = VmState::ALL.to_vec();
    assert_eq!(list(VmFilter { states, ..VmFilter::default() }).await, []);
    let every = VmFilter { builders: true, ..VmFilter::default() };
    assert_eq!(list(every).await, [asked.vm]);

    let create = async |name, capacity| {
        store.create_vm(new_vm(name), new_task(TaskKind::VmCreate), capacity, None).await
    };
    let full = Capacity { vms_max: None, starting_max: Some(1) };
    assert!(matches!(create("a", full).await, Err(StoreError::TooManyVms { max: 1, .. })));
    let one = Capacity { vms_max: Some(1), starting_max: None };
    create("a", one).await.unwrap();
    assert!(matches!(create("b", one).await, Err(StoreError::TooManyVms { max: 1, .. })));
}

pub(crate) async fn a_template_that_is_ready_takes_the_name_from_an_older_one(store: &impl Store) {
    let by_name = async || {
        store.template_by_name(ProjectId::DEFAULT, "t", "latest").await.unwrap().map(|t| t.id)
    };
    assert_eq!(by_name().await, None);
    let (asked, first) = build(store, "t").await;
    begin(store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, failed(ErrorCode::Internal, None)).await.unwrap();
    assert_eq!(by_name().await, Some(first.id), "the newest that failed");
    let (asked, second) = build(store, "t").await;
    assert_eq!(by_name().await, Some(second.id), "the newest that is being built");
    begin(store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, template_made("d2")).await.unwrap();
    let ready = now(store, second.id).await;
    assert_eq!((ready.state, ready.digest.as_deref()), (TemplateState::Ready, Some("d2")));
    assert_eq!(ready.size_bytes, Some(sealed().size_bytes));
    assert!(ready.generation > second.generation);
    assert_eq!(snapshot_now(store, second.snapshot_id).await.state, SnapshotState::Ready);

    let (asked, third) = build(store, "t").await;
    assert_eq!(by_name().await, Some(second.id), "the one that is ready");
    begin(store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, template_made("d3")).await.unwrap();
    assert_eq!(by_name().await, Some(third.id));
    assert_eq!(now(store, second.id).await.state, TemplateState::Deleted);
    let mut gone = retired(store).await;
    gone.sort_unstable();
    assert_eq!(gone, [first.snapshot_id, second.snapshot_id]);
    // Another tag is another template.
    let other = NewTemplate { tag: "v2".into(), ..new_template("t") };
    let (asked, other) = build_as(store, other, None).await;
    begin(store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, template_made("d4")).await.unwrap();
    assert_eq!(by_name().await, Some(third.id));
    assert_eq!(
        store.template_by_name(ProjectId::DEFAULT, "t", "v2").await.unwrap().map(|t| t.id),
        Some(other.id)
    );
}

pub(crate) async fn an_equal_build_that_is_under_way_is_the_answer(store: &impl Store) {
    let (first, one) = build(store, "t").await;
    let (again, same) = build(store, "t").await;
    assert!(again.repeated);
    assert_eq!((again.task, again.vm, same.id), (first.task.clone(), first.vm, one.id));
    let mut other = new_template("t");
    other.spec.memory_mb += 1;
    let (_, two) = build_as(store, other, None).await;
    assert_ne!(two.id, one.id);
    // One that was asked to end is no answer, and neither is one that has ended.
    begin(store, first.task.id, 1).await;
    store.cancel_task(first.task.id).await.unwrap();
    let (third, three) = build(store, "t").await;
    assert!(!third.repeated);
    carry_out_build(store, third.task.id).await;
    let (fourth, four) = build(store, "t").await;
    assert!(!fourth.repeated && four.id != three.id);
}

async fn carry_out_build(store: &impl Store, task: TaskId) {
    begin(store, task, 1).await;
    store.end_attempt(task, 1, template_made("d")).await.unwrap();
}

pub(crate) async fn a_repeated_build_is_answered_with_the_first(store: &impl Store) {
    let (first, one) = build_as(store, new_template("t"), Some(key("k", 1))).await;
    // A client with another key gets the build that is under way, and keeps it.
    let (other, same) = build_as(store, new_template("t"), Some(key("l", 1))).await;
    assert!(other.repeated);
    assert_eq!(same.id, one.id);
    carry_out_build(store, first.task.id).await;
    for text in ["k", "l"] {
        let (again, then) = build_as(store, new_template("t"), Some(key(text, 1))).await;
        assert!(again.repeated);
        assert_eq!((then.id, then.state), (one.id, TemplateState::Ready), "as things are now");
    }
    let wrong = (new_snapshot(SnapshotPurpose::Template), new_task(TaskKind::TemplateBuild));
    let refused = store
        .build_template(new_template("t"), wrong.0, new_vm("v"), wrong.1, Some(key("k", 2)))
        .await;
    assert!(matches!(refused, Err(StoreError::IdempotencyConflict)));
}

pub(crate) async fn a_template_fails_with_its_task(store: &impl Store) {
    let ends = [
        failed(ErrorCode::TemplateBuildFailed, Some(VmEvent::Failed)),
        completed(None),
        AttemptEnd { snapshot: Some(sealed()), ..completed(None) },
        AttemptEnd { template: Some("d".into()), ..completed(None) },
    ];
    let count = ends.len();
    for (at, end) in ends.into_iter().enumerate() {
        let (asked, template) = build(store, &format!("t{at}")).await;
        begin(store, asked.task.id, 1).await;
        let error = end.error.clone();
        store.end_attempt(asked.task.id, 1, end).await.unwrap();
        let failed = now(store, template.id).await;
        assert_eq!((failed.state, failed.digest), (TemplateState::Failed, None), "end {at}");
        assert!(failed.reason.is_some());
        assert!(error.is_none() || failed.reason == error);
    }
    let (asked, template) = build(store, "used-up").await;
    for epoch in 1..=3 {
        begin(store, asked.task.id, epoch).await;
    }
    store.begin_attempt(asked.task.id, WorkerId::new().into(), 4).await.unwrap();
    let failed = now(store, template.id).await;
    assert_eq!(failed.reason.unwrap().code, ErrorCode::AttemptsExhausted);
    assert_eq!(store.vm(asked.vm.id).await.unwrap().unwrap().state, VmState::Failed);
    assert_eq!(retired(store).await.len(), count + 1);
}

pub(crate) async fn a_build_can_be_cancelled(store: &impl Store) {
    let (asked, template) = build(store, "t").await;
    let cancelled = store.cancel_task(asked.task.id).await.unwrap();
    assert!(matches!(cancelled, CancelOutcome::Cancelled(t) if t.state == TaskState::Cancelled));
    let failed = now(store, template.id).await;
    assert_eq!(failed.state, TemplateState::Failed);
    assert_eq!(failed.reason.unwrap().code, ErrorCode::Cancelled);
    assert_eq!(snapshot_now(store, template.snapshot_id).await.state, SnapshotState::Failed);
    assert_eq!(store.vm(asked.vm.id).await.unwrap().unwrap().state, VmState::Failed);

    let (asked, template) = build(store, "t").await;
    begin(store, asked.task.id, 1).await;
    assert!(matches!(store.cancel_task(asked.task.id).await.unwrap(), CancelOutcome::Requested(_)));
    assert_eq!(now(store, template.id).await.state, TemplateState::Building);

    // Who deletes the VM ends the build.
    let (asked, template) = build(store, "u").await;
    let deletion = request(store, asked.vm.id, TaskKind::VmDelete).await;
    assert_eq!(deletion.cancelled.iter().map(|t| t.id).collect::<Vec<_>>(), [asked.task.id]);
    assert_eq!(now(store, template.id).await.state, TemplateState::Failed);
}

pub(crate) async fn progress_is_kept_and_fenced(store: &impl Store) {
    let (asked, template) = build(store, "t").await;
    let progress =
        TemplateProgress { done: 1, steps: 3, now: "step 2 of 3".into(), log: "+ true\n".into() };
    let tell = async |task, epoch| store.template_progress(task, epoch, progress.clone()).await;
    assert!(matches!(tell(asked.task.id, 0).await, Err(StoreError::Fenced)), "it does not run");
    begin(store, asked.task.id, 1).await;
    begin(store, asked.task.id, 2).await;
    assert!(matches!(tell(asked.task.id, 1).await, Err(StoreError::Fenced)));
    let told = tell(asked.task.id, 2).await.unwrap();
    assert_eq!((told.progress.clone(), told.generation), (progress.clone(), 2));
    assert_eq!(now(store, template.id).await, told);
    store.end_attempt(asked.task.id, 2, template_made("d")).await.unwrap();
    assert!(matches!(tell(asked.task.id, 2).await, Err(StoreError::Fenced)));
    assert_eq!(now(store, template.id).await.progress, progress);
    assert!(matches!(tell(TaskId::new(), 1).await, Err(StoreError::TaskNotFound)));
    let other = create(store, "a").await.task;
    assert!(matches!(tell(other.id, 0).await, Err(StoreError::TemplateNotFound)));
}

pub(crate) async fn a_template_is_deleted_with_its_snapshot(store: &impl Store) {
    let missing = store.delete_template(TemplateId::new()).await;
    assert!(matches!(missing, Err(StoreError::TemplateNotFound)));
    let (asked, template) = build(store, "t").await;
    let Err(StoreError::TemplateNotReady { detail }) = store.delete_template(template.id).await
    else {
        panic!("a template was deleted while it was built")
    };
    assert!(detail.contains("`t:latest` is being built"), "{detail}");
    assert!(detail.contains(&asked.task.id.to_string()), "{detail}");
    let snapshot = store.delete_snapshot(template.snapshot_id).await.unwrap_err();
    assert_eq!(snapshot.to_string(), "the snapshot is a template's; delete the template");
    carry_out_build(store, asked.task.id).await;
    let deleted = store.delete_template(template.id).await.unwrap();
    assert_eq!(deleted.state, TemplateState::Deleted);
    assert_eq!(snapshot_now(store, template.snapshot_id).await.state, SnapshotState::Deleted);
    assert_eq!(store.delete_template(template.id).await.unwrap(), deleted);
    assert_eq!(store.template_by_name(ProjectId::DEFAULT, "t", "latest").await.unwrap(), None);
}

pub(crate) async fn a_vm_begins_only_as_a_template_that_can_be_ready(store: &impl Store) {
    let begin_as = async |name: &str, id| {
        let mut new = new_vm(name);
        new.spec.origin = Origin::Template(id);
        store.create_vm(new, new_task(TaskKind::VmCreate), Capacity::default(), None).await
    };
    let not_found = |answer| matches!(answer, Err(StoreError::TemplateNotFound));
    assert!(not_found(begin_as("x", TemplateId::new()).await));
    let (asked, template) = build(store, "t").await;
    let early = begin_as("early", template.id).await.unwrap();
    assert_eq!(early.vm.spec.origin, Origin::Template(template.id), "it waits");
    begin(store, asked.task.id, 1).await;
    store.end_attempt(asked.task.id, 1, failed(ErrorCode::Internal, None)).await.unwrap();
    let refused = begin_as("x", template.id).await.unwrap_err();
    assert_eq!(refused.to_string(), "the template `t:latest` failed: it is a test");
    assert_eq!(refused.code(), ErrorCode::SnapshotStateConflict);
    store.cancel_task(early.task.id).await.unwrap();
    retired(store).await;

    // Its snapshot stays as long as a VM is on its way from it.
    let template = built(store, "t").await;
    let made = begin_as("a", template.id).await.unwrap();
    store.delete_template(template.id).await.unwrap();
    assert!(not_found(begin_as("x", template.id).await));
    assert_eq!(snapshot_now(store, template.snapshot_id).await.state, SnapshotState::Ready);
    assert_eq!(retired(store).await, []);
    carry_out(store, &made.task, Some(VmEvent::Started)).await;
    assert_eq!(retired(store).await, [template.snapshot_id]);
}

pub(crate) async fn templates_are_filtered_and_paged(store: &impl Store) {
    let one = built(store, "a").await;
    let (_, two) = build(store, "b").await;
    let gone = built(store, "c").await;
    store.delete_template(gone.id).await.unwrap();
    let list = async |filter: TemplateFilter| {
        let page = store.templates(filter, PageRequest::default()).await.unwrap();
        page.items.iter().map(|t| t.id).collect::<Vec<_>>()
    };
    let every = TemplateFilter::default;
    assert_eq!(list(every()).await, [two.id, one.id]);
    let states = TemplateState::ALL.to_vec();
    assert_eq!(list(TemplateFilter { states, ..every() }).await, [gone.id, two.id, one.id]);
    let states = vec![TemplateState::Building];
    assert_eq!(list(TemplateFilter { states, ..every() }).await, [two.id]);
    assert_eq!(list(TemplateFilter { name: Some("a".into()), ..every() }).await, [one.id]);
    let first = store.templates(every(), PageRequest { limit: 1, after: None }).await.unwrap();
    assert_eq!(first.items[0].id, two.id);
    let rest = PageRequest { limit: 1, after: first.next };
    let rest = store.templates(every(), rest).await.unwrap();
    assert_eq!((rest.items[0].id, rest.next), (one.id, None));
    assert_eq!(now(store, one.id).await.reason, None);
}
