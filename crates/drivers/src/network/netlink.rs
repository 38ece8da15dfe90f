//! Netlink, synchronously, many messages in one system call.
//!
//! A socket belongs to the network namespace of the thread that opened it, wherever it is used.
//! The kernel answers all but dumps before `send` returns, so nothing here waits for an event.
//! Written out rather than taken from a crate because links, packet-filter sets and connection
//! tracking share it, and because a VM's links are set up in one call with it.

use std::{mem::size_of, os::fd::OwnedFd};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
        netlink::{self, SocketAddrNetlink},
    },
};

const HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
const NESTED: u16 = 1 << 15;

/// Of one call: the rules of a VM with many of them are one transaction.
const SEND_BYTES_MAX: usize = 4 * 1024 * 1024;

const TYPE_ERROR: u16 = 2;
const TYPE_DONE: u16 = 3;

pub(super) const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
pub(super) const EXCLUSIVE: u16 = 0x200;
pub(super) const CREATE: u16 = 0x400;
pub(super) const REPLACE: u16 = 0x100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Route,
    Netfilter,
}

/// One message under construction; lengths are filled in as it grows.
#[derive(Debug, Clone)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// `fixed`: the family's header that stands before the attributes.
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | REQUEST | ACK).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(fixed);
        let mut message = Self(bytes);
        message.pad();
        message
    }

    /// For the ends of a batch, which are not acknowledged.
    pub(super) fn without_ack(mut self) -> Self {
        self.set_u16(6, REQUEST);
        self
    }

    pub(super) fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.pad();
        self
    }

    pub(super) fn attr_u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// A text that ends with a zero.
    pub(super) fn attr_text(self, kind: u16, value: &str) -> Self {
        self.attr(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(super) fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        let mut filled = fill(self);
        let length = u16::try_from(filled.0.len() - start).unwrap_or(u16::MAX);
        filled.set_u16(start, length);
        filled
    }

    pub(super) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self.pad();
        self
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
    }

    fn set_sequence(&mut self, sequence: u32) {
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }

    fn wants_ack(&self) -> bool {
        u16_at(&self.0, 6).is_some_and(|flags| flags & ACK != 0)
    }
}

#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// In the network namespace of this thread.
    pub(super) fn open(family: Family) -> Result<Self, Errno> {
        let protocol = match family {
            Family::Route => None,
            Family::Netfilter => Some(netlink::NETFILTER),
        };
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        rustix::net::sockopt::set_socket_send_buffer_size_force(&fd, SEND_BYTES_MAX)?;
        Ok(Self { fd, sequence: 0, buffer: vec![0; 64 * 1024] })
    }

    /// Sends the messages in one call. Each one's result; the kernel goes on after a failure,
    /// except in a batch of the packet filter, of which then nothing holds.
    pub(super) fn send(&mut self, messages: Vec<Message>) -> Result<Vec<Result<(), Errno>>, Errno> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(messages.iter().map(|m| m.0.len()).sum());
        let mut results = Vec::with_capacity(messages.len());
        for mut message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            message.set_sequence(self.sequence);
            // An answer that does not come is a failure, not a success.
            results.push(if message.wants_ack() { Err(Errno::PROTO) } else { Ok(()) });
            bytes.extend_from_slice(&message.0);
        }
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        loop {
            let length = match rustix::net::recv(&self.fd, &mut *self.buffer, RecvFlags::DONTWAIT) {
                Ok((length, _)) => length,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            for (header, payload) in split_messages(&self.buffer[..length]) {
                let index = header.sequence.wrapping_sub(first) as usize;
                if let (TYPE_ERROR, Some(result)) = (header.kind, results.get_mut(index)) {
                    *result = error_code(payload);
                }
            }
        }
        Ok(results)
    }

    /// Sends all, and fails with the first failure.
    pub(super) fn send_all(&mut self, messages: Vec<Message>) -> Result<(), Errno> {
        self.send(messages)?.into_iter().collect()
    }

    /// Everything of a kind: each answer's bytes after the netlink header.
    pub(super) fn dump(&mut self, kind: u16, fixed: &[u8]) -> Result<Vec<Vec<u8>>, Errno> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = Message::new(kind, DUMP, fixed);
        message.set_u16(6, REQUEST | DUMP);
        message.set_sequence(self.sequence);
        rustix::net::send(&self.fd, &message.0, SendFlags::empty())?;
        let mut found = Vec::new();
        loop {
            let (length, _) =
                match rustix::net::recv(&self.fd, &mut *self.buffer, RecvFlags::empty()) {
                    Ok(received) => received,
                    Err(Errno::INTR) => continue,
                    Err(errno) => return Err(errno),
                };
            for (header, payload) in split_messages(&self.buffer[..length]) {
                if header.sequence != self.sequence {
                    continue;
                }
                match header.kind {
                    TYPE_DONE => return Ok(found),
                    TYPE_ERROR => return error_code(payload).map(|()| found),
                    _ => found.push(payload.to_vec()),
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Header {
    kind: u16,
    sequence: u32,
}

fn split_messages(mut bytes: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32_at(bytes, 0)? as usize;
        let header = Header { kind: u16_at(bytes, 4)?, sequence: u32_at(bytes, 8)? };
        let payload = bytes.get(HEADER_BYTES..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((header, payload))
    })
}

fn error_code(payload: &[u8]) -> Result<(), Errno> {
    match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(Errno::from_raw_os_error(code.wrapping_neg())),
        None => Err(Errno::PROTO),
    }
}

/// The attributes after a fixed header of `skip` bytes.
pub(super) fn attributes(payload: &[u8], skip: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = payload.get(skip.next_multiple_of(4)..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !NESTED;
        let value = bytes.get(ATTRIBUTE_HEADER_BYTES..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + size_of::<u16>())?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + size_of::<u32>())?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let message =
            Message::new(16, 0, &[1, 2, 3, 4]).attr_text(3, "lo").nest(18, |m| m.attr_u32(1, 7));
        let (header, payload) = split_messages(&message.0).next().unwrap();
        assert_eq!(header.kind, 16);
        let found: Vec<_> = attributes(payload, 4).collect();
        assert_eq!(found[0], (3, &b"lo\0"[..]));
        assert_eq!(found[1].0, 18);
        assert_eq!(attributes(found[1].1, 0).next().unwrap(), (1, &7u32.to_ne_bytes()[..]));
    }

    #[test]
    fn torn_bytes_end_the_iteration() {
        let message = Message::new(16, 0, &[0; 16]).attr_u32(4, 1400);
        for cut in 0..message.0.len() {
            assert_eq!(split_messages(&message.0[..cut]).count(), 0);
            let _ = attributes(&message.0[..cut], 16).count();
        }
    }
}
