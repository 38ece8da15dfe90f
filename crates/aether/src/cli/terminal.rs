//! This process's terminal: raw while it is lent to a guest, and as it was on every way out.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Mutex, PoisonError},
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::failure::Failure;

/// What the terminal was before, while it is raw; for the panic hook.
static BEFORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// The terminal is raw until this is dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    pub(crate) fn enter() -> Result<Self, Failure> {
        let failed = |e: io::Error| Failure::io("use the terminal", &e);
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).map_err(|e| failed(e.into()))?;
        let mut raw = before.clone();
        raw.make_raw();
        let fd = stdin.as_fd().try_clone_to_owned().map_err(failed)?;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some((fd, before));
        let guard = Self(());
        // First back to a sane terminal, so that the message can be read.
        let earlier = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            earlier(info);
        }));
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(|e| failed(e.into()))?;
        Ok(guard)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((fd, before)) = before {
        // Without a terminal there is nothing to restore.
        let _ = tcsetattr(fd, OptionalActions::Now, &before);
    }
}

/// Rows and columns; a terminal that does not know is taken for the usual.
pub(crate) fn size() -> (u16, u16) {
    match tcgetwinsize(std::io::stdin()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        Ok(_) | Err(_) => (24, 80),
    }
}

/// What a person types, and the way out: `~.` at the start of a line ends the session, `~~`
/// sends a tilde.
#[derive(Debug)]
pub(crate) struct Escape {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    LineStart,
    /// A tilde at the start of a line, held back.
    Tilde,
    Inside,
}

impl Escape {
    pub(crate) fn new() -> Self {
        Self { state: State::LineStart }
    }

    /// What is to be sent, and whether the session is to end after it.
    pub(crate) fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len() + 1);
        for &byte in typed {
            match (self.state, byte) {
                (State::LineStart, b'~') => {
                    self.state = State::Tilde;
                    continue;
                }
                (State::Tilde, b'.') => return (out, true),
                (State::Tilde, b'~') | (State::LineStart | State::Inside, _) => {}
                (State::Tilde, _) => out.push(b'~'),
            }
            out.push(byte);
            self.state =
                if matches!(byte, b'\r' | b'\n') { State::LineStart } else { State::Inside };
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(typed: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut escape = Escape::new();
        let mut all = Vec::new();
        for part in typed {
            let (out, end) = escape.pass(part);
            all.extend(out);
            if end {
                return (all, true);
            }
        }
        (all, false)
    }

    #[test]
    fn a_tilde_and_a_dot_at_the_start_of_a_line_end_the_session() {
        assert_eq!(pass(&[b"ls\r", b"~", b"."]), (b"ls\r".to_vec(), true));
        assert_eq!(pass(&[b"~."]), (b"".to_vec(), true));
        assert_eq!(pass(&[b"cd ~.\r"]), (b"cd ~.\r".to_vec(), false));
        assert_eq!(pass(&[b"~~.\r"]), (b"~.\r".to_vec(), false));
        assert_eq!(pass(&[b"~/x\r"]), (b"~/x\r".to_vec(), false));
    }
}
