//! Steps of the store at which a test makes it fail or die. Nothing outside of tests.

use std::path::Path;

use super::SnapshotError;

#[cfg(not(test))]
#[expect(clippy::unnecessary_wraps, reason = "the steps of a test fail")]
pub(super) fn step(_path: &Path) -> Result<(), SnapshotError> {
    Ok(())
}

#[cfg(test)]
pub(super) use armed::{Fault, arm, step};

#[cfg(test)]
mod armed {
    use std::cell::Cell;
    use std::io;

    use rustix::process::{Signal, getpid, kill_process};

    use super::{Path, SnapshotError};

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(in super::super) enum Fault {
        DiskFull,
        Kill,
    }

    thread_local! {
        static ARMED: Cell<Option<(u32, Fault)>> = const { Cell::new(None) };
    }

    /// Makes the step of this thread fail that comes after `steps` more.
    pub(in super::super) fn arm(steps: u32, fault: Fault) {
        ARMED.set(Some((steps, fault)));
    }

    pub(in super::super) fn step(path: &Path) -> Result<(), SnapshotError> {
        match ARMED.take() {
            None => Ok(()),
            Some((0, Fault::DiskFull)) => {
                let full = io::Error::from(io::ErrorKind::StorageFull);
                Err(SnapshotError::io("write", path)(full))
            }
            Some((0, Fault::Kill)) => {
                kill_process(getpid(), Signal::KILL).map_err(SnapshotError::io("end at", path))
            }
            Some((steps, fault)) => {
                ARMED.set(Some((steps - 1, fault)));
                Ok(())
            }
        }
    }
}
