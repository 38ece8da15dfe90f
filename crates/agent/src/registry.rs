//! Every run of this agent.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use aether_protocol::limits::{FINISHED_RUN_TTL, FINISHED_RUNS_MAX, RUNS_MAX};
use aether_protocol::{Attach, ErrorCode, RunState, RunSummary};

use crate::conn::Conn;
use crate::error::Fail;
use crate::run::Finished;

#[derive(Debug, Default)]
pub(crate) struct Registry {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next_key: u64,
    runs: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    run_id: String,
    pid: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    Attached,
    Detached { mailbox: Arc<Mailbox> },
    Finished { finished: Arc<Finished>, since: Instant },
}

/// Where a connection waits for the thread of a detached run to take it.
#[derive(Debug)]
pub(crate) struct Mailbox {
    waiting: Mutex<Option<Attachment>>,
    /// An eventfd that is readable while somebody waits.
    bell: OwnedFd,
}

/// A connection that wants to watch a run.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) conn: Conn,
    pub(crate) generation: u32,
    pub(crate) attach: Attach,
}

/// What became of an attachment.
#[derive(Debug)]
pub(crate) enum Attached {
    /// The run's thread has the connection.
    HandedOver,
    /// The run has ended; its remains are served by the caller.
    Finished(Attachment, Arc<Finished>),
    Unknown(Attachment),
}

/// A run's place in the registry. Dropping it takes the run out.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    registry: &'a Registry,
    key: u64,
    is_kept: bool,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Self, Fail> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags).map_err(Fail::sys("make an eventfd"))?;
        Ok(Self { waiting: Mutex::new(None), bell })
    }

    pub(crate) fn bell(&self) -> std::os::fd::BorrowedFd<'_> {
        self.bell.as_fd()
    }

    pub(crate) fn take(&self) -> Option<Attachment> {
        // Cleared first: a bell that rings later is then not lost.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The newest wins; one that still waits is dropped, and with it its connection.
    fn put(&self, attachment: Attachment) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(attachment);
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

impl Registry {
    /// Enters a run before it is started, so that its id is taken once.
    pub(crate) fn enter(
        &self,
        run_id: &str,
        mailbox: Option<&Arc<Mailbox>>,
    ) -> Result<Place<'_>, Fail> {
        let mut table = self.lock();
        table.expire(Instant::now());
        if !run_id.is_empty() && table.find(run_id).is_some() {
            return Err(Fail::new(ErrorCode::RunExists, format!("run {run_id:?} exists")));
        }
        if table.active() >= RUNS_MAX {
            return Err(Fail::new(ErrorCode::TooManyRuns, format!("{RUNS_MAX} runs are active")));
        }
        let key = table.next_key;
        table.next_key += 1;
        let state = match mailbox {
            Some(mailbox) => State::Detached { mailbox: Arc::clone(mailbox) },
            None => State::Attached,
        };
        table.runs.insert(key, Entry { run_id: run_id.to_owned(), pid: 0, state });
        Ok(Place { registry: self, key, is_kept: false })
    }

    pub(crate) fn attach(&self, attachment: Attachment) -> Attached {
        let mut table = self.lock();
        table.expire(Instant::now());
        match table.find(&attachment.attach.run_id).map(|(_, entry)| &entry.state) {
            Some(State::Detached { mailbox }) => {
                // Under the table's lock, as `Place::finish` looks into the mailbox under it.
                mailbox.put(attachment);
                Attached::HandedOver
            }
            Some(State::Finished { finished, .. }) => {
                Attached::Finished(attachment, Arc::clone(finished))
            }
            Some(State::Attached) | None => Attached::Unknown(attachment),
        }
    }

    pub(crate) fn forget(&self, run_id: &str) -> Result<(), Fail> {
        let mut table = self.lock();
        match table.find(run_id).map(|(key, entry)| (key, &entry.state)) {
            Some((key, State::Finished { .. })) => {
                table.runs.remove(&key);
                Ok(())
            }
            Some((_, State::Attached | State::Detached { .. })) => {
                Err(Fail::new(ErrorCode::RunActive, format!("run {run_id:?} has not ended")))
            }
            None => Err(unknown_run(run_id)),
        }
    }

    /// Drops every run that has ended.
    pub(crate) fn forget_finished(&self) {
        let is_alive = |entry: &Entry| !matches!(entry.state, State::Finished { .. });
        self.lock().runs.retain(|_, entry| is_alive(entry));
    }

    pub(crate) fn list(&self) -> Vec<RunSummary> {
        let mut table = self.lock();
        table.expire(Instant::now());
        let summaries = table.runs.values().map(|entry| {
            let (state, detached) = match entry.state {
                State::Attached => (RunState::Running, false),
                State::Detached { .. } => (RunState::Running, true),
                State::Finished { .. } => (RunState::Exited, true),
            };
            let run_id = entry.run_id.clone();
            RunSummary { run_id, state: state.into(), detached, pid: entry.pid }
        });
        summaries.collect()
    }

    pub(crate) fn active(&self) -> usize {
        self.lock().active()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn unknown_run(run_id: &str) -> Fail {
    Fail::new(ErrorCode::UnknownRun, format!("no run {run_id:?} that can be attached to"))
}

impl Place<'_> {
    pub(crate) fn set_pid(&self, pid: u32) {
        if let Some(entry) = self.registry.lock().runs.get_mut(&self.key) {
            entry.pid = pid;
        }
    }

    /// Leaves what a run was for later attachments. Where somebody has come meanwhile, gives the
    /// run back: its thread serves them first.
    pub(crate) fn finish(mut self, mailbox: &Mailbox, finished: Finished) -> Result<(), Self> {
        let registry = self.registry;
        let mut table = registry.lock();
        if mailbox.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Err(self);
        }
        let now = Instant::now();
        if let Some(entry) = table.runs.get_mut(&self.key) {
            entry.state = State::Finished { finished: Arc::new(finished), since: now };
        }
        table.expire(now);
        self.is_kept = true;
        Ok(())
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.registry.lock().runs.remove(&self.key);
        }
    }
}

impl Table {
    fn find(&self, run_id: &str) -> Option<(u64, &Entry)> {
        let mut runs = self.runs.iter();
        runs.find(|(_, entry)| entry.run_id == run_id).map(|(&key, entry)| (key, entry))
    }

    fn active(&self) -> usize {
        let is_active = |entry: &&Entry| !matches!(entry.state, State::Finished { .. });
        self.runs.values().filter(is_active).count()
    }

    /// Drops what has been kept for long enough, and the oldest past the bound.
    fn expire(&mut self, now: Instant) {
        self.runs.retain(|_, entry| match &entry.state {
            State::Finished { since, .. } => now.duration_since(*since) < FINISHED_RUN_TTL,
            State::Attached | State::Detached { .. } => true,
        });
        let excess = (self.runs.len() - self.active()).saturating_sub(FINISHED_RUNS_MAX);
        for _ in 0..excess {
            let ended = self.runs.iter().filter_map(|(&key, entry)| match entry.state {
                State::Finished { since, .. } => Some((since, key)),
                State::Attached | State::Detached { .. } => None,
            });
            if let Some((_, key)) = ended.min() {
                self.runs.remove(&key);
            }
        }
    }
}
