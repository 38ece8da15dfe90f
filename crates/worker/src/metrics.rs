//! What is counted of tasks and VMs. Names and labels are a promise: dashboards and alerts are made
//! of them. A label has few values, none of which a client chooses.

use std::time::Duration;

use aether_types::{ErrorCode, StartReport, Task, Timestamp};
use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

const ATTEMPTS: &str = "aether_task_attempts_total";
const WAIT: &str = "aether_task_wait_seconds";
const TASKS: &str = "aether_tasks_total";
const DURATION: &str = "aether_task_duration_seconds";
const START: &str = "aether_vm_start_seconds";
const VMS: &str = "aether_vms_running";
const ENDS: &str = "aether_vm_ends_total";

/// All of them.
pub const NAMES: &[&str] = &[ATTEMPTS, WAIT, TASKS, DURATION, START, VMS, ENDS];

/// Says what the worker's metrics mean. Once the program's recorder is there.
pub fn describe() {
    describe_counter!(ATTEMPTS, "Attempts at tasks that were begun, by the task's kind.");
    describe_histogram!(
        WAIT,
        Unit::Seconds,
        "From a task's acknowledgement to its first attempt, by kind."
    );
    describe_counter!(TASKS, "Tasks that have ended, by kind and end.");
    describe_histogram!(
        DURATION,
        Unit::Seconds,
        "From a task's acknowledgement to its end, by kind."
    );
    describe_histogram!(
        START,
        Unit::Seconds,
        "From the request to a VM that takes commands, by what it started from."
    );
    describe_gauge!(VMS, "VMs of this worker that have a guest, paused ones included.");
    describe_counter!(ENDS, "VMs that ended and were not to, by reason.");
}

pub(crate) fn begun(task: &Task) {
    counter!(ATTEMPTS, "kind" => task.kind.as_str()).increment(1);
    if task.attempts <= 1 {
        histogram!(WAIT, "kind" => task.kind.as_str()).record(since(task));
    }
}

pub(crate) fn ended(task: &Task) {
    let (kind, state) = (task.kind.as_str(), task.state.as_str());
    counter!(TASKS, "kind" => kind, "state" => state).increment(1);
    histogram!(DURATION, "kind" => kind).record(since(task));
}

pub(crate) fn started(report: &StartReport) {
    let took = Duration::from_micros(report.total_us);
    histogram!(START, "start" => report.kind.as_str()).record(took);
}

pub(crate) fn vms(count: usize) {
    #[expect(clippy::cast_precision_loss, reason = "a host has no 2^53 VMs")]
    gauge!(VMS).set(count as f64);
}

pub(crate) fn ended_by_itself(reason: ErrorCode) {
    counter!(ENDS, "reason" => reason.as_str()).increment(1);
}

/// By the wall's clock: the task may have been recorded by another process.
fn since(task: &Task) -> Duration {
    let ms = Timestamp::now().unix_ms().saturating_sub(task.created_at.unix_ms());
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}
