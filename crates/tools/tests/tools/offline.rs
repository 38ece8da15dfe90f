//! Without a network: the lock, the cache, the mirror.

use std::time::Duration;

use aether_tools::Tools;

use crate::fake::{Rig, base};

#[tokio::test]
async fn what_is_locked_and_cached_asks_nobody() {
    let rig = Rig::new().await;
    let tools = rig.tools();
    for asked in ["hello", "hello@1.1.0", "world"] {
        rig.ensure(&tools, asked).await.unwrap();
    }
    drop(tools);
    let (asked, built) = (rig.registry.requests(), rig.builder.builds());
    rig.registry.set_down(true);
    let tools = rig.tools();
    for asked in ["hello", "hello@1.1.0", "world"] {
        rig.ensure(&tools, asked).await.unwrap();
    }
    assert_eq!((rig.registry.requests(), rig.builder.builds()), (asked, built));
    // Layers that are gone are built again of the artefacts.
    let layers = rig.path("tools/layers");
    std::fs::remove_dir_all(&layers).unwrap();
    std::fs::create_dir(&layers).unwrap();
    rig.ensure(&tools, "hello").await.unwrap();
    assert_eq!((rig.registry.requests(), rig.builder.builds()), (asked, built + 1));

    let locked = tools.locked().await.unwrap();
    let hello = locked.iter().find(|tool| tool.name == "hello" && tool.asked == "latest").unwrap();
    assert_eq!((hello.got.as_str(), hello.source.as_str()), ("1.2.0", "npm:hello"));
    assert!(hello.cached && hello.artefacts[0].starts_with("sha512:"), "{hello:?}");
    let versions = tools.versions("hello").await.unwrap();
    assert!(versions.offline.is_some(), "{versions:?}");
    assert_eq!(versions.versions.len(), 2);
    assert!(rig.ensure(&tools, "hello@1").await.is_err(), "it was never asked for");
}

#[tokio::test]
async fn latest_is_looked_up_again_when_it_is_old_and_the_source_answers() {
    let rig = Rig::new().await;
    let tools = rig.tools();
    assert_eq!(rig.ensure(&tools, "hello").await.unwrap().got, "1.2.0");
    assert_eq!(rig.ensure(&tools, "hello@1.2.0").await.unwrap().got, "1.2.0");
    rig.registry.put_npm("hello", &[("1.3.0", b"1.3.0"), ("1.2.0", b"1.2.0")]);
    assert_eq!(rig.ensure(&tools, "hello").await.unwrap().got, "1.2.0", "it is young");
    tools.refresh().await.unwrap();
    rig.registry.set_down(true);
    assert_eq!(rig.ensure(&tools, "hello").await.unwrap().got, "1.2.0", "nobody answers");
    rig.registry.set_down(false);
    assert_eq!(rig.ensure(&tools, "hello").await.unwrap().got, "1.3.0");
    let requests = rig.registry.requests();
    assert_eq!(rig.ensure(&tools, "hello@1.2.0").await.unwrap().got, "1.2.0");
    assert_eq!(rig.registry.requests(), requests, "an exact version is looked up once");

    let mut config = rig.config();
    config.refresh_after = Duration::ZERO;
    let tools = Tools::open(config).unwrap();
    rig.registry.put_npm("hello", &[("1.4.0", b"1.4.0")]);
    assert_eq!(rig.ensure(&tools, "hello").await.unwrap().got, "1.4.0");
}

#[tokio::test]
async fn versions_are_newest_first_with_what_is_known_of_each() {
    let rig = Rig::new().await;
    rig.registry.put_npm("hello", &[("1.2.0", b"a"), ("2.0.0-rc.1", b"b"), ("1.10.0", b"c")]);
    let tools = rig.tools();
    rig.ensure(&tools, "hello@1.10").await.unwrap();
    let versions = tools.versions("hello").await.unwrap();
    assert_eq!((versions.latest.as_deref(), versions.offline), (Some("1.2.0"), None));
    let listed: Vec<_> = versions
        .versions
        .iter()
        .map(|v| (v.version.as_str(), v.is_pre, v.locked, v.cached))
        .collect();
    assert_eq!(
        listed,
        [
            ("2.0.0-rc.1", true, false, false),
            ("1.10.0", false, true, true),
            ("1.2.0", false, false, false)
        ]
    );
}

#[tokio::test]
async fn mirror_serves_what_was_exported_and_nothing_else() {
    let rig = Rig::new().await;
    let requests = ["hello", "world@3"].map(|text| text.parse().unwrap());
    let mirror = rig.path("mirror");
    rig.tools().mirror_export(&requests, &base(), &mirror, &|_| ()).await.unwrap();
    rig.tools().mirror_export(&requests, &base(), &mirror, &|_| ()).await.unwrap();
    rig.registry.set_down(true);

    let mut config = rig.config();
    config.folder = rig.path("another");
    config.mirror = Some(mirror.clone());
    let tools = Tools::open(config.clone()).unwrap();
    let requests = rig.registry.requests();
    assert_eq!(rig.ensure(&tools, "hello@^1").await.unwrap().got, "1.2.0");
    assert_eq!(rig.ensure(&tools, "world").await.unwrap().got, "3.0.0");
    assert_eq!(rig.registry.requests(), requests);
    let error = rig.ensure(&tools, "hello@1.1.0").await.unwrap_err().to_string();
    assert!(error.contains("mirror") && error.contains("1.2.0"), "{error}");

    // A file that was changed is no file of the mirror.
    for entry in std::fs::read_dir(mirror.join("files")).unwrap() {
        std::fs::write(entry.unwrap().path(), "tampered").unwrap();
    }
    config.folder = rig.path("third");
    let tools = Tools::open(config).unwrap();
    let error = rig.ensure(&tools, "hello").await.unwrap_err().to_string();
    assert!(error.contains("wrong checksum") && error.contains("mirror"), "{error}");
}
