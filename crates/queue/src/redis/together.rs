//! Calls that come while one is under way go together in the next: what each of them costs on the
//! way to the server and back is then shared, and a single one waits for nobody.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aether_redis::CallError;
use tokio::sync::oneshot;

/// In one script; others wait meanwhile, for a millisecond or less.
const MOST: usize = 64;

/// What one call comes to. Of a failure all that went together hear.
pub(super) type Answer<A> = Result<A, Arc<CallError>>;

#[derive(Debug)]
pub(super) struct Together<Q, A> {
    inner: Mutex<Inner<Q, A>>,
}

#[derive(Debug)]
struct Inner<Q, A> {
    waiting: Vec<(Q, oneshot::Sender<Answer<A>>)>,
    /// A task sends what waits, until nothing does.
    is_sending: bool,
}

impl<Q, A> Default for Together<Q, A> {
    fn default() -> Self {
        Self { inner: Mutex::new(Inner { waiting: Vec::new(), is_sending: false }) }
    }
}

impl<Q: Send + 'static, A: Send + 'static> Together<Q, A> {
    /// `send` answers as many as it is asked, in their order. `None`: the runtime ends. Where nobody
    /// waits for it any more the answer is dropped when it comes.
    pub(super) async fn ask<F>(
        self: &Arc<Self>,
        question: Q,
        send: impl Fn(Vec<Q>) -> F + Send + 'static,
    ) -> Option<Answer<A>>
    where
        F: Future<Output = Result<Vec<A>, CallError>> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let begins = {
            let mut inner = self.lock();
            inner.waiting.push((question, answer));
            !std::mem::replace(&mut inner.is_sending, true)
        };
        if begins {
            tokio::spawn(Arc::clone(self).send_all(send));
        }
        answered.await.ok()
    }

    async fn send_all<F>(self: Arc<Self>, send: impl Fn(Vec<Q>) -> F + Send)
    where
        F: Future<Output = Result<Vec<A>, CallError>> + Send,
    {
        while let Some((questions, callers)) = self.next() {
            match send(questions).await {
                Ok(answers) => {
                    for (caller, answer) in callers.into_iter().zip(answers) {
                        let _ = caller.send(Ok(answer));
                    }
                }
                Err(error) => {
                    let error = Arc::new(error);
                    for caller in callers {
                        let _ = caller.send(Err(Arc::clone(&error)));
                    }
                }
            }
        }
    }

    /// What waits, in the order that it came. `None`: nothing does, and the next that comes begins.
    #[expect(clippy::type_complexity, reason = "two columns of one table")]
    fn next(&self) -> Option<(Vec<Q>, Vec<oneshot::Sender<Answer<A>>>)> {
        let mut inner = self.lock();
        if inner.waiting.is_empty() {
            inner.is_sending = false;
            return None;
        }
        let count = inner.waiting.len().min(MOST);
        Some(inner.waiting.drain(..count).unzip())
    }

    // Nothing panics while the lock is held.
    fn lock(&self) -> MutexGuard<'_, Inner<Q, A>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
