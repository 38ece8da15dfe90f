//! Builds the images: `build-image STORE AGENT [TEST_KERNEL]`.

use std::io::Write;
use std::time::Instant;

use aether_images::{BuildRequest, ImageError, ImageStore};

fn main() -> Result<(), ImageError> {
    let mut args = std::env::args_os().skip(1);
    let (Some(root), Some(agent)) = (args.next(), args.next()) else {
        say("build-image STORE AGENT [TEST_KERNEL]");
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
    Ok(())
}

fn say(text: &str) {
    // Nobody is there to be told that standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}
