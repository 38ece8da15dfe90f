//! What a session ends with when it does not end well.

use std::fmt;
use std::io;

use aether_protocol::{ErrorCode, Failed, Refused};
use rustix::io::Errno;

/// A stable code, and a text for a person.
#[derive(Debug, Clone)]
pub(crate) struct Fail {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
}

impl Fail {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// An error of the system; `what` is the action and its object.
    pub(crate) fn io(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::new(code_of(&error), format!("{what}: {error}"))
    }

    /// The same for calls that bring the bare number.
    pub(crate) fn sys(what: impl fmt::Display) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::io(what)(errno.into())
    }
}

impl From<Fail> for Failed {
    fn from(fail: Fail) -> Self {
        Self::new(fail.code, fail.message)
    }
}

impl From<Fail> for Refused {
    fn from(fail: Fail) -> Self {
        Self::new(fail.code, fail.message)
    }
}

fn code_of(error: &io::Error) -> ErrorCode {
    let Some(errno) = error.raw_os_error() else {
        return match error.kind() {
            io::ErrorKind::AlreadyExists => ErrorCode::Exists,
            io::ErrorKind::NotFound => ErrorCode::NotFound,
            _ => ErrorCode::Io,
        };
    };
    match errno {
        libc::ENOENT => ErrorCode::NotFound,
        libc::EACCES | libc::EPERM => ErrorCode::PermissionDenied,
        libc::EISDIR => ErrorCode::IsADirectory,
        libc::ENOTDIR => ErrorCode::NotADirectory,
        libc::EEXIST => ErrorCode::Exists,
        libc::ENOTEMPTY => ErrorCode::NotEmpty,
        libc::ENOSPC | libc::EDQUOT => ErrorCode::NoSpace,
        libc::EROFS => ErrorCode::ReadOnly,
        libc::ENAMETOOLONG | libc::ELOOP | libc::EINVAL | libc::EXDEV => ErrorCode::InvalidPath,
        libc::EFBIG => ErrorCode::TooLarge,
        libc::ENXIO | libc::ENODEV => ErrorCode::NotAFile,
        _ => ErrorCode::Io,
    }
}
