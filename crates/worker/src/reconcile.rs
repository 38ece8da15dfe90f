//! Makes the wanted and the actual state agree. Takes no input: it reads both, and repairs the
//! difference, at the start of a worker and whenever something runs out.

use std::{collections::HashSet, sync::Arc, time::Duration};

use aether_drivers::{Driver, Machine, MachineState};
use aether_events::{Event, Received, Subscription};
use aether_queue::{Entry, Lane};
use aether_store::{NewTask, PageRequest, StoreError, TaskFilter, VmFilter};
use aether_types::{
    ErrorCode, Fault, MachineId, Origin, Task, TaskId, TaskKind, TaskState, Timestamp, Vm, VmEvent,
    VmId, VmState, limits,
};

use crate::{WorkerError, fault, guest::Guest, lifecycle::parse_token, worker::Core};

/// Lost leases and unconfirmed dispatches are looked for this often: they come from crashes of
/// other processes, which send no event.
const SWEEP: Duration = Duration::from_secs(2);

/// What is on its way: VMs with an operation that has not ended.
struct Busy {
    operated: HashSet<VmId>,
    /// Of which a snapshot is being taken.
    captured: HashSet<VmId>,
}

impl Busy {
    fn new(open: &[Task]) -> Self {
        let of = |wanted: &dyn Fn(TaskKind) -> bool| {
            open.iter().filter(|task| wanted(task.kind)).filter_map(|task| task.vm_id).collect()
        };
        Self {
            operated: of(&|kind| kind != TaskKind::VmExecute),
            captured: of(&|kind| kind == TaskKind::VmSnapshot),
        }
    }

    fn has(&self, id: VmId) -> bool {
        self.operated.contains(&id)
    }
}

pub(crate) async fn at_start(core: &Arc<Core>) -> Result<(), WorkerError> {
    // A process that has just started holds no lease; what its predecessor held is free at once.
    core.parts.queue.reclaim(core.parts.id).await?;
    let open = core.parts.store.open_tasks().await?;
    let busy = Busy::new(&open);
    let mut found = HashSet::new();
    for driver in &core.parts.drivers {
        for machine in driver.list().await? {
            let vm_id = machine.spec.as_ref().map_or_else(|| own(machine.id), |spec| spec.vm);
            let Some(vm_id) = vm_id else {
                // It was a spare of a process that has ended; the pool makes its own.
                remove(driver, machine.id).await;
                continue;
            };
            found.insert(vm_id);
            core.guests.set_machine(vm_id, machine.id);
            let vm = core.parts.store.vm(vm_id).await?;
            settle_machine(core, driver, machine, vm, vm_id, &busy).await;
        }
    }
    settle_without_machine(core, &found, &busy).await?;
    dispatch_open(core).await
}

/// What this process has made of VMs that are not its own any more, once it has registered anew.
/// What is still its own goes on: a VM that nobody had come to settle, or a spare.
pub(crate) async fn after_loss(core: &Arc<Core>) -> Result<(), WorkerError> {
    // What was let go of is free at once, for whoever it is for now.
    core.parts.queue.reclaim(core.parts.id).await?;
    let open = core.parts.store.open_tasks().await?;
    let busy = Busy::new(&open);
    for driver in &core.parts.drivers {
        for machine in driver.list().await? {
            let Some(vm_id) = machine.spec.as_ref().map_or_else(|| own(machine.id), |s| s.vm)
            else {
                continue;
            };
            let vm = core.parts.store.vm(vm_id).await?;
            let is_kept = vm.as_ref().is_some_and(|vm| {
                vm.worker_id == Some(core.parts.id)
                    && matches!(vm.state, VmState::Running | VmState::Paused)
            });
            if is_kept && core.guests.get(vm_id).is_some() {
                continue;
            }
            if let Some(guest) = core.guests.get(vm_id) {
                guest.will_end(lost());
            }
            core.guests.remove_guest(vm_id);
            settle_machine(core, driver, machine, vm, vm_id, &busy).await;
        }
    }
    dispatch_owed(core).await
}

