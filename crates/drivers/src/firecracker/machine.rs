//! What a VM is, in Firecracker's words: pure, so that all of it can be seen in a test.

use serde_json::{Value, json};

use crate::{DriverError, GuestNetwork, KernelFlavour, MachineSpec, host::DISK_FILE};

/// A snapshot names its devices and their files: changing one of these names is another layout
/// ([`super::format`]).
const INTERFACE_ID: &str = "net";
pub(super) const ROOTFS_NAME: &str = "rootfs";
/// Layers of tools, put together; there is a file also where there are none.
pub(super) const TOOLS_NAME: &str = "tools";
/// In a VMM's home, while it loads them.
pub(super) const MEMORY_NAME: &str = "memory";
pub(super) const STATE_NAME: &str = "state";
/// The guest's vsock address; each VMM has its own.
const GUEST_CID: u32 = 3;

/// What a device may take of the host in each second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct RateLimit {
    pub bytes: Option<u64>,
    pub operations: Option<u64>,
}

impl RateLimit {
    fn limiter(self) -> Value {
        const SECOND_MS: u64 = 1000;
        let bucket = |size: u64| json!({ "size": size, "refill_time": SECOND_MS });
        let mut limiter = serde_json::Map::new();
        if let Some(bytes) = self.bytes {
            limiter.insert("bandwidth".to_owned(), bucket(bytes));
        }
        if let Some(operations) = self.operations {
            limiter.insert("ops".to_owned(), bucket(operations));
        }
        limiter.into()
    }
}

