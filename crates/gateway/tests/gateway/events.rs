//! Events over the API.

use aether_api::{
    CreateKey, CreateProject, CreateVm, EVENT_STREAM_MEDIA_TYPE, EVENT_VERSION, EventMessage,
    EventView,
    client::{CallOptions, Client, ClientError, EventQuery, EventsFrom, FollowEvents},
};
use aether_types::{Role, Timestamp, project::Quota};
use reqwest::{Method, StatusCode};

use crate::rig::{Rig, command, done, problem, soon, waiting};

async fn next(follow: &mut FollowEvents) -> EventView {
    match soon(follow.next()).await.unwrap().expect("the stream has ended") {
        EventMessage::Event(event) => *event,
        other => panic!("{other:?}"),
    }
}

/// Topics of the next events.
async fn take(follow: &mut FollowEvents, count: usize) -> Vec<String> {
    let mut taken = Vec::new();
    while taken.len() < count {
        taken.push(next(follow).await.topic.to_string());
    }
    taken
}

/// What has happened, to the end of it.
async fn past(client: &Client, query: EventQuery, from: EventsFrom) -> Vec<EventView> {
    let query = EventQuery { past: true, ..query };
    let mut follow = client.follow_events(&query, from).await.unwrap();
    let mut events = Vec::new();
    while let Some(message) = soon(follow.next()).await.unwrap() {
        let EventMessage::Event(event) = message else { panic!("{message:?}") };
        events.push(*event);
    }
    events
}

fn of(topics: &[&str]) -> EventQuery {
    let topics = topics.iter().map(|&topic| topic.to_owned()).collect();
    EventQuery { topics, ..EventQuery::default() }
}

const VM: [&str; 5] =
    ["vm.created", "vm.running", "execution.created", "execution.running", "execution.completed"];

#[tokio::test]
async fn a_follower_is_told_what_happens_as_it_happens() {
    let rig = Rig::new().await;
    let query = of(&["vm.*", "execution.*"]);
    let mut follow = rig.client.follow_events(&query, EventsFrom::Now).await.unwrap();
    let vm = rig.vm("web").await;
    let ran = rig.client.execute("web", &command("echo", &["hi"]), &waiting()).await.unwrap();
    let execution = done(ran);
    assert_eq!(take(&mut follow, 5).await, VM);
    let stop = rig.client.stop_vm("web", &waiting()).await.unwrap();
    done(stop);
    let stopping = next(&mut follow).await;
    assert_eq!((stopping.topic.as_str(), stopping.version), ("vm.stopping", EVENT_VERSION));
    assert_eq!((stopping.vm_id, stopping.name.as_deref()), (Some(vm.id), Some("web")));
    assert_eq!(next(&mut follow).await.topic.as_str(), "vm.stopped");

    let of_task = EventQuery { task: Some(execution.task_id), ..EventQuery::default() };
    let told = past(&rig.client, of_task, EventsFrom::After(0)).await;
    assert_eq!(told.len(), 6, "of the task and of its execution: {told:?}");
    assert!(told.iter().all(|event| event.vm_id == Some(vm.id)));
    assert!(told.iter().any(|event| event.execution_id == Some(execution.id)));
    assert!(told.iter().any(|event| event.kind.as_deref() == Some("vm:execute")));

    rig.shutdown.cancel();
    let last = soon(follow.next()).await.unwrap();
    assert_eq!(last, Some(EventMessage::Detached));
    assert_eq!(soon(follow.next()).await.unwrap(), None);
}

#[tokio::test]
async fn a_follower_goes_on_where_it_was() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let vm = rig.vm("b").await;
    let query = of(&["vm.*"]);
    let all = past(&rig.client, query.clone(), EventsFrom::Time(Timestamp::from_unix_ms(0))).await;
    assert_eq!(all.len(), 4, "{all:?}");
    let after = EventsFrom::After(all[1].sequence);
    assert_eq!(past(&rig.client, query.clone(), after).await, all[2..]);
    for named in ["b".to_owned(), vm.id.to_string()] {
        let named = EventQuery { vm: Some(named), ..query.clone() };
        assert_eq!(past(&rig.client, named, EventsFrom::After(0)).await, all[2..]);
    }
    // The past and then what comes, with nothing between them.
    let mut follow = rig.client.follow_events(&query, after).await.unwrap();
    rig.vm("c").await;
    let running = ["vm.created", "vm.running"];
    assert_eq!(take(&mut follow, 4).await, [running, running].concat());
    assert_eq!(past(&rig.client, query, EventsFrom::Now).await, []);

    let request = rig.call(Method::GET, "/events?topic=vm.*&follow=false");
    let request = request.header("accept", EVENT_STREAM_MEDIA_TYPE);
    let response = request.header("last-event-id", all[0].sequence.to_string()).send();
    let response = response.await.unwrap();
    assert_eq!(response.headers()["content-type"], EVENT_STREAM_MEDIA_TYPE);
    let text = soon(response.text()).await.unwrap();
    let events: Vec<_> = text.split_terminator("\n\n").collect();
    assert_eq!(events.len(), 5, "{text}");
    let (id, data) = events[0].split_once('\n').unwrap();
    assert_eq!(id, format!("id: {}", all[1].sequence));
    let event: EventMessage = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(event, EventMessage::Event(Box::new(all[1].clone())));
}

