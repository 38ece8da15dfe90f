//! Who did what, written down: every call that changes something, however it ended, and everybody who
//! was refused.
//!
//! The entry is in the store before the answer is sent: what was acknowledged is in the log. Where the
//! client leaves first, it is written with that as its outcome. Bodies are never in it, nor is a
//! key; a path is, with the names that are in it.
//!
//! Nobody without a key can fill it: of those a few entries a second are written, which say how many
//! were left out.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aether_api::PREFIX;
use aether_store::{AuditEntry, Outcome};
use aether_types::{AuditId, ErrorCode, Scope, Timestamp, Verb, limits};
use axum::{
    extract::Request,
    http::{StatusCode, header},
    response::Response,
};
use tokio::{task::JoinHandle, time::Instant};

use crate::{
    auth::Caller,
    edge::RequestId,
    parts::App,
    problem::{ApiError, chain},
    serve::Peer,
};

/// Of a path in the log; what is longer names nothing that there is.
const PATH_CHARS_MAX: usize = 256;

/// An entry about somebody without a key, at most this often.
const STRANGER_EVERY: Duration = Duration::from_secs(1);

/// Every so many entries the log is held to its bounds.
const PRUNE_EVERY: u64 = 1024;

/// What the route that was found needs; set when it is found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ruled(Arc<OnceLock<Scope>>);

impl Ruled {
    pub(crate) fn set(&self, needed: Scope) {
        // A request has one route.
        let _ = self.0.set(needed);
    }
}

/// A call under way.
pub(crate) struct Trail {
    app: App,
    ruled: Ruled,
    /// Taken when it is written.
    entry: Option<AuditEntry>,
}

impl Trail {
    pub(crate) fn begin(app: &App, caller: &Caller, request: &mut Request) -> Self {
        let ruled = Ruled::default();
        request.extensions_mut().insert(ruled.clone());
        let entry = AuditEntry {
            project_id: Some(caller.project()),
            key_id: caller.key,
            key_prefix: Some(caller.shown.clone()),
            ..asked(request)
        };
        Self { app: app.clone(), ruled, entry: Some(entry) }
    }

    /// Begins to write it down, where it belongs there. That goes on where the client leaves now.
    pub(crate) fn end(mut self, response: &Response) -> Written {
        let entry = self.entry.take()?;
        let action = *self.ruled.0.get()?;
        let code = code_of(response);
        let refused = code == Some(ErrorCode::Forbidden);
        if action.verb != Verb::Write && !refused {
            return None;
        }
        let status = response.status();
        let outcome = match status {
            _ if refused => Outcome::Refused,
            // A WebSocket begins with 101.
            status if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS => {
                Outcome::Done
            }
            _ => Outcome::Failed,
        };
        let made = response.headers().get(header::LOCATION).and_then(|at| at.to_str().ok());
        let made = made.map(|at| at.strip_prefix(PREFIX).unwrap_or(at).to_owned());
        let entry = AuditEntry {
            action: Some(action),
            outcome,
            status: status.as_u16(),
            code,
            made,
            ..entry
        };
        let app = self.app.clone();
        Some(self.app.tasks.spawn(async move { write(&app, entry).await }))
    }
}

/// An entry on its way; `None`: there is none to write.
pub(crate) type Written = Option<JoinHandle<()>>;

/// Returns when the entry is in the store.
pub(crate) async fn settled(written: Written) {
    let Some(written) = written else { return };
    if let Err(error) = written.await {
        tracing::error!(%error, "writing to the audit log was cut off");
    }
}

impl Drop for Trail {
    /// The client left before the answer.
    fn drop(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        let Some(&action) = self.ruled.0.get().filter(|action| action.verb == Verb::Write) else {
            return;
        };
        let entry = AuditEntry { action: Some(action), ..entry };
        let app = self.app.clone();
        self.app.tasks.spawn(async move { write(&app, entry).await });
    }
}

/// An entry that has no outcome yet.
pub(crate) fn asked(request: &Request) -> AuditEntry {
    let path = request.uri().path();
    let path = path.strip_prefix(PREFIX).unwrap_or(path);
    let id = request.extensions().get::<RequestId>();
    AuditEntry {
        id: AuditId::new(),
        at: Timestamp::now(),
        project_id: None,
        key_id: None,
        key_prefix: None,
        action: None,
        method: request.method().as_str().chars().take(16).collect(),
        path: path.chars().take(PATH_CHARS_MAX).collect(),
        made: None,
        outcome: Outcome::Abandoned,
        status: 0,
        code: None,
        request_id: id.map(|id| id.0.to_string()).unwrap_or_default(),
        address: address(request),
    }
}

pub(crate) fn address(request: &Request) -> Option<IpAddr> {
    request.extensions().get::<Peer>().map(|peer| peer.0)
}

fn code_of(response: &Response) -> Option<ErrorCode> {
    response.extensions().get::<Arc<ApiError>>().and_then(|e| e.problem().error_code())
}

async fn write(app: &App, entry: AuditEntry) {
    let (id, request_id) = (entry.id, entry.request_id.clone());
    if let Err(error) = app.store().append_audit(entry).await {
        // The change is done, and cannot be taken back for this.
        tracing::error!(audit.id = %id, request_id, error = chain(&error), "not in the audit log");
        return;
    }
    if app.audited.fetch_add(1, Ordering::Relaxed).is_multiple_of(PRUNE_EVERY) {
        let shared = app.clone();
        app.tasks.spawn(async move { prune(&shared).await });
    }
}

/// Until nothing is over, or the gateway ends.
async fn prune(app: &App) {
    let kept = i64::from(limits::AUDIT_KEPT_DAYS) * 24 * 3600 * 1000;
    let before = Timestamp::now().plus_ms(-kept);
    loop {
        let pruned = tokio::select! {
            pruned = app.store().prune_audit(before) => pruned,
            () = app.closing.cancelled() => return,
        };
        match pruned {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(error = chain(&error), "hold the audit log to its bounds");
                return;
            }
        }
    }
}

/// Those without a key.
#[derive(Debug, Default)]
pub(crate) struct Strangers {
    last: Mutex<Option<Instant>>,
    left_out: AtomicU64,
}

impl Strangers {
    /// Whether one more may be written down now, and how many were not since the last.
    fn turn(&self) -> Option<u64> {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|at| now.duration_since(at) < STRANGER_EVERY) {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        *last = Some(now);
        Some(self.left_out.swap(0, Ordering::Relaxed))
    }
}

/// Somebody whose key is missing, wrong or past its time.
pub(crate) async fn strange(app: &App, entry: AuditEntry, error: &ApiError) {
    if error.problem().error_code() != Some(ErrorCode::Unauthorized) {
        return;
    }
    let Some(left_out) = app.strangers.turn() else { return };
    if left_out > 0 {
        tracing::warn!(left_out, "requests without a key are not all in the audit log");
    }
    let entry = AuditEntry {
        outcome: Outcome::Refused,
        status: error.problem().status,
        code: Some(ErrorCode::Unauthorized),
        ..entry
    };
    write(app, entry).await;
}
