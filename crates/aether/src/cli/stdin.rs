//! Standard input, read in a thread of its own: a read of a terminal or a pipe cannot be taken
//! back, and must not keep the process from ending.

use std::io::Read as _;

use bytes::Bytes;
use tokio::sync::mpsc::{Receiver, channel};

const CHUNK_BYTES: usize = 64 * 1024;

/// What comes, until its end; then the channel closes. At most two chunks are read ahead.
pub(crate) fn read() -> Receiver<Bytes> {
    let (sender, receiver) = channel(1);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                // An input that cannot be read is an input at its end.
                Ok(0) => return,
                Ok(count) => {
                    if sender.blocking_send(Bytes::copy_from_slice(&buffer[..count])).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}