#[tokio::test]
async fn many_followers_are_told_the_same() {
    let rig = Rig::new().await;
    let query = of(&["vm.*"]);
    let mut followers = Vec::new();
    for _ in 0..50 {
        followers.push(rig.client.follow_events(&query, EventsFrom::Now).await.unwrap());
    }
    for name in ["a", "b", "c"] {
        rig.vm(name).await;
    }
    let first: Vec<_> = {
        let mut events = Vec::new();
        for _ in 0..6 {
            events.push(next(&mut followers[0]).await);
        }
        events
    };
    for follower in &mut followers[1..] {
        for wanted in &first {
            assert_eq!(next(follower).await, *wanted);
        }
    }
}

#[tokio::test]
async fn a_project_is_told_nothing_of_another() {
    let rig = Rig::new().await;
    let project = CreateProject { name: "theirs".into(), quota: Quota::default() };
    rig.client.create_project(&project).await.unwrap();
    let key = CreateKey {
        name: "k".into(),
        role: Role::Admin,
        scopes: Vec::new(),
        expires_in_s: None,
        project: Some("theirs".into()),
    };
    let key = rig.client.create_key(&key).await.unwrap().key;
    let theirs = Client::new(&rig.base, Some(&key)).unwrap();
    let begin = EventsFrom::After(0);
    let mut follow = theirs.follow_events(&EventQuery::default(), begin).await.unwrap();
    let ours = rig.vm("web").await;
    let of_ours = EventQuery { vm: Some(ours.id.to_string()), ..EventQuery::default() };
    assert_eq!(past(&theirs, of_ours, begin).await, []);
    assert_eq!(past(&theirs, EventQuery::default(), begin).await, []);
    let created = theirs.create_vm(&CreateVm::default(), &CallOptions::default()).await.unwrap();
    let first = next(&mut follow).await;
    assert_eq!(first.vm_id, Some(created.vm_id()), "the first that they are told is theirs");

    let all = EventQuery { all: true, ..EventQuery::default() };
    let refused = theirs.follow_events(&all, begin).await.unwrap_err();
    let ClientError::Problem(refused) = refused else { panic!("{refused:?}") };
    assert_eq!(refused.code, "forbidden");
    let projects = past(&rig.client, all, begin).await;
    let projects = projects.iter().map(|event| event.project_id);
    assert_eq!(projects.collect::<std::collections::BTreeSet<_>>().len(), 2);
}

#[tokio::test]
async fn a_wrong_question_is_refused_with_what_to_do() {
    let rig = Rig::new().await;
    for (parameters, words) in [
        ("topic=vm", "topic: one of vm.created"),
        ("topic=vm.*,pod.*", "topic: one of vm.created"),
        ("since=now", "since: a time such as"),
        ("after=-1", "after"),
        ("after=1&since=2026-01-31T09:30:00Z", "after: not together with since"),
        ("follow=maybe", "follow: true or false"),
        ("task_id=1", "task_id: `1` is not a task id"),
        ("vm=a", "`vm` is not known"),
        ("", "open a WebSocket, or accept text/event-stream"),
    ] {
        let response =
            rig.call(Method::GET, &format!("/events?{parameters}")).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{parameters}");
        let detail = problem(response).await.detail;
        assert!(detail.contains(words), "{parameters}: {detail}");
    }
    let none = EventQuery { vm: Some("none".into()), ..EventQuery::default() };
    let refused = rig.client.follow_events(&none, EventsFrom::Now).await.unwrap_err();
    let ClientError::Problem(refused) = refused else { panic!("{refused:?}") };
    assert_eq!(refused.code, "vm_not_found");
    let bare = rig.bare(Method::GET, "/events").send().await.unwrap();
    assert_eq!(bare.status(), StatusCode::UNAUTHORIZED);
}
