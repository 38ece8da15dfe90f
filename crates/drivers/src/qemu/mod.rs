//! QEMU's `microvm` machine: virtio devices, no PCI, no firmware to speak of.
//!
//! With KVM where a probe VM really booted, else with TCG, which emulates every instruction and is
//! not an isolation boundary. The guest's channel is a private link ([`crate::network`]).
//!
//! A guest that ends, by itself or by a panic, leaves its QEMU stopped: `-no-shutdown`. The driver
//! reads the console out of QEMU's memory, says which it was, and lets QEMU go; if no worker runs,
//! the one that comes next does so. What is gone without that has died.

mod command_line;
mod layers;
mod memory;
mod probe;
mod qmp;
mod restore;
mod snapshot;
mod stream;
mod toolbox;
mod tsc;

use std::{
    fs::File,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aether_protocol::{AGENT_PORT, host::BoxStream};
use aether_types::{DriverKind, MachineId};
use async_trait::async_trait;
use serde_json::json;
use tokio::time::Instant;

pub(crate) use self::command_line::shows_panic;
use self::{
    command_line::{Accelerator, Begin, Inherited, Layer, Toolbox},
    layers::Home,
    memory::Memories,
    qmp::{GuestEnd, Qmp},
    snapshot::WriteTracking,
};
use crate::{
    BootSource, Capabilities, Driver, DriverError, ExitReason, GuestNetwork, Machine, MachineSpec,
    SnapshotFiles, SnapshotTaken,
    host::{Host, Record, blocking, file_error, remove_file},
    machines::{Booted, Links, Machines, Phases, Place, SnapshotWish, Vmm, WasBefore},
    network::ReadyListener,
    process::{self, LOG_BYTES, Launch, PageSize, Process},
};

const QMP_SOCKET: &str = "qmp.sock";
/// Between QEMU's last answer and its end.
const QUIT_LIMIT: Duration = Duration::from_secs(5);
/// A hint may be lost: then the guest is asked this often.
const ASK_INTERVAL: Duration = Duration::from_secs(2);
/// The agent waits no longer than [`aether_protocol::limits::HANDSHAKE_LIMIT`] for a token.
const FIRST_LIMIT: Duration = Duration::from_secs(3);
const CONSOLE_LINES_SHOWN: usize = 12;

/// What runs the instructions of guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QemuAcceleration {
    /// KVM if a probe VM boots, else TCG.
    #[default]
    Auto,
    /// KVM, or no driver.
    Kvm,
    /// Software emulation, whatever the host has.
    Tcg,
}

#[derive(Debug, Clone, Default)]
pub struct QemuConfig {
    /// `None`: `qemu-system-x86_64`, found in `PATH`.
    pub program: Option<PathBuf>,
    pub acceleration: QemuAcceleration,
    /// What the probe boots: that a host runs one kernel says nothing of another. Without it KVM
    /// is not used.
    pub probe: Option<BootSource>,
    /// `PATH`, for finding the program.
    pub search_path: Option<std::ffi::OsString>,
    /// Of this host's memory, for memories of snapshots that are kept ready to be restored. `None`:
    /// a quarter of what it has.
    pub memory_cache_bytes: Option<u64>,
}

/// VMs under QEMU.
pub struct QemuDriver(Arc<Machines<Qemu>>);

impl std::fmt::Debug for QemuDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("QemuDriver").field(&self.0.capabilities()).finish()
    }
}

