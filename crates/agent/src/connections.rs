//! The host's connections to this agent, so that they can be counted and ended.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::net::{Shutdown, shutdown};

#[derive(Debug, Default)]
pub(crate) struct Connections {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next_key: u64,
    open: BTreeMap<u64, Weak<Socket>>,
}

/// The socket of one connection. It is known from its acceptance until it is closed.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    key: u64,
    ended: AtomicBool,
    connections: Arc<Connections>,
}

impl Connections {
    pub(crate) fn enter(self: &Arc<Self>, fd: OwnedFd) -> Arc<Socket> {
        let mut table = self.lock();
        let key = table.next_key;
        table.next_key += 1;
        let ended = AtomicBool::new(false);
        let socket = Arc::new(Socket { fd, key, ended, connections: Arc::clone(self) });
        table.open.insert(key, Arc::downgrade(&socket));
        socket
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().open.len()
    }

    /// Ends every connection but one. Whoever serves them sees that the host is gone.
    pub(crate) fn end_others(&self, kept: &Socket) {
        // Taken out of the lock first: the last owner of a socket takes the lock as it lets go.
        let others: Vec<_> = self.lock().open.values().filter_map(Weak::upgrade).collect();
        for socket in others.into_iter().filter(|socket| socket.key != kept.key) {
            socket.ended.store(true, Ordering::Release);
            let _ = shutdown(&socket.fd, Shutdown::Both);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Socket {
    /// Whether the agent has ended the connection, and what it received is no more to be obeyed.
    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.connections.lock().open.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn all_but_one_are_ended_and_closed_ones_are_forgotten() {
        let connections = Arc::<Connections>::default();
        let pair = || {
            let (near, far) = UnixStream::pair().unwrap();
            (connections.enter(near.into()), far)
        };
        let ((kept, _far_kept), (ended, mut far), (closed, _)) = (pair(), pair(), pair());
        assert_eq!(connections.count(), 3);
        drop(closed);
        assert_eq!(connections.count(), 2);
        connections.end_others(&kept);
        assert!(ended.is_ended() && !kept.is_ended());
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
    }
}
