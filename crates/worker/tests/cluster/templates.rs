//! Templates: built once, begun from often, and what is done without one.

use std::fs;

use aether_drivers::{fault::FaultPoints, sim::SimConfig};
use aether_store::NewVm;
use aether_types::{
    ErrorCode, Origin, ProjectId, StartKind, TaskKind, TaskState, Template, TemplateFile,
    TemplateReady, TemplateSpec, TemplateState, TemplateStep, Vm, VmId, VmState,
};

use crate::rig::{Rig, command, template_spec, vm_spec};

fn step(run: &str) -> TemplateStep {
    TemplateStep { run: run.to_owned(), timeout_s: Some(5) }
}

fn stepped() -> TemplateSpec {
    TemplateSpec {
        files: vec![TemplateFile {
            path: "/etc/app/config".into(),
            content: "given\n".into(),
            mode: 0o600,
        }],
        steps: vec![
            step("echo one > /root/one"),
            step("cat /etc/app/config; echo two > /root/two"),
        ],
        start: Some("echo started > /root/started; sleep 3600".into()),
        ready: Some(TemplateReady { command: "cat /root/started".into(), timeout_s: Some(5) }),
        ..template_spec()
    }
}

async fn says(rig: &Rig, vm: &Vm, words: &[&str]) -> String {
    let execution = rig.execute(vm.id, command(words)).await;
    rig.stdout(&execution).await
}

fn damage(rig: &Rig) {
    for file in rig.files("templates") {
        if file.file_name().is_some_and(|name| name != "manifest.json") {
            fs::remove_file(file).unwrap();
        }
    }
}

#[tokio::test]
async fn a_template_is_built_and_begins_vms() {
    let rig = Rig::new(SimConfig::default()).await;
    let template = rig.build("app", stepped()).await;
    assert_eq!(template.digest.as_ref().map(String::len), Some(64));
    assert_eq!((template.progress.done, template.progress.steps), (2, 2));
    assert!(template.progress.log.contains("given"), "{:?}", template.progress);
    assert!(template.size_bytes.is_some());
    assert_eq!(rig.host.leftovers(), Vec::<String>::new());

    let vm = rig.create_from("first", Origin::Template(template.id)).await;
    let start = vm.start.clone().unwrap();
    assert_eq!((start.kind, start.fallback), (StartKind::Restore, None));
    for (file, content) in
        [("/root/one", "one\n"), ("/root/two", "two\n"), ("/root/started", "started\n")]
    {
        assert_eq!(says(&rig, &vm, &["cat", file]).await, content);
    }
    // The template's variables are under the VM's own.
    let env = says(&rig, &vm, &["env"]).await;
    assert!(env.contains("FROM=template") && env.contains("GREETING=hello"), "{env}");
}

#[tokio::test]
async fn the_same_content_is_built_once() {
    let fault = FaultPoints::recording();
    let rig = Rig::new(SimConfig { fault: fault.clone(), ..SimConfig::default() }).await;
    let first = rig.build("one", stepped()).await;
    fault.arm("sim boot");
    let second = rig.build("two", stepped()).await;
    assert!(fault.disarm(), "it was booted again");
    assert_eq!(first.digest, second.digest);
    assert_ne!(first.snapshot_id, second.snapshot_id);
    // One of the two goes, and its files stay for the other.
    rig.store().delete_template(first.id).await.unwrap();
    let vm = rig.create_from("of-the-second", Origin::Template(second.id)).await;
    assert_eq!(vm.start.unwrap().kind, StartKind::Restore);
}

