//! Restores a guest: its memory is mapped from a sealed file that all clones share, what it writes
//! becomes its own, and only the state of its devices is loaded.

use std::{
    future::poll_fn,
    io::Write as _,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use aether_protocol::{AGENT_PORT, host::BoxStream};
use serde_json::json;
use tokio::{net::TcpStream, time::sleep};

use super::{
    Control, Qemu, Ready,
    command_line::Begin,
    ended_early, layers,
    qmp::Migration,
    snapshot::{MEMORY_FILE, STATE_FILE},
};
use crate::{
    DriverError, SnapshotFiles,
    host::{blocking, file_error},
    machines::{Booted, Phases, Place},
};

/// A restored guest answers within a few milliseconds, or its first packet was lost: the kernel
/// would send that again after a second. Each further attempt waits twice as long.
const ATTEMPT_GAP: Duration = Duration::from_millis(25);
const ATTEMPT_GAP_MAX: Duration = Duration::from_secs(1);
const ATTEMPT_LIMIT: Duration = Duration::from_secs(5);
/// Attempts at once.
const ATTEMPTS_MAX: usize = 4;

impl Qemu {
    pub(super) async fn restore_from(
        &self,
        place: &Place,
        from: &SnapshotFiles,
        phases: &mut Phases,
    ) -> Result<Booted<Control>, DriverError> {
        let (host, id) = (Arc::clone(&place.host), place.id());
        let file = |name| layers::state_file(&host, id, from, name);
        let memory = self.memories.get(&file(MEMORY_FILE)).await?;
        let state_path = file(STATE_FILE);
        let state = blocking(move || feed(&state_path)).await?;
        let memory = memory.try_clone().map_err(|source| DriverError::Io {
            action: "duplicate the memory's descriptor".to_owned(),
            source,
        })?;
        phases.end("files");
        let begin = Begin::Restore { memory: memory.as_raw_fd() };
        let uri = format!("fd:{}", state.as_raw_fd());
        let started = self.launch(place, begin, vec![memory, state]).await?;
        phases.end("process");
        let qmp = &started.qmp;
        let load = async {
            let events = json!({ "capability": "events", "state": true });
            let capabilities = json!({ "capabilities": [events] });
            qmp.execute("migrate-set-capabilities", capabilities).await?;
            qmp.forget_migration();
            qmp.execute("migrate-incoming", json!({ "uri": uri })).await?;
            let is_end = |at| matches!(at, Migration::Completed | Migration::Failed);
            Ok(qmp.migration(is_end).await? == Migration::Completed)
        };
        // A QEMU that cannot load ends.
        let loaded: Result<bool, DriverError> = tokio::select! {
            loaded = load => loaded,
            _ = started.process.ended() => Ok(false),
        };
        match loaded {
            Ok(true) => {}
            Err(error) if started.process.is_alive() => return Err(error),
            Ok(false) | Err(_) => return Err(ended_early(&started.log)),
        }
        host.fault.hit("restore: loaded")?;
        // One that was paused when the snapshot was taken comes up paused.
        qmp.execute("cont", json!({})).await?;
        phases.end("load");
        Ok(started.into_booted(Ready::Restored))
    }

    /// Connects to a restored guest, which gives no hint; then what only a start needs can go.
    pub(super) async fn ready_restored(&self, place: &Place) -> Result<BoxStream, DriverError> {
        let stream = reach(place).await?;
        layers::forget_state(&place.host, place.id())?;
        Ok(Box::new(stream))
    }
}

type Attempt = Pin<Box<dyn Future<Output = Result<TcpStream, DriverError>> + Send>>;

/// Connects by one of several attempts that overlap. The start bounds it.
async fn reach(place: &Place) -> Result<TcpStream, DriverError> {
    // Not tasks of their own: what is left of them must be gone when this is.
    let mut attempts: Vec<Attempt> = Vec::new();
    let mut gap = ATTEMPT_GAP;
    loop {
        if attempts.len() < ATTEMPTS_MAX {
            let (host, id) = (Arc::clone(&place.host), place.id());
            attempts.push(Box::pin(async move {
                host.network().dial(id, AGENT_PORT, ATTEMPT_LIMIT).await
            }));
        }
        tokio::select! {
            connected = first_of(&mut attempts) => return connected,
            () = sleep(gap) => {}
        }
        gap = (gap * 2).min(ATTEMPT_GAP_MAX);
    }
}

/// The first attempt that connects, or that fails for another reason than the guest's.
async fn first_of(attempts: &mut Vec<Attempt>) -> Result<TcpStream, DriverError> {
    poll_fn(|cx| {
        let mut at = 0;
        while let Some(attempt) = attempts.get_mut(at) {
            match attempt.as_mut().poll(cx) {
                Poll::Pending => at += 1,
                Poll::Ready(Err(
                    DriverError::ConnectTimeout { .. } | DriverError::ConnectRefused { .. },
                )) => drop(attempts.swap_remove(at)),
                Poll::Ready(answer) => return Poll::Ready(answer),
            }
        }
        Poll::Pending
    })
    .await
}

/// The devices' state, for QEMU to read to its end. Not as the file itself: later QEMUs want a
/// stream.
fn feed(path: &Path) -> Result<OwnedFd, DriverError> {
    let state = std::fs::read(path).map_err(|e| file_error("read", path, e))?;
    let failed = |source| DriverError::Io { action: "make a pipe".to_owned(), source };
    let (reader, mut writer) = std::io::pipe().map_err(failed)?;
    // More than a pipe may hold is given by a thread, which ends with its reader.
    let room = rustix::pipe::fcntl_setpipe_size(&writer, state.len())
        .or_else(|_| rustix::pipe::fcntl_getpipe_size(&writer))
        .map_err(|e| failed(e.into()))?;
    if state.len() <= room {
        writer.write_all(&state).map_err(|e| file_error("pass on", path, e))?;
    } else {
        std::thread::spawn(move || {
            if let Err(error) = writer.write_all(&state) {
                tracing::debug!(%error, "QEMU has not read all device state");
            }
        });
    }
    Ok(reader.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn device_state_of_any_size_is_fed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        for length in [0, 3, 100_000, 5_000_000] {
            let state: Vec<u8> = (0_u8..251).cycle().take(length).collect();
            std::fs::write(&path, &state).unwrap();
            let mut read = Vec::new();
            std::fs::File::from(feed(&path).unwrap()).read_to_end(&mut read).unwrap();
            assert!(read == state, "{length}");
        }
        assert!(feed(&folder.path().join("none")).is_err());
    }
}
