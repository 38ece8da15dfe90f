//! Questions about this host, for `doctor`. Each answer says what was found, and where it is not
//! enough, what mends it.

use std::{
    fs::{self, OpenOptions},
    path::Path,
    process::Command,
};

use aether_types::limits;
use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    Ok,
    /// Works, but not as it should.
    Warning,
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) check: &'static str,
    pub(crate) verdict: Verdict,
    pub(crate) found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fix: Option<String>,
}

impl Finding {
    pub(crate) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), fix: None }
    }

    pub(crate) fn warning(
        check: &'static str,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        let fix = Some(fix.into());
        Self { check, verdict: Verdict::Warning, found: found.into(), fix }
    }

    pub(crate) fn failed(
        check: &'static str,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Failed, ..Self::warning(check, found, fix) }
    }
}

/// Disk that a few VMs fill soon.
const DISK_FREE_MIN: u64 = 2 << 30;
const MEMORY_FREE_MIN: u64 = 512 << 20;

/// What runs on the host: containers need less of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Machines {
    Vms,
    Containers,
}

/// What can be asked without running anything of ours.
pub(crate) fn findings(data_dir: &Path, machines: Machines) -> Vec<Finding> {
    let mut findings = vec![root(), architecture()];
    if machines == Machines::Vms {
        findings.push(program("qemu", "qemu-system-x86_64", "--version", "qemu-system-x86"));
    }
    findings.push(program("nftables", "nft", "--version", "nftables"));
    findings.push(program("iproute2", "ip", "-V", "iproute2"));
    if machines == Machines::Vms {
        findings.extend([program("e2fsprogs", "mkfs.ext4", "-V", "e2fsprogs"), tun(), kvm()]);
    }
    findings.extend([disk(data_dir), snapshot_room(data_dir), memory()]);
    findings
}

fn root() -> Finding {
    if rustix::process::geteuid().is_root() {
        Finding::ok("root", "running as root")
    } else {
        Finding::failed(
            "root",
            "not running as root: links, rules and users cannot be made",
            "run it as root, or with sudo",
        )
    }
}

fn architecture() -> Finding {
    match std::env::consts::ARCH {
        "x86_64" => Finding::ok("processor", "x86_64"),
        other => Finding::failed("processor", other, "use an x86_64 host"),
    }
}

fn program(check: &'static str, program: &str, flag: &str, package: &'static str) -> Finding {
    let output = Command::new(program).arg(flag).output();
    match output {
        Ok(output) => {
            // `mkfs` writes its version to standard error.
            let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
            let text = String::from_utf8_lossy(&text);
            Finding::ok(check, text.lines().next().unwrap_or(program).trim())
        }
        Err(error) => Finding::failed(
            check,
            format!("{program} does not run: {error}"),
            format!("apt-get install {package}"),
        ),
    }
}

fn tun() -> Finding {
    let path = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Finding::ok("tun", format!("{path} opens")),
        Err(error) => Finding::failed(
            "tun",
            format!("{path}: {error}"),
            "modprobe tun; in a container, pass the device in and grant CAP_NET_ADMIN",
        ),
    }
}

/// Whether the device is there; only a VM shows whether it works, see the driver's finding.
fn kvm() -> Finding {
    let path = "/dev/kvm";
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Finding::ok("kvm", format!("{path} opens")),
        Err(error) => Finding::warning(
            "kvm",
            format!("{path}: {error}; VMs are emulated, which is slow and is no isolation"),
            "switch on virtualization in the firmware, or nested virtualization in the cloud's \
             settings, then modprobe kvm",
        ),
    }
}

fn disk(data_dir: &Path) -> Finding {
    // The directory need not be there yet.
    let there = data_dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(there) {
        Ok(stat) => {
            let free = stat.f_bavail * stat.f_frsize;
            let found = format!("{} MB free at {}", free >> 20, there.display());
            if free < DISK_FREE_MIN {
                Finding::warning("disk", found, "make room, or choose another --data-dir")
            } else {
                Finding::ok("disk", found)
            }
        }
        Err(error) => Finding::failed(
            "disk",
            format!("{}: {error}", there.display()),
            "choose another --data-dir",
        ),
    }
}

/// So many snapshots of the default size shall fit at least: the default template, and some.
const SNAPSHOTS_MIN: u64 = 8;

/// Snapshots hold memory, at most all of it, and what was written to the disk.
fn snapshot_room(data_dir: &Path) -> Finding {
    let there = data_dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    // That it cannot be asked is said already.
    let free = rustix::fs::statvfs(there).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    let count = (free >> 20) / u64::from(limits::MEMORY_MB_DEFAULT);
    let found = format!("room for {count} snapshots of {} MB memory", limits::MEMORY_MB_DEFAULT);
    if count < SNAPSHOTS_MIN {
        let fix = "make room, choose another --data-dir, or bound them with --snapshot-disk-mb";
        Finding::warning("room", found, fix)
    } else {
        Finding::ok("room", found)
    }
}

fn memory() -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .unwrap_or(0)
        << 10;
    let found = format!("{} MB available", free >> 20);
    if free < MEMORY_FREE_MIN {
        Finding::warning("memory", found, "end what uses it, or run fewer and smaller VMs")
    } else {
        Finding::ok("memory", found)
    }
}
