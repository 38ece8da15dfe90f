//! Firecracker: one process for each VM, with its jailer or without.
//!
//! The guest's channel is vsock, which needs nothing of the host: Firecracker shows it as Unix
//! sockets in the VM's directory. The guest's console and Firecracker's own words go to one bounded
//! log in memory; a panic is told from a shutdown by it alone, as both end Firecracker with 0.
//! What the log cannot hold is lost: a guest that fills its console hides its own panic.
//!
//! A guest that ends while no worker runs takes its log with it: its VMM has died, as far as can
//! be told.

mod api;
mod format;
mod home;
mod machine;
mod memory;
mod probe;
mod scratch;
mod snapshot;
mod version;
mod vsock;

use std::{
    collections::HashMap,
    fs::File,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aether_protocol::host::BoxStream;
use aether_types::{DriverKind, MachineId};
use async_trait::async_trait;
use serde_json::json;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

pub use self::machine::RateLimit;
use self::{
    api::{Session, State},
    home::{Appearance, Home},
    version::{SOUND, Version},
};
use crate::{
    BootSource, Capabilities, Driver, DriverError, ExitReason, GuestNetwork, Machine, MachineSpec,
    SnapshotFiles, SnapshotTaken,
    host::{Host, Record, file_error, remove_file},
    machines::{Booted, Links, Machines, Phases, Place, SnapshotWish, Vmm, WasBefore},
    process::{self, Ended, Launch, PageSize, Process},
    qemu::shows_panic,
    stream::GuestStream,
    tools,
};

const API_SOCKET: &str = "api.sock";
/// Kept of the guest's console and of Firecracker's words.
const LOG_BYTES: u64 = 256 * 1024;
const LINES_SHOWN: usize = 12;
/// For a VMM that hung up to be gone.
const END_LIMIT: Duration = Duration::from_secs(5);
/// What Firecracker says last of all, where its end was not an accident.
const EXITED_WELL: &str = "Firecracker exiting successfully. exit_code=0";

#[derive(Debug, Clone, Default)]
pub struct FirecrackerConfig {
    /// `None`: `firecracker`, found in `PATH`.
    pub firecracker: Option<PathBuf>,
    /// Runs each VMM in a jail of its own. Needs root, and `firecracker` in the name of the
    /// program. `None`: a user of its own for each VM, and Firecracker's own filter of system calls.
    pub jailer: Option<PathBuf>,
    /// What the probe boots: that a host runs one kernel says nothing of another. Without it there
    /// is no driver.
    pub probe: Option<BootSource>,
    /// Use a version although something is known against it; for tests.
    pub allow_vulnerable: bool,
    /// What each VM's disk and, in each direction, network may do.
    pub disk_limit: Option<RateLimit>,
    pub network_limit: Option<RateLimit>,
    /// Give product guests a serial console. Without it their panics look like shutdowns.
    pub serial_console: bool,
    /// `PATH`, for finding the program.
    pub search_path: Option<std::ffi::OsString>,
}

/// VMs under Firecracker.
pub struct FirecrackerDriver(Arc<Machines<Firecracker>>);

impl std::fmt::Debug for FirecrackerDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("FirecrackerDriver").field(&self.0.capabilities()).finish()
    }
}

fn unavailable(text: impl Into<String>) -> DriverError {
    DriverError::Unavailable(text.into())
}

impl FirecrackerDriver {
    /// Finds Firecracker, refuses known-bad versions, sees that a guest boots, and takes over the
    /// VMs that run.
    pub async fn open(host: Arc<Host>, config: FirecrackerConfig) -> Result<Self, DriverError> {
        let search = config.search_path.as_deref();
        let find = |path: Option<PathBuf>, name: &str| {
            let found = process::find_program(name, path, search);
            found.and_then(|path| path.canonicalize().ok())
        };
        let program = find(config.firecracker, "firecracker").ok_or_else(|| {
            unavailable(format!("firecracker is not installed; get release {SOUND} or later"))
        })?;
        let jailer = match config.jailer {
            None => None,
            Some(path) => {
                let missing = || unavailable(format!("no jailer at {}", path.display()));
                Some(find(Some(path.clone()), "jailer").ok_or_else(missing)?)
            }
        };
        let version = Version::of(&program, "Firecracker").await?;
        if let Some(jailer) = &jailer {
            let other = Version::of(jailer, "Jailer").await?;
            if other != version {
                return Err(unavailable(format!(
                    "Firecracker is {version} and its jailer {other}; install one release of both"
                )));
            }
        }
        let snapshot_format = format::here(version);
        let version = judge(version, config.allow_vulnerable)?;
        match &jailer {
            Some(_) if !rustix::process::geteuid().is_root() => {
                return Err(unavailable("only root runs Firecracker's jailer"));
            }
            Some(_) => {}
            None => may_use_devices(&host)?,
        }
        probe::kvm(&host, &program, config.probe.as_ref())
            .await
            .map_err(|reason| unavailable(format!("Firecracker cannot be used: {reason}")))?;
        let options = machine::Options {
            disk_limit: config.disk_limit,
            network_limit: config.network_limit,
            serial_console: config.serial_console,
        };
        let streams = Mutex::default();
        let vmm = Firecracker { program, jailer, version, snapshot_format, options, streams };
        Machines::open(host, vmm).await.map(Self)
    }
}

