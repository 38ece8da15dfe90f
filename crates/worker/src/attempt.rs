//! One attempt at one task, from its lease to its end.

use std::sync::Arc;

use aether_events::Event;
use aether_queue::Lease;
use aether_store::{AttemptEnd, Begin, ExecutionEnd, StoreError, VmChange, VmPatch};
use aether_types::{
    ErrorCode, ExecutionState, Fault, Origin, RetainedOutput, Snapshot, SnapshotId, Task, TaskKind,
    TaskState, Template, Timestamp, Vm, VmEvent, VmId, VmState,
};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use crate::{
    create::Started, failure::Failure, fault, metrics, phases::PhaseClock, reconcile,
    tool_build::Telling, worker::Core,
};

/// A task in hand.
pub(crate) struct Attempt {
    pub(crate) task: Task,
    pub(crate) lease: Lease,
    /// Someone asked for the task's end.
    pub(crate) cancelled: CancellationToken,
}

/// What the queue is told after an attempt.
pub(crate) enum Outcome {
    /// The store has the task's end.
    Ended,
    /// The store has it pending again, and it has been dispatched.
    GivenBack,
    /// Another attempt speaks for the task now.
    Fenced,
    /// The process ends, and the next one takes the task up again.
    Left,
    /// It is for another worker, to which it is on its way.
    PassedOn,
}

impl Core {
    pub(crate) async fn attempt(self: Arc<Self>, lease: Lease, place: OwnedSemaphorePermit) {
        let cancelled = self.attempts.begin(&lease);
        let outcome = Box::pin(self.carry_out(&lease, cancelled)).await;
        self.attempts.end(lease.task);
        drop(place);
        match outcome {
            Ok(Outcome::Ended) => self.settle(&lease).await,
            Ok(Outcome::GivenBack | Outcome::Fenced | Outcome::Left | Outcome::PassedOn) => {}
            Err(error) => {
                // The lease runs out and the task is claimed again, here or elsewhere.
                tracing::error!(task.id = %lease.task, error = fault::chain(&error), "attempt");
            }
        }
    }

    async fn settle(&self, lease: &Lease) {
        if let Err(error) = self.parts.queue.complete(lease).await {
            tracing::debug!(task.id = %lease.task, error = fault::chain(&error), "settle a lease");
        }
    }

    /// The task's VM is another worker's, or waits for one. The store owes the dispatch, so that the
    /// entry here is of no use.
    async fn pass_on(&self, lease: &Lease, task: Task) -> Result<Outcome, StoreError> {
        tracing::debug!(task.id = %task.id, "the task is for another worker");
        self.settle(lease).await;
        if let Err(error) = reconcile::pass_on(self, &task).await {
            tracing::warn!(error = fault::chain(&error), "pass a task on; it is owed still");
        }
        Ok(Outcome::PassedOn)
    }

