//! One command in one guest, from the task to its end.
//!
//! The store hears that a command is about to be handed over *before* it is. So a later attempt
//! knows: no boot id, never sent; the guest's own boot id, attach to it (or send it, if the guest
//! does not know it: the word got lost on the way); another boot id, lost with that guest.

use std::{sync::Arc, time::Duration};

use aether_events::Event;
use aether_protocol::{
    Attach, EnvVar, ErrorCode as GuestCode, Forget, Run, TtySize,
    host::{self, ClientError, RunSession},
};
use aether_store::{AttemptEnd, ExecutionEnd, StoreError};
use aether_streams::{SessionOutput, WorkerEnd};
use aether_types::{
    ErrorCode, Execution, ExecutionSpec, ExecutionState, Fault, TaskState, Timestamp, VmState,
    limits,
};
use tokio::time::{Instant, timeout_at};

use crate::{
    attempt::{Attempt, Outcome, failed, failed_execution},
    fault,
    guest::{AskError, Guest},
    pump::{Collected, Feed, Pump, PumpEnd},
    worker::Core,
};

/// Between tries to reach an agent that is being replaced.
const RECONNECT_PAUSE: Duration = Duration::from_millis(25);

impl Core {
    pub(crate) async fn execute(
        self: &Arc<Self>,
        attempt: &Attempt,
    ) -> Result<Outcome, StoreError> {
        let store = &self.parts.store;
        let execution = match attempt.task.execution_id {
            Some(id) => store.execution(id).await?,
            None => None,
        };
        let Some(execution) = execution else {
            let fault = Fault::new(ErrorCode::ExecutionNotFound, "the execution is gone");
            return self.end(attempt, failed(fault)).await;
        };
        let mut session = self.parts.sessions.take(execution.id);
        if execution.spec.interactive && session.is_none() {
            // Its client was connected to a process that has ended.
            let text = "the client went away, or asked another process than the one with the VM";
            let fault = Fault::new(ErrorCode::ClientGone, text);
            return self.end(attempt, failed_execution(fault)).await;
        }
        let outcome = self.run_to_end(attempt, &execution, &mut session).await?;
        let end = match outcome {
            Ran::Ended(end) => *end,
            Ran::Left => {
                let _ = self.parts.queue.release(&attempt.lease, Duration::ZERO).await;
                return Ok(Outcome::Left);
            }
        };
        let last = last_word(&end);
        let outcome = self.end(attempt, end).await?;
        // The client hears of the end when it is recorded, never before.
        if let Some(session) = session {
            let _ = tokio::time::timeout(Duration::from_secs(5), session.output.send(last)).await;
        }
        Ok(outcome)
    }

    async fn run_to_end(
        self: &Arc<Self>,
        attempt: &Attempt,
        execution: &Execution,
        session: &mut Option<WorkerEnd>,
    ) -> Result<Ran, StoreError> {
        let guest = match self.wait_for_guest(attempt).await? {
            Ok(guest) => guest,
            Err(fault) => return Ok(Ran::ended(failed_execution(fault))),
        };
        let _place = tokio::select! {
            place = guest.places.acquire() => place,
            fault = guest.ended() => return Ok(Ran::ended(failed_execution(fault))),
            () = attempt.cancelled.cancelled() => {
                return Ok(Ran::ended(failed_execution(cancelled())));
            }
        };
        let begun = tokio::select! {
            begun = self.begin_run(attempt, execution, &guest) => begun?,
            fault = guest.ended() => Err(fault),
        };
        let run = match begun {
            Ok(run) => run,
            Err(fault) => return Ok(Ran::ended(failed_execution(fault))),
        };
        self.publish(Event::ExecutionStarted {
            execution_id: execution.id,
            vm_id: execution.vm_id,
            at: Timestamp::now(),
        })
        .await;
        if let Some(session) = session {
            let _ = session.output.send(SessionOutput::Started).await;
        }
        Ok(self.follow(attempt, execution, &guest, run, session).await)
    }

