//! Real registries and real tools, without a VM: the installers run in a chroot over the base
//! image. Skipped, with a reason, where there is no image, no root or no network.

use std::path::PathBuf;
use std::sync::Arc;

use aether_tools::{BaseImage, Builder, ToolError, ToolEvent, Tools, ToolsConfig};
use aether_types::{ErrorCode, ToolRequest};

use crate::chroot::{ChrootBuilder, base_image};
use crate::fake::{FakeBuilder, base};

/// The image, and a builder on it.
fn on_the_image(work: &std::path::Path) -> Option<(BaseImage, Arc<dyn Builder>)> {
    let folder = std::env::var_os("AETHER_IMAGE_DIR").map(PathBuf::from)?;
    let (base, rootfs) = base_image(&folder)?;
    Some((base, Arc::new(ChrootBuilder { rootfs, work: work.to_owned() })))
}

async fn build(tools: &[&str], catalogue: Option<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let Some((base, builder)) = on_the_image(folder.path()) else {
        println!("skipped: AETHER_IMAGE_DIR names no folder with a built image");
        return;
    };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root, which mounts");
        return;
    }
    let root = std::env::var_os("AETHER_TOOLS_TEST_DIR").map(PathBuf::from);
    let root = root.unwrap_or_else(|| folder.path().join("tools"));
    let open = Tools::open(ToolsConfig { catalogue, ..ToolsConfig::new(root) }).unwrap();
    let requests: Vec<ToolRequest> = tools.iter().map(|tool| tool.parse().unwrap()).collect();
    let began = std::time::Instant::now();
    let tell = |event| {
        let seconds = began.elapsed().as_secs_f32();
        match event {
            ToolEvent::Stage { tool, version, stage } => {
                println!("{seconds:6.1} {tool}@{version}: {stage}");
            }
            ToolEvent::Line { tool, line, .. } => println!("       {tool}| {line}"),
            ToolEvent::Ready { tool, version, cached } => {
                println!("{seconds:6.1} {tool}@{version} ready, cached: {cached}");
            }
        }
    };
    match open.ensure(&requests, &base, &builder, &tell).await {
        Ok(layers) => {
            for layer in &layers {
                let (mib, digest) = (layer.size_bytes >> 20, &layer.digest);
                println!("{} {} → {}: {mib} MiB, {digest}", layer.name, layer.asked, layer.got);
            }
        }
        Err(error) => give_up(error),
    }
}

/// Without a network nothing is said of the tools.
fn give_up(error: ToolError) {
    match error {
        ToolError::Source { .. } | ToolError::Fetch { .. } => println!("skipped: {error}"),
        other => panic!("{other}"),
    }
}

/// All the tools that `AETHER_TOOLS_TEST` names, such as `go@1.23.1 python rust`, else a small one
/// of each source.
#[tokio::test(flavor = "multi_thread")]
async fn real_registry_tools_are_installed_and_run() {
    let asked = std::env::var_os("AETHER_TOOLS_TEST").unwrap_or_else(|| "jq uv bun".into());
    let asked = asked.to_str().unwrap().to_owned();
    build(&asked.split_whitespace().collect::<Vec<_>>(), None).await;
}

/// With what they depend on: a package of npm and one of a Python index.
const BACK_ENDS: [(&str, &str); 2] = [
    (
        "rimraf",
        r#"
name = "rimraf"
summary = "Removes folders"
commands = ["rimraf"]
verify = '''
rimraf --version
mkdir -p folder/inner
rimraf folder
[ ! -e folder ] && echo it is gone
'''
expect = ["{version}", "it is gone"]
[source]
kind = "mise"
backend = "npm:rimraf"
"#,
    ),
    (
        "httpie",
        r#"
name = "httpie"
summary = "Speaks HTTP"
commands = ["http", "https"]
verify = '''
http --version
http --ignore-stdin --offline --print=B POST example.test six:=42
'''
expect = ["{version}", '"six": 42']
[source]
kind = "mise"
backend = "pipx:httpie"
"#,
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn real_registry_back_ends_of_mise_bring_what_they_depend_on() {
    let recipes = tempfile::tempdir().unwrap();
    for (name, recipe) in BACK_ENDS {
        std::fs::write(recipes.path().join(format!("{name}.toml")), recipe).unwrap();
    }
    build(&["rimraf", "httpie"], Some(recipes.path().to_owned())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn real_registry_has_no_go_1_23_0_and_says_what_is_close() {
    let folder = tempfile::tempdir().unwrap();
    let tools = Tools::open(ToolsConfig::new(folder.path())).unwrap();
    let builder: Arc<dyn Builder> = FakeBuilder::new();
    let requests = ["golang@1.23.0".parse().unwrap()];
    match tools.ensure(&requests, &base(), &builder, &|_| ()).await.unwrap_err() {
        error @ ToolError::UnknownVersion { .. } => {
            let fault = error.to_fault();
            assert_eq!(fault.code, ErrorCode::ToolVersionNotFound);
            assert!(fault.message.contains("go has no version 1.23.0: "), "{fault}");
            assert!(fault.message.contains("has 1.23.1, "), "{fault}");
        }
        other => give_up(other),
    }
}
