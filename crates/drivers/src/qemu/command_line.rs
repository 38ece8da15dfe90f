//! QEMU's command line: pure, so that all of it can be seen in a test.
//!
//! Two secrets of the guest are kept out of it, because every user of the host can read it: the
//! kernel's command line, which has the agent's token, is given in a file in memory.

use std::{ffi::OsString, fmt::Write as _, os::fd::RawFd};

use aether_images::Placement;
use serde_json::json;

use super::{
    layers,
    stream::MEMORY_BLOCK,
    toolbox::{self, OUTPUT_ID, TOOLS_ID},
};
use crate::{DriverError, GuestNetwork, KernelFlavour, MachineSpec, tools::OUTPUT_FILE};

/// What of a machine a snapshot depends on beside what [`super::Qemu`] names: to be counted up
/// whenever a device, its place or its options change.
pub(super) const LAYOUT: u32 = 3;

/// The guest's end of the private link.
pub(super) const CHANNEL_GUEST_MAC: &str = "02:ae:00:00:00:02";
/// The host's end of the private link.
pub(super) const CHANNEL_HOST_MAC: &str = "02:ae:00:00:00:01";
/// Kept of what the guest's console says.
pub(super) const CONSOLE_BYTES: u64 = 64 * 1024;
/// QEMU reads no longer line from a configuration file.
const CONFIG_LINE_BYTES_MAX: usize = 1000;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// bun and Claude Code die on `qemu64`. A timer that runs on in every idle state lets the kernel stop
/// its ticks: without it an idle guest takes a twentieth of a processor.
pub(super) const TCG_PROCESSOR: &str = "Nehalem,+arat";

/// Descriptors that QEMU inherits, under their numbers.
#[derive(Debug, Clone)]
pub(super) struct Inherited {
    pub(super) begin: Begin,
    pub(super) rootfs: RawFd,
    pub(super) qmp: RawFd,
    /// The guest's network.
    pub(super) tap: RawFd,
    /// The private link.
    pub(super) channel: RawFd,
    /// From the lowest to the top, which is the VM's own.
    pub(super) layers: Vec<(u32, Layer)>,
    /// `None`: the VM has no tools.
    pub(super) tools: Option<Toolbox>,
}

/// The layers of tools, from the lowest, with the file that has their places.
#[derive(Debug, Clone)]
pub(super) struct Toolbox {
    pub(super) metadata: RawFd,
    pub(super) layers: Vec<(RawFd, Placement)>,
}

