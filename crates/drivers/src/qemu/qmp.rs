//! QMP over one kept Unix socket: requests with ids, events, bounded reads.
//!
//! The VMM is trusted less than the worker: lines have a limit, and whatever is not understood is
//! ignored or ends the connection.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{oneshot, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use crate::DriverError;

/// A console's 64 KiB, each byte of which may be written as `\u0000`, and some.
const LINE_BYTES_MAX: usize = 512 * 1024;

/// What the machine said of its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GuestEnd {
    /// A shutdown or reset that the guest asked for.
    Shutdown,
    /// The guest's kernel told a pvpanic device.
    Panicked,
}

/// Where a migration is, of those places that are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Migration {
    /// Begun; which pages there are to send is not known yet.
    Setup,
    /// On its way.
    Active,
    /// The guest stands still, and its disks are still ours.
    PreSwitchover,
    Completed,
    /// Failed or cancelled.
    Failed,
}

/// How a job on a disk ended; `Err` has QEMU's reason.
pub(super) type JobEnd = Result<(), String>;

type Answer = Result<Value, String>;

#[derive(Debug, Default)]
struct Shared {
    /// Requests without an answer. `None` once the connection is gone.
    pending: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
    end: watch::Sender<Option<GuestEnd>>,
    migration: watch::Sender<Option<Migration>>,
    job: watch::Sender<Option<JobEnd>>,
    stops: Mutex<Stops>,
}

/// How long the guest stood still.
#[derive(Debug, Default)]
struct Stops {
    /// `None` while it runs.
    since: Option<Instant>,
    before: Duration,
}

/// A connection, past its greeting.
#[derive(Debug)]
pub(super) struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    next_id: AtomicU64,
    shared: Arc<Shared>,
    _reader: AbortOnDropHandle<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken(source: io::Error) -> DriverError {
    DriverError::Io { action: "speak to QEMU".to_owned(), source }
}

