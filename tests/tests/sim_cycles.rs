//! The real program on simulated machines, killed again and again: no task is lost, none hangs.

use std::time::Duration;

use aether_api::{
    CreateVm, ExecuteRequest,
    client::{CallOptions, PageQuery, TaskQuery, VmQuery},
};
use aether_tests::{Platform, Setup};
use aether_types::{ExecutionState, VmState};
use anyhow::{Result, ensure};

/// 500 cycles of create, execute, delete, and a SIGKILL of the platform in every twentieth, at a
/// moment that moves through the cycle. Simulated machines end with the process, so the VM of a
/// killed cycle is found dead; its tasks must still have an end, and the end must be true.
#[tokio::test]
async fn five_hundred_cycles_with_kills_lose_no_task() -> Result<()> {
    let mut platform = Platform::start(Setup::sim())?;
    let long = Duration::from_mins(1);
    for cycle in 0..500_u64 {
        let no_wait = CallOptions::default();
        let request = CreateVm { name: Some(format!("cycle-{cycle}")), ..CreateVm::default() };
        let created = platform.client().create_vm(&request, &no_wait).await?;
        let vm = created.vm_id().to_string();
        let request = ExecuteRequest {
            command: "echo".into(),
            args: vec![cycle.to_string()],
            ..ExecuteRequest::default()
        };
        let executed = platform.client().execute(&vm, &request, &no_wait).await?;
        let killed = cycle % 20 == 7;
        if killed {
            tokio::time::sleep(Duration::from_micros(cycle * 37 % 4000)).await;
            platform.kill()?;
            platform.restart()?;
        }
        for task in created.task_id().into_iter().chain(executed.task_id()) {
            let task = platform.client().task(task, Some(long)).await?;
            ensure!(task.status.is_end(), "cycle {cycle}: {task:?}\n{}", platform.log());
        }
        let page = platform.client().executions(&vm, &PageQuery::default()).await?;
        ensure!(page.items.len() == 1, "cycle {cycle}: {page:?}");
        let execution = platform.client().execution(page.items[0].id).await?;
        ensure!(killed || execution.status == ExecutionState::Completed, "{execution:?}");
        if execution.status == ExecutionState::Completed {
            ensure!(execution.stdout.as_deref() == Some(&*format!("{cycle}\n")), "{execution:?}");
        }
        platform.delete(&vm).await?;
    }
    let tasks = platform.client().tasks(&TaskQuery::default()).await?;
    ensure!(tasks.items.iter().all(|task| task.status.is_end()), "{tasks:?}");
    let vms = platform.client().vms(&VmQuery::default()).await?;
    ensure!(vms.items.iter().all(|vm| vm.state == VmState::Deleted), "{vms:?}");
    platform.finish()
}
