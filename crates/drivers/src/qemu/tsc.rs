//! The frequency of this host's time stamp counter.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

/// Long enough for an error below 0.01 %.
const MEASURE: Duration = Duration::from_millis(50);
/// What was measured first, for all data directories of this host until it boots again: snapshots
/// name the frequency, and two measurements differ a little. Only root writes there.
const MEASURED: &str = "/run/aether/tsc-khz";

/// In kHz, from the processor, the hypervisor below, or a measurement. `None` on other
/// architectures than x86-64.
pub(super) fn frequency_khz() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        from_cpuid().or_else(|| first_measured(Path::new(MEASURED)))
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}

#[cfg(target_arch = "x86_64")]
fn from_cpuid() -> Option<u64> {
    use std::arch::x86_64::__cpuid;
    const TSC_LEAF: u32 = 0x15;
    const HYPERVISOR_LEAF: u32 = 0x4000_0000;
    const HYPERVISOR_TIMING_LEAF: u32 = 0x4000_0010;
    // Every x86-64 processor has CPUID; leaves are asked for only where it says that it has them.
    if __cpuid(0).eax >= TSC_LEAF {
        let leaf = __cpuid(TSC_LEAF);
        let crystal_hz = u64::from(leaf.ecx);
        if leaf.eax != 0 && leaf.ebx != 0 && crystal_hz != 0 {
            return Some(crystal_hz * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000);
        }
    }
    let under_hypervisor = __cpuid(1).ecx & (1 << 31) != 0;
    if under_hypervisor && __cpuid(HYPERVISOR_LEAF).eax >= HYPERVISOR_TIMING_LEAF {
        let khz = u64::from(__cpuid(HYPERVISOR_TIMING_LEAF).eax);
        return (khz != 0).then_some(khz);
    }
    None
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the counter has no other way to be read")]
fn measured() -> Option<u64> {
    // SAFETY: RDTSC only reads a counter; every x86-64 processor has it.
    let counter = || unsafe { std::arch::x86_64::_rdtsc() };
    let (begun, first) = (Instant::now(), counter());
    // Spinning, so that the two readings at each end belong together.
    while begun.elapsed() < MEASURE {
        std::hint::spin_loop();
    }
    let (elapsed, ticks) = (begun.elapsed(), counter().checked_sub(first)?);
    let khz = u128::from(ticks) * 1_000_000 / elapsed.as_nanos().max(1);
    u64::try_from(khz).ok().filter(|khz| *khz > 0)
}

/// The first measurement since this host booted, whoever made it.
#[cfg(target_arch = "x86_64")]
fn first_measured(path: &Path) -> Option<u64> {
    let Ok(boot_id) = fs::read_to_string("/proc/sys/kernel/random/boot_id") else {
        return measured();
    };
    let read = || {
        let text = fs::read_to_string(path).ok()?;
        let (booted, khz) = text.split_once(' ')?;
        if booted == boot_id.trim() {
            khz.trim().parse::<u64>().ok().filter(|&k| k > 0)
        } else {
            None
        }
    };
    if let Some(khz) = read() {
        return Some(khz);
    }
    let khz = measured()?;
    let keep = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        let draft = path.with_extension(format!("{}.new", std::process::id()));
        fs::write(&draft, format!("{} {khz}\n", boot_id.trim()))?;
        // Who comes first stays; what another boot left goes.
        let linked = match fs::hard_link(&draft, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && read().is_none() => {
                return fs::rename(&draft, path);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        };
        fs::remove_file(&draft).and(linked)
    };
    if let Err(error) = keep() {
        tracing::warn!(%error, path = %path.display(), "cannot keep the counter's frequency");
    }
    read().or(Some(khz))
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn what_the_processor_says_is_what_is_measured() {
        let measured = measured().unwrap();
        assert!((100_000..20_000_000).contains(&measured), "{measured}");
        if let Some(said) = from_cpuid() {
            assert!(said.abs_diff(measured) * 20 < said, "{said} and {measured}");
        }
    }

    #[test]
    fn the_first_measurement_of_a_boot_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/tsc-khz");
        fs::create_dir(path.parent().unwrap()).unwrap();
        for stale in ["", "another-boot 1000\n", "nonsense"] {
            fs::write(&path, stale).unwrap();
            let first = first_measured(&path).unwrap();
            assert!(first > 1000, "{stale}: {first}");
            assert_eq!(first_measured(&path), Some(first));
        }
        fs::remove_file(&path).unwrap();
        let first = first_measured(&path);
        assert_eq!((0..3).map(|_| first_measured(&path)).collect::<Vec<_>>(), [first; 3]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no draft stays");
    }
}
