//! The document is served, is the one that is checked in, and has every route in it.

use std::{collections::BTreeSet, env, fs, path::PathBuf, process::Command};

use aether_gateway::Gateway;
use reqwest::{Method, StatusCode, header};
use serde_json::Value;

use crate::rig::Rig;

fn checked_in() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json")
}

fn operations() -> Vec<(String, String, Value)> {
    let document: Value = serde_json::from_str(&Gateway::openapi()).unwrap();
    let paths = document["paths"].as_object().unwrap().clone();
    let operations = paths.into_iter().flat_map(|(path, operations)| {
        let operations = operations.as_object().unwrap().clone();
        operations.into_iter().map(move |(method, value)| (method, path.clone(), value))
    });
    operations.collect()
}

#[test]
fn the_document_that_is_checked_in_is_the_one_that_is_served() {
    let served = Gateway::openapi();
    if env::var_os("AETHER_UPDATE").is_some() {
        fs::write(checked_in(), &served).unwrap();
    }
    let kept = fs::read_to_string(checked_in()).unwrap_or_default();
    assert!(
        kept == served,
        "docs/openapi.json is not what is served; refresh it with\n    \
         AETHER_UPDATE=1 cargo nextest run -p aether-gateway the_document_that_is_checked_in"
    );
}

/// A folder whose `node_modules` has `@redocly/cli`.
const LINTER: &str = "AETHER_TEST_REDOCLY";

#[test]
fn the_linter_has_nothing_to_say_of_the_document() {
    let Some(folder) = env::var_os(LINTER).map(PathBuf::from) else {
        println!("skipped: {LINTER} names no folder with Redocly's linter");
        return;
    };
    let said = Command::new("node")
        .arg(folder.join("node_modules/@redocly/cli/bin/cli.js"))
        .args(["lint", "docs/openapi.json"])
        .current_dir(checked_in().ancestors().nth(2).unwrap())
        .env("REDOCLY_TELEMETRY", "off")
        .env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&said.stdout) + String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{text}");
}

#[test]
fn every_route_has_an_operation_of_its_own_and_nothing_else_is_there() {
    let routes: BTreeSet<_> = Gateway::rules()
        .into_iter()
        .map(|(method, path, rule)| (method.as_str().to_lowercase(), path, rule))
        .collect();
    let operations = operations();
    let documented: BTreeSet<_> =
        operations.iter().map(|(method, path, _)| (method.clone(), path.clone())).collect();
    let served: BTreeSet<_> =
        routes.iter().map(|(method, path, _)| (method.clone(), path.clone())).collect();
    assert_eq!(documented, served);
    let ids: BTreeSet<_> =
        operations.iter().map(|(.., value)| value["operationId"].as_str()).collect();
    assert_eq!(ids.len(), operations.len(), "two operations have one id");
    for (method, path, scope) in routes {
        let (.., value) = operations.iter().find(|(m, p, _)| (m, p) == (&method, &path)).unwrap();
        let wanted = scope.map(|scope| scope.to_string());
        let named = value["security"][0]["key"][0].as_str();
        assert_eq!(named, wanted.as_deref(), "{method} {path}");
        for named in path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
            let params = value["parameters"].as_array().unwrap();
            let of_path = |p: &&Value| p["in"] == "path" && p["name"] == named;
            let about = params.iter().find(of_path).map(|p| p["description"].as_str());
            assert!(about.flatten().is_some_and(|about| !about.is_empty()), "{path}: {named}");
        }
    }
}

#[tokio::test]
async fn the_document_needs_no_key_and_is_asked_for_once() {
    let rig = Rig::new().await;
    let client = reqwest::Client::new();
    let url = format!("{}/openapi.json", rig.base);
    let first = client.get(&url).send().await.unwrap();
    assert_eq!(first.status(), StatusCode::OK);
    assert_eq!(first.headers()[header::CACHE_CONTROL], "no-cache");
    let tag = first.headers()[header::ETAG].clone();
    assert_eq!(first.text().await.unwrap(), Gateway::openapi());
    let again = client.get(&url).header(header::IF_NONE_MATCH, tag).send().await.unwrap();
    assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
    assert_eq!(again.text().await.unwrap(), "");
    let other = client.request(Method::POST, &url).send().await.unwrap();
    assert_eq!(other.status(), StatusCode::METHOD_NOT_ALLOWED);
}
