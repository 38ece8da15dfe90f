//! Every bound of the wire in one place, each with its reason.
//!
//! A peer that passes one of these is refused or cut off; none of them is a tuning knob.

use std::time::Duration;

/// Longest frame body. Large enough for one `Run` with full argument and environment lists and for
/// one page of a listing; small enough that 256 hostile connections cannot exhaust a worker.
pub const FRAME_BYTES_MAX: usize = 1024 * 1024;

/// Longest frame that a peer may send before its token was accepted.
pub const HELLO_BYTES_MAX: usize = 4 * 1024;

/// Longest payload in one data, output or stdin frame. It is the size of a Linux pipe, so that one
/// read of a full pipe makes one frame.
pub const DATA_BYTES_MAX: usize = 64 * 1024;

/// Command and arguments together, with one byte for each terminator. It is the kernel's limit on a
/// single argument, and far below its limit on all of them.
pub const ARGS_BYTES_MAX: usize = 128 * 1024;

/// Environment of one run, names and values with two bytes of overhead each.
pub const ENV_BYTES_MAX: usize = 128 * 1024;

/// Linux `PATH_MAX`.
pub const PATH_BYTES_MAX: usize = 4096;

/// Linux `NAME_MAX`.
pub const FILE_NAME_BYTES_MAX: usize = 255;

/// Longest name of a user, as `useradd` has it, with room for `uid:gid`.
pub const USER_BYTES_MAX: usize = 64;

/// Longest run id; a UUID has 36 characters.
pub const RUN_ID_BYTES_MAX: usize = 128;

/// Longest text of an error that a peer keeps.
pub const MESSAGE_BYTES_MAX: usize = 4096;

/// Warnings of one `Configured` that a host keeps: one for each file and each interface, with room.
pub const WARNINGS_MAX: usize = 64;

/// Longest boot id or version that a peer accepts.
pub const SHORT_TEXT_BYTES_MAX: usize = 128;

/// Runs alive in one guest at once: four times what must work on a guest of 128 MiB.
pub const RUNS_MAX: usize = 256;

/// Connections to one guest at once: every run attached, and as many file sessions.
pub const CONNECTIONS_MAX: usize = 512;

/// Output kept of each stream of a detached run. Two streams of 256 runs stay within 128 MiB even
/// if all of them are full, and four full pipes fit in one.
pub const RETAINED_BYTES_MAX: usize = 256 * 1024;

/// Standard input that the guest holds for a command that does not read it.
pub const STDIN_WINDOW_BYTES: u32 = 256 * 1024;

/// Finished detached runs that are kept for a later attach.
pub const FINISHED_RUNS_MAX: usize = 128;

/// How long a finished detached run is kept for a later attach.
pub const FINISHED_RUN_TTL: Duration = Duration::from_mins(10);

/// Entries in one page of a listing. With names of 255 bytes this stays inside one frame, also if
/// every byte of a name grows to three in the readable form.
pub const LIST_ENTRIES_MAX: u32 = 512;

/// How long the guest waits for the first two frames of a connection.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Between `SIGTERM` and `SIGKILL` where a run names no time of its own.
pub const KILL_GRACE: Duration = Duration::from_secs(2);

/// How long output is still drained after the command's own process has ended, where a descendant
/// keeps the pipe open.
pub const DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// Entropy in one `Configure`: the kernel's generator takes 32 bytes, more adds nothing.
pub const ENTROPY_BYTES_MAX: usize = 512;

/// Tool layers of one guest: 32 that a VM may ask for, over 32 of its template.
pub const LAYERS_MAX: usize = 64;

/// Longest name of a tool layer in a message.
pub const LAYER_NAME_BYTES_MAX: usize = 128;

/// Tool layers begin at multiples of this on their device.
pub const LAYER_ALIGN_BYTES: u64 = 1024 * 1024;

/// Size of the device with the tool layers, whatever is on it.
pub const LAYERS_DEVICE_BYTES: u64 = 64 * 1024 * 1024 * 1024;

/// Interfaces, addresses of one interface, name servers, hosts entries: a guest has a handful.
pub const NETWORK_ITEMS_MAX: usize = 64;
