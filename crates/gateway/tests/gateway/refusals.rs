//! Every refusal: its status, its code and its text, as they are checked in.

use std::fmt::Write as _;

use aether_api::{
    BuildTemplate, CreateSnapshot, CreateVm, Problem,
    client::{CallOptions, Client, PageQuery, SnapshotQuery, TemplateQuery, VmQuery},
};
use aether_gateway::Gateway;
use aether_store::{KeyFilter, PageRequest};
use aether_types::{ErrorCode, KeyId, TaskId, VmId, limits};
use reqwest::{Method, StatusCode, header};

use crate::rig::{Options, Rig, command, done, problem, waiting};

/// Ids differ from run to run.
fn stable(problem: &Problem, ids: &[(String, &str)]) -> String {
    let mut problem = problem.clone();
    problem.instance = "REQUEST".into();
    let mut text = serde_json::to_string_pretty(&problem).unwrap();
    for (id, name) in ids {
        text = text.replace(id, name);
    }
    text
}

#[tokio::test]
async fn refusals_are_as_they_are_checked_in() {
    let rig = Rig::new().await;
    let running = rig.vm("runs").await;
    rig.vm("stops").await;
    done(rig.client.stop_vm("stops", &waiting()).await.unwrap());
    let broken =
        rig.call(Method::POST, "/vms?wait=20s").json(&serde_json::json!({"name":"broken"}));
    let broken = problem(broken.send().await.unwrap()).await;
    let kept = CreateSnapshot { name: Some("kept".into()) };
    done(rig.client.create_snapshot("runs", &kept, &waiting()).await.unwrap());
    let made = BuildTemplate { name: "made".into(), ..BuildTemplate::default() };
    done(rig.client.build_template(&made, &waiting()).await.unwrap());
    let ended = rig.client.execute("runs", &command("echo", &[]), &waiting()).await.unwrap();
    let ended = done(ended).task_id;

    let unknown = VmId::new().to_string();
    let ids = [
        (unknown.clone(), "UNKNOWN"),
        (running.id.to_string(), "RUNNING"),
        (broken.task_id.unwrap().to_string(), "TASK"),
        (broken.vm_id.unwrap().to_string(), "BROKEN"),
    ];
    let post = |path: &str, body: &str| {
        let kind = (header::CONTENT_TYPE, "application/json");
        rig.call(Method::POST, path).header(kind.0, kind.1).body(body.to_owned())
    };
    let get = |path: &str| rig.call(Method::GET, path);
    let many = serde_json::json!({"command": "echo", "args": vec!["x".repeat(1000); 200]});
    let huge = format!(r#"{{"command":"{}"}}"#, "x".repeat(limits::BODY_BYTES_MAX));
    let requests = vec![
        ("name taken", post("/vms", r#"{"name":"runs"}"#)),
        ("name malformed", post("/vms", r#"{"name":"No Host"}"#)),
        ("unknown image", post("/vms", r#"{"image":"plan9"}"#)),
        ("no vcpus", post("/vms", r#"{"vcpus":0}"#)),
        ("too many vcpus", post("/vms", r#"{"vcpus":33}"#)),
        ("more vcpus than the host", post("/vms", r#"{"vcpus":5}"#)),
        ("more memory than the host", post("/vms", r#"{"memory_mb":8192}"#)),
        ("too little memory", post("/vms", r#"{"memory_mb":1}"#)),
        ("driver that does not work", post("/vms", r#"{"driver":"qemu"}"#)),
        ("driver that is not configured", post("/vms", r#"{"driver":"firecracker"}"#)),
        ("driver that is none", post("/vms", r#"{"driver":"abacus"}"#)),
        ("misspelt field", post("/vms", r#"{"memory":1}"#)),
        ("network rule", post("/vms", r#"{"network":{"allow":["10.0.0.1/8"]}}"#)),
        ("label", post("/vms", r#"{"labels":{"a b":"c"}}"#)),
        ("two origins", post("/vms", r#"{"template":"a","snapshot":"b"}"#)),
        ("image and template", post("/vms", r#"{"template":"a","image":"debian"}"#)),
        ("image and snapshot", post("/vms", r#"{"snapshot":"a","image":"debian"}"#)),
        ("unknown template of a VM", post("/vms", r#"{"template":"a:v1"}"#)),
        ("unknown snapshot of a VM", post("/vms", r#"{"snapshot":"a"}"#)),
        ("other size than the snapshot", post("/vms", r#"{"snapshot":"kept","memory_mb":512}"#)),
        ("other driver than the snapshot", post("/vms", r#"{"snapshot":"kept","driver":"qemu"}"#)),
        ("other disk than the template", post("/vms", r#"{"template":"made","disk_mb":64}"#)),
        ("unknown tool", post("/vms", r#"{"tools":["gone"]}"#)),
        ("tool malformed", post("/vms", r#"{"tools":["go@$(x)"]}"#)),
        ("two versions of a tool", post("/vms", r#"{"tools":["go@1","golang@2"]}"#)),
        ("version of an unasked tool", post("/vms", r#"{"tool_versions":{"go":"1"}}"#)),
        (
            "a template without the defaults",
            post("/vms", r#"{"template":"made","default_tools":false}"#),
        ),
        ("unknown tool of a template", post("/templates", r#"{"name":"a","tools":["gone"]}"#)),
        ("build no tools", post("/tools/builds", r#"{"tools":[]}"#)),
        ("build an unknown tool", post("/tools/builds", r#"{"tools":["gone"]}"#)),
        ("versions of an unknown tool", get("/tools/gone/versions")),
        ("generation of a task without a wait", get(&format!("/tasks/{ended}?generation=1"))),
        ("snapshot name malformed", post("/vms/runs/snapshots", r#"{"name":"a:b"}"#)),
        ("snapshot name taken", post("/vms/runs/snapshots", r#"{"name":"kept"}"#)),
        ("snapshot of a stopped VM", post("/vms/stops/snapshots", "{}")),
        ("unknown snapshot", get("/snapshots/nothing")),
        ("delete an unknown snapshot", rig.call(Method::DELETE, "/snapshots/nothing")),
        ("fork into none", post("/vms/runs/fork", r#"{"count":0}"#)),
        ("fork into too many", post("/vms/runs/fork", r#"{"count":65}"#)),
        ("fork with a bad prefix", post("/vms/runs/fork", r#"{"name_prefix":"A"}"#)),
        ("fork a stopped VM", post("/vms/stops/fork", "{}")),
        ("keep the memory of a stopped VM", post("/vms/stops/stop?keep_memory=true", "")),
        ("template without a name", post("/templates", "{}")),
        ("template name malformed", post("/templates", r#"{"name":"A"}"#)),
        ("template tag malformed", post("/templates", r#"{"name":"a","tag":"b:c"}"#)),
        ("template of an unknown image", post("/templates", r#"{"name":"a","image":"plan9"}"#)),
        ("template step of nothing", post("/templates", r#"{"name":"a","steps":[{"run":" "}]}"#)),
        (
            "template step that takes too long",
            post("/templates", r#"{"name":"a","steps":[{"run":"a","timeout_s":3601}]}"#),
        ),
        (
            "template file that is relative",
            post("/templates", r#"{"name":"a","files":[{"path":"a","content":""}]}"#),
        ),
        ("unknown template", get("/templates/nothing%3Av1")),
        ("generation without a wait", get("/templates/made?generation=1")),
        ("key without a role", post("/keys", r#"{"name":"ci"}"#)),
        ("key without a name", post("/keys", r#"{"name":"","role":"viewer"}"#)),
        ("key of no role", post("/keys", r#"{"name":"ci","role":"owner"}"#)),
        (
            "key with a scope that is none",
            post("/keys", r#"{"name":"ci","role":"viewer","scopes":["vms:all"]}"#),
        ),
        ("key for a second", post("/keys", r#"{"name":"ci","role":"viewer","expires_in_s":1}"#)),
        ("unknown key", get(&format!("/keys/{unknown}"))),
        ("malformed key id", rig.call(Method::DELETE, "/keys/ci")),
        (
            "key of an unknown project",
            post("/keys", r#"{"name":"ci","role":"viewer","project":"nothing"}"#),
        ),
        ("project name malformed", post("/projects", r#"{"name":"A"}"#)),
        ("project name taken", post("/projects", r#"{"name":"default"}"#)),
        ("unknown project", get("/projects/nothing")),
        ("delete the default project", rig.call(Method::DELETE, "/projects/default")),
        ("malformed JSON", post("/vms", r#"{"name": }"#)),
        ("wrong type", post("/vms", r#"{"vcpus":"two"}"#)),
        ("wrong content type", rig.call(Method::POST, "/vms").body("name=a")),
        ("body too large", post("/vms/runs/execute", &huge)),
        ("unknown VM id", get(&format!("/vms/{unknown}"))),
        ("unknown VM name", get("/vms/nobody")),
        ("unknown task", get(&format!("/tasks/{unknown}"))),
        ("malformed task id", get("/tasks/7")),
        ("unknown execution", get(&format!("/executions/{unknown}"))),
        (
            "execute on an unknown VM",
            post(&format!("/vms/{unknown}/execute"), r#"{"command":"a"}"#),
        ),
        ("execute on a stopped VM", post("/vms/stops/execute", r#"{"command":"a"}"#)),
        ("execute on a failed VM", post("/vms/broken/execute", r#"{"command":"a"}"#)),
        ("execute nothing", post("/vms/runs/execute", r#"{"command":""}"#)),
        ("execute without a command", post("/vms/runs/execute", "{}")),
        ("arguments past the limit", post("/vms/runs/execute", &many.to_string())),
        ("wait and stream", post("/vms/runs/execute?wait=1s&stream=true", r#"{"command":"a"}"#)),
        ("wait too long", post("/vms/runs/stop?wait=301s", "")),
        ("wait malformed", post("/vms/runs/stop?wait=soon", "")),
        ("start what runs", post("/vms/runs/start", "")),
        ("resume what runs", post("/vms/runs/resume", "")),
        ("files of a stopped VM", get("/vms/stops/files?path=/a")),
        ("relative path", get("/vms/runs/files?path=a")),
        ("no path", get("/vms/runs/files")),
        ("file that is not there", get("/vms/runs/files?path=/a")),
        ("cancel what has ended", post(&format!("/tasks/{ended}/cancel"), "")),
        ("unknown parameter", get("/vms?colour=red")),
        ("unknown state", get("/vms?state=asleep")),
        ("cursor that is none", get("/tasks?cursor=abc")),
        ("page too long", get("/tasks?limit=501")),
        ("unknown path", get("/vm")),
        ("wrong method", rig.call(Method::PATCH, "/vms")),
        ("path that is no text", get("/vms/%ff")),
        ("terminal without a WebSocket", get("/vms/runs/terminal")),
        ("idempotency key malformed", post("/vms", "{}").header("idempotency-key", "")),
        ("strange host", get("/vms").header("host", "rebound.example")),
        ("no key", rig.bare(Method::GET, "/vms")),
        ("wrong scheme", rig.bare(Method::GET, "/vms").basic_auth("a", Some("b"))),
        ("wrong key", rig.bare(Method::GET, "/vms").bearer_auth("ae_wrong")),
    ];
    let mut text = format!("broken VM\n{}\n", stable(&broken, &ids));
    for (name, request) in requests {
        let answer = problem(request.send().await.unwrap()).await;
        write!(text, "\n{name}\n{}\n", stable(&answer, &ids)).unwrap();
    }
    // A refusal leaves nothing behind.
    let vms = rig.client.vms(&VmQuery::default()).await.unwrap();
    assert_eq!(vms.items.len(), 3);
    let snapshots = rig.client.snapshots(&SnapshotQuery::default()).await.unwrap();
    assert_eq!(snapshots.items.len(), 1);
    let templates = rig.client.templates(&TemplateQuery::default()).await.unwrap();
    assert_eq!(templates.items.len(), 1);
    let executions = rig.client.executions("runs", &PageQuery::default()).await.unwrap();
    assert_eq!(executions.items.len(), 1);

    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gateway/problems.txt");
    if std::fs::read_to_string(file).unwrap_or_default() != text {
        let new = format!("{file}.new");
        std::fs::write(&new, text).unwrap();
        panic!("the problems differ from problems.txt; compare with {new}, and move it there");
    }
}

#[tokio::test]
async fn every_route_but_health_needs_a_key() {
    let rig = Rig::with(Options { has_worker: false, ..Options::default() }).await;
    let routes = Gateway::routes();
    assert!(routes.len() > 20);
    for (method, path) in routes {
        let path = path
            .replace("{vm}", "a")
            .replace("{execution}", &VmId::new().to_string())
            .replace("{task}", &TaskId::new().to_string())
            .replace("{snapshot}", "a")
            .replace("{template}", "a")
            .replace("{tool}", "go")
            .replace("{key}", &KeyId::new().to_string())
            .replace("{project}", "a")
            .replace("{worker}", "a")
            .replace("{queue}", "shared");
        let open = ["/api/v1/health", "/openapi.json"].contains(&&*path);
        for key in [None, Some("aeth_0000"), Some("")] {
            let mut request = rig.bare(method.clone(), &path);
            if let Some(key) = key {
                request = request.bearer_auth(key);
            }
            let response = request.send().await.unwrap();
            if open {
                assert_eq!(response.status(), StatusCode::OK, "{path}");
                continue;
            }
            assert!(response.headers().contains_key("www-authenticate"), "{method} {path}");
            let refusal = problem(response).await;
            assert_eq!(refusal.error_code(), Some(ErrorCode::Unauthorized), "{method} {path}");
        }
        // With it the route answers for itself: it exists, and takes the method.
        let response = rig.call(method.clone(), &path).send().await.unwrap();
        if response.status().is_client_error() {
            let code = problem(response).await.error_code();
            assert_ne!(code, Some(ErrorCode::RouteNotFound), "{method} {path}");
            assert_ne!(code, Some(ErrorCode::MethodNotAllowed), "{method} {path}");
            assert_ne!(code, Some(ErrorCode::Unauthorized), "{method} {path}");
        }
    }
    // Paths that do not exist tell nothing either.
    let response = rig.bare(Method::GET, "/secrets").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_request_keeps_its_own_id() {
    let rig = Rig::new().await;
    let request = rig.call(Method::GET, "/vms/none").header("x-request-id", "mine-1");
    assert_eq!(problem(request.send().await.unwrap()).await.instance, "mine-1");
}

#[tokio::test]
async fn a_key_that_is_made_later_works_at_once_and_only_its_hash_is_kept() {
    let rig = Rig::new().await;
    let kept = rig.store.keys(KeyFilter::default(), PageRequest::default()).await.unwrap();
    let [kept] = kept.items.as_slice() else { panic!("{kept:?}") };
    assert!(rig.key.starts_with("aeth_") && rig.key.len() == 77);
    assert!(rig.key.starts_with(&kept.prefix) && kept.prefix.len() == 13);
    assert_ne!(&kept.hash[..], &rig.key.as_bytes()[..32]);
    rig.client.vms(&VmQuery::default()).await.unwrap();
    let stranger = Client::new(&rig.base, None).unwrap();
    let refused = stranger.create_vm(&CreateVm::default(), &CallOptions::default()).await;
    assert_eq!(refused.unwrap_err().code(), Some(ErrorCode::Unauthorized));
    assert_eq!(stranger.health().await.unwrap().components.len(), 3);
}

#[tokio::test]
async fn a_wrong_method_is_answered_with_those_that_are_taken() {
    let rig = Rig::new().await;
    let response = rig.call(Method::PATCH, "/vms").send().await.unwrap();
    assert_eq!(response.headers()["allow"], "POST,GET,HEAD");
}