#[tokio::test]
async fn a_step_that_fails_is_named_with_what_it_said() {
    let rig = Rig::new(SimConfig::default()).await;
    let spec = TemplateSpec {
        steps: vec![step("echo fine"), step("echo why; exit 7")],
        ..template_spec()
    };
    let template = rig.request_build("broken", spec).await;
    let template = rig.built(&template).await;
    assert_eq!(template.state, TemplateState::Failed);
    let fault = template.reason.unwrap();
    assert_eq!(fault.code, ErrorCode::TemplateBuildFailed);
    assert!(fault.message.contains("step 2 of 2"), "{fault:?}");
    assert!(fault.message.contains("exited with 7"), "{fault:?}");
    assert!(fault.message.contains("why"), "{fault:?}");
    assert_eq!(rig.ended(template.task_id).await.attempts, 1);
    rig.no_files("templates").await;
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_check_that_never_succeeds_and_a_step_that_hangs_end() {
    let rig = Rig::new(SimConfig::default()).await;
    let never = TemplateReady { command: "echo not yet; false".into(), timeout_s: Some(1) };
    let hangs = TemplateStep { run: "sleep 3600".into(), timeout_s: Some(1) };
    for (name, spec, words) in [
        ("never", TemplateSpec { ready: Some(never), ..template_spec() }, "ready check"),
        ("hangs", TemplateSpec { steps: vec![hangs], ..template_spec() }, "time limit"),
    ] {
        let template = rig.request_build(name, spec).await;
        let template = rig.built(&template).await;
        let fault = template.reason.unwrap();
        assert_eq!(fault.code, ErrorCode::TemplateBuildFailed, "{fault:?}");
        assert!(fault.message.contains(words), "{fault:?}");
    }
    rig.assert_clean().await;
}

#[tokio::test]
async fn every_step_of_a_build_may_fail_once() {
    let fault = FaultPoints::recording();
    let rig = Rig::new(SimConfig { fault: fault.clone(), ..SimConfig::default() }).await;
    let numbered = |n: usize| TemplateSpec {
        steps: vec![step(&format!("echo {n} > /root/number"))],
        ..template_spec()
    };
    rig.build("probe", numbered(0)).await;
    for (n, point) in fault.seen().into_iter().enumerate() {
        fault.arm(point);
        let template = rig.build(&format!("of-{n}"), numbered(n + 1)).await;
        fault.disarm();
        let vm = rig.create_from(&format!("vm-{n}"), Origin::Template(template.id)).await;
        assert_eq!(says(&rig, &vm, &["cat", "/root/number"]).await, format!("{}\n", n + 1));
        let deletion = rig.request(vm.id, TaskKind::VmDelete).await;
        rig.ended(deletion.id).await;
    }
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_build_can_be_cancelled() {
    let rig = Rig::new(SimConfig::default()).await;
    let spec = TemplateSpec {
        steps: vec![TemplateStep { run: "sleep 3600".into(), timeout_s: None }],
        ..template_spec()
    };
    let template = rig.request_build("cancelled", spec).await;
    let mut events = rig.listen();
    while rig.store().template(template.id).await.unwrap().unwrap().progress.now.is_empty() {
        events.next().await;
    }
    let outcome = rig.store().cancel_task(template.task_id).await.unwrap();
    if let aether_store::CancelOutcome::Requested(task) = outcome {
        let event =
            aether_events::Event::CancelRequested { task_id: task.id, worker_id: task.worker_id };
        rig.parts.bus.publish(event).await.unwrap();
    }
    let template = rig.built(&template).await;
    assert_eq!(template.state, TemplateState::Failed);
    assert_eq!(rig.ended(template.task_id).await.state, TaskState::Cancelled);
    rig.assert_clean().await;
}

async fn of_size(rig: &Rig, name: &str, template: &Template, memory_mb: u32) -> Vm {
    let spec = aether_types::VmSpec { memory_mb, ..vm_spec(Origin::Template(template.id)) };
    let task = rig.request_create_of(NewVm { id: VmId::new(), name: name.into(), spec }).await;
    let task = rig.ended(task.id).await;
    assert_eq!(task.state, TaskState::Completed, "{task:?}");
    rig.in_state(task.vm_id.unwrap(), VmState::Running).await
}

#[tokio::test]
async fn another_size_boots_on_the_disk_of_the_template() {
    let rig = Rig::new(SimConfig::default()).await;
    let template = rig.build("app", stepped()).await;
    let vm = of_size(&rig, "large", &template, 512).await;
    let start = vm.start.clone().unwrap();
    assert_eq!(start.kind, StartKind::Boot);
    assert!(start.fallback.is_some_and(|why| why.contains("512")));
    assert_eq!(says(&rig, &vm, &["cat", "/root/two"]).await, "two\n");
}

#[tokio::test]
async fn a_restore_that_fails_falls_back_to_a_boot_of_the_disk() {
    let fault = FaultPoints::recording();
    let rig = Rig::new(SimConfig { fault: fault.clone(), ..SimConfig::default() }).await;
    let template = rig.build("app", stepped()).await;
    for point in ["sim restore", "sim restored"] {
        fault.arm(point);
        let name = point.replace(' ', "-");
        let vm = rig.create_from(&name, Origin::Template(template.id)).await;
        assert!(!fault.disarm());
        let start = vm.start.clone().unwrap();
        assert_eq!(start.kind, StartKind::Boot, "{point}");
        assert!(start.fallback.is_some(), "{point}");
        assert_eq!(says(&rig, &vm, &["cat", "/root/two"]).await, "two\n");
    }
}

#[tokio::test]
async fn without_its_files_a_plain_template_boots_its_image_and_is_built_again() {
    let rig = Rig::new(SimConfig::default()).await;
    let template = rig.build("default", template_spec()).await;
    damage(&rig);
    let mut events = rig.listen();
    let vm = rig.create_from("anyway", Origin::Template(template.id)).await;
    let start = vm.start.clone().unwrap();
    assert_eq!(start.kind, StartKind::Boot);
    assert!(start.fallback.is_some());
    let again = loop {
        let found = rig
            .store()
            .template_by_name(ProjectId::DEFAULT, "default", "latest")
            .await
            .unwrap()
            .unwrap();
        if found.id != template.id && found.state == TemplateState::Ready {
            break found;
        }
        events.next().await;
    };
    let vm = rig.create_from("next", Origin::Template(again.id)).await;
    assert_eq!(vm.start.unwrap().kind, StartKind::Restore);
}

#[tokio::test]
async fn without_its_files_a_template_with_steps_fails_by_name_of_the_file() {
    let rig = Rig::new(SimConfig::default()).await;
    let template = rig.build("app", stepped()).await;
    damage(&rig);
    let task = rig.request_create_from("nothing", Origin::Template(template.id)).await;
    let task = rig.ended(task.id).await;
    assert_eq!(task.state, TaskState::Failed);
    assert_eq!(task.error.unwrap().code, ErrorCode::SnapshotDamaged);
}

#[tokio::test]
async fn a_vm_waits_for_its_template() {
    let rig = Rig::new(SimConfig::default()).await;
    let spec = TemplateSpec { steps: vec![step("sleep 1")], ..template_spec() };
    let template = rig.request_build("slow", spec).await;
    let vm = rig.create_from("patient", Origin::Template(template.id)).await;
    assert_eq!(vm.start.unwrap().kind, StartKind::Restore);
    rig.built(&template).await;
}

#[tokio::test]
async fn the_files_of_a_deleted_template_go() {
    let rig = Rig::new(SimConfig::default()).await;
    let template = rig.build("brief", template_spec()).await;
    assert!(!rig.files("templates").is_empty());
    let deleted = rig.store().delete_template(template.id).await.unwrap();
    let event = aether_events::Event::Template {
        template_id: deleted.id,
        state: deleted.state,
        at: deleted.updated_at,
    };
    rig.parts.bus.publish(event).await.unwrap();
    rig.no_files("templates").await;
}

#[tokio::test]
async fn the_default_template_is_seen_to() {
    let mut rig = Rig::new(SimConfig::default()).await;
    let worker = rig.worker.as_ref().unwrap();
    let template = worker.ensure_default_template(template_spec()).await.unwrap();
    assert_eq!((template.name.as_str(), template.tag.as_str()), ("default", "latest"));
    let template = rig.built(&template).await;
    let worker = rig.worker.as_ref().unwrap();
    let same = worker.ensure_default_template(template_spec()).await.unwrap();
    assert_eq!((same.id, same.state), (template.id, TemplateState::Ready));
    // Its files went: it is built again.
    rig.crash().await;
    fs::remove_dir_all(rig.dir.path().join("templates")).unwrap();
    rig.start().await;
    let worker = rig.worker.as_ref().unwrap();
    let again = worker.ensure_default_template(template_spec()).await.unwrap();
    assert_ne!(again.id, template.id);
    assert_eq!(rig.built(&again).await.state, TemplateState::Ready);
}