    /// The guest, once it takes commands; a fault where it never will.
    async fn wait_for_guest(
        &self,
        attempt: &Attempt,
    ) -> Result<Result<Arc<Guest>, Fault>, StoreError> {
        let Some(vm_id) = attempt.task.vm_id else {
            return Ok(Err(Fault::new(ErrorCode::VmNotFound, "the VM is gone")));
        };
        let mut changes = self.guests.changes();
        loop {
            changes.mark_unchanged();
            if attempt.cancelled.is_cancelled() {
                return Ok(Err(cancelled()));
            }
            // A guest that was adopted while it was paused says who it is when it runs again.
            let guest = self.guests.get(vm_id).filter(|g| !g.boot_id().is_empty());
            if let Some(guest) = guest {
                return Ok(Ok(guest));
            }
            let vm = self.parts.store.vm(vm_id).await?;
            match vm {
                Some(vm) if vm.state.takes_commands() || vm.state == VmState::Paused => {}
                Some(vm) => {
                    let fault = vm.reason.unwrap_or_else(|| {
                        let text = format!("the VM is {}", vm.state);
                        Fault::new(ErrorCode::VmStopped, text)
                    });
                    return Ok(Err(fault));
                }
                None => return Ok(Err(Fault::new(ErrorCode::VmNotFound, "the VM is gone"))),
            }
            tokio::select! {
                _ = changes.changed() => {}
                () = attempt.cancelled.cancelled() => {}
            }
        }
    }

    /// Hands the command over, once.
    async fn begin_run(
        &self,
        attempt: &Attempt,
        execution: &Execution,
        guest: &Guest,
    ) -> Result<Result<RunSession, Fault>, StoreError> {
        match &execution.boot_id {
            Some(boot_id) if *boot_id == guest.boot_id() => {
                match self.attach(execution, guest, [0; 2]).await {
                    Ok(run) => return Ok(Ok(run)),
                    // The guest is the same and does not know it: it was never handed over.
                    Err(error) if is_unknown_run(&error) => {}
                    Err(error) => return Ok(Err(error.fault())),
                }
            }
            Some(_) => return Ok(Err(lost())),
            None => {
                self.parts
                    .store
                    .execution_started(
                        attempt.task.id,
                        attempt.lease.epoch,
                        execution.id,
                        &guest.boot_id(),
                    )
                    .await?;
            }
        }
        Ok(self.hand_over(execution, guest).await)
    }

    async fn hand_over(&self, execution: &Execution, guest: &Guest) -> Result<RunSession, Fault> {
        let limit = self.parts.config.guest_limit;
        let request = run_request(execution);
        let stream = if request.detached {
            guest.connect_for_run(limit).await?
        } else {
            guest.connect(limit).await?.stream
        };
        match host::run(stream, &guest.token, request.clone(), limit).await {
            Ok(run) => {
                guest.set_boot_id(run.boot_id());
                Ok(run)
            }
            // The command may have begun. An interactive one died with its connection.
            Err(error) if error.is_connection_lost() && request.detached => {
                match self.attach(execution, guest, [0; 2]).await {
                    Ok(run) => Ok(run),
                    Err(AskError::Client(ClientError::Refused {
                        code: GuestCode::UnknownRun,
                        ..
                    })) => {
                        let stream = guest.connect(limit).await?.stream;
                        let again = host::run(stream, &guest.token, request, limit).await;
                        again.map_err(|e| fault::from_client(&e))
                    }
                    Err(error) => Err(error.fault()),
                }
            }
            Err(error) => Err(fault::from_client(&error)),
        }
    }

    async fn attach(
        &self,
        execution: &Execution,
        guest: &Guest,
        offsets: [u64; 2],
    ) -> Result<RunSession, AskError> {
        let limit = self.parts.config.guest_limit;
        guest
            .ask(limit, |stream, token| {
                let request = Attach {
                    run_id: execution.id.to_string(),
                    stdout_offset: offsets[0],
                    stderr_offset: offsets[1],
                };
                async move { host::attach(stream, &token, request, limit).await }
            })
            .await
    }

