//! A builder for tests: runs the script in a chroot over the base image, with no network, in
//! namespaces of its own that take their mounts with them. No machine is started.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use aether_tools::{BuildError, BuildJob, Builder, LogSink};
use async_trait::async_trait;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

#[derive(Debug)]
pub(crate) struct ChrootBuilder {
    /// An erofs image.
    pub(crate) rootfs: PathBuf,
    pub(crate) work: PathBuf,
}

/// $1: the image, $2: a folder of ours, $3: the output.
const SCRIPT: &str = r#"
set -eu
mount -t tmpfs -o size=8g none "$2"
cd "$2"
mkdir lower upper root
mount -t erofs -o loop,ro "$1" lower
mkdir upper/up upper/work
mount -t overlay -o lowerdir=lower,upperdir=upper/up,workdir=upper/work overlay root
mount -t tmpfs -o size=8g none root/tmp
mount --rbind /dev root/dev
mount -t proc proc root/proc
mkdir root/tmp/build root/tmp/build/artefacts
mount --bind "$ARTEFACTS" root/tmp/build/artefacts
cp "$JOB" root/tmp/build/build.sh
touch root/tmp/out
# An image of before it was in there.
if [ ! -e root/usr/bin/mkfs.erofs ]; then
  cp /usr/bin/mkfs.erofs root/usr/bin
  for library in $(ldd /usr/bin/mkfs.erofs | sed -n 's/.*=> \([^ ]*\) .*/\1/p'); do
    cp -nL "$library" root/usr/lib/x86_64-linux-gnu/
  done
fi
mount --bind "$3" root/tmp/out
exec chroot root sh /tmp/build/build.sh /tmp/build /tmp/out
"#;

#[async_trait]
impl Builder for ChrootBuilder {
    async fn build(&self, job: BuildJob, log: LogSink) -> Result<(), BuildError> {
        let unavailable =
            |error: std::io::Error| BuildError::Unavailable { reason: error.to_string() };
        let folder = tempfile::tempdir_in(&self.work).map_err(unavailable)?;
        let path = |name: &str| folder.path().join(name);
        for name in ["artefacts", "mnt"] {
            std::fs::create_dir(path(name)).map_err(unavailable)?;
        }
        for artefact in &job.artefacts {
            let target = path("artefacts").join(&artefact.name);
            std::fs::copy(&artefact.path, target).map_err(unavailable)?;
        }
        std::fs::write(path("build.sh"), &job.script).map_err(unavailable)?;
        std::fs::write(&job.output, "").map_err(unavailable)?;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--net", "--kill-child", "--propagation"])
            .args(["private", "sh", "-c", SCRIPT, "sh"])
            .arg(&self.rootfs)
            .arg(path("mnt"))
            .arg(&job.output)
            .env("ARTEFACTS", path("artefacts"))
            .env("JOB", path("build.sh"));
        run(command, &log).await
    }
}

/// Runs what prints both streams into one pipe.
pub(crate) async fn run(mut command: Command, log: &LogSink) -> Result<(), BuildError> {
    let unavailable = |error: std::io::Error| BuildError::Unavailable { reason: error.to_string() };
    let (reader, writer) = std::io::pipe().map_err(unavailable)?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().map_err(unavailable)?)
        .stderr(writer)
        .kill_on_drop(true)
        .spawn()
        .map_err(unavailable)?;
    // Holds the writing ends.
    drop(command);
    let mut reader =
        tokio::net::unix::pipe::Receiver::from_owned_fd(reader.into()).map_err(unavailable)?;
    let mut buffer = [0; 4096];
    loop {
        match reader.read(&mut buffer).await.map_err(unavailable)? {
            0 => break,
            count => log.write(&buffer[..count]),
        }
    }
    let status = child.wait().await.map_err(unavailable)?;
    match status.code() {
        Some(0) => Ok(()),
        Some(status) => Err(BuildError::Script { status }),
        None => Err(BuildError::Signal { signal: 9 }),
    }
}

/// The base image that `./dev setup` has made, where there is one.
pub(crate) fn base_image(folder: &Path) -> Option<(aether_tools::BaseImage, PathBuf)> {
    let manifest = std::fs::read(folder.join("images/debian.json")).ok()?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).ok()?;
    let digest = manifest["rootfs"]["digest"].as_str()?.to_owned();
    let packages = manifest["packages"].as_array()?;
    let base = aether_tools::BaseImage {
        image: "debian".to_owned(),
        suite: manifest["suite"].as_str()?.to_owned(),
        packages: packages.iter().filter_map(|p| p.as_str().map(str::to_owned)).collect(),
        digest: digest.clone(),
    };
    Some((base, folder.join("blobs").join(digest.strip_prefix("blake3:")?)))
}
