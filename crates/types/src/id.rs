//! One id type for each noun, so that mixing them up does not compile.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The text is not an id of the expected form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {noun} id (a UUID such as 0192f0c4-7b1e-7c3a-9d52-3f6a1b2c4d5e)")]
pub struct ParseIdError {
    noun: &'static str,
    text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $noun:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new id: a UUID of version 7, so ids sort by the time they were made.
            #[must_use]
            #[expect(clippy::new_without_default, reason = "an id is made on purpose, never by default")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($noun, ":{}"), self.0.as_hyphenated())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let error = || ParseIdError { noun: $noun, text: text.chars().take(64).collect() };
                // Only the canonical form: two spellings of one id would be two keys elsewhere.
                if text.len() != 36 {
                    return Err(error());
                }
                Uuid::try_parse(text).map(Self).map_err(|_| error())
            }
        }
    };
}

id!(
    /// A virtual machine.
    VmId, "vm"
);
id!(
    /// The host's side of a VM. A VM's first machine has the VM's own id; one that was claimed from
    /// a pool was there before the VM was.
    MachineId, "machine"
);

impl From<VmId> for MachineId {
    fn from(id: VmId) -> Self {
        Self(id.0)
    }
}

id!(
    /// A snapshot of a VM.
    SnapshotId, "snapshot"
);
id!(
    /// A template.
    TemplateId, "template"
);
id!(
    /// A unit of work that a client asked for and a worker carries out.
    TaskId, "task"
);
id!(
    /// One command run in a VM. Also the id of the run inside the guest.
    ExecutionId, "execution"
);
id!(
    /// A worker process's identity; kept in its data directory across restarts.
    WorkerId, "worker"
);
id!(
    /// An API key.
    KeyId, "key"
);
id!(
    /// An entry of the audit log.
    AuditId, "audit entry"
);
id!(
    /// A project: whose all things are, seen by nobody else.
    ProjectId, "project"
);

impl ProjectId {
    /// Of the project that there is from the start, and of all that was made before there were
    /// others. Nothing else is ever given this id.
    pub const DEFAULT: Self = Self(Uuid::nil());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_sort_by_age() {
        let first = VmId::new();
        let second = VmId::new();
        assert!(first < second);
        assert_eq!(first.to_string().parse::<VmId>(), Ok(first));
    }

    #[test]
    fn only_the_canonical_form_parses() {
        let id = VmId::new().to_string();
        assert!(id.replace('-', "").parse::<VmId>().is_err());
        assert!(format!("{{{id}}}").parse::<VmId>().is_err());
        assert!("".parse::<TaskId>().is_err());
    }
}
