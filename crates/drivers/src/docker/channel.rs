//! The folder that a container shares with the host, and the sockets in it.
//!
//! The container's root may write to it, so nothing in it is trusted: it is made anew before each
//! start, while no container runs, and links in it are not followed.

use std::{
    fs,
    io::Write as _,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::{Path, PathBuf},
};

use tokio::net::{UnixDatagram, UnixStream};

use crate::{
    DriverError,
    host::{file_error, make_folder, remove_tree},
    process,
    stream::connect_in,
};

const TOKEN_FILE: &str = "token";
const READY_SOCKET: &str = "ready.sock";
const AGENT_SOCKET: &str = "agent.sock";
/// The hint is a few bytes; more is cut.
const HINT_BYTES_MAX: usize = 2048;

pub(super) fn folder(machine: &Path) -> PathBuf {
    machine.join("channel")
}

/// Makes the folder of one start, for a container that does not run: with the token in it, and the
/// socket of its ready hint.
pub(super) fn make(machine: &Path, token: &str) -> Result<UnixDatagram, DriverError> {
    let path = folder(machine);
    remove_tree(&path)?;
    make_folder(&path, 0o700)?;
    let token_file = path.join(TOKEN_FILE);
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&token_file)
        .and_then(|mut file| file.write_all(token.as_bytes()))
        .map_err(|e| file_error("write", &token_file, e))?;
    let directory = process::open_directory(&path)?;
    UnixDatagram::bind(process::short_path(directory.as_fd(), READY_SOCKET))
        .map_err(|e| file_error("listen at", &path.join(READY_SOCKET), e))
}

/// Waits for the agent's hint, whatever it says.
pub(super) async fn wait_ready(ready: &UnixDatagram) -> Result<(), DriverError> {
    let mut hint = [0; HINT_BYTES_MAX];
    ready.recv(&mut hint).await.map(drop).map_err(|source| DriverError::Io {
        action: "receive the guest's ready hint".to_owned(),
        source,
    })
}

pub(super) async fn connect(directory: &OwnedFd) -> std::io::Result<UnixStream> {
    connect_in(directory.as_fd(), AGENT_SOCKET).await
}
