//! What a snapshot is made of, with a keyed MAC over it, as one JSON file:
//! `{"mac":"<64 digits>","manifest":{…}}`. The MAC is over the bytes of the inner object.

use blake3::Hash;
use serde::{Deserialize, Serialize};

pub(super) const FILE_NAME: &str = "manifest.json";
pub(super) const FORMAT: u32 = 1;
/// Far above what a snapshot's few files and its detail need.
pub(super) const BYTES_MAX: u64 = 4 << 20;

const HEAD: &[u8] = b"{\"mac\":\"";
const MIDDLE: &[u8] = b"\",\"manifest\":";
const TAIL: &[u8] = b"}\n";
const MAC_DIGITS: usize = 2 * blake3::OUT_LEN;

pub(super) type Key = [u8; blake3::KEY_LEN];

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) format: u32,
    pub(super) id: String,
    pub(super) created_unix_ms: u64,
    pub(super) files: Vec<FileRecord>,
    pub(super) detail: serde_json::Value,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileRecord {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    /// When it was sealed; a copy of the file may take more or less.
    pub(super) allocated_bytes: u64,
    /// See the module `content`; hexadecimal.
    pub(super) digest: String,
}

/// Why bytes are no manifest of this store.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// Not written by this program, or cut short.
    Malformed,
    /// Another key, or changed since.
    Mac,
    Format(u32),
}

impl Manifest {
    pub(super) fn encode(&self, key: &Key) -> serde_json::Result<Vec<u8>> {
        let body = serde_json::to_vec(self)?;
        let mac = blake3::keyed_hash(key, &body).to_hex();
        Ok([HEAD, mac.as_bytes(), MIDDLE, &body, TAIL].concat())
    }

    /// The body is parsed only when its MAC is right.
    pub(super) fn decode(bytes: &[u8], key: &Key) -> Result<Self, Flaw> {
        let (mac, body) = split(bytes).ok_or(Flaw::Malformed)?;
        // Compared in constant time, by the type.
        if blake3::keyed_hash(key, body) != mac {
            return Err(Flaw::Mac);
        }
        // The rest may have another shape in another format.
        #[derive(Deserialize)]
        struct Versioned {
            format: u32,
        }
        let Versioned { format } = serde_json::from_slice(body).map_err(|_| Flaw::Malformed)?;
        if format != FORMAT {
            return Err(Flaw::Format(format));
        }
        serde_json::from_slice(body).map_err(|_| Flaw::Malformed)
    }
}

fn split(bytes: &[u8]) -> Option<(Hash, &[u8])> {
    let (mac, rest) = bytes.strip_prefix(HEAD)?.split_at_checked(MAC_DIGITS)?;
    let body = rest.strip_prefix(MIDDLE)?.strip_suffix(TAIL)?;
    Some((Hash::from_hex(mac).ok()?, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            id: "one".to_owned(),
            created_unix_ms: 7,
            files: vec![],
            detail: serde_json::json!({"a": [1, 2.5, "\u{e9}"]}),
        }
    }

    #[test]
    fn what_is_written_is_json_and_read_again() {
        let bytes = manifest().encode(&[1; 32]).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["manifest"]["id"], "one");
        assert_eq!(Manifest::decode(&bytes, &[1; 32]), Ok(manifest()));
        assert_eq!(Manifest::decode(&bytes, &[2; 32]), Err(Flaw::Mac));
    }

    #[test]
    fn any_changed_or_missing_byte_is_found() {
        let bytes = manifest().encode(&[1; 32]).unwrap();
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 0x20;
            // The digits of a MAC may be written in either case.
            let read = Manifest::decode(&changed, &[1; 32]);
            assert!(read.is_err() || read == Ok(manifest()) && index < HEAD.len() + MAC_DIGITS);
            assert!(Manifest::decode(&bytes[..index], &[1; 32]).is_err());
        }
    }

    #[test]
    fn later_format_is_told() {
        let later = Manifest { format: 9, ..manifest() };
        let bytes = later.encode(&[1; 32]).unwrap();
        assert_eq!(Manifest::decode(&bytes, &[1; 32]), Err(Flaw::Format(9)));
    }
}
