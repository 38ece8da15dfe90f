//! The root file system: a small Debian that boots to an agent, without kernel or init system.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::apt::{Sources, keyring};
use super::{BuildRequest, RECIPE, stage};
use crate::blobs::remove_tree;
use crate::manifest::Blob;
use crate::program::{Program, read_if_there};
use crate::store::ImageStore;
use crate::{Digest, ImageError};

/// What there is besides `minbase`: what agents and installers of tools expect to find.
const PACKAGES: [&str; 18] = [
    "ca-certificates",
    "curl",
    // Packs what an installer of a tool has made, in the VM where it ran.
    "erofs-utils",
    "git",
    "iproute2",
    "iputils-ping",
    // The kernel asks it for modules that come with a tool.
    "kmod",
    "less",
    // Node.js asks for it from version 25 on.
    "libatomic1",
    "login",
    "netcat-openbsd",
    "openssh-client",
    "passwd",
    "procps",
    "psmisc",
    "sudo",
    "unzip",
    "xz-utils",
];

/// Left out of every package: nobody reads them in a VM. Licences stay.
const LEFT_OUT: [&str; 5] = [
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

const CA_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const LOCAL_CAS: &str = "/usr/local/share/ca-certificates";

/// The time that every file has, and a UUID, so that the same packages give the same bytes.
pub(super) const EPOCH: &str = "1735689600";
const UUID: &str = "ae7e0000-0000-4000-8000-0000000000f5";

/// The user besides root.
const USER: &str = "user";
const USER_ID: &str = "1000";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Rootfs {
    pub(crate) blob: Blob,
    pub(crate) packages: Vec<String>,
}

/// Certificates that this host trusts, so that TLS works in a guest wherever it does here.
struct Certificates {
    bundle: Option<Vec<u8>>,
    /// Those that were added here, by file name: they outlive an update of the bundle in a guest.
    local: Vec<(String, Vec<u8>)>,
}

pub(crate) fn build(
    store: &ImageStore,
    request: &BuildRequest,
    sources: &Sources,
    progress: &dyn Fn(&str),
) -> Result<Rootfs, ImageError> {
    let mut packages: Vec<&str> = PACKAGES.to_vec();
    packages.extend(request.packages.iter().map(String::as_str));
    packages.sort_unstable();
    packages.dedup();
    let certificates = Certificates::of_host()?;
    let key = stage::key(&(
        (RECIPE, "rootfs", &sources.suite, &sources.mirror),
        (&packages, LEFT_OUT, certificates.digest()),
    ))?;
    if !request.refresh
        && let Some(rootfs) = stage::find::<Rootfs>(store, "rootfs", &key)?
    {
        return Ok(rootfs);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(ImageError::NotRoot);
    }
    progress("install the packages of the root file system");
    let scratch = store.blobs.scratch("rootfs");
    let tree = scratch.join("tree");
    fs::create_dir_all(&tree).map_err(ImageError::io("make the folder", &tree))?;
    // The root of the file system, whatever the builder's umask is.
    fs::set_permissions(&tree, Permissions::from_mode(0o755))
        .map_err(ImageError::io("set the mode of", &tree))?;
    Program::new("mmdebstrap", "mmdebstrap")?
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .args(["--quiet", "--mode=root", "--variant=minbase", "--format=directory"])
        .args(["--architectures=amd64", "--skip=check/empty"])
        .arg(format!("--keyring={}", keyring()?))
        .arg(format!("--include={}", packages.join(",")))
        .args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Retries \"3\""])
        .args(LEFT_OUT.map(|option| format!("--dpkgopt={option}")))
        .arg(&sources.suite)
        .arg(&tree)
        .args(sources.lines())
        .output()?;

    progress("set up the root file system");
    customise(&tree, sources, &certificates)?;
    let packages = Program::new("dpkg-query", "dpkg")?
        .arg(format!("--admindir={}/var/lib/dpkg", tree.display()))
        .args(["--show", "--showformat=${Package}=${Version}\\n"])
        .output()?
        .lines()
        .map(str::to_owned)
        .collect();

    progress("pack the root file system");
    let image = scratch.join("rootfs.erofs");
    Program::new("mkfs.erofs", "erofs-utils")?
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .args(["-T", EPOCH, "-U", UUID])
        .arg(&image)
        .arg(&tree)
        .output()?;
    let rootfs = Rootfs { blob: store.blobs.put_file(&image)?, packages };
    stage::keep(store, "rootfs", &key, &[&rootfs.blob], &rootfs)?;
    remove_tree(&scratch).map_err(ImageError::io("remove", &scratch))?;
    Ok(rootfs)
}