    /// Follows the command to its end, over a lost connection too where the guest still has it.
    async fn follow(
        &self,
        attempt: &Attempt,
        execution: &Execution,
        guest: &Arc<Guest>,
        mut run: RunSession,
        session: &mut Option<WorkerEnd>,
    ) -> Ran {
        let task = attempt.task.id;
        let mut collected = Collected::new(&self.parts.logs, execution.vm_id, task);
        let mut feed = Feed::new(&execution.spec);
        loop {
            let pump = Pump {
                guest,
                cancelled: &attempt.cancelled,
                closing: &self.leaving,
                interactive: execution.spec.interactive,
                limit: backstop(&execution.spec),
            };
            let end = pump.run(run, session, &mut feed, &mut collected).await;
            let fault = match end {
                PumpEnd::Exited(exited) => {
                    self.forget_later(guest, execution);
                    return Ran::ended(collected.into_end(&exited));
                }
                PumpEnd::Left => return Ran::Left,
                PumpEnd::Over(fault) => fault,
                PumpEnd::Lost(error) if !execution.spec.interactive => {
                    tracing::debug!(vm.id = %guest.id, error = fault::chain(&error), "lost");
                    match self.reattach(execution, guest, &collected).await {
                        Ok(again) => {
                            run = again;
                            continue;
                        }
                        Err(fault) => fault,
                    }
                }
                PumpEnd::Lost(error) => self.why_lost(guest, &error).await,
            };
            return Ran::ended(collected.into_failure(fault));
        }
    }

    async fn reattach(
        &self,
        execution: &Execution,
        guest: &Arc<Guest>,
        collected: &Collected,
    ) -> Result<RunSession, Fault> {
        let deadline = Instant::now() + self.parts.config.reattach_limit;
        let attach = timeout_at(deadline, self.attach_patiently(execution, guest, collected));
        let result = tokio::select! {
            // The machine's end explains a lost connection better than the connection does.
            biased;
            fault = guest.ended() => return Err(fault),
            result = attach => result,
        };
        match result {
            Ok(Ok(run)) => Ok(run),
            Ok(Err(error)) if is_unknown_run(&error) => {
                self.refresh_boot_id(guest).await;
                Err(agent_lost())
            }
            Ok(Err(error)) => Err(error.fault()),
            Err(_) => Err(Fault::new(ErrorCode::GuestUnreachable, "the guest stopped answering")),
        }
    }