impl QemuDriver {
    /// Finds QEMU, chooses its accelerator, and takes over the VMs that run.
    pub async fn open(host: Arc<Host>, config: QemuConfig) -> Result<Self, DriverError> {
        let search = config.search_path.as_deref();
        let program = process::find_program("qemu-system-x86_64", config.program, search)
            .ok_or_else(|| {
                DriverError::Unavailable(
                    "qemu-system-x86_64 is not installed; on Debian and Ubuntu: apt-get install \
                     qemu-system-x86"
                        .to_owned(),
                )
            })?;
        let version = probe::version(&program).await?;
        let accelerator = match config.acceleration {
            QemuAcceleration::Tcg => Accelerator::Tcg,
            wish => match probe::kvm(&host, &program, &version, config.probe.as_ref()).await {
                Ok(()) => Accelerator::Kvm,
                Err(reason) if wish == QemuAcceleration::Kvm => {
                    return Err(DriverError::Unavailable(format!("KVM cannot be used: {reason}")));
                }
                Err(reason) => {
                    tracing::warn!(%reason, "KVM cannot be used; VMs are emulated");
                    Accelerator::Tcg
                }
            },
        };
        let tsc_khz = match accelerator {
            Accelerator::Kvm => None,
            Accelerator::Tcg => crate::host::blocking(|| Ok(tsc::frequency_khz())).await?,
        };
        let format = format_of(&version, accelerator, tsc_khz);
        let memories = Memories::new(config.memory_cache_bytes);
        let tracking = WriteTracking::of(accelerator, &version);
        let qemu = Qemu { program, version, accelerator, tsc_khz, format, memories, tracking };
        Machines::open(host, qemu).await.map(Self)
    }
}

pub(crate) struct Qemu {
    program: PathBuf,
    version: String,
    accelerator: Accelerator,
    tsc_khz: Option<u64>,
    /// Of snapshots.
    format: String,
    memories: Memories,
    tracking: WriteTracking,
}

/// All that a guest's devices, processor and clock depend on, beside what its machine was given.
fn format_of(version: &str, accelerator: Accelerator, tsc_khz: Option<u64>) -> String {
    let layout = command_line::LAYOUT;
    let processor = match accelerator {
        Accelerator::Kvm => host_processor(),
        // The guest was told how fast its counter runs, which is this host's.
        Accelerator::Tcg => {
            let mhz = tsc_khz.map_or(0, |khz| (khz + 5000) / 10_000 * 10);
            format!("{} at {mhz} MHz", command_line::TCG_PROCESSOR)
        }
    };
    let name = accelerator.name();
    format!("QEMU {version}, {name}, {processor}, layout {layout}")
}

/// The processor that a guest sees whole.
fn host_processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
    };
    let flags = line("flags").or_else(|| line("Features")).unwrap_or_default();
    let model = line("model name").unwrap_or_else(|| "unknown processor".to_owned());
    format!("{model} ({:08x})", crc32fast::hash(flags.as_bytes()))
}

pub(crate) struct Control {
    qmp: Qmp,
    /// QEMU's own words. `None`: an earlier worker's, and unreadable.
    log: Option<File>,
    /// The guest's console, as it was at the guest's end.
    console: Mutex<String>,
    ready: tokio::sync::Mutex<Ready>,
    /// The connection that showed that a restored guest is there, and when. To make another would
    /// cost the guest as much again.
    first: Mutex<Option<(BoxStream, Instant)>>,
}

/// How a guest is known to be ready.
enum Ready {
    /// It says so once it has booted.
    Hint(ReadyListener),
    /// It went on where it was.
    Restored,
    /// It was seen to be ready before.
    Seen,
}

/// A QEMU that answers.
struct Started {
    process: Process,
    qmp: Qmp,
    log: File,
}

impl Started {
    fn into_booted(self, ready: Ready) -> Booted<Control> {
        let control = Control {
            qmp: self.qmp,
            log: Some(self.log),
            console: Mutex::default(),
            ready: tokio::sync::Mutex::new(ready),
            first: Mutex::default(),
        };
        Booted { process: self.process, control }
    }
}

#[async_trait]
impl Vmm for Qemu {
    type Control = Control;