/// What Debian's packages leave to the one who installs them.
fn customise(
    tree: &Path,
    sources: &Sources,
    certificates: &Certificates,
) -> Result<(), ImageError> {
    Program::new("chroot", "coreutils")?
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .arg(tree)
        .args(["/usr/sbin/useradd", "--uid", USER_ID, "--user-group", "--create-home"])
        .args(["--shell", "/bin/bash", USER])
        .output()?;
    // The VM is the boundary, not the user: some tools only refuse to run as root.
    write(tree, "etc/sudoers.d/user", 0o440, format!("{USER} ALL=(ALL) NOPASSWD: ALL\n"))?;

    write(tree, "etc/apt/sources.list", 0o644, sources.guest_list())?;
    for (name, content) in &certificates.local {
        write(tree, &format!("{}/{name}", &LOCAL_CAS[1..]), 0o644, content)?;
    }
    if let Some(bundle) = &certificates.bundle {
        write(tree, &CA_BUNDLE[1..], 0o644, bundle)?;
    }

    // The agent makes these when it knows the VM's name and network: in memory, so that a VM that
    // is told who it is writes nothing to its disk.
    for name in ["resolv.conf", "hostname", "machine-id", "hosts"] {
        replace_with_link(tree, &format!("etc/{name}"), &format!("/run/aether-etc/{name}"))?;
    }
    replace_with_link(tree, "etc/mtab", "/proc/self/mounts")?;

    for (name, mode) in
        [("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("tmp", 0o1777)]
    {
        empty_folder(tree, name, mode)?;
    }
    // What differs from build to build, and says nothing.
    for name in [
        "var/log/apt",
        "var/log/dpkg.log",
        "var/log/alternatives.log",
        "var/log/bootstrap.log",
        "var/cache/ldconfig/aux-cache",
        "var/cache/debconf",
        "var/cache/apt",
        "var/lib/apt/lists",
        "var/lib/dpkg/status-old",
        "var/lib/dpkg/available-old",
        "etc/passwd-",
        "etc/group-",
        "etc/shadow-",
        "etc/gshadow-",
        "etc/subuid-",
        "etc/subgid-",
    ] {
        remove(&tree.join(name))?;
    }
    for name in ["var/lib/apt/lists/partial", "var/cache/apt/archives/partial", "var/cache/debconf"]
    {
        let path = tree.join(name);
        fs::create_dir_all(&path).map_err(ImageError::io("make the folder", path))?;
    }
    Ok(())
}

impl Certificates {
    fn of_host() -> Result<Self, ImageError> {
        let bundle = read_if_there(Path::new(CA_BUNDLE))?;
        let folder = Path::new(LOCAL_CAS);
        let mut local = Vec::new();
        if folder.is_dir() {
            for name in crate::store::file_names(folder)? {
                let path = folder.join(&name);
                if path.extension().is_some_and(|found| found == "crt") && path.is_file() {
                    local.push((name, crate::program::read(&path)?));
                }
            }
        }
        local.sort();
        Ok(Self { bundle, local })
    }

    fn digest(&self) -> Vec<Digest> {
        let local = self.local.iter().flat_map(|(name, content)| [name.as_bytes(), content]);
        self.bundle.as_deref().into_iter().chain(local).map(Digest::of_bytes).collect()
    }
}

/// Writes a file of the tree anew, so that a link that was there leads nowhere on the host.
fn write(tree: &Path, name: &str, mode: u32, content: impl AsRef<[u8]>) -> Result<(), ImageError> {
    let path = tree.join(name);
    remove(&path)?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(ImageError::io("make the folder", folder))?;
    }
    File::create_new(&path)
        .and_then(|mut file| {
            file.write_all(content.as_ref())?;
            file.set_permissions(Permissions::from_mode(mode))
        })
        .map_err(ImageError::io("write", path))
}

fn replace_with_link(tree: &Path, name: &str, target: &str) -> Result<(), ImageError> {
    let path = tree.join(name);
    remove(&path)?;
    symlink(target, &path).map_err(ImageError::io("link", path))
}

fn empty_folder(tree: &Path, name: &str, mode: u32) -> Result<(), ImageError> {
    let path = tree.join(name);
    remove(&path)?;
    fs::create_dir(&path)
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
        .map_err(ImageError::io("make the folder", path))
}

/// Removes a file, a link or a folder with all in it, where there is one.
fn remove(path: &Path) -> Result<(), ImageError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => remove_tree(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(ImageError::io("remove", path)),
    }
}
