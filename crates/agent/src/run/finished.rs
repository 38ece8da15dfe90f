//! A detached run that has ended.

use aether_protocol::codec::DataHeader;
use aether_protocol::limits::DATA_BYTES_MAX;
use aether_protocol::{Exited, Started, Stream};

use super::ring::Ring;
use crate::registry::Attachment;
use crate::server::Agent;

/// What is kept of it.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(super) pid: u32,
    pub(super) stdout: Ring,
    pub(super) stderr: Ring,
    pub(super) exited: Exited,
}

/// Replays the end of both streams and how the run ended.
pub(crate) fn serve_finished(agent: &Agent, attachment: Attachment, finished: &Finished) {
    let Attachment { mut conn, generation, attach } = attachment;
    let offset = |ring: &Ring, asked: u64| asked.clamp(ring.start(), ring.end());
    let stdout_offset = offset(&finished.stdout, attach.stdout_offset);
    let stderr_offset = offset(&finished.stderr, attach.stderr_offset);
    conn.queue(agent.welcome(generation));
    conn.queue(Started { pid: finished.pid, stdout_offset, stderr_offset, stdin_window: 0 });
    let streams = [
        (Stream::Stdout, &finished.stdout, stdout_offset),
        (Stream::Stderr, &finished.stderr, stderr_offset),
    ];
    for (stream, ring, mut at) in streams {
        while at < ring.end() {
            let header = |length| DataHeader::output(stream, at, length);
            let fill =
                |space: &mut [_]| Ok::<_, std::convert::Infallible>(ring.copy_from(at, space));
            let Ok(length) = conn.queue_data(DATA_BYTES_MAX, header, fill);
            at += length as u64;
            if conn.flush_all().is_err() {
                return;
            }
        }
    }
    conn.queue(finished.exited.clone());
    conn.finish();
}
