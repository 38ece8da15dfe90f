//! The initramfs: the agent as `/init`, the modules that it loads, and folders to mount on.

use std::path::Path;

use crate::ImageError;
use crate::cpio::{Segment, archive, find};
use crate::program::read;

/// The names in this file, in this order, are the modules to load: one file name a line.
pub(crate) const MODULE_ORDER: &str = "modules/order";

/// Where the kernel looks for the first program.
const AGENT: &str = "init";

/// Reads the agent and makes sure that a kernel could start it with nothing else there.
pub(crate) fn read_agent(path: &Path) -> Result<Vec<u8>, ImageError> {
    let bytes = read(path)?;
    match why_not_init(&bytes) {
        None => Ok(bytes),
        Some(reason) => Err(ImageError::Agent { path: path.to_owned(), reason }),
    }
}

/// The agent of an initramfs that was [made](make) here: for a driver without a kernel to boot.
#[must_use]
pub fn agent_in(initramfs: &[u8]) -> Option<&[u8]> {
    find(initramfs, AGENT)
}

/// Puts the initramfs together. It is not compressed: in an emulated guest that costs more than
/// it saves.
pub(crate) fn make(agent: &[u8], modules: Option<&[u8]>) -> Vec<u8> {
    let mut base = Segment::default();
    for name in ["proc", "sys", "dev", "lower", "upper", "root"] {
        base.directory(name, 0o755);
    }
    // The kernel opens the console for init before there is a devtmpfs.
    base.character_device("dev/console", 0o600, (5, 1));
    base.character_device("dev/null", 0o666, (1, 3));
    base.file(AGENT, 0o755, agent);
    if modules.is_none() {
        base.directory("modules", 0o755);
        base.file(MODULE_ORDER, 0o644, b"");
    }
    archive(&[&base.into_bytes(), modules.unwrap_or_default()])
}

fn why_not_init(bytes: &[u8]) -> Option<&'static str> {
    const X86_64: [u8; 2] = [62, 0];
    const INTERPRETER: u32 = 3;
    if bytes.get(..6) != Some(b"\x7fELF\x02\x01") || bytes.get(18..20) != Some(&X86_64) {
        return Some("it is not an x86_64 ELF executable");
    }
    let u16_at = |at: usize| {
        bytes.get(at..at + 2)?.try_into().ok().map(|b| usize::from(u16::from_le_bytes(b)))
    };
    let table = bytes
        .get(32..40)
        .and_then(|b| b.try_into().ok())
        .and_then(|b| usize::try_from(u64::from_le_bytes(b)).ok());
    let (Some(table), Some(size), Some(count)) = (table, u16_at(54), u16_at(56)) else {
        return Some("its program headers are cut off");
    };
    for index in 0..count {
        let kind = table
            .checked_add(index * size)
            .and_then(|at| bytes.get(at..at.checked_add(4)?))
            .and_then(|b| b.try_into().ok())
            .map(u32::from_le_bytes);
        match kind {
            None => return Some("its program headers are cut off"),
            Some(INTERPRETER) => return Some("it is not linked statically"),
            Some(_) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header with one program header of this kind.
    fn elf(kind: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64..68].copy_from_slice(&kind.to_le_bytes());
        bytes
    }

    #[test]
    fn the_agent_is_found_again() {
        let mut modules = Segment::default();
        modules.file(MODULE_ORDER, 0o644, b"");
        let modules = modules.into_bytes();
        for modules in [None, Some(modules.as_slice())] {
            assert_eq!(agent_in(&make(b"the agent", modules)), Some(&b"the agent"[..]));
        }
        assert_eq!(agent_in(b"\x1f\x8b packed"), None);
    }

    #[test]
    fn only_a_static_executable_can_be_init() {
        assert_eq!(why_not_init(&elf(1)), None);
        assert_eq!(why_not_init(&elf(3)), Some("it is not linked statically"));
        assert_eq!(why_not_init(b"#!/bin/sh"), Some("it is not an x86_64 ELF executable"));
        for cut in 0..68 {
            assert!(why_not_init(&elf(1)[..cut]).is_some(), "{cut}");
        }
        let mut far = elf(1);
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(why_not_init(&far).is_some());
    }
}