/// Ends what still runs when all VMs were stopped: a predecessor's, of a task that was not taken up
/// again. The task makes it anew at the next start.
pub(crate) async fn at_end(core: &Arc<Core>) {
    for driver in &core.parts.drivers {
        match driver.list().await {
            Ok(machines) => {
                let lives = |machine: &Machine| {
                    matches!(machine.state, MachineState::Running | MachineState::Paused)
                };
                for machine in machines.into_iter().filter(lives) {
                    end_machine(core, driver, machine).await;
                }
            }
            Err(error) => {
                tracing::error!(error = fault::chain(&error), "look for machines that still run");
            }
        }
    }
}

/// A VM that was made once has a disk, which stays; and so does one of which nothing is known now.
async fn end_machine(core: &Core, driver: &Arc<dyn Driver>, machine: Machine) {
    let vm_id = machine.spec.as_ref().map_or_else(|| own(machine.id), |spec| spec.vm);
    let is_made_anew = match vm_id {
        // A spare.
        None => true,
        Some(id) => match core.parts.store.vm(id).await {
            Ok(None) => true,
            Ok(Some(vm)) => {
                vm.state == VmState::Creating || matches!(vm.spec.origin, Origin::Builder(_))
            }
            Err(_) => false,
        },
    };
    if is_made_anew {
        return remove(driver, machine.id).await;
    }
    if let Err(error) = driver.kill(machine.id).await {
        tracing::error!(machine.id = %machine.id, error = fault::chain(&error), "end a machine");
    }
}

/// All that has not ended, for a queue that may not have it; what it has it keeps as it is. What
/// another has in hand is left to that one for as long as a lease.
async fn dispatch_open(core: &Core) -> Result<(), WorkerError> {
    let in_hand: HashSet<TaskId> =
        core.attempts.leases().into_iter().map(|lease| lease.task).collect();
    let open = core.parts.store.open_tasks().await?.into_iter();
    let (running, waiting): (Vec<_>, Vec<_>) =
        open.filter(|task| !in_hand.contains(&task.id)).partition(|task| {
            task.state == TaskState::Running && task.worker_id != Some(core.parts.id)
        });
    dispatch(core, waiting).await?;
    let others: Vec<TaskId> = running.iter().map(|task| task.id).collect();
    dispatch_after(core, running, core.parts.config.lease).await?;
    withdraw_ended(core, &others).await
}

/// What ended while it was dispatched once more has an entry that nobody waits for.
async fn withdraw_ended(core: &Core, tasks: &[TaskId]) -> Result<(), WorkerError> {
    if tasks.is_empty() {
        return Ok(());
    }
    let open = core.parts.store.open_tasks().await?;
    let open: HashSet<TaskId> = open.into_iter().map(|task| task.id).collect();
    for task in tasks.iter().filter(|task| !open.contains(task)) {
        core.parts.queue.remove(*task).await?;
    }
    Ok(())
}

/// A machine that the driver knows: adopt it, leave it to the task that is on its way, or remove
/// it.
async fn settle_machine(
    core: &Arc<Core>,
    driver: &Arc<dyn Driver>,
    machine: Machine,
    vm: Option<Vm>,
    id: VmId,
    busy: &Busy,
) {
    let Some(vm) = vm.filter(|vm| vm.state != VmState::Deleted) else {
        tracing::warn!(vm.id = %id, "remove a machine that belongs to no VM");
        core.guests.forget(id);
        return remove(driver, machine.id).await;
    };
    let is_anothers = vm.worker_id.is_some_and(|worker| worker != core.parts.id);
    if is_anothers || vm.worker_id.is_none() && vm.state == VmState::Creating {
        // An attempt here was too slow, and another worker makes the VM, or will.
        tracing::warn!(vm.id = %id, "remove a machine whose VM is another worker's");
        core.guests.forget(id);
        return remove(driver, machine.id).await;
    }
    let lives = matches!(machine.state, MachineState::Running | MachineState::Paused);
    // The state the task left is the state it will go on from.
    let goes_on = !vm.state.has_process() || (vm.state == VmState::Stopping && !lives);
    if busy.has(id) && goes_on {
        return;
    }
    if matches!(vm.spec.origin, Origin::Builder(_)) && !busy.has(id) {
        // Its task has ended, and it exists for nothing else.
        return delete(core, id).await;
    }
    match (vm.state, machine.state) {
        (
            VmState::Running | VmState::Paused | VmState::Stopping,
            MachineState::Running | MachineState::Paused,
        ) => {
            adopt(core, driver, &machine, &vm, busy).await;
        }
        (VmState::Running | VmState::Paused, MachineState::Exited(reason)) => {
            core.change_vm(id, VmEvent::Failed, Some(fault::from_exit(reason))).await;
        }
        (VmState::Running | VmState::Paused, MachineState::Created) => {
            core.change_vm(id, VmEvent::Failed, Some(gone())).await;
        }
        (VmState::Stopping, _) => core.change_vm(id, VmEvent::Stopped, None).await,
        (VmState::Creating | VmState::Starting, _) => {
            core.change_vm(id, VmEvent::Failed, Some(interrupted())).await;
            remove(driver, machine.id).await;
        }
        (VmState::Failed | VmState::Stopped, MachineState::Running | MachineState::Paused) => {
            if let Err(error) = driver.kill(machine.id).await {
                tracing::error!(vm.id = %id, error = fault::chain(&error), "end a stray machine");
            }
        }
        (VmState::Failed | VmState::Stopped, MachineState::Created | MachineState::Exited(_)) => {}
        (VmState::Deleting | VmState::Deleted, _) => delete(core, id).await,
    }
}

