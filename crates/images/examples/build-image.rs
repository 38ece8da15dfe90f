//! Builds the images, and a layer to boot one with: `build-image STORE AGENT [TEST_KERNEL [LAYER]]`.

use std::io::Write;
use std::time::Instant;

use aether_images::{BuildRequest, ImageError, ImageStore};

fn main() -> Result<(), ImageError> {
    let mut args = std::env::args_os().skip(1);
    let (Some(root), Some(agent)) = (args.next(), args.next()) else {
        say("build-image STORE AGENT [TEST_KERNEL [LAYER]]");
        return Ok(());
    };
    let start = Instant::now();
    let store = ImageStore::open(root)?;
    let request =
        BuildRequest { test_kernel: args.next().map(Into::into), ..BuildRequest::new(agent) };
    let progress = |step: &str| say(&format!("{:6.2} s  {step}", start.elapsed().as_secs_f64()));
    store.build(&request, &progress)?;
    for image in store.list()? {
        progress(&format!(
            "{} {}: kernel {} ({}), initrd {}, rootfs {} bytes, {} packages",
            image.name,
            image.digest,
            image.kernel.version,
            image.kernel.blob.size_bytes,
            image.initrd.size_bytes,
            image.rootfs.size_bytes,
            image.packages.len(),
        ));
        progress(&format!("{:?}", store.resolve(&image.name)?));
    }
    if let Some(layer) = args.next() {
        store.seed(10 * 1024)?.write_layer(layer.as_ref())?;
        progress("a layer of 10 GiB is made");
    }
    Ok(())
}

fn say(text: &str) {
    // Nobody is there to be told that standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}
