//! Projects: what is of one does not exist for another.

use aether_store::{
    ApiKey, Capacity, NewExecution, NewSnapshot, PageRequest, SnapshotFilter, Store, StoreError,
    TaskFilter, TemplateFilter, VmFilter,
};
use aether_types::{
    ErrorCode, ExecutionId, ExecutionSpec, KeyId, Origin, Project, ProjectId, Role,
    SnapshotPurpose, TaskKind, Timestamp, VmEvent, VmId,
    project::{DEFAULT_PROJECT, Quota},
};

use crate::support::{
    carry_out, clones, create, new_snapshot, new_task, new_template, new_vm, project, running,
    snapshot, task_of,
};

/// A VM of the project that runs.
async fn running_in(store: &impl Store, project: ProjectId, name: &str) -> VmId {
    let task = task_of(project, TaskKind::VmCreate);
    let made = store.create_vm(new_vm(name), task, Capacity::default(), None).await.unwrap();
    carry_out(store, &made.task, Some(VmEvent::Started)).await;
    assert_eq!((made.vm.project_id, made.task.project_id), (project, project));
    made.vm.id
}

pub(crate) async fn what_there_was_is_the_default_projects(store: &impl Store) {
    let made = create(store, "a").await;
    assert_eq!(made.vm.project_id, ProjectId::DEFAULT);
    assert_eq!(made.task.project_id, ProjectId::DEFAULT);
    let found = store.project(ProjectId::DEFAULT).await.unwrap().unwrap();
    assert_eq!(found.name, DEFAULT_PROJECT);
    assert_eq!(store.project_by_name(DEFAULT_PROJECT).await.unwrap(), Some(found));
}

pub(crate) async fn projects_have_names_and_are_listed(store: &impl Store) {
    let one = project(store, "one").await;
    let new = Project {
        id: ProjectId::new(),
        name: "one".into(),
        created_at: Timestamp::now(),
        quota: Quota::default(),
    };
    let taken = store.create_project(new).await.unwrap_err();
    assert!(matches!(taken, StoreError::NameTaken { name } if name == "one"));
    let two = project(store, "two").await;
    let first = PageRequest { limit: 1, after: None };
    let page = store.projects(first).await.unwrap();
    assert_eq!(page.items[0].id, two);
    let rest = store.projects(PageRequest { limit: 9, after: page.next }).await.unwrap();
    let ids: Vec<_> = rest.items.iter().map(|project| project.id).collect();
    assert_eq!(ids, [one, ProjectId::DEFAULT]);
    assert_eq!(store.project_by_name("none").await.unwrap(), None);
    assert_eq!(store.project(ProjectId::new()).await.unwrap(), None);
}

pub(crate) async fn a_project_is_deleted_when_nothing_is_left_of_it(store: &impl Store) {
    let ours = project(store, "ours").await;
    let key = ApiKey {
        id: KeyId::new(),
        name: "a".into(),
        prefix: "aeth_".into(),
        hash: [1; 32],
        project_id: ours,
        role: Role::Admin,
        scopes: Vec::new(),
        created_by: None,
        created_at: Timestamp::now(),
        expires_at: None,
        last_used_at: None,
        revoked_at: None,
    };
    store.insert_key(key.clone()).await.unwrap();
    let vm = running_in(store, ours, "a").await;
    let refused = store.delete_project(ours).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::ProjectInUse);
    assert_eq!(refused.to_string(), "the project has 1 VMs; delete them first");
    let deletion = task_of(ours, TaskKind::VmDelete);
    let deletion = store.request_on_vm(vm, deletion, None).await.unwrap();
    let refused = store.delete_project(ours).await.unwrap_err();
    assert_eq!(refused.to_string(), "the project has 1 VMs, 1 open tasks; delete them first");
    carry_out(store, &deletion.task, Some(VmEvent::Deleted)).await;

    store.delete_project(ours).await.unwrap();
    assert_eq!(store.project(ours).await.unwrap(), None);
    assert_eq!(store.key_by_hash(&key.hash).await.unwrap(), None, "its keys went with it");
    let again = store.delete_project(ours).await.unwrap_err();
    assert_eq!(again.code(), ErrorCode::ProjectNotFound);
    let stays = store.delete_project(ProjectId::DEFAULT).await.unwrap_err();
    assert_eq!(stays.code(), ErrorCode::ProjectInUse);
    // The name is free again, and what was of the first is not of the second.
    let second = project(store, "ours").await;
    assert_ne!(second, ours);
    assert_eq!(store.vm(vm).await.unwrap().unwrap().project_id, ours);
}

