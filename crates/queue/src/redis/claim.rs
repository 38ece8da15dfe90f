//! Claims on their way to the server and back. Whoever is dropped meanwhile may have claimed
//! already, as far as the server is concerned, so a claim goes on without whoever asked, and a lease
//! that nobody is there to take is given back at once.

use std::{sync::Arc, time::Duration};

use aether_redis::CallError;
use aether_types::WorkerId;

use super::{DELAYS_OF_A_CLAIM, Shared, failed, scripts, scripts::millis};
use crate::{Lease, QueueError};

#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) worker: WorkerId,
    pub(super) length: Duration,
    /// In line where nothing is ready.
    pub(super) waits: bool,
}

/// A lease on its way to who claimed it.
#[derive(Debug)]
pub(super) struct Given {
    shared: Arc<Shared>,
    lease: Option<Lease>,
    /// Who is in the server's line where there is no lease.
    waits: Option<WorkerId>,
}

impl Given {
    fn new(shared: &Arc<Shared>, claim: Claim, lease: Option<Lease>) -> Self {
        let waits = (claim.waits && lease.is_none()).then_some(claim.worker);
        Self { shared: Arc::clone(shared), lease, waits }
    }

    fn take(mut self) -> Option<Lease> {
        self.waits = None;
        self.lease.take()
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        // Without a runtime everything ends, and the lease runs out.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let shared = Arc::clone(&self.shared);
        if let Some(lease) = self.lease.take() {
            runtime.spawn(async move {
                let given = shared.held("give back", &scripts::RELEASE, &lease, Some(0)).await;
                if let Err(error) = given {
                    tracing::warn!(%error, "give back what nobody is there to take; it runs out");
                }
            });
        } else if let Some(worker) = self.waits {
            runtime.spawn(async move { shared.leave(worker, 0).await });
        }
    }
}

/// A claim that may have put its worker into the server's line. Dropped with the claim, it takes it
/// out again, unless others of its claims wait here.
pub(super) struct InLine<'q> {
    pub(super) shared: &'q Arc<Shared>,
    pub(super) worker: WorkerId,
    /// The claim is over, and has put this in order itself.
    pub(super) is_left: bool,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        // Without a runtime everything ends, and who is told of work finds nobody there.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_left {
            return;
        }
        let (shared, worker) = (Arc::clone(self.shared), self.worker);
        runtime.spawn(async move { shared.leave(worker, 0).await });
    }
}

/// The lease runs for its whole length from now. Nobody waits for that: it has begun already.
pub(super) fn confirm(shared: &Arc<Shared>, lease: &Lease) {
    if lease.duration <= shared.confirmed_within {
        return;
    }
    let (shared, lease) = (Arc::clone(shared), lease.clone());
    tokio::spawn(async move {
        // Where it was taken back meanwhile, whoever works on it is fenced, and finds out as usual.
        if let Err(error) = shared.held("confirm a lease", &scripts::RENEW, &lease, None).await {
            tracing::debug!(%error, "confirm a lease");
        }
    });
}

/// Claims what is ready for this worker.
pub(super) async fn claim(shared: &Arc<Shared>, claim: Claim) -> Result<Option<Lease>, QueueError> {
    const CONTEXT: &str = "claim an entry";
    let all = Arc::clone(shared);
    let given = shared.claims.ask(claim, move |claims| claim_all(Arc::clone(&all), claims)).await;
    match given {
        Some(Ok(given)) => Ok(given.take()),
        Some(Err(error)) => Err(failed(CONTEXT, error)),
        None => Err(QueueError::Unreachable { context: CONTEXT, source: None }),
    }
}

async fn claim_all(shared: Arc<Shared>, claims: Vec<Claim>) -> Result<Vec<Given>, CallError> {
    let mut values = vec![DELAYS_OF_A_CLAIM.to_string()];
    for claim in &claims {
        let channel = if claim.waits { shared.link.channel() } else { "" };
        values.push(claim.worker.to_string());
        values.push(millis(claim.length).to_string());
        values.push(channel.to_owned());
        values.push(millis(claim.length.min(shared.confirmed_within)).to_string());
    }
    let found: Vec<(String, i64)> = shared.call(&scripts::CLAIM, &values).await?;
    let lease = |claim: &Claim, (task, epoch): (String, i64)| {
        // Nothing was ready. What is no task is no entry of ours either.
        let task = task.parse().ok()?;
        Some(Lease { task, worker: claim.worker, epoch, duration: claim.length })
    };
    let given =
        |(claim, found): (&Claim, (String, i64))| Given::new(&shared, *claim, lease(claim, found));
    Ok(claims.iter().zip(found).map(given).collect())
}
