//! A container as what runs a machine.

use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aether_protocol::{AGENT_PORT, host::BoxStream};
use aether_types::{DriverKind, MachineId};
use async_trait::async_trait;
use rustix::fs::{Mode, OFlags};
use tokio::{net::UnixDatagram, sync::oneshot};
use tokio_util::task::TaskTracker;

use super::{
    channel,
    container::{self, Disk},
    engine::Engine,
    import, name_of, tools,
};
use crate::{
    Capabilities, DriverError, ExitReason,
    host::{Host, Record, file_error, make_folder, remove_file},
    journal::{Owner, Resource},
    machines::{Booted, Links, Place, Vmm},
    process::{self, Process, ProcessId},
};

pub(super) const ISOLATION: &str = "weak: a container, which shares the host's kernel; few \
                                    capabilities, no new privileges, seccomp";

pub(super) struct Docker {
    engine: Engine,
    version: String,
    /// One import at a time: others wait for it and find the image.
    importing: tokio::sync::Mutex<()>,
    /// The engine has said that its storage cannot bound a disk.
    disks_are_open: AtomicBool,
}

impl std::fmt::Debug for Docker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Docker").field("socket", &self.engine.socket).finish_non_exhaustive()
    }
}

/// The way to a container that runs.
pub(super) struct Control {
    name: String,
    id: MachineId,
    /// Who watches a container must not keep the host's directory from the next worker.
    host: Weak<Host>,
    work: TaskTracker,
    /// None where an earlier worker heard the hint.
    ready: Option<UnixDatagram>,
    last_words: Mutex<String>,
}

impl Control {
    fn new(name: String, place: &Place, ready: Option<UnixDatagram>) -> Self {
        let (id, host, work) = (place.id(), Arc::downgrade(&place.host), place.work.clone());
        Self { name, id, host, work, ready, last_words: Mutex::default() }
    }
}

impl Docker {
    pub(super) fn new(engine: Engine, version: String) -> Self {
        Self {
            engine,
            version,
            importing: tokio::sync::Mutex::default(),
            disks_are_open: AtomicBool::new(false),
        }
    }

    /// Makes the container, whose own layer is the machine's disk.
    async fn make_container(&self, host: &Host, record: &Record) -> Result<(), DriverError> {
        let id = record.spec.id;
        let name = name_of(id);
        let engine = self.engine.socket.clone();
        host.journal.intend(id, &Resource::Container { engine, name: name.clone() })?;
        self.engine.remove(&name).await?;
        let image = {
            let _one = self.importing.lock().await;
            import::ensure(&self.engine, &record.spec.boot.rootfs, &host.data_dir).await?
        };
        let body = |disk| container::body(host, record, &image, disk);
        if !self.disks_are_open.load(Ordering::Relaxed) {
            match self.engine.create(&name, body(Disk::Bounded)).await {
                Ok(()) => return Ok(()),
                // Whatever else is wrong is wrong without a bound, too.
                Err(error) => {
                    tracing::debug!(%error, "make a container with a bounded disk");
                    self.engine.remove(&name).await?;
                }
            }
        }
        self.engine.create(&name, body(Disk::Open)).await?;
        if !self.disks_are_open.swap(true, Ordering::Relaxed) {
            tracing::warn!("the engine's storage bounds no disks: a VM can fill the host's");
        }
        Ok(())
    }

    /// Starts the container in a task of its own: an engine that was asked to start one does so, also
    /// when nobody waits for it any more, and then it is to end.
    async fn launch(&self, place: &Place, name: &str) -> Result<Process, DriverError> {
        let (tell, told) = oneshot::channel();
        let (engine, host, id) = (self.engine.clone(), Arc::clone(&place.host), place.id());
        let name = name.to_owned();
        place.work.spawn(async move {
            let launched = start(&engine, &host, id, &name).await;
            if tell.send(launched).is_err()
                && let Err(error) = host.end_processes(Owner::Machine(id)).await
            {
                tracing::error!(vm.id = %id, %error, "cannot end a container that was given up");
            }
        });
        let gone = |_| DriverError::Io {
            action: "start a container".to_owned(),
            source: std::io::ErrorKind::BrokenPipe.into(),
        };
        told.await.map_err(gone)?
    }
}