/// The version for people, or why it is refused.
fn judge(version: Version, allow_vulnerable: bool) -> Result<String, DriverError> {
    let known = version.vulnerabilities().join(", ");
    match known.as_str() {
        "" => Ok(version.to_string()),
        _ if allow_vulnerable => Ok(format!("{version} (allowed although it has {known})")),
        _ => Err(unavailable(format!("Firecracker {version} has {known}; use {SOUND} or later"))),
    }
}

/// Without a jailer, a VM's user opens the devices by their path.
fn may_use_devices(host: &Host) -> Result<(), DriverError> {
    const BOTH: u32 = 0o6;
    let Some(identity) = host.sample_identity() else { return Ok(()) };
    for device in ["/dev/kvm", "/dev/net/tun"] {
        let found =
            std::fs::metadata(device).map_err(|e| unavailable(format!("examine {device}: {e}")))?;
        let all = found.mode() & BOTH == BOTH;
        let group = found.mode() >> 3 & BOTH == BOTH && identity.groups.contains(&found.gid());
        if !all && !group {
            return Err(unavailable(format!(
                "the users that VMs run as may not open {device}; configure Firecracker's jailer, \
                 which gives each VM its own, or let the kvm group open /dev/kvm and everybody \
                 /dev/net/tun"
            )));
        }
    }
    Ok(())
}

pub(crate) struct Firecracker {
    program: PathBuf,
    jailer: Option<PathBuf>,
    version: String,
    snapshot_format: Option<String>,
    options: machine::Options,
    /// Breaks the streams to a guest that was made to forget them.
    streams: Mutex<HashMap<MachineId, CancellationToken>>,
}

pub(crate) struct Control {
    home: Home,
    /// The VM's directory.
    directory: PathBuf,
    /// `None`: an earlier worker's, and unreadable.
    log: Option<File>,
    /// `None`: the guest went on from a snapshot, or has been ready before.
    ready: tokio::sync::Mutex<Option<UnixListener>>,
    /// The guest has yet to forget the connections of before a snapshot.
    is_channel_lost: AtomicBool,
}

/// What a VMM is started for.
#[derive(Clone, Copy)]
enum Purpose<'a> {
    Boot,
    /// The folder of the snapshot.
    Restore(&'a Path),
}

impl Control {
    fn new(place: &Place, home: Home, log: Option<File>, ready: Option<UnixListener>) -> Self {
        let directory = place.host.directory(place.id());
        let (ready, is_channel_lost) = (tokio::sync::Mutex::new(ready), AtomicBool::new(false));
        Self { home, directory, log, ready, is_channel_lost }
    }
}

impl Firecracker {
    /// Where a VMM that is started now lives.
    fn new_home_path(&self, host: &Host, id: MachineId) -> PathBuf {
        if self.jailer.is_none() {
            return host.directory(id);
        }
        // As the jailer makes it.
        let program = self.program.file_name().unwrap_or_default();
        home::jail_base(host, id).join(program).join(id.to_string()).join("root")
    }