    async fn carry_out(
        self: &Arc<Self>,
        lease: &Lease,
        cancelled: CancellationToken,
    ) -> Result<Outcome, StoreError> {
        let store = &self.parts.store;
        let task = match store.begin_attempt(lease.task, self.registration(), lease.epoch).await {
            Ok(Begin::Go(task)) => task,
            Ok(Begin::Ended(task)) => {
                self.publish_task(&task).await;
                return Ok(Outcome::Ended);
            }
            Ok(Begin::Fenced) => return Ok(Outcome::Fenced),
            Ok(Begin::Elsewhere(task)) => return self.pass_on(lease, task).await,
            Err(StoreError::TaskNotFound) => return Ok(Outcome::Ended),
            Err(error) => return Err(error),
        };
        metrics::begun(&task);
        if task.cancel_requested {
            cancelled.cancel();
        }
        let attempt = Attempt { task, lease: lease.clone(), cancelled };
        if attempt.task.kind == TaskKind::VmExecute {
            return self.execute(&attempt).await;
        }
        if attempt.task.kind == TaskKind::ToolBuild {
            return self.build_tools(&attempt).await;
        }
        let gone = || failed(Fault::new(ErrorCode::VmNotFound, "the VM is gone"));
        let Some(vm_id) = attempt.task.vm_id else { return self.end(&attempt, gone()).await };
        // Known before the VM's state is read: a deletion that is asked for later cancels this, and
        // one that was asked for before shows in the state.
        self.attempts.is_of(&attempt.task);
        if attempt.task.kind == TaskKind::VmDelete {
            // It does not wait for a boot, a build or a snapshot to end.
            self.attempts.cancel_others(&attempt.task);
        }
        let order = self.guests.order(vm_id);
        let _turn = order.lock().await;
        let Some(vm) = store.vm(vm_id).await? else { return self.end(&attempt, gone()).await };
        let boots = matches!(
            attempt.task.kind,
            TaskKind::VmCreate | TaskKind::VmStart | TaskKind::TemplateBuild
        );
        let end = tokio::select! {
            biased;
            end = self.operate(&attempt, &vm) => end,
            () = self.draining.cancelled(), if boots => return Ok(self.leave(&attempt, &vm).await),
        };
        let outcome = match end {
            Ok(end) => self.end(&attempt, end).await,
            Err(failure) => self.fail(&attempt, &vm, failure).await,
        };
        if boots && matches!(outcome, Ok(Outcome::Fenced)) {
            self.undo_if_anothers(vm.id).await;
        }
        if attempt.task.kind == TaskKind::TemplateBuild && matches!(outcome, Ok(Outcome::Ended)) {
            reconcile::delete(self, vm.id).await;
        }
        outcome
    }

    /// What an attempt made that was too slow, or whose worker was declared lost, is of no use: the
    /// VM is made elsewhere, or will not be made.
    async fn undo_if_anothers(&self, id: VmId) {
        match self.parts.store.vm(id).await {
            Ok(Some(vm)) if vm.worker_id == Some(self.parts.id) => {}
            Ok(Some(vm)) => self.undo_create(&vm).await,
            Ok(None) => {}
            Err(error) => {
                tracing::error!(vm.id = %id, error = fault::chain(&error), "look whose a VM is");
            }
        }
    }

    /// The process ends and does not wait for a boot: nothing stays of it, and the next process
    /// begins it anew.
    async fn leave(&self, attempt: &Attempt, vm: &Vm) -> Outcome {
        if attempt.task.kind == TaskKind::VmStart {
            self.undo_start(vm).await;
        } else {
            self.undo_create(vm).await;
        }
        let _ = self.parts.queue.release(&attempt.lease, std::time::Duration::ZERO).await;
        Outcome::Left
    }

    async fn operate(self: &Arc<Self>, attempt: &Attempt, vm: &Vm) -> Result<AttemptEnd, Failure> {
        match attempt.task.kind {
            TaskKind::VmCreate => self.operate_create(attempt, vm).await,
            TaskKind::VmStart => Box::pin(self.operate_start(attempt, vm)).await,
            TaskKind::VmStop => {
                if vm.state != VmState::Stopping {
                    return Ok(superseded(vm));
                }
                let why = Fault::new(ErrorCode::VmStopped, "the VM was stopped");
                self.stop(vm, why, self.parts.config.stop_grace).await?;
                Ok(completed(change(VmEvent::Stopped, None, VmPatch::default())))
            }
            TaskKind::VmSuspend => self.operate_suspend(attempt, vm).await,
            TaskKind::VmSnapshot => self.operate_snapshot(attempt, vm).await,
            TaskKind::TemplateBuild => self.operate_build(attempt, vm).await,
            TaskKind::VmPause => match vm.state {
                VmState::Running => {
                    self.pause(vm).await?;
                    Ok(completed(change(VmEvent::PauseDone, None, VmPatch::default())))
                }
                VmState::Paused => Ok(done()),
                _ => Ok(superseded(vm)),
            },
            TaskKind::VmResume => match vm.state {
                VmState::Paused => {
                    self.resume(vm).await?;
                    Ok(completed(change(VmEvent::ResumeDone, None, VmPatch::default())))
                }
                VmState::Running => Ok(done()),
                _ => Ok(superseded(vm)),
            },
            TaskKind::VmDelete => {
                if vm.state == VmState::Deleted {
                    return Ok(done());
                }
                self.delete(vm).await?;
                Ok(completed(change(VmEvent::Deleted, None, VmPatch::default())))
            }
            TaskKind::VmExecute | TaskKind::ToolBuild => Err(Failure::last(Fault::new(
                ErrorCode::Internal,
                "the task is no operation on a VM",
            ))),
        }
    }