/// Starts the container and records its process. One that was started and not recorded is ended by
/// the next worker as it opens.
async fn start(
    engine: &Engine,
    host: &Host,
    id: MachineId,
    name: &str,
) -> Result<Process, DriverError> {
    host.fault.hit("start process")?;
    engine.start(name).await?;
    host.fault.hit("start process: begun")?;
    let pid = engine.state(name).await?.pid.and_then(|pid| u32::try_from(pid).ok());
    let found = pid
        .filter(|pid| *pid != 0)
        .and_then(|pid| Some(ProcessId { pid, start_ticks: process::start_ticks(pid)? }));
    if let Some(process) = found {
        let ProcessId { pid, start_ticks } = process;
        let resource = Resource::Process { pid, start_ticks, what: "container".to_owned() };
        host.journal.intend(id, &resource)?;
        host.fault.hit("start process: journaled")?;
        if let Some(process) = Process::adopt(process)? {
            return Ok(process);
        }
    }
    Err(DriverError::ExitedDuringStart { detail: engine.last_words(name).await })
}

#[async_trait]
impl Vmm for Docker {
    type Control = Control;

    const KIND: DriverKind = DriverKind::Docker;
    const LINKS: Links = Links::Veth;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: DriverKind::Docker,
            accelerated: false,
            isolation: ISOLATION,
            version: self.version.clone(),
            snapshot_format: None,
        }
    }

    fn make_disk(&self, host: &Host, record: &Record) -> Result<(), DriverError> {
        if record.spec.disk_from.is_some() {
            return Err(DriverError::Unavailable(
                "the Docker driver makes no disks of snapshots and templates; use an image"
                    .to_owned(),
            ));
        }
        if record.spec.output_mb.is_some() {
            return Err(DriverError::Unavailable(
                "the Docker driver builds no tools; build them on a host with QEMU, or share its \
                 cache of layers"
                    .to_owned(),
            ));
        }
        write_agent(host, record)?;
        tools::prepare(host, record)?;
        // Engines want to see what they are to share.
        make_folder(&channel::folder(&host.directory(record.spec.id)), 0o700)?;
        // This thread is one that may block.
        tokio::runtime::Handle::current().block_on(self.make_container(host, record))
    }

    async fn boot(&self, place: &Place) -> Result<Booted<Control>, DriverError> {
        let name = name_of(place.id());
        tracing::warn!(vm.id = %place.id(), isolation = ISOLATION, "a VM that is a container starts");
        // Its end may be known to the kernel and not yet to the engine.
        self.engine.end(&name).await?;
        let machine = place.host.directory(place.id());
        let token = place.record.spec.token.clone();
        let at = place.clone();
        let work = move || {
            tools::put_together(&at.host, &at.record)?;
            channel::make(&machine, &token)
        };
        let made = place.blocking(work).await?;
        let process = self.launch(place, &name).await?;
        let namespace = namespace_of(process.pid())?;
        if !process.is_alive() {
            let detail = self.engine.last_words(&name).await;
            return Err(DriverError::ExitedDuringStart { detail });
        }
        place.host.network().plug(place.id(), namespace).await?;
        let control = Control::new(name, place, Some(made));
        Ok(Booted { process, control })
    }

    async fn ready(&self, _place: &Place, control: &Control) -> Result<(), DriverError> {
        match &control.ready {
            Some(ready) => channel::wait_ready(ready).await,
            None => Ok(()),
        }
    }

    async fn adopt(&self, place: &Place, _process: &Process) -> Result<Control, DriverError> {
        let name = name_of(place.id());
        // Says whether the engine still has it.
        self.engine.state(&name).await?;
        Ok(Control::new(name, place, None))
    }

    /// By the kernel's word, which comes also when the engine has ended; the engine is asked how.
    async fn watch(&self, control: &Control, process: &Process) -> ExitReason {
        process.ended().await;
        let words = self.engine.last_words(&control.name).await;
        *control.last_words.lock().unwrap_or_else(PoisonError::into_inner) = words;
        let ended = self.engine.ended(&control.name).await;
        // Nothing is in them any more.
        let id = control.id;
        if let Some(host) = control.host.upgrade() {
            let apart = control.work.spawn_blocking(move || tools::take_apart(&host, id));
            if let Err(error) = crate::finished(apart.await) {
                tracing::warn!(vm.id = %id, %error, "cannot unmount tools; the journal keeps them");
            }
        }
        match ended {
            Ok(Some(0)) => ExitReason::GuestShutdown,
            Ok(_) => ExitReason::VmmDied,
            Err(error) => {
                tracing::warn!(container = control.name, %error, "nobody says how it ended");
                ExitReason::VmmDied
            }
        }
    }

    async fn end(&self, control: &Control, process: &Process) -> Result<(), DriverError> {
        match self.engine.end(&control.name).await {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::warn!(container = control.name, %error, "end its process instead");
                process.kill()
            }
        }
    }

    /// The engine was asked for fewer.
    fn last_words(&self, control: &Control, _lines: usize) -> String {
        control.last_words.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn pause(&self, control: &Control) -> Result<(), DriverError> {
        if self.is_paused(control).await? {
            return Ok(());
        }
        self.engine.pause(&control.name).await
    }

    async fn resume(&self, control: &Control) -> Result<(), DriverError> {
        if !self.is_paused(control).await? {
            return Ok(());
        }
        self.engine.resume(&control.name).await
    }

    async fn is_paused(&self, control: &Control) -> Result<bool, DriverError> {
        Ok(self.engine.state(&control.name).await?.paused.unwrap_or(false))
    }

    async fn connect(
        &self,
        place: &Place,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError> {
        if port != AGENT_PORT {
            return Err(DriverError::ConnectRefused { port });
        }
        let folder = channel::folder(&place.host.directory(place.id()));
        let directory = process::open_directory(&folder)?;
        match tokio::time::timeout(limit, channel::connect(&directory)).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            // Not yet, or too many at once.
            Ok(Err(error)) if is_refusal(&error) => Err(DriverError::ConnectRefused { port }),
            Ok(Err(source)) => Err(DriverError::Io {
                action: format!("connect to port {port} of the guest"),
                source,
            }),
            Err(_) => Err(DriverError::ConnectTimeout { port, limit_ms: limit.as_millis() }),
        }
    }

    /// The folder that was shared is made anew with the next start.
    fn clean(&self, _host: &Host, _record: &Record) -> Result<(), DriverError> {
        Ok(())
    }
}

fn is_refusal(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock
    )
}

/// The network namespace of a process.
fn namespace_of(pid: u32) -> Result<OwnedFd, DriverError> {
    let path = format!("/proc/{pid}/ns/net");
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| file_error("open the network namespace", Path::new(&path), e.into()))
}

/// Takes the agent out of the image's initramfs.
fn write_agent(host: &Host, record: &Record) -> Result<(), DriverError> {
    let initrd = &record.spec.boot.initrd;
    let archive = fs::read(initrd).map_err(|e| file_error("read", initrd, e))?;
    let agent = aether_images::agent_in(&archive).ok_or_else(|| {
        DriverError::Unavailable(format!(
            "{} has no agent; build the image again with `aether image build`",
            initrd.display()
        ))
    })?;
    let path = container::agent_file(&host.directory(record.spec.id));
    remove_file(&path)?;
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o755)
        .open(&path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, agent))
        .map_err(|e| file_error("write", &path, e))
}
