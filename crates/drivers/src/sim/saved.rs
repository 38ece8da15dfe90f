//! A simulated snapshot: two small files of JSON, so that what is done to real ones (digests,
//! damage, removal) can be done to these.
//!
//! Times are the guest's own: since its boot, standing still while it does.

use std::{collections::BTreeMap, fs, io, path::Path, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{
    files::Disk,
    run::{Program, Progress},
};
use crate::{DriverError, host::file_error};

/// Of our layout here and of what programs mean: another one cannot be restored.
pub(super) const FORMAT: &str = "sim 1";
pub(super) const MEMORY_FILE: &str = "memory.json";
pub(super) const DISK_FILE: &str = "disk.json";

/// Bytes as two digits each: these files are for tests, and people read them.
pub(super) mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(in super::super) fn serialize<S: Serializer>(
        bytes: &[u8],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
        let text: String = bytes.iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect();
        serializer.serialize_str(&text)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok();
        let bytes = text.as_bytes().chunks(2).map(byte).collect::<Option<_>>();
        bytes.ok_or_else(|| D::Error::custom("not hexadecimal"))
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct SavedGuest {
    pub(super) boot_id: String,
    pub(super) uptime: Duration,
    pub(super) token: String,
    pub(super) hostname: String,
    pub(super) env: BTreeMap<String, String>,
    pub(super) next_pid: u32,
    pub(super) has_agent: bool,
    pub(super) runs: BTreeMap<String, SavedRun>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct SavedRun {
    pub(super) id: String,
    pub(super) is_detached: bool,
    pub(super) pid: u32,
    pub(super) program: Program,
    pub(super) started_at: Duration,
    pub(super) timeout_at: Option<Duration>,
    pub(super) tty: (u32, u32),
    pub(super) stdin: SavedStdin,
    pub(super) stdout: SavedOutput,
    pub(super) stderr: SavedOutput,
    pub(super) progress: Progress,
    /// Signal and cause, in the protocol's numbers.
    pub(super) doom: Option<(i32, i32)>,
    pub(super) end: Option<SavedEnd>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct SavedStdin {
    /// As they came: what was printed of the first is counted from its beginning.
    pub(super) chunks: Vec<Chunk>,
    pub(super) received: u64,
    pub(super) taken: u64,
    pub(super) is_closed: bool,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Chunk(#[serde(with = "hex")] pub(super) Vec<u8>);

#[derive(Serialize, Deserialize)]
pub(super) struct SavedOutput {
    pub(super) base: u64,
    #[serde(with = "hex")]
    pub(super) kept: Vec<u8>,
    pub(super) sent: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct SavedEnd {
    pub(super) exit_code: Option<i32>,
    pub(super) signal: Option<i32>,
    pub(super) cause: i32,
    pub(super) duration_us: u64,
}

/// Writes a snapshot's files: the disk's where there is one.
pub(super) fn write(
    into: &Path,
    memory: &SavedGuest,
    disk: Option<&Disk>,
) -> Result<(), DriverError> {
    write_file(&into.join(MEMORY_FILE), memory)?;
    disk.map_or(Ok(()), |disk| write_file(&into.join(DISK_FILE), disk))
}

fn write_file(path: &Path, value: &impl Serialize) -> Result<(), DriverError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let write = || {
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
        let bytes = serde_json::to_vec(value)?;
        io::Write::write_all(&mut file, &bytes)
    };
    write().map_err(|e| file_error("write", path, e))
}

pub(super) fn read<T: DeserializeOwned>(directory: &Path, name: &str) -> Result<T, DriverError> {
    let path = directory.join(name);
    let read = || serde_json::from_slice(&fs::read(&path)?).map_err(io::Error::from);
    read().map_err(|e| file_error("read", &path, e))
}
