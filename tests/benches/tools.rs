//! From the request for a VM to the first byte of its first command, at the client: a VM with eight
//! tools whose layers are there, against one without tools, by turns, of one template.

use std::time::Duration;

use aether_api::{
    BuildTemplate, BuildTools, CreateVm,
    client::{CallOptions, Waited},
};
use aether_tests::{
    Platform, Setup,
    measure::{Comparison, samples},
    platform::LONG,
};
use aether_types::StartKind;
use anyhow::{Context, Result, bail, ensure};

const MEMORY_MB: u32 = 256;
const TEMPLATE: &str = "bench-tools";
const TOOLS: &[&str] =
    &["git", "nodejs@20", "bun", "claude-code", "go@1.23.1", "jq", "ripgrep", "uv"];
const COMMAND: &[&str] = &["/bin/sh", "-c", "echo ready"];
const AT_MOST: f64 = 1.1;
/// What the worker says when the template is there with the tools.
const DERIVED: &str = "a template is kept with more tools";

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // With templates of its own: in a folder that others share, the one with the tools may be there.
    let templates = tempfile::tempdir()?;
    let folder = templates.path().to_str().context("a path that is no text")?;
    let setup = Setup::qemu().with(&["--template-dir", folder, "--no-default-template"]);
    let platform = Platform::start(setup)?;
    let (comparison, first) = runtime.block_on(measure(&platform))?;
    platform.finish()?;
    #[expect(clippy::print_stderr, reason = "beside the comparison that has the bar")]
    {
        let first = first.as_secs_f64() * 1000.0;
        eprintln!("tools, first of a set    ours {first:9.3} ms: it adds them as it starts");
    }
    comparison.report()
}

/// The comparison, and what the VM took that was the first to ask for these tools.
async fn measure(platform: &Platform) -> Result<(Comparison, Duration)> {
    let template = BuildTemplate {
        name: TEMPLATE.to_owned(),
        memory_mb: Some(MEMORY_MB),
        ..BuildTemplate::default()
    };
    platform.build_template(&template).await?;
    build_layers(platform).await?;
    first_output(platform, &[]).await?;
    let first = first_output(platform, TOOLS).await?;
    platform.await_log(DERIVED).await?;
    let mut comparison = Comparison::new("tools, eight or none", AT_MOST);
    for sample in 0..=samples(20) {
        let ours = first_output(platform, TOOLS).await?;
        let bare = first_output(platform, &[]).await?;
        // The first of each reads files that were never read.
        if sample > 0 {
            comparison.ours.push(ours);
            comparison.bare.push(bare);
        }
    }
    Ok((comparison, first))
}

/// One by one, as each may take a while to fetch.
async fn build_layers(platform: &Platform) -> Result<()> {
    for &tool in TOOLS {
        let request = BuildTools { tools: vec![tool.to_owned()] };
        match platform.client().build_tools(&request, &CallOptions::waiting(LONG)).await? {
            Waited::Done(_) => {}
            Waited::Accepted(accepted) => bail!("{tool} is not built in time: {accepted:?}"),
        }
    }
    Ok(())
}

async fn first_output(platform: &Platform, tools: &[&str]) -> Result<Duration> {
    let request = CreateVm {
        template: Some(TEMPLATE.to_owned()),
        memory_mb: Some(MEMORY_MB),
        tools: tools.iter().map(|&tool| tool.to_owned()).collect(),
        ..CreateVm::default()
    };
    let (took, vm) = platform.first_output(&request, COMMAND).await?;
    let report = vm.start.context("no report of the start")?;
    ensure!(report.kind == StartKind::Restore, "not a restore: {report:?}");
    ensure!(vm.tools.len() == tools.len(), "not all tools: {:?}", vm.tools);
    Ok(took)
}
