//! Every error that leaves the gateway: its status, its title and its text, in this file alone.
//!
//! A handler's error travels as an extension of the response; the edge adds the request's id and
//! writes the document. Details are for clients; what is internal goes to the log, once.

use std::{fmt::Write as _, sync::Arc};

use aether_api::{PROBLEM_MEDIA_TYPE, Problem};
use aether_logs::LogError;
use aether_protocol::{ErrorCode as GuestCode, host::ClientError};
use aether_store::StoreError;
use aether_types::{ErrorCode, Fault, Task, VmId, VmState};
use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

pub(crate) type ApiResult<T> = Result<T, ApiError>;

/// A refusal or a failure, before the request's id is added.
#[derive(Debug, Clone)]
pub(crate) struct ApiError(Box<Problem>);

/// A client that is told to come again should not come at once, nor wait long.
const RETRY_AFTER_S: u64 = 1;

impl ApiError {
    pub(crate) fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self(Box::new(Problem {
            kind: format!("urn:aetherium:problem:{code}"),
            title: title(code).into(),
            status: status(code).as_u16(),
            detail: detail.into(),
            instance: String::new(),
            code: code.as_str().into(),
            field: None,
            vm_state: None,
            task_id: None,
            vm_id: None,
            vm_ids: Vec::new(),
            quota: None,
            retry_after_s: status(code)
                .eq(&StatusCode::SERVICE_UNAVAILABLE)
                .then_some(RETRY_AFTER_S),
        }))
    }

    pub(crate) fn field(mut self, field: impl Into<String>) -> Self {
        self.0.field = Some(field.into());
        self
    }

    pub(crate) fn vm_state(mut self, state: VmState) -> Self {
        self.0.vm_state = Some(state);
        self
    }

    /// What is missing was named in the body, by this field: the path is right.
    pub(crate) fn in_body(mut self, field: &str) -> Self {
        if self.0.status == StatusCode::NOT_FOUND.as_u16() {
            self = self.status(StatusCode::UNPROCESSABLE_ENTITY);
        }
        self.field(field)
    }

    /// Of a fork: all VMs that it made.
    pub(crate) fn vm_ids(mut self, vms: Vec<VmId>) -> Self {
        self.0.vm_ids = vms;
        self
    }

    pub(crate) fn retry_after_s(mut self, seconds: u64) -> Self {
        self.0.retry_after_s = Some(seconds);
        self
    }

    pub(crate) fn status(mut self, status: StatusCode) -> Self {
        self.0.status = status.as_u16();
        self
    }

    /// From a text such as `vcpus: 0 is outside 1 to 32`, as the validators write it.
    pub(crate) fn invalid(text: String) -> Self {
        let field = text.split_once(": ").map(|(field, _)| field.to_owned());
        let error = Self::new(ErrorCode::InvalidRequest, text);
        match field {
            Some(field) => error.field(field),
            None => error,
        }
    }

    pub(crate) fn full() -> Self {
        Self::new(ErrorCode::Unavailable, "the server has as much in hand as it takes")
    }

    pub(crate) fn internal() -> Self {
        Self::new(ErrorCode::Internal, "the server failed; its log says more under this request id")
    }

    pub(crate) fn vm_not_found(vm: &str) -> Self {
        let shown: String = vm.chars().take(64).collect();
        Self::new(ErrorCode::VmNotFound, format!("there is no VM `{shown}`"))
    }

    /// A task that ended badly.
    pub(crate) fn from_task(task: &Task) -> Self {
        let fault = task.error.clone().unwrap_or_else(|| {
            Fault::new(ErrorCode::Internal, format!("the {} task {}", task.kind, task.state))
        });
        let mut error = Self::from(fault);
        error.0.task_id = Some(task.id);
        error.0.vm_id = task.vm_id;
        error
    }

    pub(crate) fn problem(&self) -> &Problem {
        &self.0
    }
}