pub(crate) async fn a_vm_of_another_project_is_none_for_every_request(store: &impl Store) {
    let (ours, theirs) = (project(store, "ours").await, project(store, "theirs").await);
    let vm = running_in(store, theirs, "a").await;
    let before = store.vm(vm).await.unwrap().unwrap();
    let none = |code| assert_eq!(code, ErrorCode::VmNotFound);
    for kind in [TaskKind::VmStop, TaskKind::VmStart, TaskKind::VmPause, TaskKind::VmDelete] {
        none(store.request_on_vm(vm, task_of(ours, kind), None).await.unwrap_err().code());
    }
    let new = NewExecution { id: ExecutionId::new(), spec: ExecutionSpec::default() };
    let task = task_of(ours, TaskKind::VmExecute);
    none(store.request_execution(vm, new.clone(), task, None).await.unwrap_err().code());
    for (kind, purpose) in [
        (TaskKind::VmSnapshot, SnapshotPurpose::User),
        (TaskKind::VmSuspend, SnapshotPurpose::Memory),
    ] {
        let asked = store.request_snapshot(vm, new_snapshot(purpose), task_of(ours, kind), None);
        none(asked.await.unwrap_err().code());
    }
    let fork = store.fork_vm(
        vm,
        new_snapshot(SnapshotPurpose::Fork),
        task_of(ours, TaskKind::VmSnapshot),
        clones(&["c".to_owned()]),
        Capacity::default(),
        None,
    );
    none(fork.await.unwrap_err().code());
    assert_eq!(store.vm(vm).await.unwrap().unwrap(), before);
    assert_eq!(store.open_tasks().await.unwrap(), []);

    // Its own project, and the platform, find it; what they make is of its project.
    let task = task_of(theirs, TaskKind::VmExecute);
    let (accepted, execution) = store.request_execution(vm, new, task, None).await.unwrap();
    assert_eq!((accepted.task.project_id, execution.project_id), (theirs, theirs));
    assert_eq!(store.execution(execution.id).await.unwrap().unwrap().project_id, theirs);
    let deletion = store.request_on_vm(vm, new_task(TaskKind::VmDelete), None).await.unwrap();
    assert_eq!(deletion.task.project_id, theirs);
}

pub(crate) async fn names_are_of_their_project(store: &impl Store) {
    let ours = project(store, "ours").await;
    let here = running_in(store, ours, "a").await;
    let there = running(store, "a").await;
    let named = async |project| store.vm_by_name(project, "a").await.unwrap().map(|vm| vm.id);
    assert_eq!(named(ours).await, Some(here));
    assert_eq!(named(ProjectId::DEFAULT).await, Some(there));
    assert_eq!(named(ProjectId::new()).await, None);
    let task = task_of(ours, TaskKind::VmCreate);
    let taken = store.create_vm(new_vm("a"), task, Capacity::default(), None).await.unwrap_err();
    assert_eq!(taken.code(), ErrorCode::NameTaken);

    for (vm, project) in [(here, ours), (there, ProjectId::DEFAULT)] {
        let new = NewSnapshot { name: Some("s".into()), ..new_snapshot(SnapshotPurpose::User) };
        let task = task_of(project, TaskKind::VmSnapshot);
        let (_, made) = store.request_snapshot(vm, new, task, None).await.unwrap();
        let found = store.snapshot_by_name(project, "s").await.unwrap().unwrap();
        assert_eq!((found.id, found.project_id), (made.id, project));
        let failing = store.cancel_task(found_task(store, project).await).await;
        failing.unwrap();
    }
    // One that failed gives its name to another of its own project alone.
    let new = NewSnapshot { name: Some("s".into()), ..new_snapshot(SnapshotPurpose::User) };
    let task = task_of(ours, TaskKind::VmSnapshot);
    store.request_snapshot(here, new, task, None).await.unwrap();
    assert!(store.snapshot_by_name(ProjectId::DEFAULT, "s").await.unwrap().is_some());

    let mut built = Vec::new();
    for project in [ours, ProjectId::DEFAULT] {
        let template = new_template("t");
        let builder = new_vm(&format!("build-{}", template.id));
        let task = task_of(project, TaskKind::TemplateBuild);
        let new = new_snapshot(SnapshotPurpose::Template);
        let (accepted, template) =
            store.build_template(template, new, builder, task, None).await.unwrap();
        assert!(!accepted.repeated, "an equal build of another project is another build");
        crate::support::begin(store, accepted.task.id, 1).await;
        let end = crate::support::template_made("d1");
        store.end_attempt(accepted.task.id, 1, end).await.unwrap();
        built.push((project, template.id));
    }
    for (project, id) in built {
        let found = store.template_by_name(project, "t", "latest").await.unwrap().unwrap();
        assert_eq!((found.id, found.state), (id, aether_types::TemplateState::Ready));
    }
}

