//! What a builder is given, and what it answers. The builder itself is a machine, and so the
//! worker's business: this crate knows none.

mod flight;
mod output;
mod run;
mod script;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub(crate) use flight::Flights;
pub(crate) use run::Build;
pub(crate) use script::{FORMAT, script};

/// Runs an installer where it can do no harm: no network, nothing of the host's, and nothing left
/// when it is over.
///
/// A builder gets the artefacts as files and one script, and leaves the file `job.output`, which
/// the host does not parse. What it left of the output after an error does not matter: this crate
/// removes it. The future may be dropped at any time; what it made is then the builder's to remove.
#[async_trait]
pub trait Builder: Send + Sync + fmt::Debug {
    async fn build(&self, job: BuildJob, log: LogSink) -> Result<(), BuildError>;
}

/// One layer to be made.
///
/// In the builder there is a folder of any name, say `/build`, on a file system with room for
/// [`BuildJob::room_bytes`]. It gets `artefacts/<name>` for each artefact, and `build.sh` with
/// [`BuildJob::script`]. Then `sh /build/build.sh /build <output>` is run as root, where `<output>`
/// is the file or device that the layer goes to. The script ends with 0 when all went well, with
/// [`VERIFY_FAILED`] when the tool itself did not do what it must, and otherwise with what the
/// installer ended with. It prints a line that begins with [`STAGE_PREFIX`] at each new stage and,
/// as the last one, [`SIZE_PREFIX`] with the number of bytes of the output that are the layer.
#[derive(Debug, Clone)]
pub struct BuildJob {
    pub tool: String,
    pub version: String,
    /// The base image that the tool is installed on, and that it is verified on.
    pub image: String,
    pub artefacts: Vec<BuildArtefact>,
    pub script: String,
    /// Made by the builder; its folder is there, and on the file system of the layers.
    pub output: PathBuf,
    /// The largest layer that is taken.
    pub output_bytes_max: u64,
    /// For unpacked artefacts and the installed tree, in the builder.
    pub room_bytes: u64,
    /// What is left of the time limit when the builder is called.
    pub time_limit: Duration,
}

/// Ends the script when the tool was installed and does not work.
pub const VERIFY_FAILED: i32 = 97;
/// Ends the script when what the installer made is no layer.
pub const LAYOUT_FAILED: i32 = 98;
/// Begins a line of output that names a stage: `::stage install`.
pub const STAGE_PREFIX: &str = "::stage ";
/// Begins the last line of output: `::size 1234567`.
pub const SIZE_PREFIX: &str = "::size ";

/// A file that the installer needs, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildArtefact {
    /// Its name in the folder of artefacts: one plain file name.
    pub name: String,
    pub path: PathBuf,
    pub size_bytes: u64,
}

/// Why there is no layer. This crate adds tool, version and the last lines of the log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The script ended with this status, by itself.
    #[error("the installer ended with exit status {status}")]
    Script { status: i32 },
    /// The script was ended by this signal, such as for want of memory.
    #[error("the installer was ended by signal {signal}")]
    Signal { signal: i32 },
    #[error("the time limit of {} s has passed", limit.as_secs())]
    TimedOut { limit: Duration },
    #[error("{place} is full")]
    NoSpace { place: String },
    #[error("the output is larger than {max_bytes} bytes")]
    TooLarge { max_bytes: u64 },
    /// The builder itself could not be made or did not answer: nothing that the tool did.
    #[error("the builder cannot be used: {reason}")]
    Unavailable { reason: String },
}

/// Takes what the installer prints, whole lines or parts, as it comes. Never blocks, and holds a
/// bounded amount.
#[derive(Clone)]
pub struct LogSink(Arc<Sink>);

type Sink = dyn Fn(&[u8]) + Send + Sync;

impl LogSink {
    pub fn new(sink: impl Fn(&[u8]) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// For who does not listen.
    #[must_use]
    pub fn none() -> Self {
        Self::new(|_| ())
    }

    pub fn write(&self, bytes: &[u8]) {
        (self.0)(bytes);
    }
}

impl fmt::Debug for LogSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogSink")
    }
}