/// How the guest comes to run.
#[derive(Debug, Clone, Copy)]
pub(super) enum Begin {
    /// `config`: the file in memory with [`config`].
    Boot { kernel: RawFd, initrd: RawFd, config: RawFd },
    /// Kernel and initramfs are in the memory; QEMU waits to be told where the devices' state is.
    Restore { memory: RawFd },
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Layer {
    Frozen(RawFd),
    /// In the directory that QEMU runs in.
    Own,
}

/// The kernel's own options. `tsc_khz` is this host's.
pub(super) fn kernel_options(accelerator: Accelerator, tsc_khz: Option<u64>) -> String {
    // Only what is an emergency is printed, so that a panic is seen and a boot is not slowed down.
    let mut options = "quiet loglevel=1 console=ttyS0 8250.nr_uarts=1 panic=-1 reboot=t pci=off \
         random.trust_cpu=on cryptomgr.notests audit=0 nowatchdog nmi_watchdog=0"
        .to_owned();
    match accelerator {
        Accelerator::Kvm => {}
        Accelerator::Tcg => {
            // An emulated guest is not isolated by its kernel's hardening: boot fast.
            options.push_str(
                " nokaslr mitigations=off no_timer_check noreplace-smp lsm= ima_appraise=off \
                 initcall_blacklist=init_kprobes,btf_vmlinux_init",
            );
            if let Some(khz) = tsc_khz {
                // A busy host makes calibration fail, and then the kernel hangs.
                let _ = write!(options, " tsc=reliable tsc_early_khz={khz}");
            }
        }
    }
    options
}

/// QEMU's configuration file: the part of the command line that nobody else may read.
pub(super) fn config(kernel_options: &str, token: &str) -> Result<String, DriverError> {
    let line = format!(
        "  append = \"{kernel_options} ae.channel=link:{CHANNEL_GUEST_MAC} \
         ae.hostmac={CHANNEL_HOST_MAC} ae.token={token}\"\n"
    );
    let is_hex = token.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_hex || line.len() > CONFIG_LINE_BYTES_MAX {
        return Err(DriverError::Vmm {
            action: "take the kernel's command line".to_owned(),
            detail: "the token is not hexadecimal, or the line is too long".to_owned(),
        });
    }
    Ok(format!("[machine]\n{line}"))
}

/// A restored guest need not tell anyone where it is now: the host knows its addresses, and the
/// words would be the first thing that it has to say.
const QUIET: &str = "guest_announce=off";

/// Everything after the program's name.
pub(super) fn arguments(
    spec: &MachineSpec,
    accelerator: Accelerator,
    guest: &GuestNetwork,
    fds: &Inherited,
) -> Vec<OsString> {
    let acpi = match spec.boot.kernel_flavour {
        KernelFlavour::Debian => "on",
        KernelFlavour::FirecrackerTest => "off",
    };
    let cpu = match accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => TCG_PROCESSOR,
    };
    let Inherited { begin, rootfs, qmp, tap, channel, .. } = *fds;
    let tools = fds.tools.as_ref();
    let mut args: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| {
        args.push(option.to_owned());
        if !value.is_empty() {
            args.push(value);
        }
    };
    add("-nodefaults", String::new());
    add("-no-user-config", String::new());
    add("-display", "none".into());
    // A guest that ends stops its machine, which then waits to be asked why: the console is in
    // QEMU's memory.
    add("-no-reboot", String::new());
    add("-no-shutdown", String::new());
    add(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
    );
    let memory_bytes = u64::from(spec.memory_mb) << 20;
    add(
        "-machine",
        format!(
            "microvm,acpi={acpi},pit=off,pic=off,rtc=on,isa-serial=on,memory-backend={MEMORY_BLOCK}"
        ),
    );
    match begin {
        Begin::Boot { .. } => {
            add("-object", format!("memory-backend-ram,id={MEMORY_BLOCK},size={memory_bytes}"));
        }
        Begin::Restore { memory } => add(
            "-object",
            format!(
                "memory-backend-file,id={MEMORY_BLOCK},size={memory_bytes},\
                 mem-path=/dev/fd/{memory},share=off"
            ),
        ),
    }
    add("-accel", accelerator.name().into());
    add("-cpu", cpu.into());
    add("-smp", spec.vcpus.to_string());
    add("-m", format!("{}M", spec.memory_mb));
    add("-name", format!("aether-{}", spec.id));
    match begin {
        Begin::Boot { kernel, initrd, config } => {
            add("-readconfig", format!("/dev/fd/{config}"));
            add("-kernel", format!("/dev/fd/{kernel}"));
            add("-initrd", format!("/dev/fd/{initrd}"));
        }
        Begin::Restore { .. } => add("-incoming", "defer".into()),
    }
    add("-chardev", format!("socket,id=qmp,fd={qmp},server=on,wait=off"));
    add("-mon", "chardev=qmp,mode=control".into());
    add("-chardev", format!("ringbuf,id=console,size={CONSOLE_BYTES}"));
    add("-serial", "chardev:console".into());
    // The guest finds its disks by their order.
    add("-add-fd", format!("fd={rootfs},set=1,opaque=rootfs"));
    add("-drive", "if=none,id=rootfs,format=raw,file=/dev/fdset/1,readonly=on".into());
    add("-device", "virtio-blk-device,drive=rootfs".into());
    for (file, node) in disk(&fds.layers) {
        if let Layer::Frozen(fd) = file {
            add("-add-fd", format!("fd={fd},set={},opaque=layer", set_of(fd)));
        }
        add("-blockdev", node.to_string());
    }
    let top = fds.layers.last().map(|(number, _)| node_name(*number)).unwrap_or_default();
    add("-device", format!("virtio-blk-device,drive={top},id={DISK_ID}"));
    for fd in tools.into_iter().flat_map(Toolbox::descriptors) {
        add("-add-fd", format!("fd={fd},set={},opaque=tools", set_of(fd)));
    }
    for node in toolbox_nodes(tools) {
        add("-blockdev", node.to_string());
    }
    let top = toolbox::node_name(tools.map_or(0, |tools| tools.layers.len()));
    add("-device", format!("virtio-blk-device,drive={top},id={TOOLS_ID}"));
    if spec.output_mb.is_some() {
        let file = json!({ "driver": "file", "filename": OUTPUT_FILE, "discard": "unmap" });
        let node = json!({ "driver": "raw", "node-name": OUTPUT_ID, "file": file });
        add("-blockdev", node.to_string());
        add("-device", format!("virtio-blk-device,drive={OUTPUT_ID}"));
    }
    add("-netdev", format!("tap,id=net,fd={tap}"));
    let GuestNetwork { mac, mtu, .. } = guest;
    // Without the MTU large downloads hang where the host's is small. A link that has a status comes
    // up up to a second after it was configured.
    add(
        "-device",
        format!("virtio-net-device,netdev=net,mac={mac},host_mtu={mtu},status=off,{QUIET}"),
    );
    add("-netdev", format!("tap,id=channel,fd={channel}"));
    add("-device", format!("virtio-net-device,netdev=channel,mac={CHANNEL_GUEST_MAC},{QUIET}"));
    add("-object", "rng-random,id=random,filename=/dev/urandom".into());
    add("-device", "virtio-rng-device,rng=random".into());
    args.into_iter().map(OsString::from).collect()
}

