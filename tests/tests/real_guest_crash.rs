//! The platform is killed in the middle of things, with real guests.

use std::time::Duration;

use aether_api::{
    ExecuteRequest, StreamEvent,
    client::{CallOptions, PageQuery},
};
use aether_tests::{
    Platform, Random, Setup,
    platform::{can_run_guests, small_vm},
};
use aether_types::{ExecutionState, VmState};
use anyhow::{Result, ensure};

fn shell(script: &str) -> ExecuteRequest {
    ExecuteRequest {
        command: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        ..ExecuteRequest::default()
    }
}

#[tokio::test]
async fn a_killed_platform_finds_its_vms_and_their_commands_again() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let mut platform = Platform::start(Setup::qemu())?;
    let vm = platform.create(&small_vm("kept")).await?.id.to_string();
    let request = shell("echo begun; sleep 4; echo done");
    let mut follow = platform.client().execute_stream(&vm, &request, None).await?;
    let mut execution = None;
    loop {
        match follow.next().await? {
            Some(StreamEvent::Accepted { execution_id, .. }) => execution = Some(execution_id),
            Some(StreamEvent::Stdout { .. }) => break,
            Some(_) => {}
            None => anyhow::bail!("the stream ended"),
        }
    }
    drop(follow);
    platform.kill()?;
    platform.restart()?;
    let found = platform.client().vm(&vm).await?;
    ensure!(found.state == VmState::Running, "{found:?}\n{}", platform.log());
    let next = platform.execute(&vm, &["echo", "usable"]).await?;
    ensure!(next.stdout.as_deref() == Some("usable\n"), "{next:?}");
    let execution = platform.client().execution(execution.expect("accepted first")).await?;
    platform.client().task(execution.task_id, Some(Duration::from_mins(1))).await?;
    let execution = platform.client().execution(execution.id).await?;
    ensure!(execution.status == ExecutionState::Completed, "{execution:?}");
    ensure!(execution.stdout.unwrap_or_default().ends_with("done\n"));

    // A clean end with the VM kept, and one that takes it down.
    platform.delete(&vm).await?;
    platform.finish()
}

/// Thirty cycles of create, execute, delete; at a random moment of each the platform is killed.
#[tokio::test]
async fn thirty_cycles_with_kills_leave_nothing_and_every_task_ends() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let image = ["--image", "debian-fctest"];
    let mut platform = Platform::start(Setup::qemu().with(&image))?;
    let mut random = Random::from_environment();
    let mut tasks = Vec::new();
    let cycles = 30;
    for cycle in 0..cycles {
        let no_wait = CallOptions::default();
        let request = small_vm(&format!("cycle-{cycle}"));
        let created = platform.client().create_vm(&request, &no_wait).await?;
        let vm = created.vm_id().to_string();
        let request = shell("echo once >> /root/times; cat /root/times");
        let executed = platform.client().execute(&vm, &request, &no_wait).await?;
        tasks.extend(created.task_id());
        tasks.extend(executed.task_id());
        // Anything from the first step of the creation to after the command.
        let moment = Duration::from_millis(random.below(2500));
        tokio::time::sleep(moment).await;
        platform.kill()?;
        platform.restart()?;
        for task in &tasks {
            let ended = platform.client().task(*task, Some(Duration::from_mins(2))).await?;
            ensure!(ended.status.is_end(), "{ended:?} (killed at {moment:?})\n{}", platform.log());
        }
        let page = platform.client().executions(&vm, &PageQuery::default()).await?;
        for execution in page.items {
            let execution = platform.client().execution(execution.id).await?;
            let output = execution.stdout.clone().unwrap_or_default();
            ensure!(output.matches("once").count() <= 1, "it ran twice: {execution:?}");
        }
        platform.delete(&vm).await?;
        tasks.clear();
    }
    platform.finish()
}
