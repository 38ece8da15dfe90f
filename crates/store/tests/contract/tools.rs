//! Tools of VMs and templates, and tasks that build them.

use aether_store::{
    AttemptEnd, CancelOutcome, Capacity, NewTemplate, NewVm, PageRequest, Store, StoreError,
    TaskFilter, VmChange, VmPatch,
};
use aether_types::{
    ErrorCode, Task, TaskKind, TaskProgress, TaskState, Timestamp, ToolRequest, VmEvent, VmTool,
};

use crate::support::{
    begin, build_as, carry_out, completed, create, failed, fault, key, new_task, new_template,
    new_vm, spec,
};

fn requests(texts: &[&str]) -> Vec<ToolRequest> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn asked(texts: &[&str]) -> Vec<VmTool> {
    requests(texts).iter().map(VmTool::asked).collect()
}

fn got(texts: &[&str]) -> Vec<VmTool> {
    let verified_at = Some(Timestamp::from_unix_ms(1_700_000_000_000));
    let got = |tool: VmTool| VmTool { got: Some("1.2.3".into()), verified_at, ..tool };
    asked(texts).into_iter().map(got).collect()
}

async fn build(store: &impl Store, texts: &[&str]) -> Task {
    let task = new_task(TaskKind::ToolBuild);
    store.build_tools(requests(texts), task, None).await.unwrap().task
}

pub(crate) async fn a_vm_has_what_it_asks_for_until_it_got_it(store: &impl Store) {
    let mut new = new_vm("a");
    new.spec.tools = requests(&["go@1.23.1", "rust"]);
    let spec = new.spec.clone();
    let task = new_task(TaskKind::VmCreate);
    let made = store.create_vm(new, task, Capacity::default(), None).await.unwrap();
    assert_eq!(made.vm.tools, asked(&["go@1.23.1", "rust"]));
    assert_eq!(store.vm(made.vm.id).await.unwrap(), Some(made.vm.clone()));

    begin(store, made.task.id, 1).await;
    let tools = got(&["go@1.23.1", "rust"]);
    let patch = VmPatch { tools: Some(tools.clone()), ..VmPatch::default() };
    let change = VmChange { event: VmEvent::Started, reason: None, patch };
    let end = AttemptEnd { vm: Some(change), ..completed(None) };
    store.end_attempt(made.task.id, 1, end).await.unwrap();
    let running = store.vm(made.vm.id).await.unwrap().unwrap();
    assert_eq!((running.tools, running.spec), (tools.clone(), spec));

    // What is learnt of something else leaves them.
    store.patch_vm(made.vm.id, VmPatch::default()).await.unwrap();
    let change = VmChange { event: VmEvent::Stopped, reason: None, patch: VmPatch::default() };
    assert_eq!(store.change_vm(made.vm.id, None, change).await.unwrap().tools, tools);
    assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().tools, tools);
    let other = got(&["go@1.23.1"]);
    let patch = VmPatch { tools: Some(other.clone()), ..VmPatch::default() };
    store.patch_vm(made.vm.id, patch).await.unwrap();
    assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().tools, other);
    assert_eq!(create(store, "plain").await.vm.tools, []);
}

pub(crate) async fn a_template_keeps_its_tools_and_they_make_it_another(store: &impl Store) {
    let with = |texts: &[&str]| {
        let mut new: NewTemplate = new_template("t");
        new.spec.tools = requests(texts);
        new
    };
    let (_, first) = build_as(store, with(&["go@1.22"]), None).await;
    assert_eq!(store.template(first.id).await.unwrap().unwrap().spec.tools, first.spec.tools);
    let (again, equal) = build_as(store, with(&["go@1.22"]), None).await;
    assert!(again.repeated && equal.id == first.id);
    let (other, _) = build_as(store, with(&["go@1.23"]), None).await;
    assert!(!other.repeated);
}

pub(crate) async fn a_build_of_tools_is_recorded_and_owed_and_of_no_vm(store: &impl Store) {
    let task = build(store, &["go@1.23.1", "rust"]).await;
    assert_eq!(
        (task.kind, task.vm_id, task.state),
        (TaskKind::ToolBuild, None, TaskState::Pending)
    );
    assert_eq!(task.tools, asked(&["go@1.23.1", "rust"]));
    assert_eq!(store.task(task.id).await.unwrap(), Some(task.clone()));
    assert_eq!(store.undispatched(10).await.unwrap(), std::slice::from_ref(&task));
    assert_eq!(store.open_tasks().await.unwrap(), std::slice::from_ref(&task));
    let kind = Some(TaskKind::ToolBuild);
    let filter = TaskFilter { kind, ..TaskFilter::default() };
    let listed = store.tasks(filter, PageRequest::default()).await.unwrap();
    assert_eq!(listed.items, std::slice::from_ref(&task));

    begin(store, task.id, 1).await;
    let tools = got(&["go@1.23.1", "rust"]);
    let end = AttemptEnd { tools: Some(tools.clone()), ..completed(None) };
    let ended = store.end_attempt(task.id, 1, end).await.unwrap();
    assert_eq!((ended.state, &ended.tools), (TaskState::Completed, &tools));
    assert_eq!(store.task(task.id).await.unwrap(), Some(ended));

    let wrong = store.build_tools(Vec::new(), new_task(TaskKind::VmCreate), None).await;
    assert!(matches!(wrong, Err(StoreError::WrongKind { .. })));
    let vm = create(store, "a").await.vm;
    let wrong = store.request_on_vm(vm.id, new_task(TaskKind::ToolBuild), None).await;
    assert!(matches!(wrong, Err(StoreError::WrongKind { .. })));
}

