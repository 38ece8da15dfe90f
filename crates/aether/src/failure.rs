//! What the command line says when something did not work: what, where, what to do, and a stable
//! code, in one line.

use std::{error::Error, fmt, io, path::Path};

use aether_api::client::ClientError;
use aether_images::ImageError;
use aether_types::{ErrorCode, Fault};

use crate::exit::Exit;

#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// What went wrong, and where.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) hint: Option<String>,
    /// One of `ErrorCode`, or of this program's own: `server_unreachable`, `usage`, `io`, ...
    pub(crate) code: String,
    pub(crate) exit: Exit,
}

impl Failure {
    pub(crate) fn new(code: &str, exit: Exit, message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: code.to_owned(), exit }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new("usage", Exit::Usage, message)
    }

    pub(crate) fn io(action: &str, error: &io::Error) -> Self {
        Self::new("io", Exit::Failure, format!("{action}: {error}"))
    }

    pub(crate) fn file(action: &str, path: &Path, error: &io::Error) -> Self {
        let exit = match error.kind() {
            io::ErrorKind::NotFound => Exit::NotFound,
            _ => Exit::Failure,
        };
        Self::new("io", exit, format!("{action} {}: {error}", path.display()))
    }

    /// With the whole chain of causes.
    pub(crate) fn internal(action: &str, error: &dyn Error) -> Self {
        Self::new("internal", Exit::Failure, format!("{action}: {}", chain(error)))
    }

    pub(crate) fn fault(fault: &Fault) -> Self {
        Self {
            hint: hint_for(fault.code).map(str::to_owned),
            ..Self::new(fault.code.as_str(), fault.code.into(), &fault.message)
        }
    }

    #[must_use]
    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    #[must_use]
    pub(crate) fn exit(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code)?;
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl Error for Failure {}

/// `display: source: source of that`, without repeating what a display already says.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let part = source.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        next = source.source();
    }
    text
}

fn root_cause(mut error: &dyn Error) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let text = chain(&error);
        match error {
            ClientError::Url { .. } => Self::new("url_malformed", Exit::Usage, text),
            ClientError::Key => Self::new("key_malformed", Exit::Usage, text),
            ClientError::Connect { url, source } => {
                // What the layers between say is known: that it is a connection, and where to.
                let text = format!("connect to {url}: {}", root_cause(&*source));
                Self::new("server_unreachable", Exit::Unavailable, text)
                    .hint("is it running? `aether up` starts one")
            }
            ClientError::Authority => Self::new("authority_malformed", Exit::Usage, text)
                .hint("give a file of PEM certificates with --ca or AETHER_CA"),
            ClientError::Certificate { .. } => {
                Self::new("certificate_not_trusted", Exit::Unauthorized, text).hint(
                    "check the address; where the server is right, give its authority with --ca",
                )
            }
            ClientError::Transport { .. } => Self::new("connection_lost", Exit::Unavailable, text),
            ClientError::Unexpected { .. } => Self::new("not_aetherium", Exit::Failure, text)
                .hint("check the URL: something else answers there"),
            ClientError::Problem(problem) => {
                let code = problem.error_code();
                let message = match &problem.field {
                    Some(field) if !problem.detail.contains(field.as_str()) => {
                        format!("{field}: {}", problem.detail)
                    }
                    _ => problem.detail.clone(),
                };
                let exit = code.map_or(Exit::Failure, Exit::from);
                let hint = match (code, problem.retry_after_s) {
                    (_, Some(s)) => Some(format!("try again in {s} s")),
                    (Some(code), None) => hint_for(code).map(str::to_owned),
                    (None, None) => None,
                };
                Self { hint, ..Self::new(&problem.code, exit, message) }
            }
        }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        let exit = match &error {
            ImageError::Unknown { .. } => Exit::NotFound,
            ImageError::InvalidDigest { .. } | ImageError::InvalidRequest { .. } => Exit::Usage,
            _ => Exit::Failure,
        };
        let failure = Self::new(error.code(), exit, chain(&error));
        match error {
            ImageError::Unknown { .. } => failure
                .hint("`aether image list` shows what there is, `aether image build` makes one"),
            ImageError::NotRoot => failure.hint("run it as root, or with sudo"),
            _ => failure,
        }
    }
}

fn hint_for(code: ErrorCode) -> Option<&'static str> {
    match code {
        ErrorCode::Unauthorized => {
            Some("give the key with --key or AETHER_KEY; the first one is in DATA_DIR/admin-key")
        }
        ErrorCode::Forbidden => {
            Some("ask an admin for a key that may; `aether key create` makes one")
        }
        ErrorCode::KeyNotFound => Some("`aether key list` shows the keys there are"),
        ErrorCode::ProjectNotFound => Some("`aether project list` shows the projects there are"),
        ErrorCode::QuotaExceeded => {
            Some("stop or delete what is not needed; `aether project quota` shows what is used")
        }
        ErrorCode::VmNotFound => Some("`aether vm list` shows the VMs there are"),
        ErrorCode::TaskNotFound => Some("`aether task list` shows the tasks there are"),
        ErrorCode::WorkerNotFound => Some("`aether worker list` shows the workers there are"),
        ErrorCode::QueueNotFound => Some("`aether queue list` shows the queues there are"),
        ErrorCode::WorkerLost | ErrorCode::WorkerUnreachable => {
            Some("`aether worker list` shows whether it has come back")
        }
        ErrorCode::ImageNotFound => Some("`aether image list` on the server shows what there is"),
        ErrorCode::SnapshotNotFound => Some("`aether snapshot list` shows the snapshots there are"),
        ErrorCode::TemplateNotFound => Some("`aether template list` shows the templates there are"),
        ErrorCode::SnapshotStateConflict => {
            Some("`aether snapshot list` and `aether template list` show their states")
        }
        ErrorCode::SnapshotDamaged => Some("delete it, and take or build it again"),
        ErrorCode::TooManyVms => Some("delete VMs that are not needed, or try again later"),
        ErrorCode::NameTaken => Some("choose another name, or delete what has it"),
        ErrorCode::VmStateConflict => Some("`aether vm get` shows the VM's state and its reason"),
        ErrorCode::DriverUnavailable | ErrorCode::VmStartFailed | ErrorCode::VmStartTimeout => {
            Some("`aether doctor` checks the host")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line_with_its_code() {
        let fault = Fault::new(ErrorCode::NameTaken, "a VM called web lives");
        assert_eq!(
            Failure::fault(&fault).to_string(),
            "a VM called web lives [name_taken]; choose another name, or delete what has it"
        );
        assert_eq!(Failure::fault(&fault).exit, Exit::Conflict);
    }
}
