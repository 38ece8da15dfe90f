//! The history of events: what is recorded with every change, in what order it is read, and what a
//! reader that goes on after a number gets.

use std::time::Duration;

use aether_store::{
    Capacity, EventBatch, EventFilter, EventRecord, EventsFrom, NewWorker, Registration, Store,
};
use aether_types::{ErrorCode, ProjectId, SnapshotPurpose, TaskKind, Timestamp, VmEvent};

use crate::{
    capacity::all,
    support::{
        begin, build, carry_out, create, execute, exited, failed, new_snapshot, new_task, new_vm,
        project, running, suspend, task_of,
    },
    workers::{lose, new_worker},
};

async fn read(store: &impl Store, after: u64, filter: &EventFilter) -> EventBatch {
    store.events_after(after, filter).await.unwrap()
}

async fn everything(store: &impl Store) -> Vec<EventRecord> {
    let mut all = Vec::new();
    let mut after = 0;
    loop {
        let batch = read(store, after, &EventFilter::default()).await;
        assert!(!batch.missed);
        all.extend(batch.events);
        after = batch.next;
        if !batch.more {
            return all;
        }
    }
}

/// What became of one subject.
fn of_subject<'e>(events: &'e [EventRecord], subject: &impl ToString) -> Vec<&'e str> {
    let subject = subject.to_string();
    let its = events.iter().filter(|event| event.subject == subject);
    its.map(|event| event.topic.as_str()).collect()
}

fn of(topics: &[&str]) -> EventFilter {
    let topics = topics.iter().map(|topic| topic.parse().unwrap()).collect();
    EventFilter { topics, ..EventFilter::default() }
}

pub(crate) async fn every_change_is_an_event(store: &impl Store) {
    let made = create(store, "web").await;
    carry_out(store, &made.task, Some(VmEvent::Started)).await;
    let (task, execution) = execute(store, made.vm.id).await;
    begin(store, task.id, 1).await;
    store.execution_started(task.id, 1, execution.id, "boot").await.unwrap();
    store.end_attempt(task.id, 1, exited(0)).await.unwrap();
    let events = everything(store).await;
    let created = ["task.created", "task.running", "task.completed"];
    assert_eq!(of_subject(&events, &made.vm.id), ["vm.created", "vm.running"]);
    assert_eq!(of_subject(&events, &made.task.id), created);
    assert_eq!(of_subject(&events, &task.id), created);
    let ran = ["execution.created", "execution.running", "execution.completed"];
    assert_eq!(of_subject(&events, &execution.id), ran);
    assert_eq!(events.len(), 11);

    let vm = events.iter().find(|event| event.topic.as_str() == "vm.created").unwrap();
    assert_eq!((vm.vm_id, vm.detail.as_deref()), (Some(made.vm.id), Some("web")));
    assert_eq!((vm.project_id, vm.code), (Some(made.vm.project_id), None));
    let off_ms = Timestamp::now().unix_ms() - vm.at.unix_ms();
    assert!((-1000..60_000).contains(&off_ms), "{off_ms}");
    let its_task = events.iter().find(|event| event.task_id == Some(made.task.id)).unwrap();
    assert_eq!((its_task.vm_id, its_task.detail.as_deref()), (Some(made.vm.id), Some("vm:create")));
    let command = events.iter().find(|event| event.topic.noun() == "execution").unwrap();
    assert_eq!((command.task_id, command.vm_id), (Some(task.id), Some(made.vm.id)));
}

pub(crate) async fn a_failure_and_a_worker_say_what_they_must(store: &impl Store) {
    let made = create(store, "web").await;
    begin(store, made.task.id, 1).await;
    let end = failed(ErrorCode::Internal, Some(VmEvent::Failed));
    store.end_attempt(made.task.id, 1, end).await.unwrap();
    let new = NewWorker { lease: Duration::ZERO, ..new_worker("h1") };
    let one = store.register_worker(new.clone()).await.unwrap();
    store.heartbeat(Registration::from(&one)).await.unwrap();
    store.drain_worker(one.id).await.unwrap();
    store.activate_worker(one.id).await.unwrap();
    let seen = store.worker(one.id).await.unwrap().unwrap().0;
    lose(store, &seen).await;
    let back = store.register_worker(new).await.unwrap();
    store.leave(Registration::from(&back)).await.unwrap();

    let events = everything(store).await;
    let failures = events.iter().filter(|event| event.code == Some(ErrorCode::Internal));
    let failures: Vec<_> = failures.map(|event| event.topic.as_str()).collect();
    assert!(failures.contains(&"task.failed"), "{failures:?}");
    let words = ["registered", "draining", "activated", "lost", "registered", "left"];
    let words: Vec<_> = words.iter().map(|word| format!("worker.{word}")).collect();
    assert_eq!(of_subject(&events, &one.id), words);
    let of_platform = events.iter().filter(|event| event.project_id.is_none());
    assert!(of_platform.clone().all(|event| event.detail.as_deref() == Some("h1")));
    assert_eq!(of_platform.count(), words.len());
}

pub(crate) async fn what_the_platform_makes_for_itself_is_no_event(store: &impl Store) {
    let (_, template) = build(store, "base").await;
    let vm = running(store, "web").await;
    suspend(store, vm).await;
    let events = everything(store).await;
    assert_eq!(of_subject(&events, &template.id), ["template.created"]);
    assert_eq!(of_subject(&events, &template.builder_id), [""; 0]);
    assert!(events.iter().all(|event| event.topic.noun() != "snapshot"));
    let new = new_snapshot(SnapshotPurpose::User);
    let other = running(store, "other").await;
    store.request_snapshot(other, new, new_task(TaskKind::VmSnapshot), None).await.unwrap();
    let events = everything(store).await;
    assert_eq!(events.iter().filter(|event| event.topic.noun() == "snapshot").count(), 1);
}

