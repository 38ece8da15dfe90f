//! A migration stream of QEMU's, taken apart while it comes: the guest's memory goes into a file,
//! page by page, and what is left is the state of its devices, in a stream that a QEMU whose memory
//! is that file takes in.
//!
//! ```text
//!   magic version configuration
//!   START ram   sizes of the blocks of memory        ─┐
//!   PART ram    pages, pages, ...                     ├─ pages of the guest's block are taken out
//!   END ram     the last pages, the guest stands still┘
//!   FULL device, FULL device, ... EOF description    ─── as it is
//! ```
//!
//! The sender is a VMM that its guest may have taken over: every number is checked against a bound,
//! nothing is trusted beyond what the guest could have in its memory anyway. QEMU keeps the format
//! compatible between its versions; what is not known is an error that says where.

use std::{fs::File, io, io::Read, os::unix::fs::FileExt as _};

/// Of the guest's memory, in every QEMU that we start.
pub(super) const MEMORY_BLOCK: &str = "mem";

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
const SECTION_START: u8 = 1;
const SECTION_PART: u8 = 2;
const SECTION_END: u8 = 3;
const SECTION_FULL: u8 = 4;
const CONFIGURATION: u8 = 7;
const SECTION_FOOTER: u8 = 0x7e;

const PAGE_BYTES: usize = 4096;
const FLAGS: u64 = PAGE_BYTES as u64 - 1;
const FLAG_ZERO: u64 = 0x02;
const FLAG_SIZES: u64 = 0x04;
const FLAG_PAGE: u64 = 0x08;
const FLAG_EOS: u64 = 0x10;
/// The block is that of the page before.
const FLAG_CONTINUE: u64 = 0x20;

/// Device state and small blocks (firmware tables) together; measured below 128 KiB.
const STATE_BYTES_MAX: usize = 64 * 1024 * 1024;
const CONFIGURATION_BYTES_MAX: u32 = 256;
const BUFFER_BYTES: usize = 1024 * 1024;
/// Pages in a row that are written at once.
const RUN_BYTES_MAX: usize = 1024 * 1024;

fn broken(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Reads a stream to its end, writes the guest's pages into `memory`, which is empty and as long as
/// the guest's memory, and returns the rest.
pub(super) fn take_apart(
    input: impl Read,
    memory: &File,
    memory_bytes: u64,
) -> io::Result<Vec<u8>> {
    let mut taking = Taking {
        input: Input { source: input, buffer: vec![0; BUFFER_BYTES], at: 0, end: 0 },
        state: Vec::new(),
        pages: Pages::new(memory, memory_bytes),
        block: None,
    };
    taking.header()?;
    while taking.section()? {}
    taking.pages.flush()?;
    taking.rest()?;
    Ok(taking.state)
}

/// Reads ahead, in one buffer.
struct Input<R> {
    source: R,
    buffer: Vec<u8>,
    at: usize,
    end: usize,
}

impl<R: Read> Input<R> {
    /// The next `length` bytes, at most a page and some.
    fn take(&mut self, length: usize) -> io::Result<&[u8]> {
        while self.end - self.at < length {
            if self.at + length > self.buffer.len() {
                self.buffer.copy_within(self.at..self.end, 0);
                (self.at, self.end) = (0, self.end - self.at);
            }
            match self.source.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                Ok(n) => self.end += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.at += length;
        Ok(&self.buffer[self.at - length..self.at])
    }
}

/// The guest's pages on their way into the file.
struct Pages<'a> {
    memory: &'a File,
    memory_bytes: u64,
    /// Pages that are in the file, one bit each: only there a page of zeros must be written.
    written: Vec<u64>,
    /// Pages in a row that are not in the file yet.
    run: Vec<u8>,
    run_begins: u64,
}

impl<'a> Pages<'a> {
    fn new(memory: &'a File, memory_bytes: u64) -> Self {
        let pages = usize::try_from(memory_bytes / PAGE_BYTES as u64).unwrap_or(0);
        let written = vec![0; pages.div_ceil(64)];
        Self { memory, memory_bytes, written, run: Vec::new(), run_begins: 0 }
    }

    fn put(&mut self, at: u64, page: &[u8]) -> io::Result<()> {
        let (word, bit) = self.bit(at)?;
        self.written[word] |= bit;
        let follows = self.run_begins + self.run.len() as u64 == at;
        if !follows || self.run.len() >= RUN_BYTES_MAX {
            self.flush()?;
            self.run_begins = at;
        }
        self.run.extend_from_slice(page);
        Ok(())
    }

    fn put_zeros(&mut self, at: u64) -> io::Result<()> {
        let (word, bit) = self.bit(at)?;
        if self.written[word] & bit == 0 {
            // A hole reads as zeros.
            return Ok(());
        }
        self.put(at, &[0; PAGE_BYTES])
    }

    fn bit(&self, at: u64) -> io::Result<(usize, u64)> {
        if at >= self.memory_bytes {
            return Err(broken("a page beyond the guest's memory"));
        }
        let page = at / PAGE_BYTES as u64;
        let word = usize::try_from(page / 64).map_err(|_| broken("a page beyond all memory"))?;
        Ok((word, 1 << (page % 64)))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.memory.write_all_at(&self.run, self.run_begins)?;
        self.run.clear();
        Ok(())
    }
}

/// Whose pages come.
#[derive(Clone)]
enum Block {
    Guest,
    /// Length and name, as they are in the stream.
    Other(Vec<u8>),
}

struct Taking<'a, R> {
    input: Input<R>,
    state: Vec<u8>,
    pages: Pages<'a>,
    block: Option<Block>,
}

