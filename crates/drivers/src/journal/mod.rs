//! What this host holds for the platform, written down before it is made.
//!
//! One append-only file in the data directory. A host resource is [`Journal::intend`]ed before it
//! is made and [`Journal::forget`]ten after it is gone, so whoever opens the file after a crash
//! finds every resource that may exist, and perhaps some that do not: undo steps take "not there"
//! for success.
//!
//! Invariants
//! - A call that returned `Ok` survives the death of this process at any later moment. A power cut
//!   may take the last records with it, and takes the processes, links and rules that they name
//!   as well.
//! - Reading a file that was cut anywhere gives a prefix of its history.
//! - One process at a time: the lock file beside the journal names the holder.
//! - The file has mode 0600: it holds the VMs' tokens.

mod record;

use std::{
    collections::BTreeMap,
    fmt,
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    net::Ipv4Addr,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aether_types::{MachineId, NetworkPolicy};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use self::record::Record;
use crate::DriverError;

/// Whose a resource is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    Machine(MachineId),
    /// The platform on this host: what all VMs share.
    Host,
}

impl From<MachineId> for Owner {
    fn from(id: MachineId) -> Self {
        Self::Machine(id)
    }
}

/// Something on this host that outlives a process and must not be left over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    Directory {
        path: PathBuf,
    },
    File {
        path: PathBuf,
    },
    Socket {
        path: PathBuf,
    },
    Mount {
        path: PathBuf,
    },
    Cgroup {
        path: PathBuf,
    },
    /// A process, told from a later one of the same id by its start time (field 22 of
    /// `/proc/PID/stat`).
    Process {
        pid: u32,
        start_ticks: u64,
        what: String,
    },
    /// A container of a Docker engine, by the engine's socket and its name there.
    Container {
        engine: PathBuf,
        name: String,
    },
    /// A TAP, or a veth pair in its place, in the platform's network namespace.
    Tap {
        name: String,
    },
    /// The VM's address; `slot` is its place in the range.
    Address {
        ip: Ipv4Addr,
        slot: u32,
    },
    /// What the packet filter has for the VM, whole, so that lost rules can be made again.
    Rules {
        ip: Ipv4Addr,
        policy: NetworkPolicy,
    },
    /// The platform's network on this host, by its instance.
    Network {
        instance: String,
        range: String,
    },
    /// A named network namespace.
    Namespace {
        name: String,
    },
    /// A veth pair, by the name of its end on the host.
    Veth {
        name: String,
    },
    /// A table of the packet filter on the host.
    Table {
        family: String,
        name: String,
    },
    /// Rules in a chain on the host that is not ours, found again by their comment.
    ForeignRules {
        comment: String,
    },
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Entry {
    machine: Option<serde_json::Value>,
    resources: Vec<Resource>,
}

/// What the records add up to.
#[derive(Debug, Clone, Default, PartialEq)]
struct Holdings(BTreeMap<Owner, Entry>);

impl Holdings {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Intend(owner, resource) => {
                let entry = self.0.entry(owner).or_default();
                if !entry.resources.contains(&resource) {
                    entry.resources.push(resource);
                }
            }
            Record::Forget(owner, resource) => {
                if let Some(entry) = self.0.get_mut(&owner) {
                    entry.resources.retain(|held| *held != resource);
                    self.drop_if_empty(owner);
                }
            }
            Record::Machine(id, machine) => {
                self.0.entry(Owner::Machine(id)).or_default().machine = Some(machine);
            }
            Record::ForgetOwner(owner) => {
                self.0.remove(&owner);
            }
        }
    }

    fn drop_if_empty(&mut self, owner: Owner) {
        if self.0.get(&owner).is_some_and(|e| e.machine.is_none() && e.resources.is_empty()) {
            self.0.remove(&owner);
        }
    }

    /// The shortest history with the same sum.
    fn records(&self) -> impl Iterator<Item = Record> {
        self.0.iter().flat_map(|(&owner, entry)| {
            let machine = match owner {
                Owner::Machine(id) => entry.machine.clone().map(|m| Record::Machine(id, m)),
                Owner::Host => None,
            };
            let resources = entry.resources.iter().cloned();
            machine.into_iter().chain(resources.map(move |r| Record::Intend(owner, r)))
        })
    }
}

