//! The data directory: who may use it, where things are in it, and the small files that the
//! command line finds the server by.
//!
//! ```text
//!   lock         held by the one process that uses the directory
//!   aether.db    the store            queue.db    the queue
//!   worker-id    of the worker here   admin-key   the first API key, mode 0600
//!   auth-secret  hashes API keys; not where others share the store
//!   journal      of host resources, the drivers' own
//!   listen       address of the server, while one runs; https:// before it where it has TLS
//!   server.pem   the certificate that it shows, then
//!   authority/   of the platform's own certificates
//!   vms/         what the drivers keep
//!   snapshots/   of VMs               templates/  what VMs begin as
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use aether_api::client::Trust;
use aether_types::WorkerId;
use rustix::fs::FlockOperation;

use crate::{exit::Exit, failure::Failure};

/// Before the address of a server with TLS.
const TLS_PREFIX: &str = "https://";

/// Where a server answers, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listen {
    pub(crate) address: SocketAddr,
    pub(crate) has_tls: bool,
}

const SYSTEM_DIR: &str = "/var/lib/aetherium";

/// Paths in a data directory. Knows nothing of who uses it.
#[derive(Debug, Clone)]
pub(crate) struct DataDir(PathBuf);

impl DataDir {
    /// The one that was asked for; else root's, or the user's own.
    pub(crate) fn choose(given: Option<&Path>) -> Self {
        if let Some(path) = given {
            return Self(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
        }
        if rustix::process::geteuid().is_root() {
            return Self(SYSTEM_DIR.into());
        }
        let own = std::env::home_dir().map(|home| home.join(".local/share/aetherium"));
        Self(own.unwrap_or_else(|| SYSTEM_DIR.into()))
    }

    /// Where a client looks: its own directory, else the system's.
    pub(crate) fn candidates(given: Option<&Path>) -> Vec<Self> {
        let first = Self::choose(given);
        let system = Self(SYSTEM_DIR.into());
        if given.is_some() || first.0 == system.0 { vec![first] } else { vec![first, system] }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.0.join("aether.db")
    }

    pub(crate) fn queue(&self) -> PathBuf {
        self.0.join("queue.db")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.0.join("logs.db")
    }

    pub(crate) fn admin_key(&self) -> PathBuf {
        self.0.join("admin-key")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.0.join("snapshots")
    }

    pub(crate) fn templates(&self) -> PathBuf {
        self.0.join("templates")
    }

    pub(crate) fn tools(&self) -> PathBuf {
        self.0.join("tools")
    }

    pub(crate) fn authority(&self) -> PathBuf {
        self.0.join("authority")
    }

    /// The certificate that the server here shows.
    pub(crate) fn server_certificate(&self) -> PathBuf {
        self.0.join("server.pem")
    }

    fn listen(&self) -> PathBuf {
        self.0.join("listen")
    }

    /// Where the server answers that uses the directory, if one does.
    pub(crate) fn read_listen(&self) -> Result<Option<Listen>, Failure> {
        let path = self.listen();
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        let text = text.trim();
        let (has_tls, address) = match text.strip_prefix(TLS_PREFIX) {
            Some(address) => (true, address),
            None => (false, text),
        };
        let address = address.parse().map_err(|_| {
            Failure::new("io", Exit::Failure, format!("{}: not an address", path.display()))
        })?;
        Ok(Some(Listen { address, has_tls }))
    }

    /// How a client on this machine knows the server here.
    pub(crate) fn trust(&self, listen: Listen) -> Result<Trust, Failure> {
        if !listen.has_tls {
            return Ok(Trust::System);
        }
        let path = self.server_certificate();
        let pem = fs::read(&path).map_err(|e| Failure::file("read", &path, &e))?;
        Ok(Trust::Exactly(pem))
    }

    pub(crate) fn read_admin_key(&self) -> Result<Option<String>, Failure> {
        let key = read_if_there(&self.admin_key())?.map(|key| key.trim().to_owned());
        Ok(key.filter(|key| !key.is_empty()))
    }

    /// Makes the directory, for its owner alone, and takes it for this process.
    pub(crate) fn lock(self) -> Result<LockedDataDir, Failure> {
        let path = &self.0;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|e| Failure::file("make the data directory", path, &e).exit(Exit::Failure))?;
        let lock_path = path.join("lock");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|e| Failure::file("open", &lock_path, &e))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // Only for the message.
                let _ = lock.read_to_string(&mut holder);
                if !is_gone(holder.trim()) || !wait_for_lock(&lock) {
                    return Err(Failure::new(
                        "data_dir_in_use",
                        Exit::Conflict,
                        format!("{} is in use by process {}", path.display(), holder.trim()),
                    )
                    .hint("stop that one, or choose another --data-dir"));
                }
            }
            Err(error) => return Err(Failure::file("lock", &lock_path, &error.into())),
        }
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(|e| Failure::file("write", &lock_path, &e))?;
        Ok(LockedDataDir { dir: self, _lock: lock })
    }
}

