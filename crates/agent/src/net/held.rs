//! The end of connections where the kernel cannot abort them from outside: through the descriptors
//! of the processes that hold them.
//!
//! A connection that no process holds any more, such as one that is only being closed, is not met;
//! there is nobody whom it could mislead, and it ends by its own timers.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::io::Errno;
use rustix::net::{Shutdown, connect_unspec, shutdown};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::sockets::Ends;

/// Connections that are listed for a process, of the states of TCP that have a far end.
const LISTS: [&str; 4] = ["net/tcp", "net/tcp6", "net/udp", "net/udp6"];
const TIME_WAIT: u8 = 6;
const CLOSED: u8 = 7;
const LISTENING: u8 = 10;

/// Ends what goes beyond the guest and its private link, in the namespace of the process with this
/// directory in `/proc`.
pub(super) fn disconnect_all(process: &str, link: Option<u32>) -> Result<(), Errno> {
    let mut inodes = BTreeSet::new();
    for list in LISTS {
        let text = fs::read_to_string(format!("{process}/{list}")).unwrap_or_default();
        inodes.extend(text.lines().skip(1).filter_map(|line| beyond_guest(line, link)));
    }
    if inodes.is_empty() {
        return Ok(());
    }
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(Pid::from_raw).try_for_each(|pid| disconnect_held(pid, &inodes))
}

fn disconnect_held(pid: Pid, inodes: &BTreeSet<u64>) -> Result<(), Errno> {
    let directory = format!("/proc/{}/fd", pid.as_raw_nonzero());
    let held = fs::read_dir(&directory).into_iter().flatten().flatten().filter_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()?;
        let number = entry.file_name().to_str()?.parse::<i32>().ok()?;
        inodes.contains(&inode).then_some(number)
    });
    for number in held.collect::<Vec<_>>() {
        let copy = pidfd_open(pid, PidfdFlags::empty())
            .and_then(|process| pidfd_getfd(process, number, PidfdGetfdFlags::empty()));
        match copy {
            Ok(socket) => {
                // Whoever waits in a call keeps a kernel from disconnecting, and is woken by this.
                let _ = shutdown(&socket, Shutdown::Both);
                let _ = connect_unspec(&socket);
            }
            // The process has ended, or has closed it.
            Err(Errno::SRCH | Errno::BADF) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// The inode of one line of a list, if the connection goes beyond the guest.
fn beyond_guest(line: &str, link: Option<u32>) -> Option<u64> {
    let mut fields = line.split_ascii_whitespace();
    let (local, remote) = (ip(fields.nth(1)?)?, ip(fields.next()?)?);
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let inode = fields.nth(5)?.parse().ok().filter(|&inode| inode != 0)?;
    // The lists do not have the device; what has such an address is on a link.
    let is_link_local = matches!(local, IpAddr::V6(ip) if ip.is_unicast_link_local());
    let device = link.filter(|_| is_link_local).unwrap_or(0);
    let has_far_end = ![TIME_WAIT, CLOSED, LISTENING].contains(&state);
    (has_far_end && Ends { local, remote, device }.is_beyond_guest(link)).then_some(inode)
}

/// Address and port as `/proc` has them: words of 32 bits in the processor's order.
fn ip(text: &str) -> Option<IpAddr> {
    let (digits, _port) = text.split_once(':')?;
    let word = |at: usize| -> Option<[u8; 4]> {
        let digits = digits.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match digits.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut octets = [0; 16];
            for at in 0..4 {
                octets[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_read() {
        let line = |local: &str, remote: &str, state: &str| {
            format!(
                "   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 20 4"
            )
        };
        let beyond = line("0200000A:9C40", "01010101:01BB", "01");
        assert_eq!(beyond_guest(&beyond, None), Some(4711));
        let listening = line("0200000A:0016", "00000000:0000", "0A");
        assert_eq!(beyond_guest(&listening, None), None);
        let loopback = line("0100007F:9C40", "0100007F:01BB", "01");
        assert_eq!(beyond_guest(&loopback, None), None);
        let (guest, host) =
            ("000080FE000000000000000002000000:0400", "000080FE000000000000000001000000:9000");
        assert_eq!(beyond_guest(&line(guest, host, "01"), Some(2)), None);
        assert_eq!(beyond_guest(&line(guest, host, "01"), None), Some(4711));
        for broken in ["", "0:", "0: x y 01", "0: 0200000A:1 zz:1 01 0 0 0 0 0 1"] {
            assert_eq!(beyond_guest(broken, None), None);
        }
    }
}
