//! Builds a layer in a machine of its own: no VM, no network, nothing of the host's but the
//! artefacts, and gone when the build is over.
//!
//! ```text
//!   create ─► boot ─► artefacts and script over the wire ─► script ─► end ─► copy of the output
//!      └────────────────────────── deleted, whatever happens ──────────────────────────┘
//! ```
//!
//! The machine is nobody's, as a spare one is: one that a killed worker leaves is removed by the
//! next before it does anything else. What the guest made is copied by its length, and never
//! looked into.

use std::{fmt, path::Path, sync::Arc, time::Duration};

use aether_drivers::{Driver, DriverError, MachineSpec, Start};
use aether_protocol::{
    AGENT_PORT, Cause, Configure, ErrorCode as GuestCode, ExitStatus, Exited, Run, Token,
    WriteFile,
    host::{self, ClientError, FileWriter, RunEvent},
};
use aether_tools::{BuildError, BuildJob, Builder, LogSink, SIZE_PREFIX};
use aether_types::{Egress, MachineId, NetworkPolicy};
use async_trait::async_trait;
use bytes::Bytes;
use tokio::{
    io::AsyncReadExt as _,
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tokio_util::task::TaskTracker;

use crate::{
    ImageSource,
    configure::{empty, new_token, unix_time_ns},
    fault,
};

const VCPUS: u32 = 2;
/// A compiler's check program links within it, and unpacked files go to the disk.
const MEMORY_MB: u32 = 1024;
/// Disks have one of few sizes: of each the first file system takes a moment to make.
const DISK_MB_MIN: u64 = 4096;
/// On the machine's disk itself, not over the root file system: an overlay is mounted on it.
const FOLDER: &str = "/run/aether/disk/build";
/// After the base image, the machine's disk and the layers.
const OUTPUT: &str = "/dev/vdd";
const HOSTNAME: &str = "builder";
/// Between the end of the script's time and the end of the machine.
const GRACE: Duration = Duration::from_secs(10);
const CHUNK_BYTES: usize = 256 * 1024;
/// What is kept of the last line, which says how large the layer is.
const LAST_LINE_BYTES: usize = 256;

/// A driver's machines as builders.
pub(crate) struct MachineBuilder {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) images: Arc<dyn ImageSource>,
    /// A build's boot is one of the worker's boots.
    pub(crate) boots: Arc<Semaphore>,
    pub(crate) start_limit: Duration,
    pub(crate) guest_limit: Duration,
    /// The worker waits for what ends a machine.
    pub(crate) tasks: TaskTracker,
}

impl fmt::Debug for MachineBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineBuilder").finish_non_exhaustive()
    }
}

#[async_trait]
impl Builder for MachineBuilder {
    async fn build(&self, job: BuildJob, log: LogSink) -> Result<(), BuildError> {
        let deadline = Instant::now() + job.time_limit;
        let spec = self.spec(&job).await?;
        let machine = Machine {
            id: spec.id,
            token: Token::from_hex(&spec.token).map_err(|_| unavailable("make a token"))?,
            driver: Arc::clone(&self.driver),
            limit: self.guest_limit,
            tasks: self.tasks.clone(),
        };
        let built = timeout_at(deadline, self.build_in(&machine, spec, &job, &log, deadline));
        let built = match built.await {
            Ok(built) => built,
            Err(_) => Err(BuildError::TimedOut { limit: job.time_limit }),
        };
        // Here and not only when it is dropped: whoever waits may take the next step.
        let removed = machine.driver.delete(machine.id).await;
        if let Err(error) = removed {
            tracing::error!(machine.id = %machine.id, error = fault::chain(&error),
                "remove a builder; the next start does");
        }
        built
    }
}

impl MachineBuilder {
    async fn spec(&self, job: &BuildJob) -> Result<MachineSpec, BuildError> {
        let (images, image) = (Arc::clone(&self.images), job.image.clone());
        let resolved = tokio::task::spawn_blocking(move || images.resolve(&image)).await;
        let resolved = resolved.map_err(|_| unavailable("read the image"))?;
        let boot = resolved.map_err(|fault| unavailable(&fault.message))?;
        let token = new_token().map_err(|failure| unavailable(&failure.fault.message))?;
        let disk_mb = (job.room_bytes >> 20).max(DISK_MB_MIN).next_power_of_two();
        let output_mb = job.output_bytes_max.div_ceil(1 << 20);
        let mb = |mb: u64| u32::try_from(mb).map_err(|_| unavailable("have so large a disk"));
        Ok(MachineSpec {
            id: MachineId::new(),
            vm: None,
            vcpus: VCPUS,
            memory_mb: MEMORY_MB,
            disk_mb: mb(disk_mb)?,
            boot,
            // It has no address either: nobody tells it one.
            network: NetworkPolicy { egress: Egress::None, allow: Vec::new() },
            token: token.to_hex(),
            disk_from: None,
            layers: Vec::new(),
            output_mb: Some(mb(output_mb)?),
        })
    }

