//! Buses between processes, over real servers: what one publishes all hear, and a server that goes
//! away leaves nobody waiting for what was not told.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{sync::Arc, time::Duration};

use aether_events::{Event, EventBus, PostgresBus, Received, RedisBus, Subscription};
use aether_postgres::{
    Database,
    testing::{self as postgres, ServerOptions},
};
use aether_redis::testing::{self as redis};
use aether_types::{ExecutionId, Timestamp, VmId};

const HANGS_AFTER: Duration = Duration::from_secs(20);

fn event() -> Event {
    Event::ExecutionStarted {
        execution_id: ExecutionId::new(),
        vm_id: VmId::new(),
        at: Timestamp::from_unix_ms(0),
    }
}

async fn next(listener: &mut Box<dyn Subscription>) -> Received {
    tokio::time::timeout(HANGS_AFTER, listener.next()).await.expect("nothing is heard")
}

/// The next event, whatever was missed before.
async fn next_event(listener: &mut Box<dyn Subscription>) -> Event {
    loop {
        match next(listener).await {
            Received::Event(event) => return event,
            Received::Missed => {}
            Received::Closed => panic!("the bus has ended"),
        }
    }
}

/// Two processes: each hears what the other publishes, once and in order, and its own.
async fn told_to_all(one: Arc<dyn EventBus>, two: Arc<dyn EventBus>) {
    let (mut at_one, mut at_two) = (one.subscribe(), two.subscribe());
    let events: Vec<Event> = (0..200).map(|_| event()).collect();
    for event in &events {
        one.publish(event.clone()).await.unwrap();
    }
    for event in &events {
        assert_eq!(next(&mut at_two).await, Received::Event(event.clone()));
        assert_eq!(next(&mut at_one).await, Received::Event(event.clone()));
    }
    let answer = event();
    two.publish(answer.clone()).await.unwrap();
    assert_eq!(next(&mut at_one).await, Received::Event(answer));
}

/// What is published while the server is away is heard here, and told to the others as a gap.
async fn comes_back(one: Arc<dyn EventBus>, two: Arc<dyn EventBus>, restart: impl FnOnce()) {
    let (mut at_one, mut at_two) = (one.subscribe(), two.subscribe());
    let lost = event();
    restart();
    one.publish(lost.clone()).await.unwrap();
    assert_eq!(next_event(&mut at_one).await, lost);
    assert_eq!(next(&mut at_two).await, Received::Missed);
    // Either is connected again by now or soon; what comes from then on is heard.
    let heard = async {
        loop {
            let event = event();
            two.publish(event.clone()).await.unwrap();
            loop {
                match next(&mut at_one).await {
                    Received::Event(heard) if heard == event => return,
                    Received::Event(_) => {}
                    // It was not connected yet: what was published before that may be lost.
                    Received::Missed => break,
                    Received::Closed => panic!("the bus has ended"),
                }
            }
        }
    };
    tokio::time::timeout(HANGS_AFTER, heard).await.expect("it does not come back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_redis_all_hear_all() {
    if !redis::available() {
        return;
    }
    let server = redis::Server::forgetful();
    let bus = async || Arc::new(RedisBus::open(server.config()).await.unwrap());
    told_to_all(bus().await, bus().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_postgresql_all_hear_all() {
    if !postgres::available() {
        return;
    }
    let test = postgres::empty_database().await;
    let bus = async || {
        let database = Database::open(test.config.clone()).await.unwrap();
        Arc::new(PostgresBus::open(&database).await.unwrap())
    };
    told_to_all(bus().await, bus().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_was_away_is_a_gap() {
    if !redis::available() {
        return;
    }
    let mut server = redis::Server::forgetful();
    let one = Arc::new(RedisBus::open(server.config()).await.unwrap());
    let two = Arc::new(RedisBus::open(server.config()).await.unwrap());
    comes_back(one, two, || {
        server.stop();
        server.start_again();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgresql_that_was_away_is_a_gap() {
    if !postgres::available() {
        return;
    }
    let mut server = postgres::Server::start(&ServerOptions::default());
    let bus = async || {
        let database = Database::open(server.config()).await.unwrap();
        Arc::new(PostgresBus::open(&database).await.unwrap())
    };
    let (one, two) = (bus().await, bus().await);
    comes_back(one, two, || {
        server.stop();
        server.start_again();
    })
    .await;
}
