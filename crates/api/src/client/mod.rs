//! The client.
//!
//! ```no_run
//! # async fn example() -> Result<(), aether_api::client::ClientError> {
//! use aether_api::{CreateVm, ExecuteRequest, client::{CallOptions, Client}};
//! use std::time::Duration;
//!
//! let client = Client::new("http://127.0.0.1:8080", Some("aeth_..."))?;
//! let wait = CallOptions::waiting(Duration::from_secs(60));
//! let vm = client.create_vm(&CreateVm::default(), &wait).await?;
//! let request = ExecuteRequest { command: "uname".into(), ..ExecuteRequest::default() };
//! let ended = client.execute(&vm.vm_id().to_string(), &request, &wait).await?;
//! # Ok(())
//! # }
//! ```

mod audit;
mod error;
mod events;
mod files;
mod follow;
mod http;
mod keys;
mod logs;
mod projects;
mod queues;
mod snapshots;
mod socket;
mod templates;
mod terminal;
mod tools;
mod trust;
mod workers;

use std::{fmt, sync::Arc, time::Duration};

use aether_types::{ExecutionId, OutputStream, TaskId, VmId};
use bytes::Bytes;

pub use audit::AuditQuery;
pub use error::ClientError;
pub use events::{EventQuery, EventsFrom, FollowEvents};
pub use files::{FileDownload, ReadOptions, WriteOptions};
pub use follow::Follow;
pub use keys::KeyQuery;
pub use logs::{FollowLogs, LogsFrom};
pub use snapshots::SnapshotQuery;
pub use templates::{Since, TemplateQuery};
pub use terminal::{TerminalInput, TerminalOutput};
pub use trust::Trust;

use crate::{
    Accepted, CreateVm, ExecuteRequest, ExecutionView, Health, Page, TaskView, VmView, format_wait,
};
use http::{Query, segment};

/// One server, one key. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// `None`: the server speaks plain HTTP.
    tls: Option<Arc<rustls::ClientConfig>>,
    /// Without a trailing slash and without [`crate::PREFIX`].
    base: String,
    key: Option<String>,
}

// The key must not reach a log.
impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("base", &self.base).finish_non_exhaustive()
    }
}

/// How a request that makes a task is sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallOptions {
    /// Wait this long for the end of the task; the server's bound is five minutes.
    pub wait: Option<Duration>,
    /// Carried out once for all requests with the same key and content.
    pub idempotency_key: Option<String>,
}

impl CallOptions {
    #[must_use]
    pub fn waiting(wait: Duration) -> Self {
        Self { wait: Some(wait), idempotency_key: None }
    }
}

/// The answer to a request that may have been waited for.
#[derive(Debug, Clone, PartialEq)]
pub enum Waited<T, A = Accepted> {
    /// It ended in time.
    Done(T),
    /// It is recorded and has not ended yet, or nobody waited.
    Accepted(A),
}

impl<T> Waited<T> {
    /// The task that was recorded, where nobody waited for its end.
    #[must_use]
    pub fn task_id(&self) -> Option<TaskId> {
        match self {
            Self::Done(_) => None,
            Self::Accepted(accepted) => Some(accepted.task_id),
        }
    }
}

impl Waited<VmView> {
    #[must_use]
    pub fn vm_id(&self) -> VmId {
        match self {
            Self::Done(vm) => vm.id,
            Self::Accepted(accepted) => accepted.vm_id,
        }
    }
}

/// Filters of `GET /vms`. Empty: every VM that is not deleted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmQuery {
    /// State names; several are an "or".
    pub states: Vec<String>,
    pub name: Option<String>,
    pub driver: Option<String>,
    /// All of these.
    pub labels: Vec<(String, String)>,
    pub page: PageQuery,
}

/// Filters of `GET /tasks`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskQuery {
    /// State names; several are an "or".
    pub states: Vec<String>,
    /// Such as `vm:execute`.
    pub kind: Option<String>,
    /// An id or a name.
    pub vm: Option<String>,
    pub page: PageQuery,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageQuery {
    pub limit: Option<u32>,
    pub cursor: Option<String>,
}

/// In every method `vm` is an id or a name.
impl Client {
    /// `base` is a URL such as `http://127.0.0.1:8080`, with or without a trailing slash.
    pub fn new(base: &str, key: Option<&str>) -> Result<Self, ClientError> {
        Self::trusting(base, key, &Trust::System)
    }

    /// As [`Client::new`], for a server that this machine need not trust by itself.
    pub fn trusting(base: &str, key: Option<&str>, trust: &Trust) -> Result<Self, ClientError> {
        http::connect(base, key, trust)
    }