    async fn build_in(
        &self,
        machine: &Machine,
        spec: MachineSpec,
        job: &BuildJob,
        log: &LogSink,
        deadline: Instant,
    ) -> Result<(), BuildError> {
        let id = spec.id;
        self.driver.create(spec).await.map_err(|e| of_driver(&e))?;
        {
            let place = self.boots.acquire().await;
            let started = self.driver.start(id, Start::Boot, self.start_limit).await;
            started.map_err(|e| of_driver(&e))?;
            drop(place);
        }
        machine.configure().await?;
        for artefact in &job.artefacts {
            let target = format!("{FOLDER}/artefacts/{}", artefact.name);
            machine.write_file(&artefact.path, &target).await?;
        }
        machine.write(&format!("{FOLDER}/build.sh"), job.script.as_bytes()).await?;
        let bytes = machine.run(job, log, deadline).await?;
        if bytes > job.output_bytes_max {
            return Err(BuildError::TooLarge { max_bytes: job.output_bytes_max });
        }
        self.driver.kill(id).await.map_err(|e| of_driver(&e))?;
        let taken = self.driver.take_output(id, &job.output, bytes).await;
        taken.map_err(|error| {
            if fault::is_disk_full(&error) {
                return BuildError::NoSpace { place: "the worker's disk".to_owned() };
            }
            of_driver(&error)
        })
    }
}

/// A builder's machine. Dropped before its end it is removed all the same.
struct Machine {
    id: MachineId,
    token: Token,
    driver: Arc<dyn Driver>,
    limit: Duration,
    tasks: TaskTracker,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let (driver, id) = (Arc::clone(&self.driver), self.id);
        // Deleting what is gone is harmless.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let delete = async move {
                if let Err(error) = driver.delete(id).await {
                    tracing::error!(machine.id = %id, error = fault::chain(&error),
                        "remove a builder; the next start does");
                }
            };
            self.tasks.spawn_on(delete, &runtime);
        }
    }
}

impl Machine {
    async fn connect(&self) -> Result<host::BoxStream, BuildError> {
        let connected = self.driver.connect(self.id, AGENT_PORT, self.limit).await;
        connected.map_err(|e| of_driver(&e))
    }

    async fn configure(&self) -> Result<(), BuildError> {
        let words = Configure {
            hostname: Some(HOSTNAME.to_owned()),
            unix_time_ns: Some(unix_time_ns()),
            ..empty().map_err(|failure| unavailable(&failure.fault.message))?
        };
        let stream = self.connect().await?;
        let configured = host::configure(stream, &self.token, words, self.limit).await;
        configured.map(drop).map_err(|e| of_guest(&e))
    }

    async fn open(&self, path: &str) -> Result<FileWriter, BuildError> {
        let request = WriteFile {
            path: path.to_owned(),
            mode: Some(0o644),
            create_parents: true,
            ..WriteFile::default()
        };
        let stream = self.connect().await?;
        let opened = host::write_file(stream, &self.token, request, self.limit).await;
        opened.map_err(|e| of_guest(&e))
    }

    async fn write(&self, path: &str, content: &[u8]) -> Result<(), BuildError> {
        let mut writer = self.open(path).await?;
        let content = Bytes::copy_from_slice(content);
        writer.write(content).await.map_err(|e| of_guest(&e))?;
        writer.finish().await.map(drop).map_err(|e| of_guest(&e))
    }

    /// The build's own limit bounds it.
    async fn write_file(&self, from: &Path, to: &str) -> Result<(), BuildError> {
        let failed = |error: std::io::Error| unavailable(&format!("{}: {error}", from.display()));
        let mut file = tokio::fs::File::open(from).await.map_err(failed)?;
        let mut writer = self.open(to).await?;
        loop {
            let mut chunk = bytes::BytesMut::with_capacity(CHUNK_BYTES);
            if file.read_buf(&mut chunk).await.map_err(failed)? == 0 {
                break;
            }
            writer.write(chunk.freeze()).await.map_err(|e| of_guest(&e))?;
        }
        writer.finish().await.map(drop).map_err(|e| of_guest(&e))
    }