    async fn operate_create(
        self: &Arc<Self>,
        attempt: &Attempt,
        vm: &Vm,
    ) -> Result<AttemptEnd, Failure> {
        if vm.state != VmState::Creating {
            return Ok(superseded(vm));
        }
        let clock = PhaseClock::since(attempt.task.created_at);
        let telling = Telling::default();
        let create = Box::pin(self.create(vm, clock, &telling));
        let started = tokio::select! {
            started = self.told(attempt, &telling, create) => started?,
            () = attempt.cancelled.cancelled() => {
                self.undo_create(vm).await;
                let fault = Fault::new(ErrorCode::Cancelled, "the creation was cancelled");
                let failed = change(VmEvent::Failed, Some(fault.clone()), VmPatch::default());
                return Ok(AttemptEnd { vm: Some(failed), ..cancelled(fault) });
            }
        };
        Ok(completed(change(VmEvent::Started, None, self.patch(started))))
    }

    async fn operate_start(
        self: &Arc<Self>,
        attempt: &Attempt,
        vm: &Vm,
    ) -> Result<AttemptEnd, Failure> {
        if vm.state != VmState::Starting {
            return Ok(superseded(vm));
        }
        let clock = PhaseClock::since(attempt.task.created_at);
        let telling = Telling::default();
        let start = Box::pin(self.start(vm, clock, &telling));
        let started = tokio::select! {
            started = self.told(attempt, &telling, start) => started?,
            () = attempt.cancelled.cancelled() => {
                // The VM is to be deleted instead. Its disk is the deletion's business.
                self.undo_start(vm).await;
                let fault = Fault::new(ErrorCode::Cancelled, "the start was cancelled");
                return Ok(cancelled(fault));
            }
        };
        Ok(completed(change(VmEvent::Started, None, self.patch(started))))
    }

    async fn operate_snapshot(&self, attempt: &Attempt, vm: &Vm) -> Result<AttemptEnd, Failure> {
        if !matches!(vm.state, VmState::Running | VmState::Paused) {
            return Ok(superseded(vm));
        }
        match self.take_snapshot(attempt, vm).await? {
            Some(facts) => Ok(AttemptEnd { snapshot: Some(facts), ..done() }),
            None => Ok(cancelled(Fault::new(ErrorCode::Cancelled, "the snapshot was cancelled"))),
        }
    }

    async fn operate_suspend(&self, attempt: &Attempt, vm: &Vm) -> Result<AttemptEnd, Failure> {
        if vm.state != VmState::Stopping {
            return Ok(superseded(vm));
        }
        let failure = match self.suspend(attempt, vm).await {
            Ok(facts) => {
                let stopped = change(VmEvent::Stopped, None, VmPatch::default());
                return Ok(AttemptEnd { snapshot: Some(facts), ..completed(stopped) });
            }
            Err(failure) => failure,
        };
        if failure.retryable && attempt.task.attempts < attempt.task.max_attempts {
            return Err(failure);
        }
        // It was to be stopped in any case: without its memory it ends as at any other stop.
        let why = failure.fault.clone();
        self.end_without_memory(vm, why.clone()).await?;
        let stopped = change(VmEvent::Stopped, Some(why.clone()), VmPatch::default());
        Ok(AttemptEnd { vm: Some(stopped), ..failed(why) })
    }

