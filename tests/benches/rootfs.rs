//! How a VM comes to its writable disk, on ext4, where blocks cannot be shared: a fresh layer, an
//! overlay over a template's disk (QEMU), a sparse copy of it (Firecracker). Time, and room on the
//! disk, each from nothing to a file that a VMM can open.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aether_images::{ImageStore, clone_sparse, write_qcow2_overlay};
use aether_tests::measure::{Times, has_flag, samples};
use anyhow::{Context, Result, ensure};

const DISK_MB: u32 = 10 * 1024;
const TIME_BAR: Duration = Duration::from_micros(500);
const BYTES_BAR: u64 = 64 << 10;
const BLOCK: usize = 4096;
/// What is written on the disk of the default template under Firecracker, whose journal is empty:
/// the place and number of blocks, as they were found in its snapshot.
const BOOTED: [(u64, u64); 5] = [(0, 3), (18, 1), (34, 2), (8226, 6), (9255, 3)];
const EXT4_MAGIC: i64 = 0xef53;

fn main() -> Result<()> {
    let folder = ext4_folder()?;
    let store = ImageStore::open(folder.path().join("images"))?;
    let seed = store.seed(DISK_MB)?;
    let template = folder.path().join("template.img");
    seed.write_layer(&template)?;
    let size = fs::metadata(&template)?.len();
    write_blocks(&template, size)?;

    let mut fresh = Disk::new("fresh layer", BYTES_BAR);
    let mut overlay = Disk::new("overlay, QEMU", BYTES_BAR);
    let mut copy = Disk::new("sparse copy, Firecracker", BYTES_BAR);
    for sample in 0..=samples(500) {
        let path = folder.path().join("disk.img");
        let measured = [
            (&mut fresh, Disk::time(&path, |path| Ok(seed.write_layer(path)?))?),
            (&mut overlay, Disk::time(&path, |path| Ok(write_qcow2_overlay(path, size)?))?),
            (&mut copy, Disk::time(&path, |path| Ok(clone_sparse(&template, path).map(drop)?))?),
        ];
        // The first of each reads what the others find in memory.
        for (disk, (took, bytes)) in measured.into_iter().filter(|_| sample > 0) {
            disk.times.push(took);
            disk.bytes_max = disk.bytes_max.max(bytes);
        }
    }
    let reports = [fresh, overlay, copy].map(Disk::report);
    reports.into_iter().collect()
}

/// One way to make a disk.
struct Disk {
    name: &'static str,
    times: Times,
    bytes_max: u64,
    bytes_bar: u64,
}

impl Disk {
    fn new(name: &'static str, bytes_bar: u64) -> Self {
        Self { name, times: Times::default(), bytes_max: 0, bytes_bar }
    }

    fn time(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<(Duration, u64)> {
        let start = Instant::now();
        make(path)?;
        let took = start.elapsed();
        let bytes = allocated(path)?;
        fs::remove_file(path).context("remove the disk")?;
        Ok((took, bytes))
    }

    /// A line for people, or with `--json` one for programs. With `--enforce` it fails past the bar
    /// on bytes; times are no gate on a shared machine.
    fn report(self) -> Result<()> {
        let milliseconds = |part| self.times.quantile(part).as_secs_f64() * 1000.0;
        let (median, high) = (milliseconds(0.5), milliseconds(0.99));
        let bar = TIME_BAR.as_secs_f64() * 1000.0;
        let fits = self.bytes_max <= self.bytes_bar;
        #[expect(clippy::print_stdout, reason = "the output of a benchmark")]
        if has_flag("--json") {
            println!(
                "{}",
                serde_json::json!({
                    "name": self.name,
                    "file_system": "ext4",
                    "ms_p50": median,
                    "ms_p99": high,
                    "ms_bar": bar,
                    "allocated_bytes": self.bytes_max,
                    "allocated_bytes_bar": self.bytes_bar,
                    "holds": fits && median <= bar,
                })
            );
        } else {
            println!(
                "{:24} p50 {median:6.3} ms   p99 {high:6.3} ms (bar {bar:.1})   {:4} KiB (bar {})",
                self.name,
                self.bytes_max >> 10,
                self.bytes_bar >> 10,
            );
        }
        ensure!(
            fits || !has_flag("--enforce"),
            "{}: {} bytes are past {}",
            self.name,
            self.bytes_max,
            self.bytes_bar
        );
        Ok(())
    }
}

/// A folder that goes with the benchmark, in the first place that is on ext4.
fn ext4_folder() -> Result<tempfile::TempDir> {
    let places = [std::env::temp_dir(), PathBuf::from(env!("CARGO_TARGET_TMPDIR"))];
    for place in &places {
        let found = rustix::fs::statfs(place).with_context(|| place.display().to_string())?;
        if found.f_type == EXT4_MAGIC {
            return tempfile::tempdir_in(place).context("make a folder");
        }
    }
    anyhow::bail!("neither of {places:?} is on ext4; set TMPDIR to a folder that is")
}

/// In place of what was there: a guest has zeroed some of it.
fn write_blocks(disk: &Path, size: u64) -> Result<()> {
    let file = File::create(disk)?;
    file.set_len(size)?;
    for (first, count) in BOOTED {
        for block in first..first + count {
            let content = [u8::try_from(block % 255)? + 1; BLOCK];
            file.write_all_at(&content, block * BLOCK as u64)?;
        }
    }
    Ok(())
}

/// Room on the disk; ext4 counts what it has not written out yet too.
fn allocated(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}