async fn adopt(
    core: &Arc<Core>,
    driver: &Arc<dyn Driver>,
    machine: &Machine,
    vm: &Vm,
    busy: &Busy,
) {
    let token = machine.spec.as_ref().and_then(|spec| parse_token(spec).ok());
    let Some(token) = token else {
        tracing::error!(vm.id = %vm.id, "the record of a running machine is damaged");
        core.change_vm(vm.id, VmEvent::Failed, Some(gone())).await;
        return remove(driver, machine.id).await;
    };
    let mut state = machine.state;
    match (vm.state, machine.state) {
        // The snapshot in whose middle a process died made it stand still, and nobody else.
        (VmState::Running, MachineState::Paused) if busy.captured.contains(&vm.id) => {
            match driver.resume(machine.id).await {
                Ok(()) => state = MachineState::Running,
                Err(error) => {
                    tracing::error!(vm.id = %vm.id, error = fault::chain(&error), "resume");
                }
            }
        }
        (VmState::Running, MachineState::Paused) => {
            core.change_vm(vm.id, VmEvent::PauseDone, None).await;
        }
        (VmState::Paused, MachineState::Running) => {
            core.change_vm(vm.id, VmEvent::ResumeDone, None).await;
        }
        _ => {}
    }
    let guest = Guest::new(vm.id, machine.id, Arc::clone(driver), token);
    if state == MachineState::Running {
        core.refresh_boot_id(&guest).await;
    }
    tracing::info!(vm.id = %vm.id, "adopted a running VM");
    core.admit(guest);
}

/// VMs that should have a machine and have none.
async fn settle_without_machine(
    core: &Arc<Core>,
    found: &HashSet<VmId>,
    busy: &Busy,
) -> Result<(), WorkerError> {
    let mut page = PageRequest { limit: limits::PAGE_LIMIT_MAX, after: None };
    loop {
        let filter = VmFilter { builders: true, ..VmFilter::default() };
        let vms = core.parts.store.vms(filter, page).await?;
        for vm in vms.items {
            if found.contains(&vm.id) || busy.has(vm.id) || !is_mine(core, &vm).await? {
                continue;
            }
            if matches!(vm.spec.origin, Origin::Builder(_)) {
                delete(core, vm.id).await;
                continue;
            }
            match vm.state {
                VmState::Running | VmState::Paused => {
                    core.change_vm(vm.id, VmEvent::Failed, Some(gone())).await;
                }
                VmState::Creating | VmState::Starting => {
                    core.change_vm(vm.id, VmEvent::Failed, Some(interrupted())).await;
                }
                VmState::Stopping => core.change_vm(vm.id, VmEvent::Stopped, None).await,
                VmState::Deleting => delete(core, vm.id).await,
                VmState::Stopped | VmState::Failed | VmState::Deleted => {}
            }
        }
        match vms.next {
            Some(cursor) => page.after = Some(cursor),
            None => return Ok(()),
        }
    }
}