/// The open task of a project that has one.
async fn found_task(store: &impl Store, project: ProjectId) -> aether_types::TaskId {
    let filter = TaskFilter {
        project: Some(project),
        kind: Some(TaskKind::VmSnapshot),
        ..TaskFilter::default()
    };
    store.tasks(filter, PageRequest::default()).await.unwrap().items[0].id
}

pub(crate) async fn lists_are_of_a_project(store: &impl Store) {
    let ours = project(store, "ours").await;
    let here = running_in(store, ours, "a").await;
    let there = running(store, "b").await;
    let taken = task_of(ours, TaskKind::VmSnapshot);
    let new = new_snapshot(SnapshotPurpose::User);
    let (_, kept) = store.request_snapshot(here, new, taken, None).await.unwrap();
    snapshot(store, there).await;
    let page = PageRequest::default;
    let of = Some(ours);
    let vms = store.vms(VmFilter { project: of, ..VmFilter::default() }, page()).await.unwrap();
    assert_eq!(vms.items.iter().map(|vm| vm.id).collect::<Vec<_>>(), [here]);
    let tasks = TaskFilter { project: of, ..TaskFilter::default() };
    let tasks = store.tasks(tasks, page()).await.unwrap();
    assert!(tasks.items.len() == 2 && tasks.items.iter().all(|task| task.project_id == ours));
    let snapshots = SnapshotFilter { project: of, ..SnapshotFilter::default() };
    let snapshots = store.snapshots(snapshots, page()).await.unwrap();
    assert_eq!(snapshots.items.iter().map(|one| one.id).collect::<Vec<_>>(), [kept.id]);
    crate::support::build(store, "t").await;
    let templates = TemplateFilter { project: of, ..TemplateFilter::default() };
    assert!(store.templates(templates, page()).await.unwrap().items.is_empty());
    assert_eq!(store.vms(VmFilter::default(), page()).await.unwrap().items.len(), 2);
}

pub(crate) async fn a_vm_begins_only_as_what_its_project_has(store: &impl Store) {
    let ours = project(store, "ours").await;
    let there = running(store, "b").await;
    let (_, kept) = snapshot(store, there).await;
    let template = crate::support::built(store, "t").await;
    for (origin, code) in [
        (Origin::Snapshot(kept.id), ErrorCode::SnapshotNotFound),
        (Origin::Template(template.id), ErrorCode::TemplateNotFound),
    ] {
        let mut vm = new_vm("a");
        vm.spec.origin = origin;
        let task = task_of(ours, TaskKind::VmCreate);
        let refused = store.create_vm(vm, task, Capacity::default(), None).await.unwrap_err();
        assert_eq!(refused.code(), code);
    }
}

pub(crate) async fn nothing_is_made_in_a_project_that_is_gone(store: &impl Store) {
    let ours = project(store, "ours").await;
    store.delete_project(ours).await.unwrap();
    let gone = |code| assert_eq!(code, ErrorCode::ProjectNotFound);
    let task = task_of(ours, TaskKind::VmCreate);
    let vm = store.create_vm(new_vm("a"), task, Capacity::default(), None).await;
    gone(vm.unwrap_err().code());
    let task = task_of(ours, TaskKind::ToolBuild);
    gone(store.build_tools(Vec::new(), task, None).await.unwrap_err().code());
    let template = new_template("t");
    let builder = new_vm("builder");
    let task = task_of(ours, TaskKind::TemplateBuild);
    let new = new_snapshot(SnapshotPurpose::Template);
    let built = store.build_template(template, new, builder, task, None).await;
    gone(built.unwrap_err().code());
    let now = Timestamp::now();
    let key = ApiKey {
        id: KeyId::new(),
        name: "a".into(),
        prefix: "aeth_".into(),
        hash: [1; 32],
        project_id: ours,
        role: Role::Viewer,
        scopes: Vec::new(),
        created_by: None,
        created_at: now,
        expires_at: None,
        last_used_at: None,
        revoked_at: None,
    };
    gone(store.insert_key(key).await.unwrap_err().code());
}
