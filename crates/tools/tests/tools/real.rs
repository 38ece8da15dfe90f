//! Real registries and real tools, without a VM: the installers run in a chroot over the base
//! image. Skipped, with a reason, where there is no image, no root or no network.

use std::path::PathBuf;
use std::sync::Arc;

use aether_tools::{BaseImage, Builder, ToolEvent, Tools, ToolsConfig};
use aether_types::ToolRequest;

use crate::chroot::{ChrootBuilder, base_image};

/// The image, and a builder on it.
fn on_the_image(work: &std::path::Path) -> Option<(BaseImage, Arc<dyn Builder>)> {
    let folder = std::env::var_os("AETHER_IMAGE_DIR").map(PathBuf::from)?;
    let (base, rootfs) = base_image(&folder)?;
    Some((base, Arc::new(ChrootBuilder { rootfs, work: work.to_owned() })))
}

async fn build(tools: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let Some((base, builder)) = on_the_image(folder.path()) else {
        println!("skipped: AETHER_IMAGE_DIR names no folder with a built image");
        return;
    };
    let root = std::env::var_os("AETHER_TOOLS_TEST_DIR").map(PathBuf::from);
    let root = root.unwrap_or_else(|| folder.path().join("tools"));
    let open = Tools::open(ToolsConfig::new(root)).unwrap();
    let requests: Vec<ToolRequest> = tools.iter().map(|tool| tool.parse().unwrap()).collect();
    let began = std::time::Instant::now();
    let layers = open
        .ensure(&requests, &base, &builder, &|event| match event {
            ToolEvent::Stage { tool, version, stage } => {
                println!("{:6.1} {tool}@{version}: {stage}", began.elapsed().as_secs_f32());
            }
            ToolEvent::Line { tool, line, .. } => println!("       {tool}| {line}"),
            ToolEvent::Ready { tool, version, cached } => {
                println!(
                    "{:6.1} {tool}@{version} ready, cached: {cached}",
                    began.elapsed().as_secs_f32()
                );
            }
        })
        .await
        .unwrap();
    for layer in &layers {
        let mib = layer.size_bytes >> 20;
        println!("{} {} → {}: {mib} MiB, {}", layer.name, layer.asked, layer.got, layer.digest);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn real_registry_tools_that_are_asked_for() {
    let asked = std::env::var_os("AETHER_TOOLS_TEST").unwrap_or_default();
    let asked = asked.to_str().unwrap().to_owned();
    build(&asked.split_whitespace().collect::<Vec<_>>()).await;
}