pub(crate) async fn events_are_filtered(store: &impl Store) {
    let theirs = project(store, "theirs").await;
    let ours = create(store, "web").await;
    let task = task_of(theirs, TaskKind::VmCreate);
    store.create_vm(new_vm("web"), task, Capacity::default(), None).await.unwrap();
    let count = async |filter: EventFilter| read(store, 0, &filter).await.events.len();
    assert_eq!(count(EventFilter::default()).await, 4);
    let project = |id: ProjectId| EventFilter { project: Some(id), ..EventFilter::default() };
    assert_eq!(count(project(theirs)).await, 2);
    assert_eq!(count(project(ProjectId::new())).await, 0);
    assert_eq!(count(of(&["vm.*"])).await, 2);
    assert_eq!(count(of(&["vm.*", "task.created"])).await, 4);
    assert_eq!(count(of(&["*"])).await, 4);
    assert_eq!(count(of(&["vm.running", "worker.*"])).await, 0);
    let vm = EventFilter { vm: Some(ours.vm.id), ..of(&["vm.created"]) };
    assert_eq!(count(vm).await, 1);
    let task = EventFilter { task: Some(ours.task.id), ..EventFilter::default() };
    assert_eq!(count(task).await, 1);
    // What does not fit is passed by, and not read again.
    let none = read(store, 0, &of(&["worker.*"])).await;
    assert_eq!((none.next, none.more), (4, false));
}

pub(crate) async fn a_reader_goes_on_after_a_number_or_from_a_time(store: &impl Store) {
    assert_eq!(store.events_begin(EventsFrom::Now).await.unwrap(), 0);
    let empty = read(store, 0, &EventFilter::default()).await;
    assert_eq!((empty.next, empty.missed, empty.more), (0, false, false));
    create(store, "a").await;
    let now = store.events_begin(EventsFrom::Now).await.unwrap();
    let before = Timestamp::from_unix_ms(1);
    assert_eq!(store.events_begin(EventsFrom::Time(before)).await.unwrap(), 0);
    let later = Timestamp::now().plus_ms(60_000);
    assert_eq!(store.events_begin(EventsFrom::Time(later)).await.unwrap(), now);
    assert_eq!(store.events_begin(EventsFrom::After(7)).await.unwrap(), 7);
    let made = create(store, "b").await;
    let next = read(store, now, &of(&["vm.*"])).await;
    assert_eq!(of_subject(&next.events, &made.vm.id), ["vm.created"]);
    assert_eq!(next.events.len(), 1);
    let nothing = read(store, next.next, &EventFilter::default()).await;
    assert_eq!(nothing.events, []);
    // A number of another database.
    let ahead = read(store, 1_000_000, &EventFilter::default()).await;
    assert_eq!((ahead.next, ahead.events), (1_000_000, Vec::new()));
}

pub(crate) async fn a_reader_beside_writers_misses_nothing(store: &impl Store) {
    const WRITERS: usize = 8;
    const EACH: usize = 6;
    let writers = (0..WRITERS).map(|writer| async move {
        for n in 0..EACH {
            running(store, &format!("vm-{writer}-{n}")).await;
        }
    });
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let reader = async {
        let (mut seen, mut after) = (Vec::new(), 0);
        loop {
            let was_over = is_over.load(std::sync::atomic::Ordering::SeqCst);
            let batch = read(store, after, &EventFilter::default()).await;
            after = batch.next;
            seen.extend(batch.events);
            if was_over && !batch.more {
                return seen;
            }
            // Others' turn: there is one thread.
            tokio::task::yield_now().await;
        }
    };
    let write = async {
        all(writers.map(Box::pin).collect()).await;
        is_over.store(true, std::sync::atomic::Ordering::SeqCst);
    };
    let (seen, ()) = tokio::join!(reader, write);
    assert_eq!(seen.len(), WRITERS * EACH * 5, "VMs: created, running; tasks: and completed");
    assert!(seen.is_sorted_by(|a, b| a.sequence < b.sequence), "each stands where it was read");
    assert_eq!(seen, everything(store).await);
    for event in &seen {
        let words = of_subject(&seen, &event.subject);
        let wanted: &[&str] = match event.topic.noun() {
            "vm" => &["vm.created", "vm.running"],
            _ => &["task.created", "task.running", "task.completed"],
        };
        assert_eq!(words, wanted);
    }
}

pub(crate) async fn only_retention_takes_events_away(store: &impl Store) {
    create(store, "a").await;
    create(store, "b").await;
    let newest = store.events_begin(EventsFrom::Now).await.unwrap();
    assert_eq!(store.prune_events(Timestamp::from_unix_ms(1)).await.unwrap(), 0);
    let later = Timestamp::now().plus_ms(60_000);
    assert_eq!(store.prune_events(later).await.unwrap(), newest - 1, "the newest stays");
    assert_eq!(store.prune_events(later).await.unwrap(), 0);
    let batch = read(store, 1, &EventFilter::default()).await;
    assert!(batch.missed, "a reader is told that there is a gap");
    assert_eq!(batch.events.len(), 1);
    assert!(!read(store, newest - 1, &EventFilter::default()).await.missed);
    create(store, "c").await;
    let next = read(store, newest, &EventFilter::default()).await;
    assert!(next.events.iter().all(|event| event.sequence > newest), "no number is given twice");
}
