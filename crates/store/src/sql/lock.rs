//! What a transaction locks, so that what it reads stays true until it commits. On SQLite there is
//! one writer and nothing to lock.
//!
//! The order below is the order in which transactions lock, so that no two of them wait for each
//! other; within rows: the VM, then its task, then what the task makes. One that cannot keep to it
//! is undone by the server as a deadlock, and repeated.

use aether_types::{ProjectId, SnapshotId, TaskId, TemplateId, VmId, WorkerId};

#[derive(Debug, Clone, Copy)]
pub(crate) enum Lock<'a> {
    /// Of everybody who asks with this idempotency key: the second finds the first's answer.
    Key(&'a str),
    /// The project, with the number of things that it has.
    Project(ProjectId),
    /// That the project stays; many may hold it.
    ProjectStays(ProjectId),
    /// Of everybody who records VMs or gives them a worker: what is counted stays true.
    Creation,
    /// The worker's registration, and whether it is there.
    Worker(WorkerId),
    /// That it stays as it is; many may hold it.
    WorkerStays(WorkerId),
    /// The VM, with all that happens to it.
    Vm(VmId),
    /// That the VM stays in its state; many may hold it.
    VmState(VmId),
    /// The task, and before it its VM.
    Task(TaskId),
    Snapshot(SnapshotId),
    Template(TemplateId),
    /// Of everybody who builds a template of this name, or makes one ready.
    TemplateName {
        project: ProjectId,
        name: &'a str,
        tag: &'a str,
    },
    /// That it stays what a VM may begin as; many may hold it.
    OriginSnapshot(SnapshotId),
    OriginTemplate(TemplateId),
    /// Of everybody who gives events their numbers.
    Events,
}