    /// An agent that is being replaced refuses connections for a moment, and nothing says when it
    /// does not any more.
    async fn attach_patiently(
        &self,
        execution: &Execution,
        guest: &Guest,
        collected: &Collected,
    ) -> Result<RunSession, AskError> {
        loop {
            match self.attach(execution, guest, collected.offsets()).await {
                Err(AskError::Connect(_)) => tokio::time::sleep(RECONNECT_PAUSE).await,
                Err(AskError::Client(error)) if error.is_connection_lost() => {
                    tokio::time::sleep(RECONNECT_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    /// Why an interactive command's connection went: with its machine, with its agent, or alone.
    async fn why_lost(&self, guest: &Arc<Guest>, error: &ClientError) -> Fault {
        if !error.is_connection_lost() {
            return fault::from_client(error);
        }
        let deadline = Instant::now() + self.parts.config.reattach_limit;
        let before = guest.boot_id();
        let after = tokio::select! {
            biased;
            fault = guest.ended() => return fault,
            after = timeout_at(deadline, self.refresh_boot_id(guest)) => after,
        };
        match after {
            Ok(Some(after)) if after != before => agent_lost(),
            Ok(_) | Err(_) => self.ended_or(guest, deadline, fault::from_client(error)).await,
        }
    }

    /// A connection may be refused a moment before the machine's end is known.
    async fn ended_or(&self, guest: &Guest, deadline: Instant, otherwise: Fault) -> Fault {
        timeout_at(deadline, guest.ended()).await.unwrap_or(otherwise)
    }

    pub(crate) async fn refresh_boot_id(&self, guest: &Guest) -> Option<String> {
        let limit = self.parts.config.reattach_limit;
        let pong = guest
            .ask(limit, |stream, token| async move { host::ping(stream, &token, limit).await })
            .await
            .ok()?;
        guest.set_boot_id(&pong.boot_id);
        Some(pong.boot_id)
    }

    /// Off the way of the answer: the guest keeps finished runs only for a while anyway.
    fn forget_later(&self, guest: &Arc<Guest>, execution: &Execution) {
        if execution.spec.interactive {
            return;
        }
        let (guest, run_id) = (Arc::clone(guest), execution.id.to_string());
        let limit = self.parts.config.guest_limit;
        self.spawn(async move {
            let asked = guest.ask(limit, |stream, token| {
                let forget = Forget { run_id: run_id.clone() };
                async move { host::forget(stream, &token, forget, limit).await }
            });
            let _ = asked.await;
        });
    }
}

/// How following a command ended.
enum Ran {
    Ended(Box<AttemptEnd>),
    /// The process ends and leaves the VM; the next one attaches to the command.
    Left,
}

impl Ran {
    fn ended(end: AttemptEnd) -> Self {
        Self::Ended(Box::new(end))
    }
}

/// The agent ends the command at its limit; this is for an agent that does not.
fn backstop(spec: &ExecutionSpec) -> Duration {
    let asked = spec.timeout_s.unwrap_or(limits::EXECUTION_TIMEOUT_S_DEFAULT);
    Duration::from_secs(asked) + aether_protocol::limits::KILL_GRACE + Duration::from_secs(10)
}

fn run_request(execution: &Execution) -> Run {
    let spec = &execution.spec;
    let timeout_s = spec.timeout_s.unwrap_or(limits::EXECUTION_TIMEOUT_S_DEFAULT);
    Run {
        run_id: execution.id.to_string(),
        command: spec.command.clone(),
        args: spec.args.clone(),
        env: spec.env.iter().map(|(name, value)| EnvVar::new(name, value)).collect(),
        cwd: spec.cwd.clone(),
        user: spec.user.clone(),
        timeout_ms: timeout_s.saturating_mul(1000),
        stdin: spec.interactive || spec.stdin.as_ref().is_some_and(|text| !text.is_empty()),
        tty: spec.tty.map(|t| TtySize { rows: t.rows.into(), cols: t.cols.into() }),
        detached: !spec.interactive,
        kill_grace_ms: None,
    }
}

fn last_word(end: &AttemptEnd) -> SessionOutput {
    let execution = end.execution.as_ref();
    SessionOutput::End {
        exit: execution.and_then(|e: &ExecutionEnd| e.exit),
        error: end.error.clone().or_else(|| execution.and_then(|e| e.error.clone())),
        duration_us: execution.and_then(|e| e.duration_us),
    }
}

fn is_unknown_run(error: &AskError) -> bool {
    match error {
        AskError::Client(error) => error.code() == Some(GuestCode::UnknownRun),
        AskError::Connect(_) => false,
    }
}

pub(crate) fn cancelled() -> Fault {
    Fault::new(ErrorCode::Cancelled, "the execution was cancelled")
}

fn agent_lost() -> Fault {
    Fault::new(
        ErrorCode::GuestAgentLost,
        "the agent in the guest was killed, and the command with it",
    )
}

fn lost() -> Fault {
    Fault::new(
        ErrorCode::ExecutionLost,
        "the guest restarted after the command was handed to it; it may have run",
    )
}

/// The states of task and execution that belong to a fault.
pub(crate) fn states(fault: &Fault) -> (TaskState, ExecutionState) {
    if fault.code == ErrorCode::Cancelled {
        (TaskState::Cancelled, ExecutionState::Cancelled)
    } else {
        (TaskState::Failed, ExecutionState::Failed)
    }
}