impl From<Fault> for ApiError {
    fn from(fault: Fault) -> Self {
        Self::new(fault.code, fault.message)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let code = error.code();
        match &error {
            StoreError::WrongState { vm, .. } => {
                // Why it failed says more than that it did.
                let detail = match &vm.reason {
                    Some(reason) => format!("{error}: {reason}"),
                    None => error.to_string(),
                };
                Self::new(code, detail).vm_state(vm.state)
            }
            StoreError::NameTaken { .. } => Self::new(code, error.to_string()).field("name"),
            StoreError::QuotaExceeded(shortage) => {
                let mut error = Self::new(code, shortage.to_string());
                error.0.quota = Some(*shortage);
                error
            }
            StoreError::BadCursor => Self::new(code, error.to_string()).field("cursor"),
            StoreError::VmNotFound
            | StoreError::TaskNotFound
            | StoreError::WorkerNotFound
            | StoreError::ExecutionNotFound
            | StoreError::SnapshotNotFound
            | StoreError::TemplateNotFound
            | StoreError::KeyNotFound
            | StoreError::ProjectNotFound
            | StoreError::ProjectInUse { .. }
            | StoreError::TooManyKeys { .. }
            | StoreError::SnapshotNotReady { .. }
            | StoreError::TemplateNotReady { .. }
            | StoreError::TooManyVms { .. }
            | StoreError::NoRoom { .. }
            | StoreError::NotCancellable { .. }
            | StoreError::TaskEnded { .. }
            | StoreError::IdempotencyConflict => Self::new(code, error.to_string()),
            StoreError::Busy | StoreError::Collided { .. } => {
                Self::new(code, "the store is busy; try again")
            }
            StoreError::Unreachable { .. } => {
                tracing::error!(error = chain(&error), "the store cannot be reached");
                Self::new(code, "the store cannot be reached; try again")
            }
            StoreError::InDoubt { .. } => {
                tracing::error!(error = chain(&error), "the store's answer did not come");
                Self::new(
                    code,
                    "the store's answer did not come; ask again with the same Idempotency-Key",
                )
            }
            StoreError::Fenced
            | StoreError::AlreadyStarted
            | StoreError::WrongKind { .. }
            | StoreError::NotAnEnd
            | StoreError::Corrupt(_)
            | StoreError::Database { .. }
            | StoreError::Migration(_)
            | StoreError::Schema(_) => {
                tracing::error!(error = chain(&error), "the store failed");
                Self::internal()
            }
        }
    }
}

/// Of a file operation in a guest.
impl From<LogError> for ApiError {
    fn from(error: LogError) -> Self {
        match error.code() {
            ErrorCode::Internal => {
                tracing::error!(error = chain(&error), "logs");
                Self::internal()
            }
            // Texts for clients.
            code => Self::new(code, error.to_string()),
        }
    }
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        match &error {
            ClientError::Refused { code, message } | ClientError::Failed { code, message } => {
                Self::new(guest_code(*code), message.clone())
            }
            ClientError::Request(refusal) => {
                Self::new(guest_code(refusal.code()), refusal.to_string())
            }
            ClientError::Io { .. } | ClientError::Timeout { .. } | ClientError::Closed { .. } => {
                tracing::info!(error = chain(&error), "a guest does not answer");
                Self::new(ErrorCode::GuestUnreachable, "the guest does not answer on its channel")
            }
            ClientError::Protocol(_) => {
                tracing::warn!(error = chain(&error), "a guest broke the protocol");
                Self::new(ErrorCode::GuestProtocol, "the guest broke the protocol")
            }
        }
    }
}

fn guest_code(code: GuestCode) -> ErrorCode {
    match code {
        GuestCode::NotFound => ErrorCode::FileNotFound,
        GuestCode::PermissionDenied | GuestCode::ReadOnly => ErrorCode::FilePermissionDenied,
        GuestCode::IsADirectory
        | GuestCode::NotADirectory
        | GuestCode::Exists
        | GuestCode::NotEmpty
        | GuestCode::NotAFile => ErrorCode::FileConflict,
        GuestCode::NoSpace => ErrorCode::NoSpace,
        GuestCode::InvalidPath | GuestCode::InvalidArgument | GuestCode::TooLarge => {
            ErrorCode::InvalidRequest
        }
        GuestCode::TooManyConnections | GuestCode::TooManyRuns => ErrorCode::Unavailable,
        GuestCode::Unauthorized
        | GuestCode::UnsupportedGeneration
        | GuestCode::UnknownRequest
        | GuestCode::BadMessage => ErrorCode::GuestProtocol,
        GuestCode::NoSuchUser
        | GuestCode::NoSuchDirectory
        | GuestCode::RunExists
        | GuestCode::UnknownRun
        | GuestCode::RunActive
        | GuestCode::SpawnFailed
        | GuestCode::Replaced
        | GuestCode::Unspecified
        | GuestCode::Io
        | GuestCode::Internal => ErrorCode::GuestRefused,
    }
}