    async fn operate_build(
        self: &Arc<Self>,
        attempt: &Attempt,
        vm: &Vm,
    ) -> Result<AttemptEnd, Failure> {
        if vm.state != VmState::Creating {
            return Ok(superseded(vm));
        }
        tokio::select! {
            built = self.build_template(attempt, vm) => built,
            () = attempt.cancelled.cancelled() => {
                self.undo_create(vm).await;
                Ok(cancelled(Fault::new(ErrorCode::Cancelled, "the build was cancelled")))
            }
        }
    }

    /// A start that comes to nothing: its disk stays.
    async fn undo_start(&self, vm: &Vm) {
        if let Ok(driver) = self.driver(vm)
            && let Err(error) = driver.kill(self.machine(vm.id)).await
        {
            tracing::error!(vm.id = %vm.id, error = fault::chain(&error), "undo a start");
        }
        self.guests.remove_guest(vm.id);
    }

    fn patch(&self, started: Started) -> VmPatch {
        metrics::started(&started.report);
        VmPatch {
            worker_id: Some(self.parts.id),
            address: started.network.addresses.first().map(|(address, _)| *address),
            start: Some(started.report),
            tools: started.tools,
        }
    }

    /// Records the end; all of the attempt's answer counts or none.
    pub(crate) async fn end(
        &self,
        attempt: &Attempt,
        end: AttemptEnd,
    ) -> Result<Outcome, StoreError> {
        let vm_event = end.vm.is_some();
        match self.parts.store.end_attempt(attempt.task.id, attempt.lease.epoch, end).await {
            Ok(task) => {
                self.after_end(&task, vm_event).await?;
                Ok(Outcome::Ended)
            }
            Err(StoreError::Fenced) => Ok(Outcome::Fenced),
            Err(error) => Err(error),
        }
    }

    async fn after_end(&self, task: &Task, vm_event: bool) -> Result<(), StoreError> {
        metrics::ended(task);
        if vm_event
            && let Some(vm) = task.vm_id
            && let Some(vm) = self.parts.store.vm(vm).await?
        {
            self.publish_vm(&vm).await;
            match vm.state {
                VmState::Deleted => self.guests.forget(vm.id),
                // Executions that wait for the VM look again.
                _ => self.guests.notify(),
            }
        }
        if let Some(id) = task.snapshot_id {
            self.after_snapshot(task, id).await?;
        }
        self.publish_task(task).await;
        Ok(())
    }

    async fn after_snapshot(&self, task: &Task, id: SnapshotId) -> Result<(), StoreError> {
        if let Some(snapshot) = self.parts.store.snapshot(id).await? {
            self.publish_snapshot(&snapshot).await;
        }
        if task.kind == TaskKind::TemplateBuild
            && let Some(vm) = task.vm_id
            && let Some(vm) = self.parts.store.vm(vm).await?
            && let Origin::Builder(id) = vm.spec.origin
            && let Some(template) = self.parts.store.template(id).await?
        {
            self.publish_template(&template).await;
        }
        Ok(())
    }

    async fn fail(
        &self,
        attempt: &Attempt,
        vm: &Vm,
        failure: Failure,
    ) -> Result<Outcome, StoreError> {
        let reason = Some(failure.fault.clone());
        // A deletion that fails leaves the VM as it is: being deleted. Reconciling repeats it.
        let event = match attempt.task.kind {
            TaskKind::VmCreate | TaskKind::VmStart | TaskKind::VmStop | TaskKind::TemplateBuild => {
                Some(VmEvent::Failed)
            }
            TaskKind::VmPause
            | TaskKind::VmResume
            | TaskKind::VmSuspend
            | TaskKind::VmSnapshot
            | TaskKind::VmDelete
            | TaskKind::ToolBuild
            | TaskKind::VmExecute => None,
        };
        let end = AttemptEnd {
            vm: event.map(|event| change(event, reason, VmPatch::default())),
            ..failed(failure.fault.clone())
        };
        let again = failure.retryable && attempt.task.attempts < attempt.task.max_attempts;
        if !again {
            tracing::warn!(task.id = %attempt.task.id, vm.id = %vm.id,
                code = %failure.fault.code, "task failed");
            return self.end(attempt, end).await;
        }
        self.give_back(attempt, failure.fault, end).await
    }

