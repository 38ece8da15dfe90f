//! To a VM. A file appears there whole or not at all.

use std::{io, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use aether_api::{
    ExecuteRequest, MkdirRequest,
    client::{CallOptions, Waited, WriteOptions},
};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use tokio_util::io::ReaderStream;

use super::{
    WAIT,
    cp::{Copied, Copy, join},
    progress::Progress,
    stdin as input,
};
use crate::{exit::Exit, failure::Failure};

const CHUNK_BYTES: usize = 256 * 1024;

pub(super) async fn stdin(copy: &Copy<'_>, path: &str) -> Result<Copied, Failure> {
    if path.ends_with('/') || copy.is_folder(path).await? {
        return Err(Failure::usage(format!("{path} is a folder")).hint("name a file in it"));
    }
    let content = stream::unfold(input::read(), |mut chunks| async move {
        chunks.recv().await.map(|chunk| (Ok(chunk), chunks))
    });
    let progress = Progress::bytes(path, None, copy.json);
    let bytes = write(copy, path, None, content, progress).await?;
    Ok(Copied { files: 1, bytes })
}

/// A file or, where asked for, a folder; into `target` where that is a folder, else as it.
pub(super) async fn tree(copy: &Copy<'_>, local: &Path, target: &str) -> Result<Copied, Failure> {
    let metadata = std::fs::metadata(local).map_err(|e| Failure::file("examine", local, &e))?;
    let target = if copy.is_folder(target).await? {
        let whole = local.canonicalize().map_err(|e| Failure::file("examine", local, &e))?;
        join(target, name_of(&whole)?)
    } else if target.ends_with('/') && !metadata.is_dir() {
        return Err(Failure::new(
            aether_types::ErrorCode::FileNotFound.as_str(),
            Exit::NotFound,
            format!("{}:{target} is not a folder", copy.vm),
        ));
    } else {
        target.trim_end_matches('/').to_owned()
    };
    let mut copied = Copied::default();
    if metadata.is_dir() {
        copy.needs_recursive(&local.display().to_string())?;
        folder(copy, local, &target, &mut copied).await?;
    } else {
        file(copy, local, &target, &mut copied).await?;
    }
    Ok(copied)
}

async fn folder(
    copy: &Copy<'_>,
    local: &Path,
    target: &str,
    copied: &mut Copied,
) -> Result<(), Failure> {
    let mode = |path: &Path| -> Result<u32, Failure> {
        let metadata = std::fs::symlink_metadata(path);
        Ok(metadata.map_err(|e| Failure::file("examine", path, &e))?.permissions().mode() & 0o7777)
    };
    let mut folders = vec![(local.to_owned(), target.to_owned())];
    while let Some((from, to)) = folders.pop() {
        let request = MkdirRequest {
            path: to.clone(),
            parents: true,
            mode: Some(format!("{:04o}", mode(&from)?)),
            user: copy.user.map(str::to_owned),
        };
        copy.client.make_dir(copy.vm, &request).await?;
        let entries = std::fs::read_dir(&from).map_err(|e| Failure::file("list", &from, &e))?;
        for entry in entries {
            let entry = entry.map_err(|e| Failure::file("list", &from, &e))?;
            let path = entry.path();
            let there = join(&to, name_of(&path)?);
            let kind = entry.file_type().map_err(|e| Failure::file("examine", &path, &e))?;
            if kind.is_dir() {
                folders.push((path, there));
            } else if kind.is_symlink() {
                symlink(copy, &path, &there).await?;
                copied.files += 1;
            } else if kind.is_file() {
                file(copy, &path, &there, copied).await?;
            } else {
                return Err(Failure::usage(format!(
                    "{} is neither a file, a folder nor a link",
                    path.display()
                )));
            }
        }
    }
    Ok(())
}

async fn file(
    copy: &Copy<'_>,
    local: &Path,
    target: &str,
    copied: &mut Copied,
) -> Result<(), Failure> {
    let failed = |action: &'static str| move |e: io::Error| Failure::file(action, local, &e);
    let file = tokio::fs::File::open(local).await.map_err(failed("open"))?;
    let metadata = file.metadata().await.map_err(failed("examine"))?;
    let content = ReaderStream::with_capacity(file, CHUNK_BYTES);
    let progress = Progress::bytes(local.display().to_string(), Some(metadata.len()), copy.json);
    let mode = metadata.permissions().mode() & 0o7777;
    copied.bytes += write(copy, target, Some(mode), content, progress).await?;
    copied.files += 1;
    Ok(())
}

async fn write(
    copy: &Copy<'_>,
    path: &str,
    mode: Option<u32>,
    content: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    progress: Progress,
) -> Result<u64, Failure> {
    let options =
        WriteOptions { mode, user: copy.user.map(str::to_owned), ..WriteOptions::default() };
    // The body may outlive this call for a moment; the bar must not.
    let progress = Arc::new(progress);
    let shown = Arc::downgrade(&progress);
    let content = content.inspect(move |chunk| {
        if let (Some(progress), Ok(chunk)) = (shown.upgrade(), chunk) {
            progress.add(chunk.len());
        }
    });
    let written = copy.client.write_file(copy.vm, path, &options, Box::pin(content)).await?;
    Ok(written.bytes)
}

/// The interface has no request for a link: the VM's own `ln` makes it.
async fn symlink(copy: &Copy<'_>, local: &Path, target: &str) -> Result<(), Failure> {
    let points_to =
        std::fs::read_link(local).map_err(|e| Failure::file("read the link", local, &e))?;
    let request = ExecuteRequest {
        command: "ln".to_owned(),
        args: vec!["-sfn".into(), "--".into(), utf8(&points_to)?.into(), target.to_owned()],
        user: copy.user.map(str::to_owned),
        ..ExecuteRequest::default()
    };
    let answer = copy.client.execute(copy.vm, &request, &CallOptions::waiting(WAIT)).await?;
    match answer {
        Waited::Done(execution) if execution.exit_code == Some(0) => Ok(()),
        Waited::Done(execution) => {
            let why = execution.stderr.unwrap_or_default();
            let why = execution.error.map_or(why, |error| error.message);
            Err(Failure::new(
                "link_failed",
                Exit::Failure,
                format!("make the link {target}: {}", super::table::printable(why.trim())),
            ))
        }
        Waited::Accepted(_) => Err(Failure::new(
            "link_failed",
            Exit::Failure,
            format!("make the link {target}: it takes more than {} s", WAIT.as_secs()),
        )),
    }
}

fn name_of(path: &Path) -> Result<&str, Failure> {
    let name = path.file_name().map(Path::new);
    name.map_or_else(|| Err(Failure::usage("the folder has no name; copy it to a new one")), utf8)
}

fn utf8(path: &Path) -> Result<&str, Failure> {
    path.to_str()
        .ok_or_else(|| Failure::usage(format!("{}: the name is not UTF-8", path.display())))
}
