//! Tells the service manager how far we are (`NOTIFY_SOCKET`; see `sd_notify`).

use std::os::{
    linux::net::SocketAddrExt as _,
    unix::{ffi::OsStrExt as _, net::UnixDatagram},
};

/// Does nothing where no service manager listens.
pub(crate) fn send(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let outcome = UnixDatagram::unbound().and_then(|socket| {
        let bytes = name.as_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(abstract_name) => {
                std::os::unix::net::SocketAddr::from_abstract_name(abstract_name)?
            }
            None => std::os::unix::net::SocketAddr::from_pathname(&name)?,
        };
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(error) = outcome {
        tracing::warn!(%error, "the service manager does not hear us");
    }
}