    /// Another attempt, after a pause that doubles each time.
    pub(crate) async fn give_back(
        &self,
        attempt: &Attempt,
        fault: Fault,
        otherwise: AttemptEnd,
    ) -> Result<Outcome, StoreError> {
        let (id, epoch) = (attempt.task.id, attempt.lease.epoch);
        let task = match self.parts.store.retry_attempt(id, epoch, fault, otherwise).await {
            Ok(task) => task,
            Err(StoreError::Fenced) => return Ok(Outcome::Fenced),
            Err(error) => return Err(error),
        };
        if task.state.is_end() {
            self.after_end(&task, true).await?;
            return Ok(Outcome::Ended);
        }
        let pause = std::time::Duration::from_millis(250 << attempt.task.attempts.min(6));
        match self.parts.queue.release(&attempt.lease, pause).await {
            Ok(()) => {
                let _ = self.parts.store.confirm_dispatched(&[id]).await;
            }
            Err(error) => {
                tracing::warn!(task.id = %id, error = fault::chain(&error), "give a task back");
            }
        }
        self.publish_task(&task).await;
        Ok(Outcome::GivenBack)
    }

    pub(crate) async fn publish_task(&self, task: &Task) {
        self.publish(Event::Task {
            task_id: task.id,
            vm_id: task.vm_id,
            state: task.state,
            at: Timestamp::now(),
        })
        .await;
    }

    pub(crate) async fn publish_vm(&self, vm: &Vm) {
        self.publish(Event::Vm { vm_id: vm.id, state: vm.state, at: vm.updated_at }).await;
    }

    pub(crate) async fn publish_snapshot(&self, snapshot: &Snapshot) {
        self.publish(Event::Snapshot {
            snapshot_id: snapshot.id,
            state: snapshot.state,
            at: snapshot.updated_at,
        })
        .await;
    }

    pub(crate) async fn publish_template(&self, template: &Template) {
        self.publish(Event::Template {
            template_id: template.id,
            state: template.state,
            at: template.updated_at,
        })
        .await;
    }

    pub(crate) async fn publish(&self, event: Event) {
        if let Err(error) = self.parts.bus.publish(event).await {
            tracing::warn!(error = fault::chain(&error), "publish");
        }
    }
}

fn change(event: VmEvent, reason: Option<Fault>, patch: VmPatch) -> VmChange {
    VmChange { event, reason, patch }
}

fn completed(vm: VmChange) -> AttemptEnd {
    AttemptEnd { vm: Some(vm), ..done() }
}

/// What was asked for is so already: an earlier attempt died after it had done it.
pub(crate) fn done() -> AttemptEnd {
    AttemptEnd {
        state: TaskState::Completed,
        error: None,
        vm: None,
        execution: None,
        snapshot: None,
        template: None,
        tools: None,
    }
}

pub(crate) fn failed(fault: Fault) -> AttemptEnd {
    AttemptEnd { state: TaskState::Failed, error: Some(fault), ..done() }
}

pub(crate) fn cancelled(fault: Fault) -> AttemptEnd {
    AttemptEnd { state: TaskState::Cancelled, ..failed(fault) }
}

/// The VM went on to another state while the task waited.
fn superseded(vm: &Vm) -> AttemptEnd {
    let text = format!("the VM is {} by now", vm.state);
    cancelled(Fault::new(ErrorCode::Cancelled, text))
}

/// The end of an execution that has nothing to show.
pub(crate) fn failed_execution(fault: Fault) -> AttemptEnd {
    let cancelled = fault.code == ErrorCode::Cancelled;
    AttemptEnd {
        state: if cancelled { TaskState::Cancelled } else { TaskState::Failed },
        error: Some(fault.clone()),
        execution: Some(ExecutionEnd {
            state: if cancelled { ExecutionState::Cancelled } else { ExecutionState::Failed },
            exit: None,
            error: Some(fault),
            duration_us: None,
            stdout: RetainedOutput::default(),
            stderr: RetainedOutput::default(),
        }),
        ..done()
    }
}