/// Whether no other worker has the VM, and it is not on its way. One that has no worker yet may be in
/// another's hands, and one that is to be made may have come since the tasks were listed: its tasks
/// tell, which are read after it, so that none is missed.
async fn is_mine(core: &Core, vm: &Vm) -> Result<bool, WorkerError> {
    let is_on_its_way = matches!(vm.state, VmState::Creating | VmState::Starting);
    match vm.worker_id {
        Some(worker) if worker != core.parts.id => return Ok(false),
        Some(_) if !is_on_its_way => return Ok(true),
        Some(_) | None => {}
    }
    let filter = TaskFilter { vm_id: Some(vm.id), ..TaskFilter::default() };
    let newest_first = PageRequest { limit: limits::PAGE_LIMIT_MAX, after: None };
    let tasks = core.parts.store.tasks(filter, newest_first).await?.items;
    // A command waits for a VM, and does not make it.
    let makes = |task: &Task| vm.worker_id.is_none() || task.kind != TaskKind::VmExecute;
    if tasks.iter().any(|task| !task.state.is_end() && makes(task)) {
        return Ok(false);
    }
    if vm.worker_id.is_some() {
        return Ok(true);
    }
    // It ended under the worker that had it last, which puts in order what it left.
    let last = tasks.iter().find_map(|task| task.worker_id);
    Ok(last.is_none_or(|worker| worker == core.parts.id))
}

/// The VM of a machine whose record is damaged: its first machine has its id.
fn own(machine: MachineId) -> Option<VmId> {
    machine.to_string().parse().ok()
}

async fn remove(driver: &Arc<dyn Driver>, id: MachineId) {
    if let Err(error) = driver.delete(id).await {
        tracing::error!(machine.id = %id, error = fault::chain(&error), "remove a machine");
    }
}

/// Runs until the worker closes: times to live, leases of the dead, dispatches of the dead.
pub(crate) async fn keep(core: Arc<Core>, mut events: Box<dyn Subscription>) {
    // The queue may lack what it was told.
    let mut is_owed = false;
    loop {
        let expiry = next_expiry(&core).await;
        tokio::select! {
            () = core.draining.cancelled() => return,
            () = tokio::time::sleep(expiry.min(SWEEP)) => {}
            () = core.parts.queue.may_have_lost() => is_owed = true,
            // A new VM may expire before the timer that was set without it.
            is_room = vm_event(&mut events) => {
                if is_room {
                    let _ = noted(fill_room(&core).await);
                }
                continue;
            }
        }
        if is_owed {
            tracing::warn!("the queue may have lost entries; all open tasks are dispatched again");
            is_owed = noted(dispatch_open(&core).await).is_err();
        }
        let _ = noted(sweep(&core).await);
        // A queue that is away keeps no VM alive.
        let _ = noted(expire(&core).await);
    }
}

fn noted(done: Result<(), WorkerError>) -> Result<(), WorkerError> {
    if let Err(error) = &done {
        tracing::error!(error = fault::chain(error), "reconcile");
    }
    done
}

/// Whether a VM gave back room that another may wait for, or one began to run.
async fn vm_event(events: &mut Box<dyn Subscription>) -> bool {
    loop {
        match events.next().await {
            Received::Event(Event::Vm { state: VmState::Running, .. }) | Received::Missed => {
                return false;
            }
            Received::Event(Event::Vm { state, .. }) if !state.holds_capacity() => return true,
            Received::Event(_) => {}
            Received::Closed => std::future::pending().await,
        }
    }
}

async fn next_expiry(core: &Core) -> Duration {
    match core.parts.store.next_expiry().await {
        Ok(Some(at)) => {
            let left = at.unix_ms().saturating_sub(Timestamp::now().unix_ms());
            Duration::from_millis(u64::try_from(left).unwrap_or(0))
        }
        Ok(None) => SWEEP,
        Err(error) => {
            tracing::warn!(error = fault::chain(&error), "read the next expiry");
            SWEEP
        }
    }
}

async fn sweep(core: &Arc<Core>) -> Result<(), WorkerError> {
    core.parts.queue.sweep().await?;
    dispatch_owed(core).await
}

/// A VM gave back its room. Nearly always nobody waits for it, which one look tells.
async fn fill_room(core: &Core) -> Result<(), WorkerError> {
    if core.parts.store.place_waiting(limits::PAGE_LIMIT_MAX).await? > 0 {
        dispatch_owed(core).await?;
    }
    Ok(())
}