pub(crate) async fn a_build_of_tools_that_fails_says_why(store: &impl Store) {
    let task = build(store, &["go"]).await;
    begin(store, task.id, 1).await;
    let ended =
        store.end_attempt(task.id, 1, failed(ErrorCode::ToolBuildFailed, None)).await.unwrap();
    assert_eq!(ended.error, Some(fault(ErrorCode::ToolBuildFailed)));
    assert_eq!(ended.tools, asked(&["go"]), "it got nothing");

    let task = build(store, &["go"]).await;
    for epoch in 1..=i64::from(task.max_attempts) {
        begin(store, task.id, epoch).await;
    }
    store.begin_attempt(task.id, aether_types::WorkerId::new().into(), 9).await.unwrap();
    let ended = store.task(task.id).await.unwrap().unwrap();
    assert_eq!(ended.error.map(|e| e.code), Some(ErrorCode::AttemptsExhausted));
}

pub(crate) async fn a_build_of_tools_can_be_cancelled(store: &impl Store) {
    let task = build(store, &["go"]).await;
    let outcome = store.cancel_task(task.id).await.unwrap();
    assert!(matches!(outcome, CancelOutcome::Cancelled(_)), "{outcome:?}");
    let task = build(store, &["go"]).await;
    begin(store, task.id, 1).await;
    let outcome = store.cancel_task(task.id).await.unwrap();
    assert!(matches!(outcome, CancelOutcome::Requested(_)), "{outcome:?}");
    let otherwise = AttemptEnd { tools: Some(got(&["go"])), ..completed(None) };
    let why = fault(ErrorCode::Unavailable);
    let ended = store.retry_attempt(task.id, 1, why, otherwise).await.unwrap();
    assert_eq!((ended.state, ended.tools), (TaskState::Cancelled, asked(&["go"])));
}

pub(crate) async fn a_repeated_build_of_tools_is_answered_with_the_first(store: &impl Store) {
    let build = async |digest| {
        let task = new_task(TaskKind::ToolBuild);
        store.build_tools(requests(&["go"]), task, Some(key("k", digest))).await
    };
    let first = build(1).await.unwrap();
    assert!(!first.repeated);
    let again = build(1).await.unwrap();
    assert!(again.repeated && again.task == first.task);
    assert!(matches!(build(2).await, Err(StoreError::IdempotencyConflict)));

    // The key of a request of another kind.
    let vm = |name: &str| NewVm { spec: spec(), ..new_vm(name) };
    let create = async |name, key| {
        let task = new_task(TaskKind::VmCreate);
        store.create_vm(vm(name), task, Capacity::default(), Some(key)).await
    };
    let refused = create("a", key("k", 1)).await;
    assert!(matches!(refused, Err(StoreError::IdempotencyConflict)));
    create("b", key("vm", 1)).await.unwrap();
    let task = new_task(TaskKind::ToolBuild);
    let refused = store.build_tools(requests(&["go"]), task, Some(key("vm", 1))).await;
    assert!(matches!(refused, Err(StoreError::IdempotencyConflict)));
}

pub(crate) async fn the_progress_of_a_task_is_kept_counted_and_fenced(store: &impl Store) {
    let made = create(store, "a").await;
    assert_eq!(made.task.progress, None);
    let say = async |epoch, now: &str, log: &str| {
        store.task_progress(made.task.id, epoch, now.to_owned(), log.to_owned()).await
    };
    assert!(matches!(say(0, "early", "").await, Err(StoreError::Fenced)));
    begin(store, made.task.id, 1).await;
    // What an installer says is any text.
    for (generation, log) in [(1, "one\n"), (2, "\"quoted\" \0 \u{1b}[1m\u{fffd}\n")] {
        let task = say(1, "building go 1.23.1", log).await.unwrap();
        let progress =
            TaskProgress { now: "building go 1.23.1".into(), log: log.into(), generation };
        assert_eq!(task.progress, Some(progress));
        assert_eq!(store.task(made.task.id).await.unwrap(), Some(task));
    }
    begin(store, made.task.id, 2).await;
    assert!(matches!(say(1, "late", "").await, Err(StoreError::Fenced)));
    assert_eq!(say(2, "again", "").await.unwrap().progress.map(|p| p.generation), Some(3));
    carry_out(store, &store.task(made.task.id).await.unwrap().unwrap(), Some(VmEvent::Started))
        .await;
    assert!(matches!(say(3, "late", "").await, Err(StoreError::Fenced)));
    let unknown = aether_types::TaskId::new();
    let refused = store.task_progress(unknown, 1, String::new(), String::new()).await;
    assert!(matches!(refused, Err(StoreError::TaskNotFound)));
}