/// The device whose drive is the VM's disk.
pub(super) const DISK_ID: &str = "disk";
/// The first set is the root file system's.
const SETS_BEFORE_LAYERS: RawFd = 2;

fn set_of(fd: RawFd) -> RawFd {
    fd + SETS_BEFORE_LAYERS
}

impl Toolbox {
    fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        std::iter::once(self.metadata).chain(self.layers.iter().map(|(fd, _)| *fd))
    }
}

/// The layers device, from the lowest node up.
fn toolbox_nodes(tools: Option<&Toolbox>) -> Vec<serde_json::Value> {
    let set = |fd| i64::from(set_of(fd));
    let mut nodes = vec![toolbox::lowest()];
    if let Some(tools) = tools {
        for (number, (fd, placement)) in tools.layers.iter().enumerate() {
            let (sets, below) = ((set(tools.metadata), set(*fd)), toolbox::node_name(number));
            nodes.push(toolbox::node(number + 1, sets, placement, &json!(below)));
        }
    }
    nodes
}

/// The name in QEMU of a layer of the disk.
pub(super) fn node_name(number: u32) -> String {
    format!("layer{number}")
}

pub(super) fn number_of_node(name: &str) -> Option<u32> {
    name.strip_prefix("layer")?.parse().ok()
}

/// The layers of a disk, each over the one before; all but the last are read only.
fn disk(layers: &[(u32, Layer)]) -> Vec<(Layer, serde_json::Value)> {
    let mut nodes = Vec::new();
    let mut below = None;
    for (at, (number, layer)) in layers.iter().enumerate() {
        let is_top = at + 1 == layers.len();
        let file = match layer {
            // Many have it open, and nobody writes it.
            Layer::Frozen(fd) => json!({
                "driver": "file", "filename": format!("/dev/fdset/{}", set_of(*fd)),
                "read-only": true, "locking": "off",
            }),
            Layer::Own if is_top => own_file(*number),
            Layer::Own => json!({
                "driver": "file", "filename": layers::file_name(*number),
                "read-only": true, "locking": "off",
            }),
        };
        let mut node = layer_node(*number, &file, below.take().map(serde_json::Value::String));
        if !is_top {
            node["read-only"] = json!(true);
        }
        nodes.push((*layer, node));
        below = Some(node_name(*number));
    }
    nodes
}

/// The file of a top layer.
pub(super) fn own_file(number: u32) -> serde_json::Value {
    json!({ "driver": "file", "filename": layers::file_name(number), "discard": "unmap" })
}

/// A layer over another; `Null` below stands for one that is put there later.
pub(super) fn layer_node(
    number: u32,
    file: &serde_json::Value,
    below: Option<serde_json::Value>,
) -> serde_json::Value {
    let driver = if number == 0 { "raw" } else { "qcow2" };
    let mut node = json!({
        "driver": driver, "node-name": node_name(number), "discard": "unmap", "file": file,
    });
    if let Some(below) = below {
        node["backing"] = below;
    }
    node
}