impl Qmp {
    /// Connects, reads the greeting and switches commands on. The caller bounds it.
    pub(super) async fn connect(path: &Path) -> Result<Self, DriverError> {
        let stream = UnixStream::connect(path).await.map_err(broken)?;
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = read_line(&mut reader).await.map_err(broken)?;
        if greeting.is_none_or(|line| line.get("QMP").is_none()) {
            return Err(broken(io::Error::other("it gave no greeting")));
        }
        let shared =
            Arc::new(Shared { pending: Mutex::new(Some(HashMap::new())), ..Shared::default() });
        let reading = tokio::spawn(read(reader, Arc::clone(&shared)));
        let qmp = Self {
            writer: tokio::sync::Mutex::new(writer),
            next_id: AtomicU64::new(1),
            shared,
            _reader: AbortOnDropHandle::new(reading),
        };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// One command and its answer. A dropped call leaves the answer unread. The caller bounds it.
    pub(super) async fn execute(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, DriverError> {
        self.execute_with(command, arguments, None).await
    }

    /// Gives QEMU a descriptor under a name.
    pub(super) async fn give(&self, name: &str, fd: OwnedFd) -> Result<(), DriverError> {
        let arguments = json!({ "fdname": name });
        self.execute_with("getfd", arguments, Some(fd)).await.map(drop)
    }

    /// Gives QEMU a descriptor in a set of its own; returns the set's number.
    pub(super) async fn add_fd(&self, fd: OwnedFd) -> Result<i64, DriverError> {
        let answer = self.execute_with("add-fd", json!({}), Some(fd)).await?;
        let set = answer.get("fdset-id").and_then(Value::as_i64);
        set.ok_or_else(|| broken(io::Error::other("it does not say where a descriptor is")))
    }

    async fn execute_with(
        &self,
        command: &'static str,
        arguments: Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, DriverError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        let gone = || broken(io::Error::from(io::ErrorKind::ConnectionReset));
        lock(&self.shared.pending).as_mut().ok_or_else(gone)?.insert(id, sender);
        let pending = Pending { shared: &self.shared, id };
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        {
            // Half a line would garble the next one: the write is not given up with the caller,
            // as it fits the socket's buffer whole.
            let mut writer = self.writer.lock().await;
            let sent = match &fd {
                None => 0,
                Some(fd) => {
                    send_with(writer.as_ref(), line.as_bytes(), fd.as_fd()).await.map_err(broken)?
                }
            };
            writer.write_all(&line.as_bytes()[sent..]).await.map_err(broken)?;
        }
        let answer = receiver.await.map_err(|_| gone())?;
        drop(pending);
        answer.map_err(|detail| DriverError::Vmm { action: command.to_owned(), detail })
    }

    /// Where the migration is that was begun after [`Qmp::forget_migration`]; waits until it is at
    /// a place that `is_awaited`.
    pub(super) async fn migration(
        &self,
        is_awaited: impl Fn(Migration) -> bool,
    ) -> Result<Migration, DriverError> {
        let mut seen = self.shared.migration.subscribe();
        let awaited = seen.wait_for(|at| at.is_some_and(&is_awaited)).await.map(|at| *at);
        self.said(awaited.ok().flatten())
    }

    pub(super) fn forget_migration(&self) {
        self.shared.migration.send_replace(None);
    }

    /// Waits for the end of the job that was begun after [`Qmp::forget_job`].
    pub(super) async fn job_end(&self) -> Result<JobEnd, DriverError> {
        let mut seen = self.shared.job.subscribe();
        let ended = seen.wait_for(Option::is_some).await.map(|end| end.clone());
        self.said(ended.ok().flatten())
    }

    pub(super) fn forget_job(&self) {
        self.shared.job.send_replace(None);
    }

    #[expect(clippy::unused_self, reason = "the answer is this connection's")]
    fn said<T>(&self, event: Option<T>) -> Result<T, DriverError> {
        event.ok_or_else(|| broken(io::Error::from(io::ErrorKind::ConnectionReset)))
    }

    pub(super) fn forget_stops(&self) {
        *lock(&self.shared.stops) = Stops::default();
    }

    /// How long the guest stood still since [`Qmp::forget_stops`].
    pub(super) fn stood_still(&self) -> Duration {
        let stops = lock(&self.shared.stops);
        stops.before + stops.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Waits until the guest has ended. Pending for ever where the connection ends first: then the
    /// process's end is what counts.
    pub(super) async fn guest_end(&self) -> GuestEnd {
        let mut end = self.shared.end.subscribe();
        match end.wait_for(Option::is_some).await.map(|end| *end) {
            Ok(Some(end)) => end,
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// QEMU's word for what the machine does.
    pub(super) async fn status(&self) -> Result<String, DriverError> {
        let answer = self.execute("query-status", json!({})).await?;
        Ok(answer.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// Whether the machine is paused. Finds an end that came while nobody listened.
    pub(super) async fn is_paused(&self) -> Result<bool, DriverError> {
        let status = self.status().await?;
        let status = status.as_str();
        match status {
            "shutdown" => self.shared.note(GuestEnd::Shutdown),
            "guest-panicked" => self.shared.note(GuestEnd::Panicked),
            _ => {}
        }
        // The last: the host's disk was full when the guest wrote. It may go on once there is room.
        Ok(matches!(
            status,
            "paused" | "prelaunch" | "suspended" | "io-error" | "postmigrate" | "finish-migrate"
        ))
    }

    /// All that the guest's console holds.
    pub(super) async fn read_console(&self, bytes: u64) -> Result<String, DriverError> {
        let arguments = json!({ "device": "console", "size": bytes, "format": "utf8" });
        let answer = self.execute("ringbuf-read", arguments).await?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }
}

/// Forgets a request whose caller has gone.
struct Pending<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(pending) = lock(&self.shared.pending).as_mut() {
            pending.remove(&self.id);
        }
    }
}

impl Shared {
    /// The first word counts, but a panic is the better one.
    fn note(&self, end: GuestEnd) {
        self.end.send_if_modified(|known| {
            let is_news = known.is_none() || (end == GuestEnd::Panicked && *known != Some(end));
            if is_news {
                *known = Some(end);
            }
            is_news
        });
    }

    fn note_migration(&self, line: &Value) {
        let status = line.pointer("/data/status").and_then(Value::as_str);
        let at = match status {
            Some("completed") => Migration::Completed,
            Some("failed" | "cancelled") => Migration::Failed,
            Some("pre-switchover") => Migration::PreSwitchover,
            Some("setup") => Migration::Setup,
            Some(_) | None => Migration::Active,
        };
        self.migration.send_replace(Some(at));
    }

    fn note_job(&self, line: &Value) {
        let is_cancelled = line.get("event").and_then(Value::as_str) == Some("BLOCK_JOB_CANCELLED");
        let error = line.pointer("/data/error").and_then(Value::as_str);
        let end = match error {
            Some(error) => Err(error.chars().take(500).collect()),
            None if is_cancelled => Err("it was cancelled".to_owned()),
            None => Ok(()),
        };
        self.job.send_replace(Some(end));
    }

    fn take(&self, line: &Value) {
        if let Some(event) = line.get("event").and_then(Value::as_str) {
            let by_guest = line.pointer("/data/guest").and_then(Value::as_bool) == Some(true);
            match event {
                "GUEST_PANICKED" => self.note(GuestEnd::Panicked),
                "SHUTDOWN" if by_guest => self.note(GuestEnd::Shutdown),
                "MIGRATION" => self.note_migration(line),
                "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => self.note_job(line),
                "STOP" => lock(&self.stops).since = Some(Instant::now()),
                "RESUME" => {
                    let mut stops = lock(&self.stops);
                    let since = stops.since.take();
                    stops.before += since.map_or(Duration::ZERO, |since| since.elapsed());
                }
                _ => {}
            }
            return;
        }
        let Some(id) = line.get("id").and_then(Value::as_u64) else { return };
        let sender = lock(&self.pending).as_mut().and_then(|pending| pending.remove(&id));
        let Some(sender) = sender else { return };
        let answer = match (line.get("return"), line.pointer("/error/desc")) {
            (Some(value), _) => Ok(value.clone()),
            (None, Some(text)) => {
                Err(text.as_str().unwrap_or_default().chars().take(500).collect())
            }
            (None, None) => Err("an answer without a result".to_owned()),
        };
        // The caller may have gone.
        let _ = sender.send(answer);
    }
}

/// Sends bytes and a descriptor; returns how many bytes went.
async fn send_with(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    stream
        .async_io(Interest::WRITABLE, || {
            let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut with = SendAncillaryBuffer::new(&mut room);
            let fds = [fd];
            with.push(SendAncillaryMessage::ScmRights(&fds));
            let bytes = [io::IoSlice::new(bytes)];
            Ok(rustix::net::sendmsg(stream, &bytes, &mut with, SendFlags::NOSIGNAL)?)
        })
        .await
}

async fn read(mut reader: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    loop {
        match read_line(&mut reader).await {
            Ok(Some(line)) => shared.take(&line),
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "the connection to QEMU has ended");
                break;
            }
        }
    }
    // Callers that wait see their sender gone.
    lock(&shared.pending).take();
    shared.migration.send_replace(Some(Migration::Failed));
    shared.job.send_replace(Some(Err("QEMU has ended".to_owned())));
}

/// One line of JSON; `None` at the end.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Value>> {
    let mut line = Vec::new();
    loop {
        let available = reader.fill_buf().await?;
        if available.is_empty() {
            return Ok(None);
        }
        let end = available.iter().position(|b| *b == b'\n');
        let take = end.map_or(available.len(), |end| end + 1);
        line.extend_from_slice(&available[..take]);
        reader.consume(take);
        if line.len() > LINE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line past its limit"));
        }
        if end.is_some() {
            return serde_json::from_slice(&line).map(Some).map_err(io::Error::from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// A QEMU that greets, answers what it is told to, and says the events of the script.
    async fn peer(listener: UnixListener, script: &'static [&'static str]) {
        let (stream, _) = listener.accept().await.unwrap();
        let (reader, mut writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        writer.write_all(b"{\"QMP\": {}}\n").await.unwrap();
        let mut script = script.iter();
        while let Some(request) = read_line(&mut reader).await.unwrap() {
            if request["execute"] == "qmp_capabilities" {
                let answer = json!({ "return": {}, "id": request["id"] });
                writer.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
                continue;
            }
            let Some(line) = script.next() else { return };
            let line = line.replace("ID", &request["id"].to_string());
            writer.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        }
    }

    async fn connected(script: &'static [&'static str]) -> (tempfile::TempDir, Qmp) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q");
        tokio::spawn(peer(UnixListener::bind(&path).unwrap(), script));
        let qmp = Qmp::connect(&path).await.unwrap();
        (folder, qmp)
    }

    #[tokio::test]
    async fn answers_find_their_request_and_events_are_seen() {
        let script = &[
            "{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}, \"id\": ID}",
            "{\"return\": 1, \"id\": 999}\n{\"error\": {\"desc\": \"no\"}, \"id\": ID}",
            "{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true}}\n{\"return\": {}, \"id\": ID}",
        ];
        let (_folder, qmp) = connected(script).await;
        assert!(qmp.is_paused().await.unwrap());
        let error = qmp.execute("cont", json!({})).await.unwrap_err();
        assert!(error.to_string().contains("no"), "{error}");
        qmp.execute("stop", json!({})).await.unwrap();
        assert_eq!(qmp.guest_end().await, GuestEnd::Shutdown);
        // The peer hangs up: neither this request nor a later one waits for ever.
        assert!(qmp.execute("stop", json!({})).await.is_err());
        assert!(qmp.execute("stop", json!({})).await.is_err());
    }

    #[tokio::test]
    async fn a_line_without_end_is_cut_off() {
        let long = vec![b'x'; LINE_BYTES_MAX + 10];
        let mut reader = BufReader::new(long.as_slice());
        assert!(read_line(&mut reader).await.is_err());
    }
}