/// An error with everything under it, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}

pub(crate) fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest | ErrorCode::MalformedBody => StatusCode::BAD_REQUEST,
        ErrorCode::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        ErrorCode::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::RouteNotFound
        | ErrorCode::VmNotFound
        | ErrorCode::TaskNotFound
        | ErrorCode::WorkerNotFound
        | ErrorCode::QueueNotFound
        | ErrorCode::ExecutionNotFound
        | ErrorCode::SnapshotNotFound
        | ErrorCode::TemplateNotFound
        | ErrorCode::KeyNotFound
        | ErrorCode::ProjectNotFound
        | ErrorCode::ToolNotFound
        | ErrorCode::FileNotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::Forbidden | ErrorCode::QuotaExceeded | ErrorCode::FilePermissionDenied => {
            StatusCode::FORBIDDEN
        }
        // What is named in the body does not exist or cannot be had.
        ErrorCode::ImageNotFound
        | ErrorCode::InsufficientCapacity
        | ErrorCode::DriverUnavailable
        | ErrorCode::SnapshotIncompatible
        | ErrorCode::TemplateBuildFailed
        | ErrorCode::ToolVersionNotFound
        | ErrorCode::ToolBuildFailed
        | ErrorCode::GuestRefused => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::NameTaken
        | ErrorCode::VmStateConflict
        | ErrorCode::SnapshotStateConflict
        | ErrorCode::TaskEnded
        | ErrorCode::IdempotencyConflict
        | ErrorCode::TooManyKeys
        | ErrorCode::ProjectInUse
        | ErrorCode::VmStopped
        | ErrorCode::ClientGone
        | ErrorCode::Cancelled
        | ErrorCode::FileConflict => StatusCode::CONFLICT,
        ErrorCode::Unavailable | ErrorCode::TooManyVms | ErrorCode::WorkerUnreachable => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        ErrorCode::GuestPanic
        | ErrorCode::GuestShutdown
        | ErrorCode::GuestAgentLost
        | ErrorCode::VmmExited
        | ErrorCode::WorkerLost
        | ErrorCode::GuestUnreachable
        | ErrorCode::GuestProtocol => StatusCode::BAD_GATEWAY,
        ErrorCode::VmStartTimeout | ErrorCode::ExecutionTimeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::VmStartFailed
        | ErrorCode::SnapshotDamaged
        | ErrorCode::ExecutionLost
        | ErrorCode::AttemptsExhausted
        | ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn title(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::InvalidRequest => "The request is invalid",
        ErrorCode::MalformedBody => "The body is malformed",
        ErrorCode::UnsupportedMediaType => "The content type is not supported",
        ErrorCode::BodyTooLarge => "The body is too large",
        ErrorCode::Unauthorized => "A valid API key is needed",
        ErrorCode::RateLimited => "Too many requests",
        ErrorCode::Forbidden => "The key may not do this",
        ErrorCode::RouteNotFound => "There is no such path",
        ErrorCode::MethodNotAllowed => "The path does not take this method",
        ErrorCode::VmNotFound => "There is no such VM",
        ErrorCode::TaskNotFound => "There is no such task",
        ErrorCode::WorkerNotFound => "There is no such worker",
        ErrorCode::QueueNotFound => "There is no such queue",
        ErrorCode::ExecutionNotFound => "There is no such execution",
        ErrorCode::ImageNotFound => "There is no such image",
        ErrorCode::SnapshotNotFound => "There is no such snapshot",
        ErrorCode::TemplateNotFound => "There is no such template",
        ErrorCode::KeyNotFound => "There is no such key",
        ErrorCode::ProjectNotFound => "There is no such project",
        ErrorCode::ProjectInUse => "The project cannot be deleted now",
        ErrorCode::QuotaExceeded => "The project may not have so much",
        ErrorCode::TooManyKeys => "There are as many keys as there may be",
        ErrorCode::SnapshotStateConflict => {
            "The snapshot's or template's state does not allow this"
        }
        ErrorCode::SnapshotDamaged => "The snapshot is damaged",
        ErrorCode::SnapshotIncompatible => "The snapshot does not fit this host",
        ErrorCode::TemplateBuildFailed => "The template could not be built",
        ErrorCode::ToolNotFound => "There is no such tool",
        ErrorCode::ToolVersionNotFound => "The tool has no such version",
        ErrorCode::ToolBuildFailed => "The tool could not be built",
        ErrorCode::NameTaken => "The name is taken",
        ErrorCode::VmStateConflict => "The VM's state does not allow this",
        ErrorCode::TaskEnded => "The task has ended",
        ErrorCode::IdempotencyConflict => "The idempotency key was used for another request",
        ErrorCode::InsufficientCapacity => "The host cannot give this much",
        ErrorCode::TooManyVms => "There are as many VMs as there may be",
        ErrorCode::DriverUnavailable => "The driver is not available",
        ErrorCode::Unavailable => "The server cannot take this now",
        ErrorCode::VmStartFailed => "The VM could not be started",
        ErrorCode::VmStartTimeout => "The VM did not become ready in time",
        ErrorCode::GuestPanic => "The guest's kernel panicked",
        ErrorCode::GuestShutdown => "The guest ended by itself",
        ErrorCode::GuestAgentLost => "The agent in the guest died",
        ErrorCode::VmmExited => "The VM's process ended",
        ErrorCode::WorkerLost => "The worker that had the VM is lost",
        ErrorCode::WorkerUnreachable => "The worker that has the VM cannot be reached",
        ErrorCode::VmStopped => "The VM was stopped or deleted",
        ErrorCode::GuestUnreachable => "The guest does not answer",
        ErrorCode::GuestProtocol => "The guest broke the protocol",
        ErrorCode::GuestRefused => "The guest refused",
        ErrorCode::ExecutionTimeout => "The command ran past its time limit",
        ErrorCode::ExecutionLost => "The command was lost",
        ErrorCode::ClientGone => "The client went away",
        ErrorCode::Cancelled => "It was cancelled",
        ErrorCode::AttemptsExhausted => "All attempts failed",
        ErrorCode::FileNotFound => "There is no such file",
        ErrorCode::FilePermissionDenied => "The file may not be used this way",
        ErrorCode::FileConflict => "The file is not of the kind that is needed",
        ErrorCode::NoSpace => "The disk is full",
        ErrorCode::Internal => "The server failed",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}