/// For the end of what a killed process was just starting.
const LOCK_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// Its holder was killed; what it was just starting has a copy of the lock until it sees that.
fn is_gone(holder: &str) -> bool {
    !holder.is_empty() && !Path::new("/proc").join(holder).exists()
}

/// Waits in a thread, since only a wait without a bound is told that a lock is free.
fn wait_for_lock(lock: &File) -> bool {
    let Ok(lock) = lock.try_clone() else { return false };
    let (locked, is_locked) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let result = rustix::fs::flock(&lock, FlockOperation::LockExclusive);
        if locked.send(result.is_ok()).is_err() {
            // Too late: nobody wants it any more.
            let _ = rustix::fs::flock(&lock, FlockOperation::Unlock);
        }
    });
    is_locked.recv_timeout(LOCK_LIMIT).unwrap_or(false)
}

/// A data directory that is this process's alone, until it is dropped.
#[derive(Debug)]
pub(crate) struct LockedDataDir {
    dir: DataDir,
    _lock: File,
}

impl std::ops::Deref for LockedDataDir {
    type Target = DataDir;

    fn deref(&self) -> &DataDir {
        &self.dir
    }
}

impl LockedDataDir {
    /// The worker's identity, the same over restarts.
    pub(crate) fn worker_id(&self) -> Result<WorkerId, Failure> {
        let path = self.path().join("worker-id");
        if let Some(text) = read_if_there(&path)? {
            return text.trim().parse().map_err(|e| {
                Failure::new("io", Exit::Failure, format!("{}: {e}", path.display()))
                    .hint("put the old content back, or remove the data directory")
            });
        }
        let id = WorkerId::new();
        replace(&path, format!("{id}\n").as_bytes(), 0o600)?;
        Ok(id)
    }

    /// What API keys are hashed with: not in the store, so that a copy of it opens nothing.
    pub(crate) fn read_secret(&self) -> Result<Option<[u8; 32]>, Failure> {
        let path = self.path().join("auth-secret");
        match fs::read(&path) {
            Ok(bytes) => bytes.try_into().map(Some).map_err(|_| {
                Failure::new("io", Exit::Failure, format!("{} is damaged", path.display()))
                    .hint("put the old content back; or remove it, and every API key is void")
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Failure::file("read", &path, &e)),
        }
    }

    pub(crate) fn write_secret(&self, secret: &[u8; 32]) -> Result<(), Failure> {
        replace(&self.path().join("auth-secret"), secret, 0o600)
    }

    pub(crate) fn write_admin_key(&self, key: &str) -> Result<(), Failure> {
        replace(&self.admin_key(), format!("{key}\n").as_bytes(), 0o600)
    }

    pub(crate) fn write_listen(&self, listen: Listen) -> Result<(), Failure> {
        let Listen { address, has_tls } = listen;
        let prefix = if has_tls { TLS_PREFIX } else { "" };
        replace(&self.listen(), format!("{prefix}{address}\n").as_bytes(), 0o644)
    }

    pub(crate) fn remove_listen(&self) -> Result<(), Failure> {
        for path in [self.listen(), self.server_certificate()] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Failure::file("remove", &path, &e));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

pub(crate) fn read_if_there(path: &Path) -> Result<Option<String>, Failure> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(Failure::new(
            "permission_denied",
            Exit::Unauthorized,
            format!("{} is not yours to read", path.display()),
        )
        .hint("use root or sudo, or give --url and --key")),
        Err(e) => Err(Failure::file("read", path, &e)),
    }
}

/// Whole or not at all, also when the machine stops in the middle.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), Failure> {
    let new = path.with_extension("new");
    let write = || -> io::Result<()> {
        // A file that a crash left may have another mode.
        let _ = fs::remove_file(&new);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    };
    write().map_err(|e| Failure::file("write", path, &e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_directory_has_one_user_and_small_files_survive() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("data");
        let dir = DataDir::choose(Some(&path));
        let locked = dir.clone().lock().unwrap();
        let refused = dir.clone().lock().unwrap_err();
        assert_eq!(refused.exit, Exit::Conflict);
        assert!(refused.message.contains(&std::process::id().to_string()), "{refused}");

        assert_eq!(locked.worker_id().unwrap(), locked.worker_id().unwrap());
        locked.write_admin_key("ae_x").unwrap();
        assert_eq!(dir.read_admin_key().unwrap().as_deref(), Some("ae_x"));
        let mode = fs::metadata(dir.admin_key()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        for has_tls in [false, true] {
            let listen = Listen { address: "127.0.0.1:8080".parse().unwrap(), has_tls };
            locked.write_listen(listen).unwrap();
            assert_eq!(dir.read_listen().unwrap(), Some(listen));
        }
        locked.remove_listen().unwrap();
        locked.remove_listen().unwrap();
        assert_eq!(dir.read_listen().unwrap(), None);
    }
}
