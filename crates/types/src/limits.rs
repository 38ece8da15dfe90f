//! Every bound of the platform's requests, in one place, with its reason.

/// One processor at least.
pub const VCPUS_MIN: u32 = 1;
/// Firecracker's own bound.
pub const VCPUS_MAX: u32 = 32;
pub const VCPUS_DEFAULT: u32 = 1;

/// Debian's kernel and the agent do not boot in less.
pub const MEMORY_MB_MIN: u32 = 96;
/// 1 TiB; the host's own memory is the bound that users meet.
pub const MEMORY_MB_MAX: u32 = 1_048_576;
pub const MEMORY_MB_DEFAULT: u32 = 256;

/// Room for the file system's own tables and a little work.
pub const DISK_MB_MIN: u32 = 64;
/// 1 TiB.
pub const DISK_MB_MAX: u32 = 1_048_576;
pub const DISK_MB_DEFAULT: u32 = 2048;

/// A host name's label (RFC 1123), since the name is the guest's host name.
pub const VM_NAME_BYTES_MAX: usize = 63;
pub const IMAGE_NAME_BYTES_MAX: usize = 128;

/// Time to live of a VM: one second to one year.
pub const VM_TIMEOUT_S_MAX: u64 = 366 * 24 * 3600;

pub const LABELS_MAX: usize = 64;
pub const LABEL_KEY_BYTES_MAX: usize = 63;
pub const LABEL_VALUE_BYTES_MAX: usize = 255;

/// A worker's host name (the longest that DNS has) or zone.
pub const WORKER_NAME_BYTES_MAX: usize = 253;
/// Between two heartbeats of a worker: each is a write, and much longer would be no news.
pub const WORKER_HEARTBEAT_MS_MIN: u64 = 100;
pub const WORKER_HEARTBEAT_MS_MAX: u64 = 60_000;
/// Of a worker's lease, in heartbeats: two may be late and it is still there.
pub const WORKER_LEASE_HEARTBEATS_MIN: u32 = 3;
/// Its VMs have nobody for so long.
pub const WORKER_LEASE_MS_MAX: u64 = 600_000;

pub const ENV_VARS_MAX: usize = 1024;
/// Of all names and values together; the guest's protocol has the same bound.
pub const ENV_BYTES_MAX: usize = 128 * 1024;

pub const ALLOW_RULES_MAX: usize = 64;

/// Linux refuses a single argument or environment string of more.
pub const ARG_BYTES_MAX: usize = 128 * 1024 - 1;
/// Of the command and all arguments together.
pub const ARGS_BYTES_MAX: usize = 128 * 1024;
pub const ARGS_MAX: usize = 4096;
/// Linux's PATH_MAX less the terminating zero.
pub const PATH_BYTES_MAX: usize = 4095;
pub const USER_BYTES_MAX: usize = 64;
/// Standard input given in the request's body; more goes over the streaming form.
pub const STDIN_BYTES_MAX: usize = 1024 * 1024;

pub const EXECUTION_TIMEOUT_S_DEFAULT: u64 = 3600;
/// A week.
pub const EXECUTION_TIMEOUT_S_MAX: u64 = 7 * 24 * 3600;

/// Kept of each output stream with an execution: this much from its start ...
pub const OUTPUT_HEAD_BYTES: usize = 512 * 1024;
/// ... and this much from its end.
pub const OUTPUT_TAIL_BYTES: usize = 512 * 1024;

/// A JSON request's body.
pub const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// `?wait=`: a client, or a proxy between, gives up later than this.
pub const WAIT_S_MAX: u64 = 300;

pub const PAGE_LIMIT_DEFAULT: u32 = 50;
pub const PAGE_LIMIT_MAX: u32 = 500;

/// Attempts of a task when the infrastructure fails; a command that ran is never repeated.
pub const TASK_ATTEMPTS_MAX: u32 = 5;

/// Executions that run at once in one VM; the rest wait for a place.
pub const EXECUTIONS_PER_VM_MAX: usize = 64;

/// Clones of one fork.
pub const FORK_COUNT_MAX: u32 = 64;
pub const SNAPSHOT_NAME_BYTES_MAX: usize = 63;
pub const TEMPLATE_NAME_BYTES_MAX: usize = 63;
pub const TEMPLATE_TAG_BYTES_MAX: usize = 63;
pub const TEMPLATE_STEPS_MAX: usize = 100;
pub const TEMPLATE_FILES_MAX: usize = 100;
/// Of the contents of all files of a template together.
pub const TEMPLATE_FILES_BYTES_MAX: usize = 1024 * 1024;
pub const TEMPLATE_STEP_TIMEOUT_S_DEFAULT: u64 = 600;
/// A step is no longer than a build may be.
pub const TEMPLATE_STEP_TIMEOUT_S_MAX: u64 = 3600;
pub const TEMPLATE_READY_TIMEOUT_S_DEFAULT: u64 = 60;
/// Of a whole build; the VM in which it runs goes then.
pub const TEMPLATE_BUILD_TIMEOUT_S: u64 = 2 * 3600;
/// Kept of what the steps of a build say: the end.
pub const TEMPLATE_LOG_BYTES: usize = 64 * 1024;

/// Layers of one VM: tools asked for and the defaults together.
pub const TOOLS_MAX: usize = 32;
pub const TOOL_NAME_BYTES_MAX: usize = 63;
pub const TOOL_VERSION_BYTES_MAX: usize = 64;
/// From the first byte fetched to the layer's digest.
pub const TOOL_BUILD_TIMEOUT_S: u64 = 20 * 60;
/// Kept of what an installer says: the end.
pub const TOOL_LOG_BYTES: usize = 64 * 1024;

/// Of one line of a log; what is longer is cut, and the entry says by how much.
pub const LOG_LINE_BYTES_MAX: usize = 16 * 1024;
/// Of the text that lines are searched for.
pub const LOG_TEXT_BYTES_MAX: usize = 1024;
pub const LOG_QUERY_LIMIT_DEFAULT: u32 = 1000;
/// What Loki gives at once, unless it is configured otherwise.
pub const LOG_QUERY_LIMIT_MAX: u32 = 5000;
/// Of the lines of one answer together.
pub const LOG_QUERY_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Of the name of a key, which is for people alone.
pub const KEY_NAME_BYTES_MAX: usize = 63;
pub const PROJECT_NAME_BYTES_MAX: usize = 63;
/// More than there are scopes.
pub const KEY_SCOPES_MAX: usize = 64;
/// A minute: a shorter one is over before it is used.
pub const KEY_TTL_S_MIN: u64 = 60;
/// Ten years.
pub const KEY_TTL_S_MAX: u64 = 10 * 366 * 24 * 3600;
/// Keys of one project that are not revoked.
pub const KEYS_MAX: u32 = 1000;
/// Of the audit log: older entries go ...
pub const AUDIT_KEPT_DAYS: u32 = 365;
/// ... and the oldest, where there are more than this: some gigabytes.
pub const AUDIT_ROWS_MAX: u32 = 5_000_000;
/// Events of one batch that a follower reads.
pub const EVENTS_MAX: u32 = 500;
/// Of the history of events: older ones go ...
pub const EVENTS_KEPT_DAYS: u32 = 7;
/// ... and the oldest, where there are more than this: some hundred megabytes.
pub const EVENT_ROWS_MAX: u32 = 1_000_000;
/// Patterns that one follower may name.
pub const EVENT_PATTERNS_MAX: usize = 32;
/// A key that is revoked or past its time is shown this long, and then forgotten.
pub const KEY_KEPT_DAYS: u32 = 90;