/// Gives places to VMs that wait for one, and dispatches what is owed.
pub(crate) async fn dispatch_owed(core: &Core) -> Result<(), WorkerError> {
    core.parts.store.place_waiting(limits::PAGE_LIMIT_MAX).await?;
    let owed = core.parts.store.undispatched(limits::PAGE_LIMIT_MAX).await?;
    let mut dispatched = Vec::with_capacity(owed.len());
    for task in owed {
        let entry = entry(core, &task, Duration::ZERO).await?;
        // It may have an entry in the lane of a worker that it was for before.
        if core.parts.queue.relocate(entry).await? {
            dispatched.push(task.id);
        }
    }
    if !dispatched.is_empty() {
        core.parts.store.confirm_dispatched(&dispatched).await?;
    }
    Ok(())
}

/// A task came here that is for another worker.
pub(crate) async fn pass_on(core: &Core, task: &Task) -> Result<(), WorkerError> {
    let entry = entry(core, task, Duration::ZERO).await?;
    // One that waits for a worker comes with what is owed, when it has one.
    if entry.lane != Lane::Shared && core.parts.queue.relocate(entry).await? {
        core.parts.store.confirm_dispatched(&[task.id]).await?;
    }
    dispatch_owed(core).await
}

async fn entry(core: &Core, task: &Task, delay: Duration) -> Result<Entry, WorkerError> {
    let vm = match task.vm_id {
        Some(id) => core.parts.store.vm(id).await?,
        None => None,
    };
    let lane = vm.and_then(|vm| vm.worker_id).map_or(Lane::Shared, Lane::Worker);
    Ok(Entry { task: task.id, lane, priority: task.priority, delay })
}

async fn expire(core: &Arc<Core>) -> Result<(), WorkerError> {
    for id in core.parts.store.expired_vms(Timestamp::now()).await? {
        tracing::info!(vm.id = %id, "the VM's time to live is over");
        delete(core, id).await;
    }
    Ok(())
}

pub(crate) async fn dispatch(core: &Core, tasks: Vec<Task>) -> Result<(), WorkerError> {
    dispatch_after(core, tasks, Duration::ZERO).await
}

async fn dispatch_after(core: &Core, tasks: Vec<Task>, delay: Duration) -> Result<(), WorkerError> {
    let mut entries = Vec::with_capacity(tasks.len());
    for task in &tasks {
        entries.push(entry(core, task, delay).await?);
    }
    if entries.is_empty() {
        return Ok(());
    }
    core.parts.queue.enqueue(&entries).await?;
    let ids: Vec<TaskId> = tasks.iter().map(|task| task.id).collect();
    core.parts.store.confirm_dispatched(&ids).await?;
    Ok(())
}

/// Asks for a VM's deletion as a client would.
pub(crate) async fn delete(core: &Core, id: VmId) {
    let task = NewTask {
        id: TaskId::new(),
        kind: TaskKind::VmDelete,
        priority: aether_types::Priority::High,
        max_attempts: limits::TASK_ATTEMPTS_MAX,
        project: None,
    };
    let recorded = match core.parts.store.request_on_vm(id, task, None).await {
        Ok(accepted) => Ok(accepted),
        Err(StoreError::VmNotFound) => return,
        Err(error) => Err(error),
    };
    let dispatched = match recorded {
        Ok(accepted) if accepted.task.state.is_end() => Ok(()),
        Ok(accepted) => {
            for task in &accepted.cancelled {
                if task.state.is_end() {
                    core.publish_task(task).await;
                } else {
                    core.attempts.cancel(task.id);
                }
            }
            core.publish_vm(&accepted.vm).await;
            dispatch(core, vec![accepted.task]).await
        }
        Err(error) => Err(error.into()),
    };
    if let Err(error) = dispatched {
        tracing::error!(vm.id = %id, error = fault::chain(&error), "delete a VM");
    }
}

fn gone() -> Fault {
    Fault::new(ErrorCode::VmmExited, "the VM's process was gone when the worker started")
}

fn lost() -> Fault {
    Fault::new(ErrorCode::WorkerLost, "the worker was declared lost, and the VM with it")
}

fn interrupted() -> Fault {
    Fault::new(ErrorCode::VmStartFailed, "the worker ended while the VM was being started")
}
