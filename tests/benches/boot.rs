//! A VM made and ready through the API against a bare QEMU with the same kernel, image, memory and
//! devices, up to the guest's word that it is ready, by turns.

use std::time::Instant;

use aether_tests::{
    Platform, Setup,
    bare::{Bare, From},
    measure::{Comparison, samples},
    platform::small_vm,
};
use anyhow::Result;

const MEMORY_MB: u32 = 256;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let bare = Bare::new(MEMORY_MB, 1)?;
    let platform = Platform::start(Setup::qemu())?;
    let mut times = Comparison::new("boot", 1.1);
    for sample in 0..=samples(10) {
        let name = format!("boot-{sample}");
        let mut request = small_vm(&name);
        request.memory_mb = Some(MEMORY_MB);
        // Not restored.
        request.template = Some("none".to_owned());
        let start = Instant::now();
        runtime.block_on(platform.create(&request))?;
        let ours = start.elapsed();
        runtime.block_on(platform.delete(&name))?;
        let (_machine, took) = bare.boot(From::Kernel)?;
        // The first of each reads the image from the disk.
        if sample > 0 {
            times.ours.push(ours);
            times.bare.push(took);
        }
    }
    platform.finish()?;
    drop(bare);
    times.report()
}
