//! Whether KVM on this host boots a real guest.
//!
//! That `/dev/kvm` opens says little: some hosts run guest kernels in an emulator that knows a part
//! of the instructions. So the very kernel and initramfs that VMs use is booted, without disks and
//! links, until it starts its first program; once for each boot of the host.

use std::{
    fs, os::fd::AsRawFd as _, os::unix::fs::MetadataExt as _, path::Path, process::Stdio,
    sync::Arc, time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    BootSource, DriverError, KernelFlavour,
    host::{Host, file_error},
    journal::Owner,
    process::{self, Launch, PageSize},
};

/// Accelerated, a guest boots in a fraction of this; what takes longer is better emulated.
const BOOT_LIMIT: Duration = Duration::from_secs(8);
const VERSION_LIMIT: Duration = Duration::from_secs(10);
/// For all data directories of this host, until it boots again. Only root writes there.
const FINDING: &str = "/run/aether/qemu-kvm.json";
/// The kernel's word that it hands over to the first program.
const BOOTED: &str = "Run /init as init process";
const LOG_BYTES: u64 = 256 * 1024;

/// What was found, and what it depends on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Finding {
    host_boot_id: String,
    qemu: String,
    /// Paths, sizes and times of kernel and initramfs.
    boot: Vec<(String, u64, i64)>,
    /// Why KVM cannot be used; empty where it can.
    reason: String,
}

/// The first line of `--version`, less its copyright.
pub(super) async fn version(program: &Path) -> Result<String, DriverError> {
    let failed = |detail: String| DriverError::Program { program: "qemu-system-x86_64", detail };
    let output = tokio::process::Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(VERSION_LIMIT, output)
        .await
        .map_err(|_| failed("no answer to --version".to_owned()))?
        .map_err(|e| file_error("run", program, e))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    match line.strip_prefix("QEMU emulator version ") {
        Some(version) if output.status.success() => {
            Ok(version.split(' ').next().unwrap_or(version).chars().take(40).collect())
        }
        Some(_) | None => Err(failed(format!("not a version: {line:.80}"))),
    }
}

/// `Err` says why KVM cannot be used.
pub(super) async fn kvm(
    host: &Arc<Host>,
    program: &Path,
    version: &str,
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
        qemu: format!("{} {version}", program.display()),
        boot: [&boot.kernel, &boot.initrd].map(|path| identity(path)).into(),
        reason: String::new(),
    };
    let path = Path::new(FINDING);
    let known = fs::read(path).ok().and_then(|b| serde_json::from_slice::<Finding>(&b).ok());
    if let Some(known) = known {
        finding.reason.clone_from(&known.reason);
        if finding == known {
            return if known.reason.is_empty() { Ok(()) } else { Err(known.reason) };
        }
    }
    finding.reason = match boot_once(host, program, boot).await {
        Ok(()) => String::new(),
        Err(reason) => reason,
    };
    let kept = serde_json::to_vec_pretty(&finding).map_err(std::io::Error::from);
    if let Err(error) = kept.and_then(|bytes| {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, bytes)
    }) {
        // It is found out again next time.
        tracing::warn!(%error, path = %path.display(), "cannot keep what a probe found");
    }
    if finding.reason.is_empty() { Ok(()) } else { Err(finding.reason) }
}

fn identity(path: &Path) -> (String, u64, i64) {
    let (size, changed) = fs::metadata(path).map_or((0, 0), |m| (m.len(), m.ctime()));
    (path.display().to_string(), size, changed)
}

async fn boot_once(host: &Arc<Host>, program: &Path, boot: &BootSource) -> Result<(), String> {
    let launched = launch(host, program, boot).await;
    // Also where it failed half-way.
    let cleaned = host.end_processes(Owner::Host).await;
    let result = launched.map_err(|e| e.to_string())?;
    cleaned.map_err(|e| e.to_string())?;
    result
}

async fn launch(
    host: &Arc<Host>,
    program: &Path,
    boot: &BootSource,
) -> Result<Result<(), String>, DriverError> {
    let acpi = match boot.kernel_flavour {
        KernelFlavour::Debian => "on",
        KernelFlavour::FirecrackerTest => "off",
    };
    let no_pipe = |source| DriverError::Io { action: "make a pipe".to_owned(), source };
    let (writer, console) = tokio::net::unix::pipe::pipe().map_err(no_pipe)?;
    let as_file = writer.into_blocking_fd().map_err(no_pipe)?;
    let log = process::bounded_log(LOG_BYTES)?;
    let args = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-machine",
        &format!("microvm,acpi={acpi},pit=off,pic=off,rtc=on,isa-serial=on"),
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-m",
        "128M",
        "-kernel",
        &boot.kernel.display().to_string(),
        "-initrd",
        &boot.initrd.display().to_string(),
        "-append",
        "console=ttyS0 8250.nr_uarts=1 loglevel=7 panic=-1 reboot=t",
        "-chardev",
        &format!("file,id=console,path=/dev/fd/{}", as_file.as_raw_fd()),
        "-serial",
        "chardev:console",
    ]
    .map(Into::into);
    let launch = Launch {
        program: program.to_owned(),
        args: args.into(),
        fds: vec![as_file],
        directory: process::open_directory(&host.data_dir)?,
        netns: None,
        identity: None,
        log: Some(log.try_clone().map_err(|e| file_error("open", "log".as_ref(), e))?),
        page_size: PageSize::Any,
    };
    let process = host.spawn_probe(launch, "qemu-probe").await?;
    let seen = tokio::time::timeout(BOOT_LIMIT, saw(console)).await;
    process.kill_and_wait().await?;
    Ok(match seen {
        Ok(true) => Ok(()),
        Ok(false) => {
            let words = process::last_lines(&process::read_log(&log), 3);
            Err(format!("a probe VM ended before it had booted: {words}"))
        }
        Err(_) => Err(format!("a probe VM did not boot within {} s", BOOT_LIMIT.as_secs())),
    })
}

/// Reads the console until the kernel has booted, or ends.
async fn saw(mut console: tokio::net::unix::pipe::Receiver) -> bool {
    use tokio::io::AsyncReadExt as _;
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(n) = console.read(&mut chunk).await {
        if n == 0 || text.len() > 1024 * 1024 {
            return false;
        }
        text.extend_from_slice(&chunk[..n]);
        if text.windows(BOOTED.len()).any(|window| window == BOOTED.as_bytes()) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn a_boot_is_seen_on_the_console_and_so_is_its_lack() {
        for (words, booted) in [("Run /init as ini|t process\n", true), ("panic", false)] {
            let (mut writer, console) = tokio::net::unix::pipe::pipe().unwrap();
            for part in words.split('|') {
                writer.write_all(part.as_bytes()).await.unwrap();
            }
            drop(writer);
            assert_eq!(saw(console).await, booted);
        }
    }
}