/// Appended beyond this since the last compaction, and more than [`COMPACT_FACTOR`] times what
/// it left, the file is compacted again: a worker may run for years.
const COMPACT_BYTES_MIN: u64 = 1024 * 1024;
const COMPACT_FACTOR: u64 = 8;

const LOCK_LIMIT: Duration = Duration::from_secs(5);

struct State {
    holdings: Holdings,
    file: File,
    length: u64,
    length_compacted: u64,
}

struct Shared {
    path: PathBuf,
    state: Mutex<State>,
    lock: File,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Closing alone would leave it to a child that another thread is just forking.
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

/// Cheap to clone. Calls block for one small write.
#[derive(Clone)]
pub struct Journal(Arc<Shared>);

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("path", &self.0.path).finish_non_exhaustive()
    }
}

impl Journal {
    /// Opens or makes the journal at `path`. What a crash tore off is cut; what stands after a
    /// damaged record is kept aside in `<path>.damaged`.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, DriverError> {
        let path = path.into();
        let lock = lock(&path)?;
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(file_error("read journal", &path, source)),
        };
        let mut holdings = Holdings::default();
        let sound = record::decode(&bytes, |record| holdings.apply(record));
        let rest = &bytes[sound..];
        if record::has_records_after_damage(rest) {
            let aside = suffixed(&path, ".damaged");
            write_new(&aside, rest).map_err(|e| file_error("write", &aside, e))?;
            tracing::error!(
                journal = %path.display(), offset = sound, kept = %aside.display(),
                "the journal is damaged; records after the damage are not read"
            );
        }
        let (file, length) = compact(&path, &holdings)?;
        let state = Mutex::new(State { holdings, file, length, length_compacted: length });
        Ok(Self(Arc::new(Shared { path, state, lock })))
    }

    /// Writes down that `resource` is about to be made. Repeating it writes nothing.
    pub fn intend(&self, owner: impl Into<Owner>, resource: &Resource) -> Result<(), DriverError> {
        let owner = owner.into();
        let mut state = self.state();
        if state.holdings.0.get(&owner).is_some_and(|e| e.resources.contains(resource)) {
            return Ok(());
        }
        self.append(&mut state, Record::Intend(owner, resource.clone()))
    }

    /// Strikes out a resource that is gone. Striking out what is not there writes nothing.
    pub fn forget(&self, owner: impl Into<Owner>, resource: &Resource) -> Result<(), DriverError> {
        let owner = owner.into();
        let mut state = self.state();
        if !state.holdings.0.get(&owner).is_some_and(|e| e.resources.contains(resource)) {
            return Ok(());
        }
        self.append(&mut state, Record::Forget(owner, resource.clone()))
    }

    /// Keeps the driver's own record of a VM, in place of the one before.
    pub fn set_machine(
        &self,
        id: MachineId,
        machine: serde_json::Value,
    ) -> Result<(), DriverError> {
        self.append(&mut self.state(), Record::Machine(id, machine))
    }

    pub fn machine(&self, id: MachineId) -> Option<serde_json::Value> {
        self.state().holdings.0.get(&Owner::Machine(id))?.machine.clone()
    }

    /// Every VM that has a record or a resource.
    pub fn machines(&self) -> Vec<MachineId> {
        let state = self.state();
        let vms = state.holdings.0.keys().filter_map(|owner| match owner {
            Owner::Machine(id) => Some(*id),
            Owner::Host => None,
        });
        vms.collect()
    }

    /// In the order in which they were intended; undo in reverse.
    pub fn resources(&self, owner: impl Into<Owner>) -> Vec<Resource> {
        let state = self.state();
        state.holdings.0.get(&owner.into()).map(|e| e.resources.clone()).unwrap_or_default()
    }

    /// Strikes out everything of an owner: its record and its resources.
    pub fn forget_owner(&self, owner: impl Into<Owner>) -> Result<(), DriverError> {
        let owner = owner.into();
        let mut state = self.state();
        if !state.holdings.0.contains_key(&owner) {
            return Ok(());
        }
        self.append(&mut state, Record::ForgetOwner(owner))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Holdings change only after their record is written, in steps that do not panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, state: &mut State, record: Record) -> Result<(), DriverError> {
        let path = &self.0.path;
        let line = record::encode(&record);
        if let Err(source) = state.file.write_all_at(&line, state.length) {
            // A part of the line may be there (a full disk); the next record goes over it, and
            // until then it reads as a torn tail.
            return Err(file_error("append to journal", path, source));
        }
        state.length += line.len() as u64;
        state.holdings.apply(record);
        let appended = state.length - state.length_compacted;
        if appended > COMPACT_BYTES_MIN.max(COMPACT_FACTOR * state.length_compacted) {
            match compact(path, &state.holdings) {
                Ok((file, length)) => {
                    state.file = file;
                    state.length = length;
                    state.length_compacted = length;
                }
                // The record itself is safe; the next append tries again.
                Err(error) => tracing::warn!(%error, "cannot compact the journal"),
            }
        }
        Ok(())
    }
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> DriverError {
    DriverError::File { action, path: path.to_owned(), source }
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The lock is on a file of its own, since compaction replaces the journal.
fn lock(path: &Path) -> Result<File, DriverError> {
    let lock_path = suffixed(path, ".lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(|e| file_error("open", &lock_path, e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut text = String::new();
            file.read_to_string(&mut text).map_err(|e| file_error("read", &lock_path, e))?;
            let holder = text.trim();
            let gone = !Path::new("/proc").join(holder).exists();
            if holder.is_empty() || !gone || !wait_for_lock(&file) {
                return Err(DriverError::Unavailable(format!(
                    "the data directory {} is in use by process {holder}; stop it or use another \
                     directory",
                    path.parent().unwrap_or(path).display(),
                )));
            }
        }
        Err(error) => return Err(file_error("lock", &lock_path, error.into())),
    }
    let named = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    named.map_err(|e| file_error("write", &lock_path, e))?;
    Ok(file)
}

