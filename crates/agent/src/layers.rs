//! Tools: layers that the host has put on a device of their own, and one overlay of them on `/usr`.
//!
//! ```text
//!   /usr                        overlay of all that follows, written to the disk
//!   /run/aether/layers/N        layer N, erofs, of a partition that only the kernel knows
//!   /run/aether/disk/tools/M    what was written to /usr while there were M layers
//!   /run/aether/usr             /usr of the root file system
//! ```
//!
//! What a user sees is in this order: what was written, the layers since then, what was written
//! before those came, the layers before, and at last the root's own `/usr`. So what is written stays
//! over a boot, and a new layer is over all that was there when it came.
//!
//! A folder that is written to belongs to one overlay only, over the same layers for ever: its name
//! is the number of layers below it, which only grows.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use aether_protocol::limits::LAYERS_MAX;
use aether_protocol::{ErrorCode, Layer};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind};

use crate::error::Fail;
use crate::{kmsg, sys};

/// Everything of ours; of no use to anyone else.
pub(crate) const FOLDER: &str = "/run/aether";
/// The VM's writable file system, put there by [`crate::init`].
pub(crate) const DISK: &str = "/run/aether/disk";
const WRITTEN: &str = "/run/aether/disk/tools";
const LAYERS: &str = "/run/aether/layers";
const ROOT_USR: &str = "/run/aether/usr";
const USR: &str = "/usr";
/// After the base image and the VM's disk.
const DEVICE: &str = "/dev/vdc";
/// The kernel takes no more text with a mount.
const OPTIONS_BYTES_MAX: usize = 4095;

/// What must not be written through an overlay: containers have overlays of their own, and the
/// kernel does not put a third on two.
const ON_DISK: [(&str, &str); 2] =
    [("docker", "/var/lib/docker"), ("containerd", "/var/lib/containerd")];

/// How many layers the guest has. `None`: nobody has looked.
#[derive(Debug, Default)]
pub(crate) struct Mounted(Option<usize>);

impl Mounted {
    /// As far as it is known: without a question for layers there is no need to look.
    pub(crate) fn count(&self) -> usize {
        self.0.unwrap_or(0)
    }

    /// Makes the guest have these layers, the first of which it may have already.
    pub(crate) fn apply(&mut self, wanted: &[Layer]) -> Result<(), Fail> {
        if wanted.is_empty() {
            return Ok(());
        }
        let have = match self.0 {
            Some(have) => have,
            // An agent that was replaced finds what the one before has done.
            None => *self.0.insert(mounted_now().map_err(Fail::io("read the mounts"))?),
        };
        if wanted.len() < have {
            let message = format!("the guest has {have} layers and not {}", wanted.len());
            return Err(Fail::new(ErrorCode::InvalidArgument, message));
        }
        if wanted.len() > have {
            attach(wanted, have)?;
            self.0 = Some(wanted.len());
        }
        Ok(())
    }
}

fn attach(wanted: &[Layer], have: usize) -> Result<(), Fail> {
    make_folder(FOLDER, 0o700).map_err(Fail::io("make a folder for layers"))?;
    let device = File::open(DEVICE).map_err(|error| {
        Fail::new(ErrorCode::InvalidArgument, format!("open the layers device {DEVICE}: {error}"))
    })?;
    for (number, layer) in wanted.iter().enumerate().skip(have) {
        let named = |what: &str| format!("{what} layer {}", layer.name);
        // Partition numbers begin at one.
        let partition = number + 1;
        match sys::add_partition(device.as_fd(), partition, layer.offset, layer.length) {
            // Of an agent that ended here.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(errno) => return Err(Fail::sys(named("find"))(errno)),
        }
        let target = format!("{LAYERS}/{number}");
        make_folder(&target, 0o755).map_err(Fail::io(named("make a folder for")))?;
        let flags = MountFlags::RDONLY | MountFlags::NODEV;
        match mount(format!("{DEVICE}{partition}"), &target, "erofs", flags, c"") {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(errno) => return Err(Fail::sys(named("mount"))(errno)),
        }
        if !Path::new(&target).join("usr").is_dir() {
            return Err(Fail::new(ErrorCode::Io, format!("layer {} has no usr", layer.name)));
        }
    }
    put_on_usr(wanted.len()).map_err(Fail::io("put the layers on /usr"))?;
    keep_on_disk(have..wanted.len());
    Ok(())
}