    fn launch(
        &self,
        place: &Place,
        log: &File,
        purpose: Purpose<'_>,
    ) -> Result<(Home, Launch, machine::Files), DriverError> {
        let (host, id, record) = (&place.host, place.id(), &place.record);
        let path = self.new_home_path(host, id);
        let own = ["--api-sock", API_SOCKET, "--level", "Warn"].map(str::to_owned);
        let home = match &self.jailer {
            None => Home::open(path)?,
            Some(_) => home::make_jail(host, id, path)?,
        };
        home.furnish(host, record)?;
        let (fds, files) = match (purpose, &self.jailer) {
            (Purpose::Boot, None) => home::inherited(&record.spec.boot)?,
            (Purpose::Boot, Some(_)) => (Vec::new(), home.bring_kernel(host, record)?),
            (Purpose::Restore(directory), _) => {
                home.bring_snapshot(host, id, directory)?;
                (Vec::new(), machine::Files::default())
            }
        };
        let (program, args, identity) = match &self.jailer {
            None => {
                let args = ["--id".to_owned(), id.to_string()].into_iter().chain(own).collect();
                (&self.program, args, host.identity(record.uid))
            }
            Some(jailer) => (jailer, self.jailer_arguments(host, record, own), None),
        };
        let launch = Launch {
            program: program.clone(),
            args: args.into_iter().map(Into::into).collect(),
            fds,
            directory: home.directory.try_clone().map_err(|e| file_error("open", &home.path, e))?,
            netns: Some(host.network().namespace()?),
            identity,
            log: Some(log.try_clone().map_err(|e| file_error("open", "log".as_ref(), e))?),
            page_size: PageSize::Any,
        };
        Ok((home, launch, files))
    }

    /// The jailer becomes Firecracker under the same process id. It starts in the VMs' network
    /// namespace and in the VM's cgroup, as every VMM does.
    fn jailer_arguments(&self, host: &Host, record: &Record, own: [String; 4]) -> Vec<String> {
        let id = record.spec.id;
        let uid = record.uid.unwrap_or_else(|| rustix::process::geteuid().as_raw()).to_string();
        let mut args = Vec::new();
        for (option, value) in [
            ("--id", id.to_string()),
            ("--exec-file", self.program.display().to_string()),
            ("--uid", uid.clone()),
            ("--gid", uid),
            ("--chroot-base-dir", home::jail_base(host, id).display().to_string()),
            ("--resource-limit", "no-file=1024".to_owned()),
        ] {
            args.extend([option.to_owned(), value]);
        }
        args.push("--".to_owned());
        args.extend(own);
        args
    }

    /// Describes the VM and lets it run.
    async fn describe(
        &self,
        place: &Place,
        session: &mut Session,
        files: &machine::Files,
    ) -> Result<(), DriverError> {
        let (spec, attachment) = (&place.record.spec, &place.attachment);
        let requests =
            machine::requests(spec, &attachment.guest, &attachment.tap, files, self.options)?;
        for (path, body) in &requests {
            session.put(path, body).await?;
        }
        // Only now: Firecracker writes every request to its log, and the token was in one.
        session.put("/logger", &json!({ "level": "Info" })).await?;
        session.put("/actions", &json!({ "action_type": "InstanceStart" })).await
    }

    /// Waits for the API of a VMM that was started and tells it what to do: its first words where it
    /// ends instead.
    async fn instruct<F: Future<Output = Result<(), DriverError>> + Send>(
        home: &Home,
        process: &Process,
        log: &File,
        appearance: &Appearance,
        instruct: impl FnOnce(Session) -> F,
    ) -> Result<(), DriverError> {
        let instructed = tokio::select! {
            session = appearance.session(home) => match session {
                Ok(session) => instruct(session).await,
                Err(error) => Err(error),
            },
            _ = process.ended() => return Err(ended_early(log)),
        };
        match instructed {
            Ok(()) => Ok(()),
            Err(error @ (DriverError::Vmm { .. } | DriverError::Injected(_))) => Err(error),
            // It may have ended and not be reaped yet: then its words are the better reason.
            Err(error) => match tokio::time::timeout(END_LIMIT, process.ended()).await {
                Ok(_) => Err(ended_early(log)),
                Err(_) => Err(error),
            },
        }
    }

    /// The guest knows nothing any more of the streams that there are to it.
    fn break_streams(&self, id: MachineId) {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some(streams) = streams {
            streams.cancel();
        }
    }

    async fn session(control: &Control) -> Result<Session, DriverError> {
        Session::open(control.home.directory.as_fd(), API_SOCKET).await
    }
}

#[async_trait]
impl Vmm for Firecracker {
    type Control = Control;

