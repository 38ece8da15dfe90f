//! The live side of executions.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use aether_types::{ExecutionId, ExitStatus, Fault, OutputStream, TtySize};
use bytes::Bytes;
use tokio::sync::{
    mpsc::{Receiver, Sender, channel},
    watch,
};
use tokio_util::sync::CancellationToken;

/// Messages in flight each way. With 64 KiB in a message, at most 1 MiB waits for a slow client.
const MESSAGES: usize = 16;

/// From the client to the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionInput {
    Stdin(Bytes),
    StdinEof,
    Signal(i32),
    Resize(TtySize),
}

/// From the command to the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionOutput {
    /// The guest has started the command.
    Started,
    Data {
        stream: OutputStream,
        data: Bytes,
    },
    /// Bytes that were lost on the way (only after a crash of the worker).
    Skipped {
        stream: OutputStream,
        bytes: u64,
    },
    /// The last message; nothing follows.
    End {
        exit: Option<ExitStatus>,
        error: Option<Fault>,
        duration_us: Option<u64>,
    },
}

/// The gateway's end. Dropping it tells the worker that the client has gone.
#[derive(Debug)]
pub struct ClientEnd {
    pub input: Sender<SessionInput>,
    pub output: Receiver<SessionOutput>,
    /// Bytes of standard input that have gone on to the guest, in all. The worker takes whatever
    /// comes, so that signals never wait behind input; who sends bounds what is on its way.
    pub taken: watch::Receiver<u64>,
    pub(crate) entry: Entry,
}

impl ClientEnd {
    /// The task has ended: where no worker ever took the session, it closes.
    pub fn settle(&self) {
        self.entry.settle();
    }
}

/// The worker's end.
#[derive(Debug)]
pub struct WorkerEnd {
    pub input: Receiver<SessionInput>,
    pub output: Sender<SessionOutput>,
    pub taken: watch::Sender<u64>,
}

pub(crate) type Waiting = Mutex<HashMap<ExecutionId, WorkerEnd>>;

/// Sessions that the gateway has opened and no worker has taken yet.
#[derive(Debug, Clone, Default)]
pub struct Sessions {
    waiting: Arc<Waiting>,
}

impl Sessions {
    /// Opens a session for an execution that is about to be recorded.
    #[must_use]
    pub fn open(&self, id: ExecutionId) -> ClientEnd {
        let (input, worker_input) = channel(MESSAGES);
        let (worker_output, output) = channel(MESSAGES);
        let (worker_taken, taken) = watch::channel(0);
        let end = WorkerEnd { input: worker_input, output: worker_output, taken: worker_taken };
        lock(&self.waiting).insert(id, end);
        let entry = Entry::Here { id, waiting: Arc::downgrade(&self.waiting) };
        ClientEnd { input, output, taken, entry }
    }

    /// The worker's end, once. `None`: nobody follows this execution live.
    #[must_use]
    pub fn take(&self, id: ExecutionId) -> Option<WorkerEnd> {
        lock(&self.waiting).remove(&id)
    }
}

/// The two ends of a session whose worker is in another process; the token says that the session
/// is settled.
pub(crate) fn apart() -> (ClientEnd, WorkerEnd, CancellationToken) {
    let (input, far_input) = channel(MESSAGES);
    let (far_output, output) = channel(MESSAGES);
    let (far_taken, taken) = watch::channel(0);
    let settled = CancellationToken::new();
    let far = WorkerEnd { input: far_input, output: far_output, taken: far_taken };
    let entry = Entry::Apart(settled.clone());
    (ClientEnd { input, output, taken, entry }, far, settled)
}

/// Takes the session off the list when the client goes before a worker came.
#[derive(Debug)]
pub(crate) enum Entry {
    Here { id: ExecutionId, waiting: Weak<Waiting> },
    Apart(CancellationToken),
}

impl Entry {
    pub(crate) fn settle(&self) {
        match self {
            Self::Here { id, waiting } => {
                if let Some(waiting) = waiting.upgrade() {
                    lock(&waiting).remove(id);
                }
            }
            Self::Apart(settled) => settled.cancel(),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.settle();
    }
}

// Nothing panics while the lock is held; a poisoned map is as good as a clean one.
fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<ExecutionId, WorkerEnd>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_two_ends_meet_once() {
        let sessions = Sessions::default();
        let id = ExecutionId::new();
        let mut client = sessions.open(id);
        let mut worker = sessions.take(id).unwrap();
        assert!(sessions.take(id).is_none());
        client.input.send(SessionInput::StdinEof).await.unwrap();
        assert_eq!(worker.input.recv().await, Some(SessionInput::StdinEof));
        worker.output.send(SessionOutput::Started).await.unwrap();
        assert_eq!(client.output.recv().await, Some(SessionOutput::Started));
        drop(client);
        assert_eq!(worker.input.recv().await, None);
        assert!(worker.output.send(SessionOutput::Started).await.is_err());
    }

    #[test]
    fn a_client_that_leaves_early_leaves_nothing() {
        let sessions = Sessions::default();
        let id = ExecutionId::new();
        drop(sessions.open(id));
        assert!(sessions.take(id).is_none());
        assert!(lock(&sessions.waiting).is_empty());
    }
}