fn put_on_usr(count: usize) -> io::Result<()> {
    if !Path::new(ROOT_USR).join("bin").exists() {
        make_folder(ROOT_USR, 0o755)?;
        mount_bind(USR, ROOT_USR)?;
    }
    let own = format!("{WRITTEN}/{count}");
    for name in ["upper", "work"] {
        make_folder(&format!("{own}/{name}"), 0o755)?;
    }
    let lower = lower_folders(count, &written_below(count)?).join(":");
    let plain = format!("lowerdir={lower},upperdir={own}/upper,workdir={own}/work");
    // With redirects, directories of layers can be renamed; not every kernel has them.
    let options = [format!("{plain},redirect_dir=on"), plain];
    if options[0].len() > OPTIONS_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let put = |options: &str| -> io::Result<()> {
        Ok(mount("overlay", USR, "overlay", MountFlags::NOATIME, &*CString::new(options)?)?)
    };
    put(&options[0]).or_else(|_| put(&options[1]))
}

/// Numbers of layers below which something was written, fewer than `count`, in order.
fn written_below(count: usize) -> io::Result<Vec<usize>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(WRITTEN)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.parse::<usize>().ok());
        found.extend(number.filter(|number| (1..count).contains(number)));
        if found.len() > LAYERS_MAX {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// From the one that is looked at first.
fn lower_folders(count: usize, written: &[usize]) -> Vec<String> {
    let layers = |from: usize, to: usize| (from..to).rev().map(|n| format!("{LAYERS}/{n}/usr"));
    let mut folders = Vec::new();
    let mut above = count;
    for &below in written.iter().rev() {
        folders.extend(layers(below, above));
        folders.push(format!("{WRITTEN}/{below}/upper"));
        above = below;
    }
    folders.extend(layers(0, above));
    folders.push(ROOT_USR.to_owned());
    folders
}

/// Where a layer brings containers, their files go to the disk. The guest works without.
fn keep_on_disk(mut layers: std::ops::Range<usize>) {
    let brings = |number| {
        ["sbin", "bin"].iter().any(|folder| {
            fs::exists(format!("{LAYERS}/{number}/usr/{folder}/dockerd")).is_ok_and(|is| is)
        })
    };
    if !layers.any(brings) {
        return;
    }
    for (name, target) in ON_DISK {
        let source = format!("{DISK}/{name}");
        let kept = make_folder(&source, 0o710)
            .and_then(|()| make_folder(target, 0o710))
            .and_then(|()| Ok(mount_bind(&source, target)?));
        match kept {
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
                kmsg!("put {target} on the disk: {error}");
            }
            Ok(()) | Err(_) => {}
        }
    }
}

fn mounted_now() -> io::Result<usize> {
    Ok(mounted_in(&fs::read_to_string("/proc/self/mountinfo")?))
}

/// The layers below the last overlay on `/usr` of ours.
fn mounted_in(mountinfo: &str) -> usize {
    let own = format!("upperdir={WRITTEN}/");
    let count = |line: &str| {
        let is_usr = line.split(' ').nth(4) == Some(USR);
        let (_, rest) = line.split_once(&own).filter(|_| is_usr)?;
        rest.split('/').next()?.parse::<usize>().ok()
    };
    mountinfo.lines().filter_map(count).max().unwrap_or(0)
}

/// Makes a folder and what is above it; one that is there is left alone.
fn make_folder(path: &str, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_last_is_looked_at_first() {
        let short = |count, written: &[usize]| {
            let folders = lower_folders(count, written).join(" ");
            folders.replace(WRITTEN, "W").replace(LAYERS, "L").replace("/usr", "")
        };
        assert_eq!(short(2, &[]), "L/1 L/0 /run/aether");
        assert_eq!(short(3, &[2]), "L/2 W/2/upper L/1 L/0 /run/aether");
        assert_eq!(short(5, &[1, 3]), "L/4 L/3 W/3/upper L/2 L/1 W/1/upper L/0 /run/aether");
    }

    #[test]
    fn the_longest_list_fits_a_mount() {
        let every: Vec<usize> = vec![32];
        let lower = lower_folders(LAYERS_MAX, &every).join(":");
        assert!(lower.len() + 200 < OPTIONS_BYTES_MAX, "{}", lower.len());
    }

    #[test]
    fn an_agent_that_was_replaced_sees_the_layers() {
        let line = |n: usize| {
            format!(
                "40 20 0:30 / /usr rw,relatime - overlay overlay rw,lowerdir=/run/aether/usr,\
                 upperdir=/run/aether/disk/tools/{n}/upper,workdir=/run/aether/disk/tools/{n}/work\n"
            )
        };
        assert_eq!(mounted_in(""), 0);
        let other = "41 20 0:31 / /usr rw - overlay overlay rw,upperdir=/base/upper\n";
        assert_eq!(mounted_in(other), 0);
        assert_eq!(mounted_in(&(other.to_owned() + &line(4) + &line(12))), 12);
        assert_eq!(mounted_in(&line(4).replace(" /usr ", " /opt ")), 0);
    }
}
