//! The private link to a guest's agent: connections to it, and its ready hint.
//!
//! Every link has the same two addresses; the link's index, as the addresses' scope, tells them
//! apart. A restored clone therefore finds what its template knew.

use std::{
    io,
    net::{SocketAddr, SocketAddrV6, UdpSocket},
    time::Duration,
};

use tokio::net::{TcpSocket, TcpStream};

use super::{control::Slot, lane::Lane, link};
use crate::DriverError;

/// Where an agent says that it is ready.
pub const READY_PORT: u16 = 1025;
/// The hint is a few bytes; more is cut.
const HINT_BYTES_MAX: usize = 2048;

pub(super) async fn dial(
    lane: &Lane,
    slot: Slot,
    port: u32,
    limit: Duration,
) -> Result<TcpStream, DriverError> {
    let failed = move |source: io::Error| DriverError::Io {
        action: format!("connect to port {port} of the guest"),
        source,
    };
    let number = u16::try_from(port).map_err(|_| DriverError::ConnectRefused { port })?;
    let address = SocketAddrV6::new(link::CHANNEL_GUEST, number, 0, slot.channel_index());
    let connect = async {
        // Made in the namespace, it stays of the namespace; the runtime drives it.
        let socket = lane.run(move || TcpSocket::new_v6().map_err(failed)).await?;
        socket.set_nodelay(true).map_err(failed)?;
        match socket.connect(SocketAddr::V6(address)).await {
            Ok(stream) => Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Err(DriverError::ConnectRefused { port })
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                Err(DriverError::ConnectTimeout { port, limit_ms: limit.as_millis() })
            }
            Err(error) => Err(failed(error)),
        }
    };
    match tokio::time::timeout(limit, connect).await {
        Ok(result) => result,
        Err(_) => Err(DriverError::ConnectTimeout { port, limit_ms: limit.as_millis() }),
    }
}

/// The socket on which a guest's agent says that it is ready.
#[derive(Debug)]
pub struct ReadyListener {
    socket: tokio::net::UdpSocket,
    scope: u32,
}

impl ReadyListener {
    pub(super) async fn bind(lane: &Lane, slot: Slot) -> Result<Self, DriverError> {
        let scope = slot.channel_index();
        let failed = |source: io::Error| DriverError::Io {
            action: "listen for the guest's ready hint".to_owned(),
            source,
        };
        let socket = lane
            .run(move || {
                let address = SocketAddrV6::new(link::CHANNEL_HOST, READY_PORT, 0, scope);
                let socket = UdpSocket::bind(address).map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                Ok(socket)
            })
            .await?;
        Ok(Self { socket: tokio::net::UdpSocket::from_std(socket).map_err(failed)?, scope })
    }

    /// The next hint from the guest, whatever it says: a guest writes it, so it is a hint only.
    /// Safe to drop and call again.
    pub async fn wait(&mut self) -> Result<Vec<u8>, DriverError> {
        let mut hint = vec![0; HINT_BYTES_MAX];
        loop {
            let (length, from) = self.socket.recv_from(&mut hint).await.map_err(|source| {
                DriverError::Io { action: "receive the guest's ready hint".to_owned(), source }
            })?;
            let from_guest = match from {
                SocketAddr::V6(from) => {
                    *from.ip() == link::CHANNEL_GUEST && from.scope_id() == self.scope
                }
                SocketAddr::V4(_) => false,
            };
            if from_guest {
                hint.truncate(length);
                return Ok(hint);
            }
        }
    }
}