    const KIND: DriverKind = DriverKind::Firecracker;
    const LINKS: Links = Links::Tap;

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: DriverKind::Firecracker,
            accelerated: true,
            isolation: match self.jailer {
                Some(_) => {
                    "hardware virtualization (KVM); Firecracker in a jail with a seccomp filter, a \
                     user of its own for each VM"
                }
                None => {
                    "hardware virtualization (KVM); Firecracker with a seccomp filter and without \
                     a jail, a user of its own for each VM where the platform runs as root"
                }
            },
            version: self.version.clone(),
            snapshot_format: self.snapshot_format.clone(),
        }
    }

    fn make_disk(&self, host: &Host, record: &Record) -> Result<(), DriverError> {
        let Some(from) = &record.spec.disk_from else { return host.make_disk(record) };
        let path = host.disk(record.spec.id);
        // Of an earlier attempt: it may be half a disk.
        remove_file(&path)?;
        snapshot::copy_disk(&from.directory.join(snapshot::DISK_NAME), &path)?;
        host.give(&path, record)
    }

    fn keep_layers(&self, host: &Host, record: &Record, have: usize) -> Result<(), DriverError> {
        let spec = &record.spec;
        tools::keep(host, spec.id, have, &spec.layers[have..])?;
        tools::compose(host, record)
    }

    async fn boot(&self, place: &Place) -> Result<Booted<Control>, DriverError> {
        let host = &place.host;
        let log = process::bounded_log(LOG_BYTES)?;
        host.fault.hit("make home")?;
        let (home, launch, files) = self.launch(place, &log, Purpose::Boot)?;
        snapshot::begin_at_zero(host, place.id())?;
        let ready = vsock::listen_ready(home.directory.as_fd())?;
        host.give(&home.path.join(vsock::ready_socket()), &place.record)?;
        host.fault.hit("make home: made")?;
        let appearance = Appearance::of(&home)?;
        let process = host.spawn(&place.record.spec, launch, "firecracker").await?;
        host.fault.hit("start process: running")?;
        Self::instruct(&home, &process, &log, &appearance, |mut session| async move {
            self.describe(place, &mut session, &files).await
        })
        .await?;
        Ok(Booted { process, control: Control::new(place, home, Some(log), Some(ready)) })
    }

    async fn restore(
        &self,
        place: &Place,
        from: &SnapshotFiles,
        phases: &mut Phases,
    ) -> Result<Booted<Control>, DriverError> {
        let (host, id) = (&place.host, place.id());
        snapshot::check_memory(&from.directory, place.record.spec.memory_mb)?;
        let log = process::bounded_log(LOG_BYTES)?;
        host.fault.hit("make home")?;
        let (home, launch, _) = self.launch(place, &log, Purpose::Restore(&from.directory))?;
        snapshot::begin_at(host, id, &from.directory.join(machine::MEMORY_NAME));
        host.fault.hit("make home: made")?;
        let appearance = Appearance::of(&home)?;
        let process = host.spawn(&place.record.spec, launch, "firecracker").await?;
        host.fault.hit("start process: running")?;
        phases.end("process");
        Self::instruct(&home, &process, &log, &appearance, |mut session| async move {
            session.put("/logger", &json!({ "level": "Info" })).await?;
            host.fault.hit("load")?;
            session.put("/snapshot/load", &machine::load(&place.attachment.tap)).await?;
            host.fault.hit("load: loaded")
        })
        .await?;
        home.remove_snapshot(host, id)?;
        phases.end("load");
        Ok(Booted { process, control: Control::new(place, home, Some(log), None) })
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
        self.break_streams(place.id());
        control.is_channel_lost.store(true, Ordering::Release);
        if was == WasBefore::Running {
            self.resume(control).await?;
        }
        scratch::empty(&control.home)
    }

    async fn ready(&self, place: &Place, control: &Control) -> Result<(), DriverError> {
        let Some(listener) = control.ready.lock().await.take() else {
            return vsock::outlast_reset(&control.home.directory).await;
        };
        let hint = vsock::wait_ready(&listener).await?;
        tracing::debug!(vm.id = %place.id(), bytes = hint.len(), "a guest says that it is ready");
        // It is a hint: what counts is a connection.
        vsock::reach_agent(&control.home.directory).await.map(drop)
    }

    async fn adopt(&self, place: &Place, process: &Process) -> Result<Control, DriverError> {
        let home = Home::of_running(&place.host, place.id())?;
        let log = process::log_of(process.pid());
        let control = Control::new(place, home, log, None);
        match Self::session(&control).await?.state().await? {
            State::Running | State::Paused => Ok(control),
            State::NotStarted => Err(DriverError::Vmm {
                action: "be adopted".to_owned(),
                detail: "its machine was never started".to_owned(),
            }),
        }
    }

    async fn watch(&self, control: &Control, process: &Process) -> ExitReason {
        let ended = process.ended().await;
        if let Err(error) = snapshot::forget_base(&control.directory) {
            tracing::warn!(%error, "cannot give back the room of a memory");
        }
        let log = control.log.as_ref().map(process::read_log).unwrap_or_default();
        exit_reason(ended, &log)
    }

    fn last_words(&self, control: &Control, lines: usize) -> String {
        let log = control.log.as_ref().map(process::read_log).unwrap_or_default();
        process::last_lines(&log, lines)
    }

    async fn pause(&self, control: &Control) -> Result<(), DriverError> {
        Self::session(control).await?.set_state(State::Paused).await
    }

    async fn resume(&self, control: &Control) -> Result<(), DriverError> {
        Self::session(control).await?.set_state(State::Running).await?;
        control.regain_channel(true).await;
        Ok(())
    }

    async fn is_paused(&self, control: &Control) -> Result<bool, DriverError> {
        Ok(Self::session(control).await?.state().await? == State::Paused)
    }

    async fn connect(
        &self,
        place: &Place,
        port: u32,
        limit: Duration,
    ) -> Result<BoxStream, DriverError> {
        let home = Home::of_running(&place.host, place.id())?;
        let broken = {
            let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
            streams.entry(place.id()).or_default().clone()
        };
        let stream = vsock::connect(&home.directory, port, limit).await?;
        Ok(Box::new(GuestStream::new(Box::new(stream), broken)))
    }

    fn clean(&self, host: &Host, record: &Record) -> Result<(), DriverError> {
        self.break_streams(record.spec.id);
        home::clean(host, record.spec.id)
    }
}

