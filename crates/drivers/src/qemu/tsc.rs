//! The frequency of this host's time stamp counter.

use std::time::{Duration, Instant};

/// Long enough for an error below 0.01 %.
const MEASURE: Duration = Duration::from_millis(50);

/// In kHz, from the processor, the hypervisor below, or a measurement. `None` on other
/// architectures than x86-64.
pub(super) fn frequency_khz() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        from_cpuid().or_else(measured)
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
}
