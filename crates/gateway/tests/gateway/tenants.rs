//! Two projects, and what each has of the other: nothing, on every route there is.

use std::collections::BTreeSet;

use aether_api::{
    BuildTemplate, CreateKey, CreateProject, CreateSnapshot, CreateVm, OriginKind, Problem,
    QueryLogs, TerminalStart,
    client::{CallOptions, Client, LogsFrom, SnapshotQuery, TaskQuery, TemplateQuery, VmQuery},
};
use aether_gateway::Gateway;
use aether_logs::{LogEntry, LogLevel, LogService, LogStore as _, LogStream};
use aether_streams::PoolStatus;
use aether_types::{
    ErrorCode, ExecutionId, KeyId, Role, SnapshotId, TaskId, TemplateId, VmId, VmState,
    project::{Quota, Usage},
};
use reqwest::{Method, StatusCode, header};

use crate::rig::{Options, Rig, ScriptedPools, command, done, problem, waiting};

/// A project with one of everything.
struct Tenant {
    key: String,
    client: Client,
    things: Things,
}

/// What may stand in the place of each parameter, by id and by name.
#[derive(Clone)]
struct Things {
    vm: Vec<String>,
    execution: Vec<String>,
    task: Vec<String>,
    snapshot: Vec<String>,
    template: Vec<String>,
    key: Vec<String>,
}

impl Things {
    fn unknown() -> Self {
        let both = |id: String| vec![id, "nobody".to_owned()];
        Self {
            vm: both(VmId::new().to_string()),
            execution: vec![ExecutionId::new().to_string()],
            task: vec![TaskId::new().to_string()],
            snapshot: both(SnapshotId::new().to_string()),
            template: both(TemplateId::new().to_string()),
            key: vec![KeyId::new().to_string()],
        }
    }

    /// The path with these; `n` chooses among the ways to say each.
    fn fill(&self, path: &str, n: usize) -> String {
        let pick = |ways: &[String]| ways[n.min(ways.len() - 1)].clone();
        path.replace("{vm}", &pick(&self.vm))
            .replace("{execution}", &pick(&self.execution))
            .replace("{task}", &pick(&self.task))
            .replace("{snapshot}", &pick(&self.snapshot))
            .replace("{template}", &pick(&self.template))
            .replace("{key}", &pick(&self.key))
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        let of_vm = self.vm.iter().chain(&self.execution).chain(&self.task);
        of_vm.chain(&self.snapshot).chain(&self.template).chain(&self.key)
    }
}

impl Tenant {
    async fn new(rig: &Rig, name: &str, key: String) -> Self {
        let client = Client::new(&rig.base, Some(&key)).unwrap();
        let vm = CreateVm { name: Some(format!("vm-of-{name}")), ..CreateVm::default() };
        let vm = done(client.create_vm(&vm, &waiting()).await.unwrap());
        let ran = client.execute(&vm.name, &command("echo", &["secret"]), &waiting()).await;
        let ran = done(ran.unwrap());
        let kept = CreateSnapshot { name: Some(format!("snapshot-of-{name}")) };
        let kept = done(client.create_snapshot(&vm.name, &kept, &waiting()).await.unwrap());
        let made =
            BuildTemplate { name: format!("template-of-{name}"), ..BuildTemplate::default() };
        let made = done(client.build_template(&made, &waiting()).await.unwrap());
        let viewer = CreateKey {
            name: "viewer".into(),
            role: Role::Viewer,
            scopes: Vec::new(),
            expires_in_s: None,
            project: None,
        };
        let viewer = client.create_key(&viewer).await.unwrap().view;
        let things = Things {
            vm: vec![vm.id.to_string(), vm.name],
            execution: vec![ran.id.to_string()],
            task: vec![ran.task_id.to_string()],
            snapshot: vec![kept.id.to_string(), kept.name.unwrap()],
            template: vec![made.id.to_string(), made.name],
            key: vec![viewer.id.to_string()],
        };
        Self { key, client, things }
    }

    /// Everything that it sees, to be compared.
    async fn world(&self) -> String {
        let vms = self.client.vms(&VmQuery::default()).await.unwrap();
        let tasks = self.client.tasks(&TaskQuery::default()).await.unwrap();
        let snapshots = self.client.snapshots(&SnapshotQuery::default()).await.unwrap();
        let templates = self.client.templates(&TemplateQuery::default()).await.unwrap();
        let keys = self.client.keys(&aether_api::client::KeyQuery::default()).await.unwrap();
        let keys: Vec<_> = keys.items.iter().map(|key| (key.id, key.revoked_at)).collect();
        format!("{vms:?}\n{tasks:?}\n{snapshots:?}\n{templates:?}\n{keys:?}")
    }
}

