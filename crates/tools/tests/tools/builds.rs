//! Builds: one for all who ask, and nothing left of those that fail.

use std::sync::Mutex;
use std::time::Duration;

use aether_tools::{ToolError, ToolEvent, Tools};
use aether_types::ErrorCode;

use crate::fake::{Does, Rig};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn tool_is_built_once_and_found_from_then_on() {
    let rig = Rig::new().await;
    let tools = rig.tools();
    let layer = rig.ensure(&tools, "hello").await.unwrap();
    assert_eq!((layer.name.as_str(), layer.asked.as_str()), ("hello", "latest"));
    assert_eq!((layer.got.as_str(), layer.size_bytes), ("1.2.0", 8192));
    let content = std::fs::read(&layer.path).unwrap();
    assert_eq!(layer.digest, format!("blake3:{}", blake3::hash(&content).to_hex()));
    let again = rig.ensure(&tools, "hello@1.2.0").await.unwrap();
    assert_eq!((again.digest, again.verified_at), (layer.digest, layer.verified_at));
    let other = rig.ensure(&tools, "hello@1.1").await.unwrap();
    assert_eq!(other.got, "1.1.0");
    assert_ne!(other.path, layer.path);
    assert_eq!(rig.builder.builds(), 2);
    rig.assert_only(2);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_who_ask_at_once_get_one_build_and_all_of_its_log() {
    let rig = Rig::new().await;
    rig.builder.set(Does::Wait);
    let tools = rig.tools();
    // Another process with the same folder, and so another list of builds in hand.
    let others = rig.tools();
    let seen: Vec<Mutex<Vec<ToolEvent>>> = (0..20).map(|_| Mutex::default()).collect();
    let ask = async |place: usize, tools: &Tools| {
        let tell = |event| seen[place].lock().unwrap().push(event);
        rig.ensure_telling(tools, "hello", &tell).await.unwrap()
    };
    let first = (0..10).map(|place| ask(place, &tools));
    let late = async {
        rig.builder.begun().await;
        let late = (10..19).map(|place| ask(place, &tools));
        let late = futures::future::join_all(late);
        let go_on = async {
            // All of them wait; then the build may end.
            let hears = |one: &Mutex<Vec<ToolEvent>>| one.lock().unwrap().iter().any(is_log);
            while !seen[..19].iter().all(hears) {
                tokio::task::yield_now().await;
            }
            rig.builder.go_on();
        };
        futures::future::join3(late, ask(19, &others), go_on).await
    };
    let both = futures::future::join(futures::future::join_all(first), late);
    let (first, (late, other, ())) = tokio::time::timeout(SOON, both).await.unwrap();
    assert_eq!(rig.builder.builds(), 1);
    assert!(first.iter().chain(&late).all(|layer| layer.digest == other.digest));
    for (place, events) in seen[..19].iter().enumerate() {
        let events = events.lock().unwrap();
        let lines: Vec<_> = events.iter().filter(|event| is_log(event)).collect();
        assert_eq!(lines.len(), 2, "{place}: {events:?}");
        assert!(matches!(events.last(), Some(ToolEvent::Ready { .. })), "{place}: {events:?}");
    }
}

fn is_log(event: &ToolEvent) -> bool {
    matches!(event, ToolEvent::Line { .. })
}

#[tokio::test]
async fn build_goes_on_when_nobody_waits() {
    let rig = Rig::new().await;
    rig.builder.set(Does::Wait);
    let tools = rig.tools();
    tokio::select! {
        _ = rig.ensure(&tools, "hello") => panic!("it waits"),
        () = rig.builder.begun() => {}
    }
    rig.builder.go_on();
    tokio::time::timeout(SOON, tools.finish()).await.unwrap();
    rig.ensure(&tools, "hello").await.unwrap();
    assert_eq!(rig.builder.builds(), 1);
}

#[tokio::test]
async fn build_that_fails_leaves_nothing_and_the_next_works() {
    let rig = Rig::new().await;
    let mut config = rig.config();
    config.build_time_limit = Duration::from_millis(300);
    let tools = Tools::open(config).unwrap();
    for (does, said) in [
        (Does::Fail(3), "exit status 3 (at: install)"),
        (Does::Fail(aether_tools::VERIFY_FAILED), "does not do what it must"),
        (Does::Fail(aether_tools::LAYOUT_FAILED), "cannot be a layer"),
        (Does::Hang, "time limit of 0 s"),
        (Does::FillTheDisk, "the builder is full"),
        (Does::Garbage, "no erofs image"),
    ] {
        rig.builder.set(does);
        let error = rig.ensure(&tools, "hello").await.unwrap_err();
        let fault = error.to_fault();
        assert_eq!(fault.code, ErrorCode::ToolBuildFailed);
        for part in ["hello 1.2.0", said, "unpacking\nalmost done"] {
            assert!(fault.message.contains(part), "{does:?}: {part}: {}", fault.message);
        }
        rig.assert_only(0);
        assert!(tools.locked().await.unwrap().is_empty());
    }
    rig.builder.set(Does::Panic);
    assert!(matches!(rig.ensure(&tools, "hello").await, Err(ToolError::Io { .. })));
    rig.assert_only(0);
    rig.builder.set(Does::Build);
    rig.ensure(&tools, "hello").await.unwrap();
    rig.assert_only(1);
}

#[tokio::test]
async fn artefact_with_a_wrong_checksum_leaves_nothing_and_the_next_works() {
    let rig = Rig::new().await;
    let tools = rig.tools();
    rig.registry.put("/hello/-/hello-1.2.0.tgz", "", "tampered");
    let error = rig.ensure(&tools, "hello").await.unwrap_err().to_string();
    // The mirror's own file is tried first, then the address that the listing has.
    assert!(error.contains("hello 1.2.0") && error.contains("elsewhere"), "{error}");
    rig.registry.put("/elsewhere/hello-1.2.0.tgz", "", "tampered too");
    let error = rig.ensure(&tools, "hello").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ToolBuildFailed);
    assert!(error.to_string().contains("wrong checksum"), "{error}");
    rig.assert_only(0);
    assert_eq!((rig.files("artefacts"), rig.builder.builds()), (0, 0));
    rig.registry.put("/elsewhere/hello-1.2.0.tgz", "", "1.2.0");
    rig.ensure(&tools, "hello").await.unwrap();
    rig.assert_only(1);
}

#[tokio::test]
async fn what_is_not_there_is_named_with_what_is_close() {
    let rig = Rig::new().await;
    let tools = rig.tools();
    let fault = rig.ensure(&tools, "helo").await.unwrap_err().to_fault();
    assert_eq!(fault.code, ErrorCode::ToolNotFound);
    assert!(fault.message.contains("helo") && fault.message.contains("hello"), "{fault}");
    assert_eq!(rig.registry.requests(), 0, "a wrong name asks nobody");
    let fault = rig.ensure(&tools, "hello@1.1.1").await.unwrap_err().to_fault();
    assert_eq!(fault.code, ErrorCode::ToolVersionNotFound);
    for part in ["hello", "1.1.1", "npm:hello", "1.1.0"] {
        assert!(fault.message.contains(part), "{part}: {fault}");
    }
    let fault = rig.ensure(&tools, "hello@=<1").await.unwrap_err().to_fault();
    assert_eq!(fault.code, ErrorCode::ToolVersionNotFound);
    rig.assert_only(0);
}
