//! A warm command through the API against the same command run by a bare agent in the same guest,
//! over the same channel, by turns.

use std::{
    io::{Read as _, Write as _},
    time::Instant,
};

use aether_tests::{
    Platform, Setup,
    measure::{Comparison, samples},
    platform, wire,
};
use anyhow::{Result, ensure};

const COMMAND: &[&str] = &["/bin/sh", "-c", "echo ready"];

#[tokio::main]
async fn main() -> Result<()> {
    let platform = Platform::start(Setup::qemu())?;
    let vm = platform.create(&platform::small_vm("exec")).await?;
    let vm = vm.id.to_string();
    platform.run_bare_agent(&vm).await?;
    let lane = wire::Lane::open(&platform.namespace()?)?;
    let mut times = Comparison::new("exec", 1.15);
    let warm_up = 5;
    for sample in 0..samples(100) + warm_up {
        let start = Instant::now();
        let execution = platform.execute(&vm, COMMAND).await?;
        let ours = start.elapsed();
        ensure!(execution.stdout.as_deref() == Some("ready\n"), "{execution:?}");

        let start = Instant::now();
        let output = bare(&lane)?;
        let bare = start.elapsed();
        ensure!(output == "ready\n", "{output:?}");
        if sample >= warm_up {
            times.ours.push(ours);
            times.bare.push(bare);
        }
    }
    platform.delete(&vm).await?;
    platform.finish()?;
    times.report()
}

fn bare(lane: &wire::Lane) -> Result<String> {
    let mut stream = lane.dial(platform::BARE_PORT)?;
    stream.write_all(format!("x\t{}\n", COMMAND.join("\t")).as_bytes())?;
    let mut output = String::new();
    stream.read_to_string(&mut output)?;
    Ok(output)
}
