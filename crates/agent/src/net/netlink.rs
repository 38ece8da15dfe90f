//! The little of netlink that a guest needs: routing, and the list of sockets.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

pub(super) const NLM_F_REPLACE: u16 = 0x100;
pub(super) const NLM_F_CREATE: u16 = 0x400;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
/// What the kernel sends at once in a dump, at most.
const RECEIVE_BYTES: usize = 32 * 1024;

/// One message on its way to the kernel.
#[derive(Debug, Clone)]
pub(super) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
    /// An answer that is as good as success.
    harmless: Option<Errno>,
    /// What the message does, for whoever reads of its failure.
    what: &'static str,
}

/// A message of a batch that failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) what: &'static str,
    pub(super) errno: Errno,
}

impl Message {
    pub(super) fn new(what: &'static str, kind: u16, flags: u16, fixed: &[u8]) -> Self {
        Self { kind, flags, body: fixed.to_vec(), harmless: None, what }
    }

    #[must_use]
    pub(super) fn unless(self, harmless: Errno) -> Self {
        Self { harmless: Some(harmless), ..self }
    }

    #[must_use]
    pub(super) fn with(mut self, attribute: u16, value: &[u8]) -> Self {
        self.body.extend_from_slice(&nested(attribute, value));
        self
    }

    #[must_use]
    pub(super) fn with_ip(self, attribute: u16, ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => self.with(attribute, &ip.octets()),
            IpAddr::V6(ip) => self.with(attribute, &ip.octets()),
        }
    }

    fn encode(&self, out: &mut Vec<u8>, flags: u16, sequence: u32) {
        let length = u32::try_from(HEADER_BYTES + self.body.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&length.to_ne_bytes());
        out.extend_from_slice(&self.kind.to_ne_bytes());
        out.extend_from_slice(&(self.flags | flags | NLM_F_REQUEST).to_ne_bytes());
        out.extend_from_slice(&sequence.to_ne_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.body);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// For interfaces, addresses and routes.
    pub(super) fn route() -> Result<Self, Errno> {
        // Protocol 0 is routing.
        Self::open(None)
    }

    /// For sockets.
    pub(super) fn sockets() -> Result<Self, Errno> {
        Self::open(Some(netlink::SOCK_DIAG))
    }

    fn open(protocol: Option<rustix::net::Protocol>) -> Result<Self, Errno> {
        let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
        let socket = socket_with(family, SocketType::RAW, flags, protocol)?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_BYTES) })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a message and waits for the kernel's verdict.
    pub(super) fn call(&mut self, message: &Message) -> Result<(), Errno> {
        self.batch(std::slice::from_ref(message)).map_err(|failure| failure.errno)
    }

    /// Sends messages at once, and waits for the verdict on the last: the kernel goes through them
    /// in their order and speaks up for each that fails. Gives the first that did.
    pub(super) fn batch(&mut self, messages: &[Message]) -> Result<(), Failure> {
        let Some((last, before)) = messages.split_last() else { return Ok(()) };
        let first_sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        for message in before {
            message.encode(&mut bytes, 0, self.next_sequence());
        }
        last.encode(&mut bytes, NLM_F_ACK, self.next_sequence());
        let broken = |errno| Failure { what: last.what, errno };
        send(&self.socket, &bytes, SendFlags::empty()).map_err(broken)?;
        let mut failure = None;
        let is_over = |sequence| sequence == self.sequence;
        let (socket, buffer) = (&self.socket, &mut self.buffer);
        receive(socket, buffer, |kind, sequence, body| {
            let index = usize::try_from(sequence.wrapping_sub(first_sequence)).ok();
            let message = index.and_then(|index| messages.get(index));
            let (NLMSG_ERROR, Some(message)) = (kind, message) else { return false };
            if let Err(errno) = verdict(body)
                && Some(errno) != message.harmless
            {
                failure.get_or_insert(Failure { what: message.what, errno });
            }
            is_over(sequence)
        })
        .map_err(broken)?;
        failure.map_or(Ok(()), Err)
    }

    /// Asks for a list; `each` gets the body of every entry.
    pub(super) fn dump(
        &mut self,
        message: &Message,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Errno> {
        let sequence = self.next_sequence();
        let mut bytes = Vec::new();
        message.encode(&mut bytes, NLM_F_DUMP, sequence);
        send(&self.socket, &bytes, SendFlags::empty())?;
        let mut result = Ok(());
        receive(&self.socket, &mut self.buffer, |kind, of, body| {
            match kind {
                _ if of != sequence => return false,
                NLMSG_DONE | NLMSG_ERROR => result = verdict(body),
                _ => {
                    each(body);
                    return false;
                }
            }
            true
        })?;
        result
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }
}

/// Gives kind, sequence and body of each message to `take`, until that says that it was the last.
fn receive(
    socket: &OwnedFd,
    buffer: &mut Vec<u8>,
    mut take: impl FnMut(u16, u32, &[u8]) -> bool,
) -> Result<(), Errno> {
    loop {
        buffer.clear();
        match recv(socket, spare_capacity(buffer), RecvFlags::empty()) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        }
        let mut rest = &buffer[..];
        while let Some((kind, sequence, body, after)) = split_message(rest) {
            if take(kind, sequence, body) {
                return Ok(());
            }
            rest = after;
        }
    }
}

/// What an error message, or the end of a list, says.
fn verdict(body: &[u8]) -> Result<(), Errno> {
    match body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code)) {
        0.. => Ok(()),
        code => Err(Errno::from_raw_os_error(code.saturating_neg())),
    }
}

fn split_message(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let sequence = u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    let after = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, sequence, body, after))
}

/// An attribute, such as one that goes into another.
pub(super) fn nested(attribute: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&attribute.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The attributes behind a message's fixed part.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        // The highest bits say that attributes are nested in it.
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & 0x3fff;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The number at a place of a message's fixed part.
pub(super) fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let message = Message::new("test", 1, 0, &[]).with(5, b"abcde").with(6, b"");
        let read: Vec<_> = attributes(&message.body).collect();
        assert_eq!(read, [(5, &b"abcde"[..]), (6, &b""[..])]);
        assert_eq!(message.body.len(), 16);
    }

    #[test]
    fn broken_attributes_end_the_list() {
        assert_eq!(attributes(&[3, 0, 0, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 0, 0, 1]).count(), 0);
    }
}
