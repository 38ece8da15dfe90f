//! The base image, given to the engine once: its root file system as a tar stream.
//!
//! It is mounted in a mount namespace that ends with the program that reads it, so that nothing is
//! left of it, however this ends. It has the name of its content; engines keep it as the image store
//! keeps its own, until somebody removes it.

use std::{path::Path, process::Stdio, time::Duration};

use bollard::{body_try_stream, query_parameters::CreateImageOptions};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::{
    io::AsyncReadExt as _,
    process::{Child, Command},
};
use tokio_util::io::ReaderStream;

use super::engine::{Engine, is_status, refusal};
use crate::DriverError;

/// A name that no registry has: engines must never look for it elsewhere.
const REPOSITORY: &str = "aetherium.invalid/base";
const LABEL: &str = "aetherium.rootfs";
/// Of a digest, in the tag.
const TAG_CHARS: usize = 40;
/// Of a whole import, on a slow disk.
const LIMIT: Duration = Duration::from_mins(10);
const ERROR_BYTES_MAX: u64 = 2000;
const NOT_FOUND: u16 = 404;

/// The folder that is the mount point is hidden by it in the new namespace only.
const SCRIPT: &str = "mount -t erofs -o ro,loop \"$1\" \"$2\" && \
    exec tar -C \"$2\" --numeric-owner --xattrs --xattrs-include='*' -cf - .";

/// The engine's name of the image with this root file system, whose file is named by its digest.
pub(super) async fn ensure(
    engine: &Engine,
    rootfs: &Path,
    mount_point: &Path,
) -> Result<String, DriverError> {
    let digest = rootfs.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if digest.len() < TAG_CHARS || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(DriverError::Unavailable(format!(
            "the root file system {} is not named by its digest, so that it cannot be given to \
             Docker; use an image of the image store",
            rootfs.display()
        )));
    }
    let tag = &digest[..TAG_CHARS];
    let name = format!("{REPOSITORY}:{tag}");
    if is_there(engine, &name, digest).await? {
        return Ok(name);
    }
    tracing::info!(image = name, "importing the base image into the Docker engine");
    let options = CreateImageOptions {
        from_src: Some("-".to_owned()),
        repo: Some(REPOSITORY.to_owned()),
        tag: Some(tag.to_owned()),
        changes: vec![format!("LABEL {LABEL}={digest}")],
        ..CreateImageOptions::default()
    };
    let tar = read_tar(rootfs, mount_point)?;
    let request = engine.client.create_image(Some(options), Some(body_try_stream(tar)), None);
    let import = request.try_for_each(|_| std::future::ready(Ok(())));
    match tokio::time::timeout(LIMIT, import).await {
        Ok(Ok(())) => Ok(name),
        Ok(Err(error)) => Err(refusal("import the base image", &error)),
        Err(_) => Err(DriverError::Vmm {
            action: "import the base image".to_owned(),
            detail: format!("not done within {} s", LIMIT.as_secs()),
        }),
    }
}

async fn is_there(engine: &Engine, name: &str, digest: &str) -> Result<bool, DriverError> {
    let inspected = async {
        match engine.client.inspect_image(name).await {
            Ok(image) => {
                let labels = image.config.and_then(|config| config.labels).unwrap_or_default();
                Ok(labels.get(LABEL).is_some_and(|label| label == digest))
            }
            Err(error) if is_status(&error, &[NOT_FOUND]) => Ok(false),
            Err(error) => Err(error),
        }
    };
    engine.ask("inspect the base image", inspected).await
}

/// The stream ends with an error where the program does: half an image must not be taken for one.
fn read_tar(
    rootfs: &Path,
    mount_point: &Path,
) -> Result<impl futures::Stream<Item = std::io::Result<bytes::Bytes>> + Send + 'static, DriverError>
{
    let failed = |source| DriverError::Io {
        action: "start unshare to read the base image".to_owned(),
        source,
    };
    let mut child = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--", "sh", "-c", SCRIPT, "sh"])
        .args([rootfs, mount_point])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let out = child.stdout.take().ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
    let end = stream::once(end_of(child)).filter_map(|end| std::future::ready(end.err().map(Err)));
    Ok(ReaderStream::with_capacity(out, 1 << 18).chain(end))
}

async fn end_of(mut child: Child) -> std::io::Result<()> {
    let mut words = String::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(ERROR_BYTES_MAX).read_to_string(&mut words).await?;
    }
    let status = child.wait().await?;
    if status.success() {
        return Ok(());
    }
    tracing::error!(%status, words = words.trim(), "cannot read the base image");
    Err(std::io::Error::other(format!("read the base image: {status}: {}", words.trim())))
}