/// The document where there is no response to carry it: on a WebSocket.
pub(crate) fn plain(error: &ApiError) -> Problem {
    error.0.as_ref().clone()
}

/// An error that a library answered with: a path that is not UTF-8, for one.
fn foreign(status: StatusCode) -> Option<Arc<ApiError>> {
    let error = if status.is_client_error() {
        ApiError::new(ErrorCode::InvalidRequest, "the request cannot be read").status(status)
    } else if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
        ApiError::internal()
    } else {
        // Health answers 503 with a document of its own.
        return None;
    };
    Some(Arc::new(error))
}

/// Writes the document of a response that carries an error, with the id of its request.
pub(crate) fn render(mut response: Response, request_id: &str) -> Response {
    let carried = response.extensions_mut().remove::<Arc<ApiError>>();
    let Some(error) = carried.or_else(|| foreign(response.status())) else { return response };
    let mut problem = error.problem().clone();
    request_id.clone_into(&mut problem.instance);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_MEDIA_TYPE));
    headers.remove(header::CONTENT_LENGTH);
    if let Some(seconds) = problem.retry_after_s {
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    if problem.status == StatusCode::UNAUTHORIZED.as_u16() {
        let scheme = HeaderValue::from_static("Bearer realm=\"aetherium\"");
        headers.insert(header::WWW_AUTHENTICATE, scheme);
    }
    // A struct of texts and numbers always has a JSON form.
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    *response.body_mut() = Body::from(body);
    response
}
