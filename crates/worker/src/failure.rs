//! How an operation goes wrong, and what its callers need to know of that.

use aether_drivers::DriverError;
use aether_images::SnapshotError;
use aether_store::StoreError;
use aether_tools::ToolError;
use aether_types::{ErrorCode, Fault, MachineId, VmId};

use crate::{fault, guest::AskError};

/// How an operation went wrong.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) fault: Fault,
    /// Another attempt may do better.
    pub(crate) retryable: bool,
}

impl Failure {
    pub(crate) fn last(fault: Fault) -> Self {
        Self { fault, retryable: false }
    }

    pub(crate) fn again(fault: Fault) -> Self {
        Self { fault, retryable: true }
    }

    pub(crate) fn driver(error: &DriverError, vm: VmId) -> Self {
        tracing::warn!(vm.id = %vm, error = fault::chain(error), "driver");
        Self::of_driver(error)
    }

    /// Of a machine that is no VM's yet.
    pub(crate) fn machine(error: &DriverError, machine: MachineId) -> Self {
        tracing::debug!(machine.id = %machine, error = fault::chain(error), "driver");
        Self::of_driver(error)
    }

    fn of_driver(error: &DriverError) -> Self {
        let retryable = error.is_retryable() && !fault::is_disk_full(error);
        Self { fault: fault::from_driver(error), retryable }
    }

    pub(crate) fn ask(error: &AskError) -> Self {
        Self::again(error.fault())
    }

    pub(crate) fn store(error: &StoreError) -> Self {
        tracing::warn!(error = fault::chain(error), "store");
        let text = "the worker could not read its records; its log says why";
        Self { fault: Fault::new(ErrorCode::Internal, text), retryable: error.is_retryable() }
    }

    pub(crate) fn tool(error: &ToolError) -> Self {
        tracing::warn!(error = fault::chain(error), "tools");
        let retryable = matches!(error, ToolError::BuilderUnavailable { .. });
        Self { fault: error.to_fault(), retryable }
    }

    pub(crate) fn snapshot(error: &SnapshotError) -> Self {
        tracing::warn!(error = fault::chain(error), "snapshot store");
        Self::last(fault::from_snapshot(error))
    }
}

/// What a client is told of a defect.
pub(crate) fn internal(action: &str) -> Fault {
    Fault::new(ErrorCode::Internal, format!("the worker could not {action}; its log says why"))
}

/// Off the async threads. The work goes on when the future is dropped.
pub(crate) async fn blocking<T, F>(action: &str, work: F) -> Result<T, Failure>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.map_err(|_| Failure::last(internal(action)))
}