/// A process that was killed may have left a child that has not come to its `exec`, or to its end,
/// and holds the lock until then.
fn wait_for_lock(file: &File) -> bool {
    let Ok(file) = file.try_clone() else { return false };
    let (locked, lock) = std::sync::mpsc::sync_channel(1);
    // Where the limit passes, the thread stays until the lock is free and then unlocks it.
    std::thread::spawn(move || {
        let result = flock(&file, FlockOperation::LockExclusive);
        if locked.send(result.is_ok()).is_err() {
            let _ = flock(&file, FlockOperation::Unlock);
        }
    });
    lock.recv_timeout(LOCK_LIMIT).unwrap_or(false)
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    Ok(file)
}

/// Replaces the file by the shortest history, in one step; also makes it. Returns it for append.
fn compact(path: &Path, holdings: &Holdings) -> Result<(File, u64), DriverError> {
    let bytes: Vec<u8> = holdings.records().flat_map(|r| record::encode(&r)).collect();
    let new = suffixed(path, ".new");
    let file = write_new(&new, &bytes).map_err(|e| file_error("write", &new, e))?;
    std::fs::rename(&new, path).map_err(|e| file_error("replace", path, e))?;
    if let Some(parent) = path.parent() {
        let synced = File::open(parent).and_then(|dir| dir.sync_data());
        synced.map_err(|e| file_error("sync", parent, e))?;
    }
    Ok((file, bytes.len() as u64))
}

#[cfg(test)]
mod tests;
