//! The builder's script, run on this host: what it takes for a layer, and what it refuses.

use std::path::Path;
use std::sync::Arc;

use aether_tools::{BuildError, BuildJob, Builder, LogSink, ReadyLayer, ToolError, Tools};
use async_trait::async_trait;
use tokio::process::Command;

use crate::chroot::run;
use crate::fake::{Rig, base};

/// Runs the script with a folder of its own, on this host: for recipes of the test's own only.
#[derive(Debug)]
struct HostBuilder;

#[async_trait]
impl Builder for HostBuilder {
    async fn build(&self, job: BuildJob, log: LogSink) -> Result<(), BuildError> {
        let folder = tempfile::tempdir().unwrap();
        let artefacts = folder.path().join("artefacts");
        std::fs::create_dir(&artefacts).unwrap();
        for artefact in &job.artefacts {
            std::fs::copy(&artefact.path, artefacts.join(&artefact.name)).unwrap();
        }
        let script = folder.path().join("build.sh");
        std::fs::write(&script, &job.script).unwrap();
        let mut command = Command::new("sh");
        command.arg(script).arg(folder.path()).arg(&job.output);
        run(command, &log).await
    }
}

/// Why the script cannot run here.
fn obstacle() -> Option<&'static str> {
    let has =
        |name: &str| ["/usr/bin", "/usr/sbin"].iter().any(|f| Path::new(f).join(name).exists());
    match () {
        () if !rustix::process::geteuid().is_root() => Some("not root, which mounts"),
        () if !has("mkfs.erofs") => Some("no mkfs.erofs"),
        () if !has("unshare") => Some("no unshare"),
        () => None,
    }
}

async fn build(
    rig: &Rig,
    folder: &str,
    (install, verify, expect): (&str, &str, &str),
) -> Result<ReadyLayer, ToolError> {
    let recipe = format!(
        "name = \"made\"\nsummary = \"x\"\ncommands = [\"made\"]\nexpect = [\"{expect}\"]\n\
         install = '''\n{install}\n'''\nverify = '''\n{verify}\n'''\n\
         [source]\nkind = \"npm\"\npackage = \"hello\"\n"
    );
    std::fs::write(rig.path("recipes").join("made.toml"), recipe).unwrap();
    let mut config = rig.config();
    config.folder = rig.path(folder);
    let tools = Tools::open(config).unwrap();
    let builder: Arc<dyn Builder> = Arc::new(HostBuilder);
    let requests = ["made".parse().unwrap()];
    let layers = tools.ensure(&requests, &base(), &builder, &|_| ()).await?;
    Ok(layers.into_iter().next().unwrap())
}

const MADE: &str = r#"
mkdir -p "$TREE/bin" "$DEST/etc" "$DEST/usr/share"
printf '#!/bin/sh\necho "$0 says $(cat "$(dirname "$(readlink -f "$0")")/../word")"\n' > "$TREE/bin/made"
chmod 700 "$TREE/bin/made"
cp "$ARTEFACTS/hello.tgz" "$TREE/word"
echo dropped > "$DEST/etc/made.conf"
put_command "$TREE/bin/made"
"#;

#[tokio::test]
async fn installed_tree_becomes_the_same_layer_each_time() {
    if let Some(reason) = obstacle() {
        println!("skipped: {reason}");
        return;
    }
    let rig = Rig::new().await;
    let recipe = (MADE, "made", "/usr/bin/made says {version}");
    let one = build(&rig, "one", recipe).await.unwrap();
    let two = build(&rig, "two", recipe).await.unwrap();
    assert_eq!((one.got.as_str(), &one.digest), ("1.2.0", &two.digest));
    let listed = std::process::Command::new("dump.erofs")
        .args(["--ls", "--path=/"])
        .arg(&one.path)
        .output()
        .unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("usr") && !listed.contains("etc"), "{listed}");
}

#[tokio::test]
async fn what_does_not_do_what_it_must_is_no_layer() {
    if let Some(reason) = obstacle() {
        println!("skipped: {reason}");
        return;
    }
    let rig = Rig::new().await;
    for (recipe, said) in [
        (("echo no room; exit 28", "made", "x"), "exit status 28 (at: install)"),
        (("exit 97", "made", "x"), "exit status 1 (at: install)"),
        ((MADE, "made", "says 9"), "does not contain: says 9"),
        ((MADE, "made; exit 3", "says"), "ended with exit status 3"),
        (("true", "echo says", "says"), "/usr/bin/made is not there"),
        (("rm -rf \"$DEST/usr\"", "true", "x"), "there is no folder usr"),
        (("mkfifo \"$DEST/usr/pipe\"", "true", "x"), "only files, folders and links"),
        (
            ("ln -s \"$TREE/x\" \"$DEST/usr/bin/made\"", "true", "x"),
            "a link leads into the builder",
        ),
    ] {
        let error = build(&rig, "tools", recipe).await.unwrap_err().to_string();
        assert!(error.contains("made 1.2.0") && error.contains(said), "{said}: {error}");
        rig.assert_only_after(0);
    }
}
