//! Whether Firecracker boots a real guest on this host.
//!
//! That `/dev/kvm` opens says little: some hosts run guest kernels in an emulator that knows a part
//! of the instructions. So the very kernel and initramfs that VMs use is booted, without disks and
//! links, until it starts its first program; once for each boot of the host.

use std::{
    fs,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::AsyncReadExt as _;

use super::{
    API_SOCKET,
    home::{Appearance, Home},
    machine,
};
use crate::{
    BootSource, DriverError, KernelFlavour,
    host::{Host, file_error, make_folder, remove_tree},
    journal::Owner,
    process::{self, Launch, PageSize},
};

/// The kernel's word that it hands over to the first program.
const BOOTED: &[u8] = b"Run /init as init process";
const CONSOLE_BYTES_MAX: usize = 1024 * 1024;
const LINES_SHOWN: usize = 3;
const MEMORY_MB: u32 = 128;

/// A processor boots a guest in a fraction of the first; the test kernel is for hosts where an
/// emulator does, which takes five seconds when nothing else runs.
fn boot_limit(flavour: KernelFlavour) -> Duration {
    match flavour {
        KernelFlavour::Debian => Duration::from_secs(10),
        KernelFlavour::FirecrackerTest => Duration::from_mins(1),
    }
}

/// What was found, and what it depends on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Finding {
    host_boot_id: String,
    firecracker: (String, u64, i64),
    kernel: (String, u64, i64),
    initrd: (String, u64, i64),
    /// Why guests do not boot; empty where they do.
    reason: String,
}

fn identity(path: &Path) -> (String, u64, i64) {
    let (size, changed) = fs::metadata(path).map_or((0, 0), |m| (m.len(), m.ctime()));
    (path.display().to_string(), size, changed)
}

/// `Err` says why Firecracker cannot be used.
pub(super) async fn kvm(
    host: &Arc<Host>,
    program: &Path,
    boot: Option<&BootSource>,
) -> Result<(), String> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|e| format!("open /dev/kvm: {e}"))?;
    let boot = boot.ok_or("there is no image to try it with")?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|e| format!("read the boot id: {e}"))?;
    let mut finding = Finding {
        host_boot_id: boot_id.trim().to_owned(),
        firecracker: identity(program),
        kernel: identity(&boot.kernel),
        initrd: identity(&boot.initrd),
        reason: String::new(),
    };
    let path = host.data_dir.join("probe/firecracker.json");
    let known = fs::read(&path).ok().and_then(|b| serde_json::from_slice::<Finding>(&b).ok());
    if let Some(known) = known {
        finding.reason.clone_from(&known.reason);
        if finding == known {
            return if known.reason.is_empty() { Ok(()) } else { Err(known.reason) };
        }
    }
    finding.reason = boot_once(host, program, boot).await.err().unwrap_or_default();
    let kept = serde_json::to_vec_pretty(&finding).map_err(std::io::Error::from);
    if let Err(error) = kept.and_then(|bytes| fs::write(&path, bytes)) {
        // It is found out again next time.
        tracing::warn!(%error, path = %path.display(), "cannot keep what a probe found");
    }
    if finding.reason.is_empty() { Ok(()) } else { Err(finding.reason) }
}

async fn boot_once(host: &Arc<Host>, program: &Path, boot: &BootSource) -> Result<(), String> {
    let folder = host.data_dir.join("probe/firecracker");
    let limit = boot_limit(boot.kernel_flavour);
    let launched = tokio::time::timeout(limit, launch(host, program, boot, &folder)).await;
    // Also where it failed half-way.
    let cleaned = host.end_processes(Owner::Host).await.and_then(|()| remove_tree(&folder));
    let late = || format!("a probe VM did not boot within {} s", limit.as_secs());
    let booted = launched.map_err(|_| late())?.map_err(|e| e.to_string())?;
    cleaned.map_err(|e| e.to_string())?;
    booted
}

async fn launch(
    host: &Arc<Host>,
    program: &Path,
    boot: &BootSource,
    folder: &Path,
) -> Result<Result<(), String>, DriverError> {
    // What an earlier worker's probe left.
    remove_tree(folder)?;
    make_folder(folder, 0o700)?;
    let home = Home::open(folder.to_owned())?;
    let no_pipe = |source| DriverError::Io { action: "make a pipe".to_owned(), source };
    let (writer, mut console) = tokio::net::unix::pipe::pipe().map_err(no_pipe)?;
    let (kernel, initrd) = (process::open_for(&boot.kernel)?, process::open_for(&boot.initrd)?);
    let options =
        machine::kernel_options(boot.kernel_flavour, true).replace("quiet loglevel=1 ", "");
    let boot_source = json!({
        "kernel_image_path": format!("/proc/self/fd/{}", kernel.as_raw_fd()),
        "initrd_path": format!("/proc/self/fd/{}", initrd.as_raw_fd()),
        "boot_args": format!("loglevel=7 {options}"),
    });
    let appearance = Appearance::of(&home)?;
    let launch = Launch {
        program: program.to_owned(),
        args: ["--api-sock", API_SOCKET, "--level", "Warn"].map(Into::into).into(),
        fds: vec![kernel, initrd],
        directory: home.directory.try_clone().map_err(|e| file_error("open", folder, e))?,
        netns: None,
        identity: None,
        log: Some(writer.into_blocking_fd().map_err(no_pipe)?.into()),
        page_size: PageSize::Any,
    };
    let process = host.spawn_probe(launch, "firecracker-probe").await?;
    let mut text = Vec::new();
    let booted = {
        let reading = saw(&mut console, &mut text);
        tokio::pin!(reading);
        let starting = async {
            let mut session = appearance.session(&home).await?;
            for (path, body) in machine::bare(boot.kernel_flavour, 1, MEMORY_MB, &boot_source) {
                session.put(path, &body).await?;
            }
            session.put("/actions", &json!({ "action_type": "InstanceStart" })).await
        };
        tokio::select! {
            booted = &mut reading => booted,
            started = starting => { started?; reading.await }
        }
    };
    process.kill_and_wait().await?;
    let words = process::last_lines(&String::from_utf8_lossy(&text), LINES_SHOWN);
    let ended = || format!("a probe VM ended before it had booted: {words}");
    Ok(if booted { Ok(()) } else { Err(ended()) })
}

/// Reads the console until the kernel has booted, or ends.
async fn saw(console: &mut tokio::net::unix::pipe::Receiver, text: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 4096];
    while let Ok(n) = console.read(&mut chunk).await {
        if n == 0 || text.len() > CONSOLE_BYTES_MAX {
            return false;
        }
        let from = text.len().saturating_sub(BOOTED.len());
        text.extend_from_slice(&chunk[..n]);
        if text[from..].windows(BOOTED.len()).any(|window| window == BOOTED) {
            return true;
        }
    }
    false
}
