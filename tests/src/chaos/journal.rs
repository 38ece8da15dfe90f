//! What clients were told, and what they may never be told.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use aether_types::TaskId;

/// What a client that retries has seen.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Every task that was acknowledged, by the key of the request that it was the answer to.
    tasks: BTreeMap<String, TaskId>,
    wrong: Vec<String>,
    tries: u64,
}

impl Journal {
    /// The same request has the same answer, however often and whomever it is asked.
    pub(crate) fn acknowledged(&self, key: &str, task: TaskId) {
        let mut inner = self.lock();
        let before = *inner.tasks.entry(key.to_owned()).or_insert(task);
        if before != task {
            inner.wrong.push(format!("{key} was answered with {before}, and then with {task}"));
        }
    }

    pub(crate) fn wrong(&self, what: String) {
        self.lock().wrong.push(what);
    }

    pub(crate) fn tried(&self) {
        self.lock().tries += 1;
    }

    pub(crate) fn tasks(&self) -> Vec<TaskId> {
        self.lock().tasks.values().copied().collect()
    }

    pub(crate) fn all_wrong(&self) -> Vec<String> {
        self.lock().wrong.clone()
    }

    /// Requests that were sent, retries too.
    pub(crate) fn tries(&self) -> u64 {
        self.lock().tries
    }

    // Nothing panics while the lock is held.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
