//! What is the same for machines that are none: requests, records, refusals.

use aether_drivers::sim::SimConfig;
use aether_store::NewVm;
use aether_types::{
    ErrorCode, Origin, TaskState, TemplateSpec, TemplateState, Vm, VmId, VmSpec, VmState,
};

use crate::{
    recipes::{SAYS_ITSELF, Source, asked},
    rig::{Rig, template_spec, vm_spec},
};

async fn rig() -> (Rig, Source) {
    let mut rig = Rig::new(SimConfig::default()).await;
    let source = Source::open().await;
    for name in ["hello", "other"] {
        source.recipe(&rig.dir.path().join("catalogue"), name, SAYS_ITSELF);
    }
    rig.crash().await;
    rig.parts.tools = Source::tools(rig.dir.path());
    rig.start().await;
    (rig, source)
}

fn with_tools(name: &str, origin: Origin, tools: &[&str]) -> NewVm {
    let spec = VmSpec { tools: asked(tools), ..vm_spec(origin) };
    NewVm { id: VmId::new(), name: name.to_owned(), spec }
}

async fn created(rig: &Rig, vm: NewVm) -> Vm {
    let task = rig.request_create_of(vm).await;
    let task = rig.ended(task.id).await;
    assert_eq!(task.state, TaskState::Completed, "{task:?}");
    rig.in_state(task.vm_id.unwrap(), VmState::Running).await
}

fn got(vm: &Vm) -> Vec<String> {
    let text = |tool: &aether_types::VmTool| {
        assert!(tool.verified_at.is_some());
        format!("{} {} {}", tool.name, tool.asked, tool.got.as_deref().unwrap_or("?"))
    };
    vm.tools.iter().map(text).collect()
}

#[tokio::test]
async fn a_vm_has_the_tools_that_it_asks_for() {
    let (rig, _source) = rig().await;
    let vm = created(&rig, with_tools("one", Origin::Image, &["hello", "other@1"])).await;
    assert_eq!(got(&vm), ["hello latest 2.0.0", "other 1 1.0.0"]);

    let spec = TemplateSpec { tools: asked(&["hello@1.0.0"]), ..template_spec() };
    let plain = rig.build("plain", template_spec()).await;
    let template = rig.build("with", spec).await;
    assert_eq!(template.state, TemplateState::Ready);
    assert_ne!(template.digest, plain.digest);
    let origin = Origin::Template(template.id);
    let vm = created(&rig, with_tools("two", origin, &["hello@2.0.0", "other"])).await;
    assert_eq!(got(&vm), ["hello 2.0.0 2.0.0", "other latest 2.0.0"]);
}

#[tokio::test]
async fn what_there_is_not_leaves_no_vm_and_no_machine() {
    let (rig, _source) = rig().await;
    for (tools, code, part) in [
        (["hello@3"], ErrorCode::ToolVersionNotFound, "2.0.0"),
        (["helo"], ErrorCode::ToolNotFound, "hello"),
    ] {
        let task = rig.request_create_of(with_tools(part, Origin::Image, &tools)).await;
        let task = rig.ended(task.id).await;
        let fault = task.error.unwrap();
        assert_eq!(fault.code, code, "{fault}");
        assert!(fault.message.contains(part), "{fault}");
        rig.in_state(task.vm_id.unwrap(), VmState::Failed).await;
        assert_eq!(rig.host.leftovers(), Vec::<String>::new());
    }
    created(&rig, with_tools("good", Origin::Image, &["hello"])).await;
}