    /// Runs the script to its end; how large the layer is by its own word.
    async fn run(
        &self,
        job: &BuildJob,
        log: &LogSink,
        deadline: Instant,
    ) -> Result<u64, BuildError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let request = Run {
            command: "sh".to_owned(),
            args: vec![format!("{FOLDER}/build.sh"), FOLDER.to_owned(), OUTPUT.to_owned()],
            timeout_ms: u64::try_from(left.saturating_sub(GRACE).as_millis()).unwrap_or(0).max(1),
            ..Run::default()
        };
        let stream = self.connect().await?;
        let mut run =
            host::run(stream, &self.token, request, self.limit).await.map_err(|e| of_guest(&e))?;
        let mut last = LastLine::default();
        let exited = loop {
            let event = tokio::select! {
                event = run.next() => event.map_err(|e| of_guest(&e))?,
                ended = self.driver.exited(self.id) => {
                    let how = ended.map(|reason| fault::from_exit(reason).message);
                    return Err(unavailable(&how.unwrap_or_else(|error| error.to_string())));
                }
            };
            match event {
                RunEvent::Output { data, .. } => {
                    last.hear(&data);
                    log.write(&data);
                }
                RunEvent::Exited(exited) => break exited,
            }
        };
        outcome(&exited, job)?;
        last.size().ok_or(BuildError::Script { status: 0 })
    }
}

fn outcome(exited: &Exited, job: &BuildJob) -> Result<(), BuildError> {
    if exited.cause() == Cause::TimedOut {
        return Err(BuildError::TimedOut { limit: job.time_limit });
    }
    match exited.status() {
        ExitStatus::Code(0) => Ok(()),
        ExitStatus::Code(status) => Err(BuildError::Script { status }),
        ExitStatus::Signal(signal) => Err(BuildError::Signal { signal }),
    }
}

/// The end of what the script printed, on whichever stream.
#[derive(Debug, Default)]
struct LastLine {
    line: Vec<u8>,
    is_ended: bool,
}

impl LastLine {
    fn hear(&mut self, data: &[u8]) {
        for &byte in data {
            if self.is_ended {
                self.line.clear();
                self.is_ended = false;
            }
            match byte {
                b'\n' => self.is_ended = true,
                byte if self.line.len() < LAST_LINE_BYTES => self.line.push(byte),
                _ => {}
            }
        }
    }

    fn size(&self) -> Option<u64> {
        let line = str::from_utf8(&self.line).ok()?;
        line.trim_end().strip_prefix(SIZE_PREFIX)?.trim().parse().ok().filter(|bytes| *bytes > 0)
    }
}

fn unavailable(reason: &str) -> BuildError {
    BuildError::Unavailable { reason: reason.to_owned() }
}

fn of_driver(error: &DriverError) -> BuildError {
    tracing::warn!(error = fault::chain(error), "a builder's machine");
    if fault::is_disk_full(error) {
        return BuildError::NoSpace { place: "the worker's disk".to_owned() };
    }
    unavailable(&fault::from_driver(error).message)
}

fn of_guest(error: &ClientError) -> BuildError {
    tracing::warn!(error = fault::chain(error), "a builder's guest");
    if error.code() == Some(GuestCode::NoSpace) {
        return BuildError::NoSpace { place: "the builder's disk".to_owned() };
    }
    unavailable(&fault::from_client(error).message)
}

const EROFS_MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];

/// For machines that are none: a layer with nothing in it.
#[derive(Debug)]
pub(crate) struct SimulatedBuilder;

#[async_trait]
impl Builder for SimulatedBuilder {
    async fn build(&self, job: BuildJob, log: LogSink) -> Result<(), BuildError> {
        log.write(format!("{} {} is simulated\n", job.tool, job.version).as_bytes());
        let mut layer = vec![0; 4096];
        layer[1024..1028].copy_from_slice(&EROFS_MAGIC);
        // So that no two of them are the same.
        let name = format!("{} {}", job.tool, job.version);
        let length = name.len().min(1024);
        layer[..length].copy_from_slice(&name.as_bytes()[..length]);
        let written = tokio::fs::write(&job.output, layer).await;
        written.map_err(|error| unavailable(&error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_said_in_the_last_line() {
        let size = |parts: &[&[u8]]| {
            let mut last = LastLine::default();
            for part in parts {
                last.hear(part);
            }
            last.size()
        };
        assert_eq!(size(&[b"a\n::size 4096\n"]), Some(4096));
        assert_eq!(size(&[b"a\n::si", b"ze 40", b"96"]), Some(4096));
        assert_eq!(size(&[b"::size 4096\nmore\n"]), None);
        assert_eq!(size(&[b"::size 0\n"]), None);
        assert_eq!(size(&[b"::size -1\n"]), None);
        assert_eq!(size(&[&vec![b'x'; 100_000], b"\n::size 8192\n"]), Some(8192));
        assert_eq!(size(&[]), None);
    }
}
