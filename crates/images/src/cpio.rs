//! A writer of the `newc` cpio format, as far as an initramfs needs it, and a look-up in one.
//!
//! An archive can be made of [segments](Segment) that were written at different times: the kernel
//! and `cpio` read one after the other up to the trailer.

const MAGIC: &[u8; 6] = b"070701";
const TRAILER: &str = "TRAILER!!!";

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Entries without the trailer, padded so that another segment can follow.
#[derive(Debug, Default)]
pub(crate) struct Segment {
    bytes: Vec<u8>,
}

impl Segment {
    pub(crate) fn directory(&mut self, name: &str, mode: u32) {
        self.entry(name, DIRECTORY | mode, (0, 0), &[]);
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, REGULAR | mode, (0, 0), content);
    }

    pub(crate) fn character_device(&mut self, name: &str, mode: u32, device: (u32, u32)) {
        self.entry(name, CHARACTER_DEVICE | mode, device, &[]);
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        // Inode numbers matter for hard links alone, of which there are none: every entry has one
        // link. Owner, group and time are zero, so that the same input gives the same archive.
        let link_count = u32::from(name != TRAILER);
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        debug_assert_eq!(size as usize, content.len(), "newc sizes have 32 bits");
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let fields =
            [0, mode, 0, 0, link_count, 0, size, 0, 0, device.0, device.1, name_size, 0u32];
        self.bytes.extend_from_slice(MAGIC);
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Puts segments together to a complete archive.
pub(crate) fn archive(segments: &[&[u8]]) -> Vec<u8> {
    let mut trailer = Segment::default();
    trailer.entry(TRAILER, 0, (0, 0), &[]);
    let mut bytes = segments.concat();
    bytes.extend_from_slice(&trailer.bytes);
    bytes
}

/// Length of an entry's header, and where in it the sizes of its content and its name stand.
const HEADER_BYTES: usize = 110;
const SIZE_AT: usize = 54;
const NAME_SIZE_AT: usize = 94;

/// The content of a file in an archive that is not compressed.
pub(crate) fn find<'a>(mut archive: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    loop {
        let header = archive.get(..HEADER_BYTES)?;
        let field = |at: usize| {
            let digits = header.get(at..at + 8).and_then(|digits| str::from_utf8(digits).ok())?;
            usize::try_from(u32::from_str_radix(digits, 16).ok()?).ok()
        };
        header.starts_with(MAGIC).then_some(())?;
        let (size, name_size) = (field(SIZE_AT)?, field(NAME_SIZE_AT)?);
        let begin = (HEADER_BYTES + name_size).next_multiple_of(4);
        let name = archive.get(HEADER_BYTES..HEADER_BYTES + name_size)?.strip_suffix(&[0])?;
        let content = archive.get(begin..begin.checked_add(size)?)?;
        if name == wanted.as_bytes() {
            return Some(content);
        }
        if name == TRAILER.as_bytes() {
            return None;
        }
        archive = archive.get((begin + size).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_reads_what_the_writer_wrote() {
        let mut first = Segment::default();
        first.directory("dev", 0o755);
        first.character_device("dev/console", 0o600, (5, 1));
        first.file("odd", 0o644, b"seven b");
        let mut second = Segment::default();
        second.file("init", 0o755, b"\x7fELF");
        second.file("empty", 0o400, b"");
        let bytes = archive(&[&first.into_bytes(), &second.into_bytes()]);
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(find(&bytes, "init"), Some(&b"\x7fELF"[..]));
        assert_eq!(find(&bytes, "odd"), Some(&b"seven b"[..]));
        assert_eq!(find(&bytes, "dev"), Some(&b""[..]));
        for wrong in [&bytes[..], &bytes[..300], b"", b"070701"] {
            assert_eq!(find(wrong, "absent"), None);
        }

        let mut child = Command::new("cpio")
            .args(["-itv", "--numeric-uid-gid"])
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let listing = String::from_utf8(output.stdout).unwrap();
        let modes: Vec<_> = listing
            .lines()
            .map(|line| {
                let mut words = line.split_whitespace();
                (words.next().unwrap().to_owned(), words.next_back().unwrap().to_owned())
            })
            .collect();
        let expected = [
            ("drwxr-xr-x", "dev"),
            ("crw-------", "dev/console"),
            ("-rw-r--r--", "odd"),
            ("-rwxr-xr-x", "init"),
            ("-r--------", "empty"),
        ];
        assert_eq!(modes, expected.map(|(mode, name)| (mode.to_owned(), name.to_owned())));
        assert!(listing.contains("5,   1"), "{listing}");
    }
}
