//! The journal's lines: a checksum in hex, a space, JSON, a line feed.
//!
//! Text, so that a person can read what a host holds. The checksum (CRC-32) guards against a torn
//! or half-written line, not against an enemy: the file is its owner's.

use aether_types::MachineId;
use serde::{Deserialize, Serialize};

use super::{Owner, Resource};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Record {
    Intend(Owner, Resource),
    Forget(Owner, Resource),
    Machine(MachineId, serde_json::Value),
    ForgetOwner(Owner),
}

const CHECKSUM_DIGITS: usize = 8;

pub(super) fn encode(record: &Record) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "no map with keys that are not text, no foreign type")]
    let json = serde_json::to_string(record).expect("a record is JSON");
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())).into_bytes()
}

/// Gives each record up to the first that is damaged; returns the length of that prefix.
pub(super) fn decode(bytes: &[u8], mut each: impl FnMut(Record)) -> usize {
    let mut sound = 0;
    for line in bytes.split_inclusive(|b| *b == b'\n') {
        let Some(record) = decode_line(line) else { break };
        each(record);
        sound += line.len();
    }
    sound
}

/// A torn tail has nothing sound after it; damage in the middle (a bad disk, an editor) has.
pub(super) fn has_records_after_damage(rest: &[u8]) -> bool {
    rest.split_inclusive(|b| *b == b'\n').skip(1).any(|line| decode_line(line).is_some())
}

fn decode_line(line: &[u8]) -> Option<Record> {
    let line = line.strip_suffix(b"\n")?;
    let (checksum, json) = line.split_at_checked(CHECKSUM_DIGITS)?;
    let checksum = u32::from_str_radix(str::from_utf8(checksum).ok()?, 16).ok()?;
    let json = json.strip_prefix(b" ")?;
    (crc32fast::hash(json) == checksum).then_some(())?;
    serde_json::from_slice(json).ok()
}