impl<R: Read> Taking<'_, R> {
    fn byte(&mut self) -> io::Result<u8> {
        Ok(self.input.take(1)?[0])
    }

    fn be32(&mut self) -> io::Result<u32> {
        let bytes = self.input.take(4)?;
        Ok(bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }

    fn be64(&mut self) -> io::Result<u64> {
        let bytes = self.input.take(8)?;
        Ok(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// A length of one byte and as many bytes: both.
    fn name(&mut self) -> io::Result<Vec<u8>> {
        let length = self.byte()?;
        let mut name = vec![length];
        name.extend_from_slice(self.input.take(usize::from(length))?);
        Ok(name)
    }

    fn keep(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.state.len() + bytes.len() > STATE_BYTES_MAX {
            return Err(broken("more device state than any machine has"));
        }
        self.state.extend_from_slice(bytes);
        Ok(())
    }

    fn header(&mut self) -> io::Result<()> {
        let (magic, version) = (self.be32()?, self.be32()?);
        if (magic, version) != (MAGIC, VERSION) {
            return Err(broken(format!("not a stream of version {VERSION}")));
        }
        self.keep(&magic.to_be_bytes())?;
        self.keep(&version.to_be_bytes())
    }

    /// Whether another section with memory may follow.
    fn section(&mut self) -> io::Result<bool> {
        let kind = self.byte()?;
        self.keep(&[kind])?;
        match kind {
            CONFIGURATION => {
                let length = self.be32()?;
                if length > CONFIGURATION_BYTES_MAX {
                    return Err(broken("a machine's name of more than 256 bytes"));
                }
                self.keep(&length.to_be_bytes())?;
                let name = self.input.take(length as usize)?.to_vec();
                self.keep(&name)?;
                return Ok(true);
            }
            SECTION_START | SECTION_PART | SECTION_END => {}
            // Devices follow, and nothing with memory.
            SECTION_FULL => return Ok(false),
            _ => return Err(broken(format!("a section of the unknown kind {kind}"))),
        }
        let section = self.be32()?;
        self.keep(&section.to_be_bytes())?;
        if kind == SECTION_START {
            let name = self.name()?;
            if name.get(1..) != Some(b"ram") {
                let name = String::from_utf8_lossy(&name).into_owned();
                return Err(broken(format!("a section of the unknown device {name}")));
            }
            self.keep(&name)?;
            // Instance and version.
            let rest = self.input.take(8)?.to_vec();
            self.keep(&rest)?;
        }
        while self.record()? {}
        let (footer, again) = (self.byte()?, self.be32()?);
        if (footer, again) != (SECTION_FOOTER, section) {
            return Err(broken("a section that does not end as it began"));
        }
        self.keep(&[footer])?;
        self.keep(&section.to_be_bytes())?;
        Ok(true)
    }

    /// Whether the section goes on.
    fn record(&mut self) -> io::Result<bool> {
        let head = self.be64()?;
        let (at, flags) = (head & !FLAGS, head & FLAGS);
        match flags & !FLAG_CONTINUE {
            FLAG_EOS => {
                self.keep(&head.to_be_bytes())?;
                return Ok(false);
            }
            FLAG_SIZES => {
                self.keep(&head.to_be_bytes())?;
                self.sizes(at)?;
            }
            FLAG_PAGE | FLAG_ZERO => self.page(at, flags)?,
            _ => return Err(broken(format!("memory with the unknown flags {flags:#x}"))),
        }
        Ok(true)
    }

    fn sizes(&mut self, total: u64) -> io::Result<()> {
        let mut left = total;
        let mut has_guest = false;
        while left > 0 {
            let name = self.name()?;
            let length = self.be64()?;
            if name[1..] == *MEMORY_BLOCK.as_bytes() {
                if length != self.pages.memory_bytes {
                    return Err(broken("memory of another size than the guest's"));
                }
                has_guest = true;
            }
            self.keep(&name)?;
            self.keep(&length.to_be_bytes())?;
            left = left.checked_sub(length).ok_or_else(|| broken("sizes beyond their sum"))?;
            if length == 0 {
                return Err(broken("a block of memory without a size"));
            }
        }
        if has_guest { Ok(()) } else { Err(broken("no memory of the guest's")) }
    }

    fn page(&mut self, at: u64, flags: u64) -> io::Result<()> {
        if flags & FLAG_CONTINUE == 0 {
            let name = self.name()?;
            let is_guest = name[1..] == *MEMORY_BLOCK.as_bytes();
            self.block = Some(if is_guest { Block::Guest } else { Block::Other(name) });
        }
        let is_zero = flags & FLAG_ZERO != 0;
        match self.block.clone() {
            None => Err(broken("a page of no block")),
            Some(Block::Guest) if is_zero => {
                self.zero_byte()?;
                self.pages.put_zeros(at)
            }
            Some(Block::Guest) => {
                let page = self.input.take(PAGE_BYTES)?;
                self.pages.put(at, page)
            }
            Some(Block::Other(name)) => {
                // The page before it in this stream is of another block than in the one that came.
                self.keep(&(at | flags & !FLAG_CONTINUE).to_be_bytes())?;
                self.keep(&name)?;
                if is_zero {
                    self.zero_byte()?;
                    return self.keep(&[0]);
                }
                let page = self.input.take(PAGE_BYTES)?.to_vec();
                self.keep(&page)
            }
        }
    }

    fn zero_byte(&mut self) -> io::Result<()> {
        match self.byte()? {
            0 => Ok(()),
            byte => Err(broken(format!("a page filled with {byte:#x}"))),
        }
    }

    /// The devices, up to the end of the stream.
    fn rest(&mut self) -> io::Result<()> {
        let buffered = self.input.buffer[self.input.at..self.input.end].to_vec();
        self.keep(&buffered)?;
        let room = STATE_BYTES_MAX.saturating_sub(self.state.len()) as u64;
        (&mut self.input.source).take(room + 1).read_to_end(&mut self.state)?;
        // Also says where that was too much.
        self.keep(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: u64 = 16 * PAGE_BYTES as u64;

    /// A stream such as QEMU sends, with pages given as address, flags, block and fill.
    fn stream(pages: &[(u64, u64, &str, u8)]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(b"QEVM\0\0\0\x03\x07\0\0\0\x07microvm\x01\0\0\0\x02\x03ram");
        out.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 4]);
        let total = MEMORY + PAGE_BYTES as u64;
        out.extend_from_slice(&(total | FLAG_SIZES).to_be_bytes());
        for (name, length) in [(MEMORY_BLOCK, MEMORY), ("pc.bios", PAGE_BYTES as u64)] {
            out.push(u8::try_from(name.len()).unwrap());
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(&length.to_be_bytes());
        }
        out.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x03\0\0\0\x02");
        for (at, flags, block, fill) in pages {
            out.extend_from_slice(&(at | flags).to_be_bytes());
            if flags & FLAG_CONTINUE == 0 {
                out.push(u8::try_from(block.len()).unwrap());
                out.extend_from_slice(block.as_bytes());
            }
            let length = if flags & FLAG_PAGE != 0 { PAGE_BYTES } else { 1 };
            out.resize(out.len() + length, *fill);
        }
        out.extend_from_slice(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x04devices and so on");
        out
    }

    fn taken(input: &[u8]) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(MEMORY).unwrap();
        let state = take_apart(Dribble(input), &memory, MEMORY)?;
        let mut bytes = vec![0; usize::try_from(MEMORY).unwrap()];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        Ok((state, bytes))
    }

    /// Gives a few bytes at a time.
    struct Dribble<'a>(&'a [u8]);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(777);
            self.0.read(&mut buffer[..length])
        }
    }

    #[test]
    fn the_guests_pages_go_into_the_file_and_the_rest_stays_a_stream() {
        let page = PAGE_BYTES as u64;
        let more = FLAG_PAGE | FLAG_CONTINUE;
        let input = stream(&[
            (0, FLAG_PAGE, MEMORY_BLOCK, 1),
            (page, more, "", 2),
            (5 * page, FLAG_ZERO | FLAG_CONTINUE, "", 0),
            (0, FLAG_PAGE, "pc.bios", 9),
            (7 * page, FLAG_PAGE, MEMORY_BLOCK, 3),
            // Sent again: changed, and cleared.
            (0, more, "", 4),
            (7 * page, FLAG_ZERO | FLAG_CONTINUE, "", 0),
        ]);
        let (state, memory) = taken(&input).unwrap();
        assert_eq!(state, stream(&[(0, FLAG_PAGE, "pc.bios", 9)]));
        let mut expected = vec![0; memory.len()];
        expected[..PAGE_BYTES].fill(4);
        expected[PAGE_BYTES..2 * PAGE_BYTES].fill(2);
        assert!(memory == expected);
    }

    #[test]
    fn a_hostile_stream_is_refused() {
        let outside = stream(&[(MEMORY, FLAG_PAGE, MEMORY_BLOCK, 1)]);
        let no_block = stream(&[(0, FLAG_PAGE | FLAG_CONTINUE, "", 1)]);
        let filled = stream(&[(0, FLAG_ZERO, MEMORY_BLOCK, 7)]);
        let compressed = stream(&[(0, 0x100, MEMORY_BLOCK, 1)]);
        for (input, reason) in [
            (outside, "beyond the guest's memory"),
            (no_block, "of no block"),
            (filled, "filled with"),
            (compressed, "unknown flags"),
            (b"QEVM\0\0\0\x04".to_vec(), "not a stream"),
        ] {
            let error = taken(&input).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}, not {reason}");
        }
    }

    #[test]
    fn a_stream_cut_anywhere_before_its_devices_is_an_error() {
        let page = PAGE_BYTES as u64;
        let input = stream(&[(0, FLAG_PAGE, MEMORY_BLOCK, 1), (page, FLAG_PAGE, "pc.bios", 2)]);
        let devices = input.len() - "devices and so on".len();
        for cut in (0..devices).step_by(13).chain([devices - 1]) {
            assert!(taken(&input[..cut]).is_err(), "cut at {cut}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(at in 0_usize..400, byte: u8) {
            let mut input = stream(&[(0, FLAG_PAGE, MEMORY_BLOCK, 1), (0, FLAG_ZERO, "pc.bios", 0)]);
            input[at] = byte;
            let _ = taken(&input);
        }
    }
}