/// Whether a console shows that the guest's kernel panicked.
pub(crate) fn shows_panic(console: &str) -> bool {
    // As printk writes it: with a time before it, or at the start of a line.
    console.lines().any(|line| {
        let text = match line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
            Some((_, text)) => text,
            None => line,
        };
        text.starts_with("Kernel panic - not syncing")
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn line(flavour: KernelFlavour, accelerator: Accelerator) -> String {
        let begin = Begin::Boot { kernel: 20, initrd: 21, config: 27 };
        line_of(flavour, accelerator, begin, &[(0, Layer::Own)])
    }

    fn line_of(
        flavour: KernelFlavour,
        accelerator: Accelerator,
        begin: Begin,
        layers: &[(u32, Layer)],
    ) -> String {
        let mut spec = crate::tests::spec(Path::new("/images"));
        spec.boot.kernel_flavour = flavour;
        let guest = GuestNetwork {
            mac: "02:ae:01:00:00:05".into(),
            addresses: Vec::new(),
            gateways: Vec::new(),
            dns: Vec::new(),
            mtu: 1400,
        };
        let layers = layers.to_vec();
        let fds =
            Inherited { begin, rootfs: 22, qmp: 24, tap: 25, channel: 26, layers, tools: None };
        let args = arguments(&spec, accelerator, &guest, &fds);
        let args: Vec<_> = args.iter().map(|a| a.to_str().unwrap()).collect();
        args.join(" ").replace(&spec.id.to_string(), "ID")
    }

    #[test]
    fn the_command_line_is_the_measured_one() {
        assert_eq!(
            line(KernelFlavour::Debian, Accelerator::Tcg),
            "-nodefaults -no-user-config -display none -no-reboot -no-shutdown -sandbox \
             on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -machine \
             microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on,memory-backend=mem -object \
             memory-backend-ram,id=mem,size=134217728 -accel tcg -cpu Nehalem,+arat -smp 1 -m 128M -name \
             aether-ID -readconfig /dev/fd/27 -kernel /dev/fd/20 -initrd /dev/fd/21 -chardev \
             socket,id=qmp,fd=24,server=on,wait=off -mon chardev=qmp,mode=control -chardev \
             ringbuf,id=console,size=65536 -serial chardev:console -add-fd \
             fd=22,set=1,opaque=rootfs -drive \
             if=none,id=rootfs,format=raw,file=/dev/fdset/1,readonly=on -device \
             virtio-blk-device,drive=rootfs -blockdev \
             {\"discard\":\"unmap\",\"driver\":\"raw\",\"file\":{\"discard\":\"unmap\",\"driver\":\
             \"file\",\"filename\":\"disk.img\"},\"node-name\":\"layer0\"} -device \
             virtio-blk-device,drive=layer0,id=disk -blockdev \
             {\"driver\":\"null-co\",\"node-name\":\"tools0\",\"read-only\":true,\
             \"read-zeroes\":true,\"size\":68719476736} -device \
             virtio-blk-device,drive=tools0,id=tools -netdev tap,id=net,fd=25 -device \
             virtio-net-device,netdev=net,mac=02:ae:01:00:00:05,host_mtu=1400,status=off,guest_announce=off -netdev \
             tap,id=channel,fd=26 -device \
             virtio-net-device,netdev=channel,mac=02:ae:00:00:00:02,guest_announce=off -object \
             rng-random,id=random,filename=/dev/urandom -device virtio-rng-device,rng=random"
        );
    }

    #[test]
    fn a_clone_maps_the_memory_privately_and_reads_what_is_below_its_disk() {
        let layers = [(0, Layer::Frozen(30)), (1, Layer::Frozen(31)), (2, Layer::Own)];
        let begin = Begin::Restore { memory: 40 };
        let line = line_of(KernelFlavour::Debian, Accelerator::Tcg, begin, &layers);
        for part in [
            "-object memory-backend-file,id=mem,size=134217728,mem-path=/dev/fd/40,share=off ",
            " -incoming defer ",
            " -add-fd fd=31,set=33,opaque=layer -blockdev {\"backing\":\"layer0\",",
            "\"filename\":\"/dev/fdset/33\",\"locking\":\"off\",\"read-only\":true}",
            "{\"backing\":\"layer1\",\"discard\":\"unmap\",\"driver\":\"qcow2\",\"file\":{\"discard\":\
             \"unmap\",\"driver\":\"file\",\"filename\":\"disk.2.qcow2\"},\"node-name\":\"layer2\"}",
            "virtio-blk-device,drive=layer2,id=disk",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(!line.contains("-kernel") && !line.contains("-readconfig"), "{line}");
    }

    #[test]
    fn kernel_and_accelerator_change_what_they_must() {
        let test = line(KernelFlavour::FirecrackerTest, Accelerator::Kvm);
        assert!(test.contains("acpi=off") && test.contains("-accel kvm -cpu host"), "{test}");
        let kvm = kernel_options(Accelerator::Kvm, Some(1));
        assert!(!kvm.contains("mitigations") && !kvm.contains("nokaslr"), "{kvm}");
        let tcg = kernel_options(Accelerator::Tcg, Some(2_600_000));
        assert!(tcg.ends_with("tsc=reliable tsc_early_khz=2600000"), "{tcg}");
    }

    #[test]
    fn the_token_is_in_the_configuration_and_fits_its_line() {
        let options = kernel_options(Accelerator::Tcg, Some(99_999_999));
        let text = config(&options, &"f".repeat(64)).unwrap();
        assert!(text.starts_with("[machine]\n  append = \"quiet "), "{text}");
        assert!(config(&options, "f\"\n[drive]").is_err());
        assert!(config(&"x".repeat(1000), "ff").is_err());
    }

    #[test]
    fn a_panic_is_told_from_talk_of_one() {
        assert!(shows_panic("[    0.1] Kernel panic - not syncing: Attempted to kill init!\n"));
        assert!(!shows_panic("bash: echo Kernel panic - not syncing\n"));
        assert!(!shows_panic("[    0.2] reboot: Restarting system"));
    }
}