    const KIND: DriverKind = DriverKind::Qemu;
    const LINKS: Links = Links::TapAndChannel;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: DriverKind::Qemu,
            accelerated: self.accelerator == Accelerator::Kvm,
            isolation: match self.accelerator {
                Accelerator::Kvm => {
                    "hardware virtualization (KVM); QEMU in a seccomp sandbox, a user of its own \
                     for each VM"
                }
                Accelerator::Tcg => {
                    "weak: TCG software emulation is not an isolation boundary; QEMU in a seccomp \
                     sandbox, a user of its own for each VM"
                }
            },
            version: self.version.clone(),
            snapshot_format: Some(self.format.clone()),
        }
    }

    fn make_disk(&self, host: &Host, record: &Record) -> Result<(), DriverError> {
        layers::make(host, record)
    }

    async fn boot(&self, place: &Place) -> Result<Booted<Control>, DriverError> {
        let ready = place.host.network().ready_listener(place.id()).await?;
        let kernel = command_line::kernel_options(self.accelerator, self.tsc_khz);
        let config = command_line::config(&kernel, &place.record.spec.token)?;
        let boot = &place.record.spec.boot;
        let files = vec![
            process::open_for(&boot.kernel)?,
            process::open_for(&boot.initrd)?,
            process::secret_file(&config)?,
        ];
        let begin = match &files[..] {
            [kernel, initrd, config] => Begin::Boot {
                kernel: kernel.as_raw_fd(),
                initrd: initrd.as_raw_fd(),
                config: config.as_raw_fd(),
            },
            _ => unreachable!("three files were opened"),
        };
        // What only a restore needs is not needed any more.
        layers::forget_state(&place.host, place.id())?;
        Ok(self.launch(place, begin, files).await?.into_booted(Ready::Hint(ready)))
    }

    async fn restore(
        &self,
        place: &Place,
        from: &SnapshotFiles,
        phases: &mut Phases,
    ) -> Result<Booted<Control>, DriverError> {
        self.restore_from(place, from, phases).await
    }

    async fn snapshot(
        &self,
        place: &Place,
        control: &Control,
        into: &Path,
        wish: SnapshotWish,
    ) -> Result<SnapshotTaken, DriverError> {
        self.take_snapshot(place, control, into, wish).await
    }

    async fn settle(
        &self,
        place: &Place,
        control: &Control,
        was: WasBefore,
    ) -> Result<(), DriverError> {
        snapshot::settle(place, &control.qmp, was).await
    }

    async fn ready(&self, place: &Place, control: &Control) -> Result<(), DriverError> {
        let ready = std::mem::replace(&mut *control.ready.lock().await, Ready::Seen);
        match ready {
            Ready::Hint(mut listener) => self.hinted(place, &mut listener).await?,
            Ready::Restored => {
                let stream = self.ready_restored(place).await?;
                *lock(&control.first) = Some((stream, Instant::now()));
                return Ok(());
            }
            Ready::Seen => {}
        }
        // The hint may be forged or of an earlier moment: what counts is a connection.
        loop {
            match self.connect(place, AGENT_PORT, ASK_INTERVAL).await {
                Ok(_) => return Ok(()),
                Err(DriverError::ConnectTimeout { .. } | DriverError::ConnectRefused { .. }) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn adopt(&self, place: &Place, process: &Process) -> Result<Control, DriverError> {
        let directory = process::open_directory(&place.host.directory(place.id()))?;
        let qmp = Qmp::connect(&process::short_path(directory.as_fd(), QMP_SOCKET)).await?;
        // An end that came while no worker ran is found here.
        qmp.is_paused().await?;
        if qmp.status().await? == "inmigrate" {
            return Err(DriverError::Vmm {
                action: "be adopted".to_owned(),
                detail: "its guest was never restored".to_owned(),
            });
        }
        Ok(Control {
            qmp,
            log: process::log_of(process.pid()),
            console: Mutex::default(),
            ready: tokio::sync::Mutex::new(Ready::Seen),
            first: Mutex::default(),
        })
    }

    async fn watch(&self, control: &Control, process: &Process) -> ExitReason {
        let end = tokio::select! {
            _ = process.ended() => return ExitReason::VmmDied,
            end = control.qmp.guest_end() => end,
        };
        let last = async {
            match control.qmp.read_console(command_line::CONSOLE_BYTES).await {
                Ok(console) => *lock(&control.console) = console,
                Err(error) => tracing::debug!(%error, "the console cannot be read"),
            }
            // It may end before it answers.
            let _ = control.qmp.execute("quit", json!({})).await;
            process.ended().await;
        };
        if tokio::time::timeout(QUIT_LIMIT, last).await.is_err()
            && let Err(error) = process.kill_and_wait().await
        {
            tracing::error!(%error, pid = process.pid(), "cannot end a QEMU whose guest has ended");
        }
        match end {
            GuestEnd::Shutdown if !shows_panic(&lock(&control.console)) => {
                ExitReason::GuestShutdown
            }
            GuestEnd::Shutdown | GuestEnd::Panicked => ExitReason::GuestPanic,
        }
    }

    fn last_words(&self, control: &Control, lines: usize) -> String {
        let console = process::last_lines(&lock(&control.console), lines);
        if console.is_empty() {
            let log = control.log.as_ref().map(process::read_log).unwrap_or_default();
            process::last_lines(&log, lines)
        } else {
            console
        }
    }

    async fn add_layers(
        &self,
        place: &Place,
        control: &Control,
        have: usize,
    ) -> Result<(), DriverError> {
        toolbox::add(place, &control.qmp, have).await
    }

    async fn pause(&self, control: &Control) -> Result<(), DriverError> {
        control.qmp.execute("stop", json!({})).await.map(drop)
    }

    async fn resume(&self, control: &Control) -> Result<(), DriverError> {
        control.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn is_paused(&self, control: &Control) -> Result<bool, DriverError> {
        control.qmp.is_paused().await
    }

    fn take_connection(&self, control: &Control, port: u32) -> Option<BoxStream> {
        let (stream, since) = lock(&control.first).take_if(|_| port == AGENT_PORT)?;
        (since.elapsed() < FIRST_LIMIT).then_some(stream)
    }

    async fn connect(
        &self,
        place: &Place,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError> {
        let stream = place.host.network().dial(place.id(), port, limit).await?;
        Ok(Box::new(stream))
    }

    fn clean(&self, host: &Host, record: &Record) -> Result<(), DriverError> {
        remove_file(&host.directory(record.spec.id).join(QMP_SOCKET))
    }
}

impl Qemu {
    /// Starts QEMU and waits until it answers. `files` are those of `begin`, and stay open in it.
    async fn launch(
        &self,
        place: &Place,
        begin: Begin,
        mut files: Vec<OwnedFd>,
    ) -> Result<Started, DriverError> {
        let (host, id) = (&place.host, place.id());
        let path = host.directory(id);
        let directory = process::open_directory(&path)?;
        let socket = process::short_path(directory.as_fd(), QMP_SOCKET);
        let inherited = inherit(place, begin, &socket, &mut files).await?;
        let (spec, guest) = (&place.record.spec, &place.attachment.guest);
        let log = process::bounded_log(LOG_BYTES)?;
        let launch = Launch {
            program: self.program.clone(),
            args: command_line::arguments(spec, self.accelerator, guest, &inherited),
            fds: files,
            directory: directory.try_clone().map_err(|e| file_error("open", &path, e))?,
            netns: Some(host.network().namespace()?),
            identity: host.identity(place.record.uid),
            log: Some(log.try_clone().map_err(|e| file_error("open", "log".as_ref(), e))?),
            page_size: self.page_size(begin),
        };
        let process = host.spawn(spec, launch, "qemu").await?;
        host.fault.hit("start process: running")?;
        let qmp = tokio::select! {
            qmp = Qmp::connect(&socket) => qmp,
            _ = process.ended() => return Err(ended_early(&log)),
        };
        match qmp {
            Ok(qmp) => Ok(Started { process, qmp, log }),
            // It may have ended and not be reaped yet: then its words are the better reason.
            Err(error) => match tokio::time::timeout(QUIT_LIMIT, process.ended()).await {
                Ok(_) => Err(ended_early(&log)),
                Err(_) => Err(error),
            },
        }
    }

    /// A restored guest's memory is a file, which has small pages anyway; what the emulator
    /// translates for it is then given in these too.
    fn page_size(&self, begin: Begin) -> PageSize {
        match (self.accelerator, begin) {
            (Accelerator::Tcg, Begin::Restore { .. }) => PageSize::Small,
            (Accelerator::Tcg, Begin::Boot { .. }) | (Accelerator::Kvm, _) => PageSize::Any,
        }
    }

    /// Waits until a guest that boots says that it is ready, or answers.
    async fn hinted(&self, place: &Place, listener: &mut ReadyListener) -> Result<(), DriverError> {
        let asked = async {
            let mut next = Instant::now() + ASK_INTERVAL;
            loop {
                tokio::time::sleep_until(next).await;
                next = Instant::now() + ASK_INTERVAL;
                if self.connect(place, AGENT_PORT, ASK_INTERVAL).await.is_ok() {
                    return;
                }
            }
        };
        tokio::select! {
            hint = listener.wait() => hint.map(drop),
            () = asked => Ok(()),
        }
    }
}

/// Opens all that every QEMU inherits, whatever it begins with.
async fn inherit(
    place: &Place,
    begin: Begin,
    socket: &Path,
    files: &mut Vec<OwnedFd>,
) -> Result<Inherited, DriverError> {
    let network = place.host.network();
    let mut add = |file: OwnedFd| {
        let number = file.as_raw_fd();
        files.push(file);
        number
    };
    let rootfs = add(process::open_for(&place.record.spec.boot.rootfs)?);
    let qmp = std::os::unix::net::UnixListener::bind(socket)
        .map_err(|e| file_error("listen at", QMP_SOCKET.as_ref(), e))?;
    let qmp = add(qmp.into());
    let tap = add(network.open_tap(&place.attachment.tap).await?);
    let channel_tap = place.attachment.channel_tap.as_deref().unwrap_or_default();
    let channel = add(network.open_tap(channel_tap).await?);
    let (host, id) = (Arc::clone(&place.host), place.id());
    let tools = place.record.spec.layers.clone();
    let opened = blocking(move || {
        let tools = toolbox::place(&host, id, &tools, 0)?;
        let there = layers::of(&host, id)?.into_iter();
        let open = |(number, home)| {
            let fd = match home {
                Home::Frozen => Some(layers::open_frozen(&host, id, number)?),
                Home::Own => None,
            };
            Ok((number, fd))
        };
        Ok((there.map(open).collect::<Result<Vec<_>, DriverError>>()?, tools))
    });
    let (layers, tools) = opened.await?;
    let layers = layers
        .into_iter()
        .map(|(number, fd)| (number, fd.map_or(Layer::Own, |fd| Layer::Frozen(add(fd)))))
        .collect();
    let tools = tools.map(|placed| Toolbox {
        metadata: add(placed.metadata),
        layers: placed.layers.into_iter().map(|(fd, placement)| (add(fd), placement)).collect(),
    });
    Ok(Inherited { begin, rootfs, qmp, tap, channel, layers, tools })
}

fn ended_early(log: &File) -> DriverError {
    let words = process::last_lines(&process::read_log(log), CONSOLE_LINES_SHOWN);
    let detail = if words.is_empty() { "QEMU ended without a word".to_owned() } else { words };
    DriverError::ExitedDuringStart { detail }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

crate::machines::delegate_driver!(QemuDriver);

#[cfg(test)]
mod tests;
