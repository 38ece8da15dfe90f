//! The kernel's log, which a VMM's console shows; standard error where there is none.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::sync::OnceLock;

static KMSG: OnceLock<Option<File>> = OnceLock::new();

/// Logs one line.
#[macro_export]
macro_rules! kmsg {
    ($($argument:tt)*) => {
        $crate::log::write($crate::log::Level::Warning, format_args!($($argument)*))
    };
}

/// Of a line, as the kernel counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Shown on a console even if the guest was told to be quiet.
    Fatal = 0,
    Warning = 4,
}

/// Sends later lines to the kernel's log. Only PID 1 does: a test must not write there.
pub fn use_kernel_log() {
    KMSG.get_or_init(|| File::options().write(true).open("/dev/kmsg").ok());
}

#[doc(hidden)]
pub fn write(level: Level, line: fmt::Arguments<'_>) {
    // One write is one record. Nothing can be done where logging itself does not work.
    let record = format!("<{}>aether-agent: {line}\n", level as u8);
    match KMSG.get() {
        Some(Some(kmsg)) => drop((&*kmsg).write_all(record.as_bytes())),
        Some(None) | None => drop(std::io::stderr().write_all(&record.as_bytes()[3..])),
    }
}
