//! What the store refuses, and what goes wrong underneath it.

use aether_postgres::Trouble;
use aether_types::{ErrorCode, Task, TaskKind, Vm, project::Shortage};
use sqlx::{error::DatabaseError, sqlite::SqliteError};

/// Display texts name what was asked for and never repeat their source.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Of what was to be recorded: a VM; or a snapshot or a project, whose request says so to the
    /// client.
    #[error("the name `{name}` belongs to another VM")]
    NameTaken { name: String },
    #[error("no such VM")]
    VmNotFound,
    #[error("no such task")]
    TaskNotFound,
    #[error("no such worker")]
    WorkerNotFound,
    #[error("no such execution")]
    ExecutionNotFound,
    #[error("no such snapshot")]
    SnapshotNotFound,
    #[error("no such template")]
    TemplateNotFound,
    #[error("no such key")]
    KeyNotFound,
    #[error("no such project")]
    ProjectNotFound,
    #[error("{detail}")]
    ProjectInUse { detail: String },
    #[error("{0}")]
    QuotaExceeded(Shortage),
    #[error("the project has {max} keys, which are as many as there may be; revoke some")]
    TooManyKeys { max: u32 },
    /// `detail` is a whole sentence for the client.
    #[error("{detail}")]
    SnapshotNotReady { detail: String },
    #[error("{detail}")]
    TemplateNotReady { detail: String },
    /// `what` is counted, and `max` of it are allowed.
    #[error("there is no room for more: {max} {what} at once are the most that is configured")]
    TooManyVms { what: &'static str, max: u32 },
    /// `detail` is a whole sentence for the client.
    #[error("{detail}")]
    NoRoom { detail: String },
    /// The VM as it is. `action` completes "it cannot ...".
    #[error("VM `{}` is {}; it cannot {action}", vm.name, vm.state)]
    WrongState { vm: Box<Vm>, action: &'static str },
    /// Only creations, executions, snapshots and builds can be cancelled: the other requests have
    /// changed the VM's state already, and are short.
    #[error("a {} task cannot be cancelled", task.kind)]
    NotCancellable { task: Box<Task> },
    #[error("the task has ended")]
    TaskEnded { task: Box<Task> },
    /// A later attempt has begun, or the task has ended: what this attempt says does not count.
    #[error("a later attempt has begun or the task has ended")]
    Fenced,
    /// The command was handed to a guest of another boot; it is never started a second time.
    #[error("the command was handed to the guest before its last boot")]
    AlreadyStarted,
    #[error("the idempotency key came with another request before")]
    IdempotencyConflict,
    #[error("the cursor is not one that a page of this list ended with")]
    BadCursor,
    #[error("the store is busy")]
    Busy,
    /// The caller broke the contract: a defect, not a state of the world.
    #[error("a {kind} task cannot be recorded this way")]
    WrongKind { kind: TaskKind },
    /// The caller broke the contract: an attempt cannot end in a state that is no end.
    #[error("an attempt cannot end as pending or running")]
    NotAnEnd,
    /// What is stored cannot be read back.
    #[error("the stored {0} cannot be read")]
    Corrupt(&'static str),
    #[error("{context}")]
    Database {
        context: &'static str,
        #[source]
        source: sqlx::Error,
    },
    /// The database went away before this was done, so that nothing was.
    #[error("{context}: the database cannot be reached")]
    Unreachable {
        context: &'static str,
        #[source]
        source: sqlx::Error,
    },
    /// The database went away while this was being done. The same request with its idempotency key
    /// finds out; an attempt is ended by its lease.
    #[error("{context}: the database went away, and nobody knows whether it was done")]
    InDoubt {
        context: &'static str,
        #[source]
        source: Option<sqlx::Error>,
    },
    /// Others changed the same at the same time, again and again; this was undone.
    #[error("{context}: others changed the same at the same time")]
    Collided {
        context: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error("bring the store's tables up to date")]
    Migration(#[source] Box<sqlx::migrate::MigrateError>),
    /// The tables are not those that this program knows.
    #[error("the store's tables are not fit for this program")]
    Schema(#[source] Box<aether_postgres::MigrateError>),
}

impl StoreError {
    /// The code that a client sees.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NameTaken { .. } => ErrorCode::NameTaken,
            Self::VmNotFound => ErrorCode::VmNotFound,
            Self::TaskNotFound => ErrorCode::TaskNotFound,
            Self::WorkerNotFound => ErrorCode::WorkerNotFound,
            Self::ExecutionNotFound => ErrorCode::ExecutionNotFound,
            Self::SnapshotNotFound => ErrorCode::SnapshotNotFound,
            Self::TemplateNotFound => ErrorCode::TemplateNotFound,
            Self::KeyNotFound => ErrorCode::KeyNotFound,
            Self::ProjectNotFound => ErrorCode::ProjectNotFound,
            Self::ProjectInUse { .. } => ErrorCode::ProjectInUse,
            Self::QuotaExceeded(_) => ErrorCode::QuotaExceeded,
            Self::TooManyKeys { .. } => ErrorCode::TooManyKeys,
            Self::SnapshotNotReady { .. } | Self::TemplateNotReady { .. } => {
                ErrorCode::SnapshotStateConflict
            }
            Self::TooManyVms { .. } => ErrorCode::TooManyVms,
            Self::NoRoom { .. } => ErrorCode::InsufficientCapacity,
            Self::WrongState { .. } | Self::NotCancellable { .. } => ErrorCode::VmStateConflict,
            Self::TaskEnded { .. } => ErrorCode::TaskEnded,
            Self::IdempotencyConflict => ErrorCode::IdempotencyConflict,
            Self::AlreadyStarted => ErrorCode::ExecutionLost,
            Self::BadCursor => ErrorCode::InvalidRequest,
            Self::Busy
            | Self::Unreachable { .. }
            | Self::InDoubt { .. }
            | Self::Collided { .. } => ErrorCode::Unavailable,
            Self::Fenced
            | Self::WrongKind { .. }
            | Self::NotAnEnd
            | Self::Corrupt(_)
            | Self::Database { .. }
            | Self::Migration(_)
            | Self::Schema(_) => ErrorCode::Internal,
        }
    }

    /// The same call may succeed a moment later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Busy
            | Self::Unreachable { .. }
            | Self::InDoubt { .. }
            | Self::Collided { .. }
            | Self::Database { .. } => true,
            Self::NameTaken { .. }
            | Self::SnapshotNotFound
            | Self::TemplateNotFound
            | Self::KeyNotFound
            | Self::ProjectNotFound
            | Self::ProjectInUse { .. }
            | Self::QuotaExceeded(_)
            | Self::TooManyKeys { .. }
            | Self::SnapshotNotReady { .. }
            | Self::TemplateNotReady { .. }
            | Self::TooManyVms { .. }
            | Self::NoRoom { .. }
            | Self::VmNotFound
            | Self::TaskNotFound
            | Self::WorkerNotFound
            | Self::ExecutionNotFound
            | Self::WrongState { .. }
            | Self::NotCancellable { .. }
            | Self::TaskEnded { .. }
            | Self::Fenced
            | Self::AlreadyStarted
            | Self::IdempotencyConflict
            | Self::BadCursor
            | Self::WrongKind { .. }
            | Self::NotAnEnd
            | Self::Corrupt(_)
            | Self::Migration(_)
            | Self::Schema(_) => false,
        }
    }

    pub(crate) fn database(context: &'static str, source: sqlx::Error) -> Self {
        if is_busy_sqlite(&source) {
            return Self::Busy;
        }
        match aether_postgres::trouble(&source) {
            Trouble::Busy => Self::Busy,
            Trouble::Lost => Self::Unreachable { context, source },
            Trouble::Conflict => Self::Collided { context, source },
            Trouble::Other => Self::Database { context, source },
        }
    }

    pub(crate) fn schema(error: aether_postgres::MigrateError) -> Self {
        Self::Schema(Box::new(error))
    }
}

/// Adds what was being done to a database error.
pub(crate) trait Context<T> {
    fn context(self, context: &'static str) -> Result<T, StoreError>;
}

impl<T> Context<T> for Result<T, sqlx::Error> {
    fn context(self, context: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::database(context, source))
    }
}

/// SQLITE_BUSY (5) and SQLITE_LOCKED (6), with their extended forms.
fn is_busy_sqlite(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(e) = error else { return false };
    let code = e.try_downcast_ref::<SqliteError>().and_then(DatabaseError::code);
    code.and_then(|c| c.parse::<u32>().ok()).is_some_and(|c| matches!(c & 0xff, 5 | 6))
}

/// Whether a row was refused because its name belongs to another: SQLite names the columns,
/// PostgreSQL the index.
pub(crate) fn is_taken(error: &sqlx::Error, columns: &str, index: &str) -> bool {
    match error {
        sqlx::Error::Database(e) if e.is_unique_violation() => {
            e.constraint() == Some(index) || e.message().ends_with(columns)
        }
        _ => false,
    }
}
