//! PID 1 of a container: what a guest's is, where somebody else has brought the guest up.
//!
//! ```text
//! DIR/token        hex; read at the start, and removed
//! DIR/ready.sock   the host's: hears of the agent once it listens
//! DIR/agent.sock   ours: the host connects here
//! ```
//!
//! `DIR` is a folder of the host's that root alone can enter. A container shares the host's kernel,
//! so that clock, random generator and links are the host's business: [`Place::Container`] says
//! where the rest of the agent leaves them alone.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use aether_protocol::Token;

use crate::guest::Guest;
use crate::init::{After, supervise};
use crate::server::{self, Agent, Place};
use crate::{kmsg, power};

const TOKEN_FILE: &str = "token";
const READY_SOCKET: &str = "ready.sock";
const AGENT_SOCKET: &str = "agent.sock";

/// Whether this is `aether-agent --container DIR`.
pub fn wanted(mut args: impl Iterator<Item = OsString>) -> Option<PathBuf> {
    (args.next()? == "--container").then(|| args.next().map(PathBuf::from))?
}

/// Returns when the container is to end.
#[must_use]
pub fn main(directory: &Path) -> ExitCode {
    match run(directory) {
        Ok(After::End) => ExitCode::SUCCESS,
        Ok(After::GoOn) => {
            kmsg!("the agent does not stay alive");
            ExitCode::FAILURE
        }
        Err(error) => {
            kmsg!("give up: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(directory: &Path) -> io::Result<After> {
    let token = take_token(&directory.join(TOKEN_FILE))?;
    // The kernel's own name for a boot is the host's here.
    let boot_id = Guest::default().new_boot_id()?;
    let after = |status| if power::is_end_of_container(status) { After::End } else { After::GoOn };
    Ok(supervise(
        |legacy, instance| serve(directory, &token, legacy, &format!("{boot_id}.{instance}")),
        after,
    ))
}

fn take_token(path: &Path) -> io::Result<Token> {
    let named = |error: &dyn std::fmt::Display| {
        io::Error::other(format!("read the token {}: {error}", path.display()))
    };
    let text = fs::read_to_string(path).map_err(|e| named(&e))?;
    fs::remove_file(path).map_err(|e| named(&e))?;
    Token::from_hex(text.trim()).map_err(|e| named(&e))
}

fn serve(
    directory: &Path,
    token: &Token,
    legacy: Option<&File>,
    boot_id: &str,
) -> io::Result<Infallible> {
    let legacy = legacy.map(File::try_clone).transpose()?;
    let agent = Agent::placed(Place::Container, token.clone(), boot_id.to_owned(), legacy);
    let path = directory.join(AGENT_SOCKET);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&path)?;
    // A hint only: nobody listens any more when an agent is replaced.
    if let Err(error) = say_ready(&directory.join(READY_SOCKET), boot_id) {
        kmsg!("say that the guest is ready: {error}");
    }
    server::serve(&agent, server::Listener::unix(listener))
}

fn say_ready(path: &Path, boot_id: &str) -> io::Result<()> {
    UnixDatagram::unbound()?.send_to(boot_id.as_bytes(), path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_read_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(TOKEN_FILE);
        fs::write(&path, "ab".repeat(32)).unwrap();
        assert_eq!(take_token(&path).unwrap().to_hex(), "ab".repeat(32));
        assert!(!path.exists());
        assert!(take_token(&path).unwrap_err().to_string().contains("token"));
    }

    #[test]
    fn only_its_own_flag_makes_it_a_container() {
        let args = |args: &[&str]| wanted(args.iter().map(OsString::from));
        assert_eq!(args(&["--container", "/x"]), Some("/x".into()));
        for other in [&[][..], &["--container"], &["--serve-unix", "/x"]] {
            assert_eq!(args(other), None);
        }
    }
}