    /// The server's URL, without a trailing slash.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Also `Ok` where the server says that it is unavailable.
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.get_health().await
    }

    pub async fn create_vm(
        &self,
        request: &CreateVm,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        self.submit(reqwest::Method::POST, "/vms", Some(request), options).await
    }

    pub async fn vms(&self, query: &VmQuery) -> Result<Page<VmView>, ClientError> {
        let mut q = Query::default();
        q.all("state", &query.states).opt("name", query.name.as_deref());
        q.opt("driver", query.driver.as_deref()).page(&query.page);
        for (key, value) in &query.labels {
            q.add("label", format!("{key}={value}"));
        }
        self.get("/vms", &q).await
    }

    pub async fn vm(&self, vm: &str) -> Result<VmView, ClientError> {
        self.get(&format!("/vms/{}", segment(vm)), &Query::default()).await
    }

    pub async fn stop_vm(
        &self,
        vm: &str,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        self.act(vm, "stop", options).await
    }

    pub async fn start_vm(
        &self,
        vm: &str,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        self.act(vm, "start", options).await
    }

    pub async fn pause_vm(
        &self,
        vm: &str,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        self.act(vm, "pause", options).await
    }

    pub async fn resume_vm(
        &self,
        vm: &str,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        self.act(vm, "resume", options).await
    }

    pub async fn delete_vm(
        &self,
        vm: &str,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        let path = format!("/vms/{}", segment(vm));
        self.submit(reqwest::Method::DELETE, &path, None::<&()>, options).await
    }

    async fn act(
        &self,
        vm: &str,
        verb: &str,
        options: &CallOptions,
    ) -> Result<Waited<VmView>, ClientError> {
        let path = format!("/vms/{}/{verb}", segment(vm));
        self.submit(reqwest::Method::POST, &path, None::<&()>, options).await
    }

    /// With a wait: the execution, however it ended, where it ended in time.
    pub async fn execute(
        &self,
        vm: &str,
        request: &ExecuteRequest,
        options: &CallOptions,
    ) -> Result<Waited<ExecutionView>, ClientError> {
        let path = format!("/vms/{}/execute", segment(vm));
        self.submit(reqwest::Method::POST, &path, Some(request), options).await
    }

    /// Runs a command and follows its output. The command goes on if the [`Follow`] is dropped.
    pub async fn execute_stream(
        &self,
        vm: &str,
        request: &ExecuteRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Follow, ClientError> {
        follow::open(self, vm, request, idempotency_key).await
    }

    /// Newest first, without output.
    pub async fn executions(
        &self,
        vm: &str,
        page: &PageQuery,
    ) -> Result<Page<ExecutionView>, ClientError> {
        let mut q = Query::default();
        q.page(page);
        self.get(&format!("/vms/{}/executions", segment(vm)), &q).await
    }

    pub async fn execution(&self, id: ExecutionId) -> Result<ExecutionView, ClientError> {
        self.get(&format!("/executions/{id}"), &Query::default()).await
    }

    /// The bytes that were kept of a stream.
    pub async fn execution_output(
        &self,
        id: ExecutionId,
        stream: OutputStream,
    ) -> Result<Bytes, ClientError> {
        let mut q = Query::default();
        q.add(
            "stream",
            match stream {
                OutputStream::Stdout => "stdout",
                OutputStream::Stderr => "stderr",
            },
        );
        self.get_bytes(&format!("/executions/{id}/output"), &q).await
    }

    pub async fn tasks(&self, query: &TaskQuery) -> Result<Page<TaskView>, ClientError> {
        let mut q = Query::default();
        q.all("status", &query.states).opt("kind", query.kind.as_deref());
        q.opt("vm", query.vm.as_deref()).page(&query.page);
        self.get("/tasks", &q).await
    }

    /// With a wait: as it is at its end, or when the time is over.
    pub async fn task(&self, id: TaskId, wait: Option<Duration>) -> Result<TaskView, ClientError> {
        let mut q = Query::default();
        q.opt("wait", wait.map(format_wait).as_deref());
        self.get(&format!("/tasks/{id}"), &q).await
    }

    /// Asks that a task end; the answer is the task as it is then.
    pub async fn cancel_task(
        &self,
        id: TaskId,
        wait: Option<Duration>,
    ) -> Result<TaskView, ClientError> {
        let mut q = Query::default();
        q.opt("wait", wait.map(format_wait).as_deref());
        self.post(&format!("/tasks/{id}/cancel"), &q, None::<&()>).await
    }

    /// Opens an interactive execution, with or without a terminal. The command ends when both
    /// halves are dropped.
    pub async fn terminal(
        &self,
        vm: &str,
        start: &crate::TerminalStart,
    ) -> Result<(TerminalInput, TerminalOutput), ClientError> {
        terminal::open(self, vm, start).await
    }
}