/// What a guest boots, by paths as the VMM sees them.
#[derive(Debug, Clone, Default)]
pub(super) struct Files {
    pub(super) kernel: String,
    pub(super) initrd: String,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Options {
    pub(super) disk_limit: Option<RateLimit>,
    pub(super) network_limit: Option<RateLimit>,
    pub(super) serial_console: bool,
}

/// The kernel's own options.
pub(super) fn kernel_options(flavour: KernelFlavour, serial_console: bool) -> String {
    // A restart ends Firecracker, a power off does not. Only what is an emergency is printed, so
    // that a panic is seen and a boot is not slowed down.
    const BOTH: &str = "quiet loglevel=1 reboot=k panic=-1";
    let serial = "console=ttyS0 8250.nr_uarts=1";
    match flavour {
        KernelFlavour::FirecrackerTest => format!(
            "{BOTH} {serial} nokaslr noxsave lpj=4000000 tsc=reliable no_timer_check \
             pty.legacy_count=0 clearcpuid=popcnt,cx16,fsgsbase,erms,fsrm,invpcid,pcid,smap,umip,\
             pku,rdpid,rdtscp,rep_good"
        ),
        KernelFlavour::Debian => {
            let serial = if serial_console { serial } else { "8250.nr_uarts=0" };
            format!(
                "{BOTH} {serial} pci=off random.trust_cpu=on cryptomgr.notests audit=0 nowatchdog \
                 nmi_watchdog=0 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
            )
        }
    }
}

/// For the kernel that runs in KVM's instruction emulator: it must not see what that lacks.
fn cpu_config() -> Value {
    // CX16, XSAVE, AVX and FMA.
    let ecx = json!({ "register": "ecx", "bitmap": "0bxx0000xxxxxxxxxxxx00xxxxxxxxxxxx" });
    json!({ "cpuid_modifiers": [
        { "leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [ecx] }
    ] })
}

/// For a processor and a kernel, and nothing else. Pages that the guest changes are told apart, so
/// that a snapshot need not write the others.
pub(super) fn bare(
    flavour: KernelFlavour,
    vcpus: u32,
    memory_mb: u32,
    boot_source: &Value,
) -> Vec<(&'static str, Value)> {
    let mut requests = Vec::new();
    if flavour == KernelFlavour::FirecrackerTest {
        requests.push(("/cpu-config", cpu_config()));
    }
    let machine = json!({
        "vcpu_count": vcpus, "mem_size_mib": memory_mb, "track_dirty_pages": true,
    });
    requests.push(("/machine-config", machine));
    requests.push(("/boot-source", boot_source.clone()));
    requests
}

/// Makes a VMM that has nothing yet go on with a snapshot. The guest runs at once: it has no network
/// until it is told its own addresses.
pub(super) fn load(tap: &str) -> Value {
    json!({
        "snapshot_path": STATE_NAME,
        "mem_backend": { "backend_type": "File", "backend_path": MEMORY_NAME },
        "enable_diff_snapshots": true,
        "resume_vm": true,
        "network_overrides": [{ "iface_id": INTERFACE_ID, "host_dev_name": tap }],
    })
}

/// Every request that describes a VM, in their order. The token is in a request's body and so on
/// no command line of the host.
pub(super) fn requests(
    spec: &MachineSpec,
    guest: &GuestNetwork,
    tap: &str,
    files: &Files,
    options: Options,
) -> Result<Vec<(&'static str, Value)>, DriverError> {
    if spec.token.is_empty() || !spec.token.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(DriverError::Vmm {
            action: "take the kernel's command line".to_owned(),
            detail: "the token is not hexadecimal".to_owned(),
        });
    }
    let flavour = spec.boot.kernel_flavour;
    let kernel = kernel_options(flavour, options.serial_console);
    let boot_source = json!({
        "kernel_image_path": files.kernel,
        "initrd_path": files.initrd,
        "boot_args": format!("{kernel} ae.channel=vsock ae.token={}", spec.token),
    });
    // The guest finds its disks by their order.
    let rootfs = json!({
        "drive_id": "rootfs", "path_on_host": ROOTFS_NAME,
        "is_root_device": false, "is_read_only": true,
    });
    let mut disk = json!({
        "drive_id": "disk", "path_on_host": DISK_FILE,
        "is_root_device": false, "is_read_only": false,
        // What the guest has synced is on the host's disk.
        "cache_type": "Writeback",
    });
    let tools = json!({
        "drive_id": "tools", "path_on_host": TOOLS_NAME,
        "is_root_device": false, "is_read_only": true,
    });
    let mut network = json!({
        "iface_id": INTERFACE_ID, "host_dev_name": tap, "guest_mac": guest.mac,
    });
    if let Some(limit) = options.disk_limit {
        disk["rate_limiter"] = limit.limiter();
    }
    if let Some(limit) = options.network_limit {
        network["rx_rate_limiter"] = limit.limiter();
        network["tx_rate_limiter"] = limit.limiter();
    }
    let mut requests = bare(flavour, spec.vcpus, spec.memory_mb, &boot_source);
    requests.extend([
        ("/drives/rootfs", rootfs),
        ("/drives/disk", disk),
        ("/drives/tools", tools),
        ("/network-interfaces/net", network),
        ("/vsock", json!({ "guest_cid": GUEST_CID, "uds_path": super::vsock::SOCKET })),
        ("/entropy", json!({})),
    ]);
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn all(flavour: KernelFlavour, options: Options) -> Vec<(&'static str, Value)> {
        let mut spec = crate::tests::spec(Path::new("/images"));
        spec.boot.kernel_flavour = flavour;
        let guest = GuestNetwork {
            mac: "02:ae:01:00:00:05".into(),
            addresses: Vec::new(),
            gateways: Vec::new(),
            dns: Vec::new(),
            mtu: 1400,
        };
        let files = Files { kernel: "kernel".into(), initrd: "initrd".into() };
        requests(&spec, &guest, "aeu8", &files, options).unwrap()
    }

    fn get<'a>(all: &'a [(&'static str, Value)], path: &str) -> &'a Value {
        &all.iter().find(|(p, _)| *p == path).unwrap().1
    }

    #[test]
    fn the_requests_come_in_the_measured_order() {
        let test = all(KernelFlavour::FirecrackerTest, Options::default());
        let paths: Vec<_> = test.iter().map(|(path, _)| *path).collect();
        assert_eq!(
            paths,
            [
                "/cpu-config",
                "/machine-config",
                "/boot-source",
                "/drives/rootfs",
                "/drives/disk",
                "/drives/tools",
                "/network-interfaces/net",
                "/vsock",
                "/entropy"
            ]
        );
        let args = get(&test, "/boot-source")["boot_args"].as_str().unwrap();
        assert!(args.contains("console=ttyS0") && args.contains("clearcpuid=popcnt,"), "{args}");
        let token = "0123456789abcdef".repeat(4);
        assert!(args.ends_with(&format!(" ae.channel=vsock ae.token={token}")), "{args}");
        assert_eq!(get(&test, "/drives/rootfs")["is_read_only"], true);
        assert_eq!(get(&test, "/network-interfaces/net")["host_dev_name"], "aeu8");
    }

    #[test]
    fn a_product_guest_has_no_serial_port_unless_asked_for() {
        let debian = all(KernelFlavour::Debian, Options::default());
        assert!(debian.iter().all(|(path, _)| *path != "/cpu-config"));
        let args = get(&debian, "/boot-source")["boot_args"].as_str().unwrap();
        assert!(args.contains("8250.nr_uarts=0") && !args.contains("console="), "{args}");
        assert!(kernel_options(KernelFlavour::Debian, true).contains("console=ttyS0"));
    }

    #[test]
    fn limits_are_token_buckets_of_a_second() {
        let limit = RateLimit { bytes: Some(1000), operations: None };
        let options = Options { disk_limit: Some(limit), ..Options::default() };
        let limited = all(KernelFlavour::Debian, options);
        assert_eq!(
            get(&limited, "/drives/disk")["rate_limiter"],
            json!({ "bandwidth": { "size": 1000, "refill_time": 1000 } })
        );
        assert!(get(&limited, "/network-interfaces/net").get("rx_rate_limiter").is_none());
    }
}
