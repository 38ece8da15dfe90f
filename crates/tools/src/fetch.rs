//! Artefacts: from the cache, else from the mirror or the network, always checked.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::checksum::Checksum;
use crate::error::ToolError;
use crate::http::{Http, HttpError};
use crate::mirror::Mirror;
use crate::sources::Artefact;
use crate::store::{Scratch, Store};

/// The largest file that is fetched.
const ARTEFACT_BYTES_MAX: u64 = 4 << 30;

/// What a version needs, for errors.
#[derive(Debug, Clone)]
pub(crate) struct Of {
    pub(crate) tool: String,
    pub(crate) version: String,
}

impl Of {
    fn fetch(&self, reason: impl Into<String>) -> ToolError {
        ToolError::Fetch {
            tool: self.tool.clone(),
            version: self.version.clone(),
            reason: reason.into(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Fetcher {
    pub(crate) http: Http,
    pub(crate) mirror: Option<Mirror>,
    pub(crate) store: Arc<Store>,
}

/// A file that is there, checked, and not pruned while this is kept.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) path: PathBuf,
    pub(crate) size_bytes: u64,
    _pin: File,
}

impl Fetched {
    fn new((path, pin): (PathBuf, File)) -> Result<Self, ToolError> {
        let size_bytes = pin.metadata().map_err(ToolError::io("examine", &path))?.len();
        Ok(Self { path, size_bytes, _pin: pin })
    }
}

impl Fetcher {
    /// `began` is called when it is not in the cache.
    pub(crate) async fn fetch(
        &self,
        of: &Of,
        artefact: &Artefact,
        began: impl FnOnce(),
    ) -> Result<Fetched, ToolError> {
        let store = Arc::clone(&self.store);
        let checksum = artefact.checksum.clone();
        if let Some(found) = blocking(move || store.find_artefact(&checksum)).await? {
            return Fetched::new(found);
        }
        began();
        let scratch = match &self.mirror {
            Some(mirror) => self.copy(of, artefact, mirror).await?,
            None => self.download(of, artefact).await?,
        };
        let store = Arc::clone(&self.store);
        let checksum = artefact.checksum.clone();
        blocking(move || store.put_artefact(&scratch, &checksum)).await.and_then(Fetched::new)
    }

    async fn copy(
        &self,
        of: &Of,
        artefact: &Artefact,
        mirror: &Mirror,
    ) -> Result<Scratch, ToolError> {
        let (of, checksum, from) =
            (of.clone(), artefact.checksum.clone(), mirror.file(&artefact.checksum));
        let scratch = self.store.scratch("artefact");
        let name = artefact.name.clone();
        blocking(move || {
            let mut source = File::open(&from).map_err(|error| {
                of.fetch(format!("{name} should be in the mirror as {}: {error}", from.display()))
            })?;
            let target =
                File::create_new(scratch.path()).map_err(ToolError::io("write", scratch.path()));
            io::copy(&mut source, &mut target?).map_err(ToolError::io("write", scratch.path()))?;
            let is_right = File::open(scratch.path())
                .and_then(|mut copy| checksum.is_of(&mut copy))
                .map_err(ToolError::io("read", scratch.path()))?;
            if is_right {
                return Ok(scratch);
            }
            Err(of.fetch(wrong_checksum(&from.display().to_string(), &checksum)))
        })
        .await
    }

    async fn download(&self, of: &Of, artefact: &Artefact) -> Result<Scratch, ToolError> {
        let bytes_max = artefact.size_bytes.unwrap_or(ARTEFACT_BYTES_MAX).min(ARTEFACT_BYTES_MAX);
        let mut last = of.fetch(format!("{} has no address", artefact.name));
        for url in &artefact.urls {
            let scratch = self.store.scratch("artefact");
            let mut file =
                File::create_new(scratch.path()).map_err(ToolError::io("write", scratch.path()))?;
            match self.http.download(url, &mut file, &artefact.checksum, bytes_max).await {
                Ok(_) => return Ok(scratch),
                Err(HttpError::NoSpace) => {
                    let path = scratch.path().to_owned();
                    return Err(ToolError::NoSpace { action: "write", path });
                }
                Err(error) => last = of.fetch(error.reason()),
            }
        }
        Err(last)
    }
}

fn wrong_checksum(place: &str, checksum: &Checksum) -> String {
    format!("{place} has the wrong checksum: {checksum} is expected")
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ToolError> + Send + 'static,
) -> Result<T, ToolError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        let reason = format!("the work was not done: {error}");
        Err(ToolError::Io { action: "work in", path: PathBuf::from("the store"), reason })
    })
}