fn exit_reason(ended: Ended, log: &str) -> ExitReason {
    let by_guest = match ended {
        Ended::Code(code) => code == 0,
        Ended::Signal(_) => false,
        // An earlier worker's child: only its log says how it ended.
        Ended::Unknown => log.contains(EXITED_WELL),
    };
    match by_guest {
        true if shows_panic(log) => ExitReason::GuestPanic,
        true => ExitReason::GuestShutdown,
        false => ExitReason::VmmDied,
    }
}

fn ended_early(log: &File) -> DriverError {
    let words = process::last_lines(&process::read_log(log), LINES_SHOWN);
    let detail =
        if words.is_empty() { "Firecracker ended without a word".to_owned() } else { words };
    DriverError::ExitedDuringStart { detail }
}

crate::machines::delegate_driver!(FirecrackerDriver);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vulnerable_version_is_refused_unless_it_is_allowed_and_then_shown() {
        let version = |text| Version::parse(text, "v").unwrap();
        let refused = judge(version("v1.12.1"), false).unwrap_err();
        assert!(matches!(&refused, DriverError::Unavailable(_)), "{refused:?}");
        assert_eq!(
            refused.to_string(),
            "Firecracker 1.12.1 has CVE-2026-1386; use 1.15.1 or later"
        );
        let allowed = judge(version("v1.12.1"), true).unwrap();
        assert_eq!(allowed, "1.12.1 (allowed although it has CVE-2026-1386)");
        assert_eq!(judge(version("v1.15.1"), false).unwrap(), "1.15.1");
    }

    #[test]
    fn the_log_tells_a_panic_and_an_adopted_end() {
        let panic = "[    5.1] Kernel panic - not syncing: sysrq triggered crash\r\n";
        assert_eq!(exit_reason(Ended::Code(0), ""), ExitReason::GuestShutdown);
        assert_eq!(exit_reason(Ended::Code(0), panic), ExitReason::GuestPanic);
        assert_eq!(exit_reason(Ended::Code(1), panic), ExitReason::VmmDied);
        assert_eq!(exit_reason(Ended::Signal(9), ""), ExitReason::VmmDied);
        assert_eq!(exit_reason(Ended::Unknown, ""), ExitReason::VmmDied);
        let well = format!("2026-01-01T00:00:00.0 [id:main] {EXITED_WELL}\n");
        assert_eq!(exit_reason(Ended::Unknown, &well), ExitReason::GuestShutdown);
        assert_eq!(exit_reason(Ended::Unknown, &format!("{panic}{well}")), ExitReason::GuestPanic);
    }
}