async fn tenants(rig: &Rig) -> [Tenant; 2] {
    let name = "other".to_owned();
    rig.client
        .create_project(&CreateProject { name: name.clone(), quota: Quota::default() })
        .await
        .unwrap();
    let admin = CreateKey {
        name: "admin".into(),
        role: Role::Admin,
        scopes: Vec::new(),
        expires_in_s: None,
        project: Some(name),
    };
    let admin = rig.client.create_key(&admin).await.unwrap().key;
    [Tenant::new(rig, "default", rig.key.clone()).await, Tenant::new(rig, "other", admin).await]
}

/// Routes below the prefix, but for those of the platform: a key of another project opens none.
fn routes_of_projects() -> Vec<(Method, String)> {
    let below = Gateway::rules().into_iter().filter_map(|(method, path, rule)| {
        let is_shared = rule.is_some_and(|needed| needed.resource.is_shared());
        let path = path.strip_prefix("/api/v1").filter(|_| !is_shared)?;
        Some((method, path.to_owned()))
    });
    below.collect()
}

/// Parameters and a body with which the route does something.
fn completed(method: &Method, path: &str) -> Vec<(&'static str, Option<&'static str>)> {
    if path.ends_with("/files/mkdir") {
        return vec![("", Some(r#"{"path":"/a"}"#))];
    }
    if path.ends_with("/files/move") {
        return vec![("", Some(r#"{"from":"/a","to":"/b"}"#))];
    }
    if path.contains("/files") {
        return vec![("?path=/a", None)];
    }
    if path.ends_with("/execute") {
        let body = Some(r#"{"command":"echo"}"#);
        return vec![("", body), ("?stream=true", body), ("?wait=1s", body)];
    }
    if path.ends_with("/stop") {
        return vec![("", None), ("?keep_memory=true", None)];
    }
    if *method == Method::GET && (path.ends_with("{task}") || path.ends_with("{template}")) {
        return vec![("", None), ("?wait=1s&generation=0", None)];
    }
    if *method == Method::GET && path.ends_with("/output") {
        return vec![("", None), ("?stream=stderr", None)];
    }
    vec![("", None)]
}

/// The answer as one that gets it sees it, but for what was asked.
async fn answer(
    rig: &Rig,
    key: &str,
    method: &Method,
    path: &str,
    things: &Things,
    n: usize,
    (query, body): (&str, Option<&'static str>),
) -> (StatusCode, Problem) {
    let path = format!("{}{query}", things.fill(path, n));
    let mut request = rig.bare(method.clone(), &path).bearer_auth(key);
    if let Some(body) = body {
        request = request.header(header::CONTENT_TYPE, "application/json").body(body);
    }
    let response = request.send().await.unwrap();
    let status = response.status();
    assert!(status.is_client_error(), "{method} {path}: {status}");
    let mut problem = problem(response).await;
    problem.instance.clear();
    for name in things.all() {
        problem.detail = problem.detail.replace(name, "IT");
    }
    (status, problem)
}

#[tokio::test]
async fn on_every_route_a_thing_of_another_project_is_one_that_there_is_not() {
    let rig = Rig::new().await;
    let tenants = tenants(&rig).await;
    let before = [tenants[0].world().await, tenants[1].world().await];
    let mut tried = BTreeSet::new();
    for (one, other) in [(&tenants[0], &tenants[1]), (&tenants[1], &tenants[0])] {
        for (method, path) in routes_of_projects() {
            let path = path.as_str();
            // Of everybody, and not of a project.
            if !path.contains('{') || path.contains("{tool}") {
                continue;
            }
            for how in completed(&method, path) {
                for n in 0..2 {
                    let ask = async |things: &Things| {
                        answer(&rig, &one.key, &method, path, things, n, how).await
                    };
                    let foreign = ask(&other.things).await;
                    assert_eq!(foreign.0, StatusCode::NOT_FOUND, "{method} {path} {how:?}");
                    assert_eq!(foreign, ask(&Things::unknown()).await, "{method} {path} {how:?}");
                }
            }
            tried.insert(format!("{method} {path}"));
        }
    }
    assert!(tried.len() > 30, "{tried:?}");
    assert_eq!([tenants[0].world().await, tenants[1].world().await], before);
}

#[tokio::test]
async fn a_thing_of_ones_own_and_one_of_another_are_two() {
    let rig = Rig::new().await;
    let [one, other] = tenants(&rig).await;
    // Of one's own VM, another's execution; and the other way round.
    let mixed = |vm: &Tenant, execution: &Tenant| Things {
        vm: vm.things.vm.clone(),
        ..execution.things.clone()
    };
    for things in [mixed(&one, &other), mixed(&other, &one)] {
        let path = things.fill("/vms/{vm}/executions/{execution}/output", 0);
        let response = rig.bare(Method::GET, &path).bearer_auth(&one.key).send().await.unwrap();
        let refusal = problem(response).await;
        assert_eq!(refusal.error_code(), Some(ErrorCode::ExecutionNotFound));
    }
}

#[tokio::test]
async fn lists_and_filters_show_nothing_of_another_project() {
    let pool = PoolStatus {
        template_id: TemplateId::new(),
        template: "web:latest".into(),
        ready: 1,
        target: 1,
        min: 1,
        max: 1,
        hits: 0,
        misses: 0,
    };
    let pools = ScriptedPools::default();
    pools.0.lock().unwrap().push(pool);
    let rig = Rig::with(Options { pools, ..Options::default() }).await;
    let tenants = tenants(&rig).await;
    for (one, other) in [(&tenants[0], &tenants[1]), (&tenants[1], &tenants[0])] {
        let vm = &other.things.vm[0];
        let every = "creating,starting,running,paused,stopping,stopped,failed,deleting,deleted";
        let mut paths: Vec<String> = routes_of_projects()
            .into_iter()
            .filter(|(method, path)| *method == Method::GET && !path.contains('{'))
            .map(|(_, path)| path)
            // No page.
            .filter(|path| path != "/logs/stream" && path != "/events")
            .collect();
        assert!(paths.len() > 8, "{paths:?}");
        paths.extend([
            format!("/vms?state={every}"),
            format!("/vms?name={}", other.things.vm[1]),
            format!("/tasks?vm={vm}"),
            format!("/snapshots?vm={vm}"),
            format!("/templates?name={}", other.things.template[1]),
            "/keys?revoked=true".to_owned(),
        ]);
        for path in paths {
            let response = rig.bare(Method::GET, &path).bearer_auth(&one.key).send().await.unwrap();
            assert!(response.status().is_success(), "{path}");
            let text = response.text().await.unwrap();
            for thing in other.things.all() {
                assert!(!text.contains(thing.as_str()), "{path} has {thing}: {text}");
            }
        }
    }
    assert_eq!(tenants[0].client.pools().await.unwrap().items.len(), 1);
    assert_eq!(tenants[1].client.pools().await.unwrap().items, []);
}

#[tokio::test]
async fn what_is_named_in_a_body_is_of_the_project_too() {
    let rig = Rig::new().await;
    let [one, other] = tenants(&rig).await;
    let unknown = Things::unknown();
    for (field, theirs, nothing) in [
        ("template", &other.things.template, &unknown.template),
        ("snapshot", &other.things.snapshot, &unknown.snapshot),
    ] {
        for (theirs, nothing) in theirs.iter().zip(nothing) {
            let ask = async |name: &str| {
                let body = serde_json::json!({ field: name });
                let request = rig.bare(Method::POST, "/vms").bearer_auth(&one.key).json(&body);
                let mut refusal = problem(request.send().await.unwrap()).await;
                refusal.instance.clear();
                refusal.detail = refusal.detail.replace(name, "IT");
                refusal
            };
            let refusal = ask(theirs).await;
            assert_eq!(refusal.status, 422);
            assert_eq!(refusal, ask(nothing).await);
        }
    }
}

#[tokio::test]
async fn names_keys_of_repetition_and_default_templates_are_each_projects_own() {
    let rig = Rig::new().await;
    let [one, other] = tenants(&rig).await;
    let named = CreateVm { name: Some("web".into()), ..CreateVm::default() };
    let once = CallOptions { idempotency_key: Some("k".into()), ..waiting() };
    let ours = done(one.client.create_vm(&named, &once).await.unwrap());
    let theirs = done(other.client.create_vm(&named, &once).await.unwrap());
    assert_ne!(ours.id, theirs.id);
    for (tenant, vm) in [(&one, &ours), (&other, &theirs)] {
        assert_eq!(tenant.client.vm("web").await.unwrap().id, vm.id);
        let again = done(tenant.client.create_vm(&named, &once).await.unwrap());
        assert_eq!(again.id, vm.id, "a repetition is answered with the project's own");
    }
    done(other.client.delete_vm("web", &waiting()).await.unwrap());
    assert_eq!(one.client.vm("web").await.unwrap().state, VmState::Running);

    let default = BuildTemplate { name: "default".into(), ..BuildTemplate::default() };
    done(one.client.build_template(&default, &waiting()).await.unwrap());
    for (tenant, kind) in [(&one, OriginKind::Template), (&other, OriginKind::Image)] {
        let vm = CreateVm::default();
        let vm = done(tenant.client.create_vm(&vm, &waiting()).await.unwrap());
        assert_eq!(vm.origin.kind, kind);
    }
}

#[tokio::test]
async fn a_terminal_in_another_projects_vm_is_not_opened() {
    let rig = Rig::new().await;
    let [one, other] = tenants(&rig).await;
    for vm in &other.things.vm {
        let Err(refusal) = one.client.terminal(vm, &TerminalStart::default()).await else {
            panic!("a terminal in {vm}");
        };
        assert_eq!(refusal.code(), Some(ErrorCode::VmNotFound));
    }
}

#[tokio::test]
async fn projects_are_for_admins_of_the_default_one() {
    let rig = Rig::new().await;
    let [one, other] = tenants(&rig).await;
    let new = CreateProject { name: "third".into(), quota: Quota::default() };
    let forbidden = Some(ErrorCode::Forbidden);
    assert_eq!(other.client.create_project(&new).await.unwrap_err().code(), forbidden);
    let page = aether_api::client::PageQuery::default();
    assert_eq!(other.client.projects(&page).await.unwrap_err().code(), forbidden);
    for project in ["default", "other", "nothing"] {
        assert_eq!(other.client.project(project).await.unwrap_err().code(), forbidden);
        assert_eq!(other.client.delete_project(project).await.unwrap_err().code(), forbidden);
        let key = CreateKey {
            name: "a".into(),
            role: Role::Viewer,
            scopes: Vec::new(),
            expires_in_s: None,
            project: Some(project.into()),
        };
        assert_eq!(other.client.create_key(&key).await.unwrap_err().code(), forbidden);
    }
    let taken = one
        .client
        .create_project(&CreateProject { name: "other".into(), quota: Quota::default() })
        .await;
    assert_eq!(taken.unwrap_err().code(), Some(ErrorCode::NameTaken));
    let in_use = one.client.delete_project("other").await.unwrap_err();
    assert_eq!(in_use.code(), Some(ErrorCode::ProjectInUse));
    let made = one.client.create_project(&new).await.unwrap();
    let third = one.client.project("third").await.unwrap();
    assert_eq!((third.id, third.used), (made.id, Some(Usage::default())));
    let key = CreateKey {
        name: "a".into(),
        role: Role::Admin,
        scopes: Vec::new(),
        expires_in_s: None,
        project: Some(made.id.to_string()),
    };
    let key = one.client.create_key(&key).await.unwrap();
    assert_eq!(key.view.project_id, made.id);
    let third = Client::new(&rig.base, Some(&key.key)).unwrap();
    assert!(third.vms(&VmQuery::default()).await.unwrap().items.is_empty());
    one.client.delete_project("third").await.unwrap();
    let gone = third.vms(&VmQuery::default()).await.unwrap_err();
    assert_eq!(gone.code(), Some(ErrorCode::Unauthorized), "its keys went with it");
}

#[tokio::test]
async fn log_lines_are_those_of_ones_own_vms_and_tasks() {
    let rig = Rig::new().await;
    // The first is of the platform's own project, and its key sees all.
    let [other, one] = tenants(&rig).await;
    let said = |tenant: &Tenant, text: &str| {
        let line = LogEntry::new(LogService::Guest, LogLevel::Info, LogStream::Stdout, text);
        let vm = tenant.things.vm[0].parse().unwrap();
        line.of_vm(Some(vm)).of_task(Some(tenant.things.task[0].parse().unwrap()))
    };
    rig.logs.append(vec![said(&one, "mine"), said(&other, "theirs")]).await.unwrap();
    let of_vm = |vm: &str| QueryLogs { vm_id: Some(vm.to_owned()), ..QueryLogs::default() };
    let of_task =
        |task: &str| QueryLogs { task_id: Some(task.parse().unwrap()), ..QueryLogs::default() };
    let ask = async |query: &QueryLogs| {
        let found = one.client.query_logs(query).await.map_err(|error| error.code());
        let lines = found.map(|found| found.items);
        let live = one.client.follow_logs(query, LogsFrom::After(0)).await;
        let live = live.map(drop).map_err(|error| error.code());
        assert_eq!(live.err(), lines.as_ref().err().copied(), "{query:?}");
        lines.map(|lines| lines.into_iter().map(|line| line.text).collect::<Vec<_>>())
    };
    for vm in &one.things.vm {
        assert_eq!(ask(&of_vm(vm)).await.unwrap(), ["mine"]);
    }
    assert_eq!(ask(&of_task(&one.things.task[0])).await.unwrap(), ["mine"]);
    for things in [&other.things, &Things::unknown()] {
        for vm in &things.vm {
            assert_eq!(ask(&of_vm(vm)).await, Err(Some(ErrorCode::VmNotFound)));
        }
        let refused = Err(Some(ErrorCode::TaskNotFound));
        assert_eq!(ask(&of_task(&things.task[0])).await, refused);
    }
    assert_eq!(ask(&QueryLogs::default()).await, Err(Some(ErrorCode::Forbidden)));
    // Who looks at the whole platform sees all.
    assert_eq!(rig.client.query_logs(&QueryLogs::default()).await.unwrap().items.len(), 2);
}
