//! What of a snapshot must be equal for it to be restored here.

use super::version::Version;

/// Of what this driver makes of a VM: devices, their order and names, and what a snapshot's files
/// are. To be raised when one of them changes.
const LAYOUT: u32 = 2;
/// The first that lets a restored VM have another TAP.
const FIRST: Version = Version::new(1, 12, 0);

/// `None`: this version or processor restores none. KVM hands the host's processor to the guest, so
/// that it must be the same kind of processor.
pub(super) fn of(version: Version, cpuinfo: &str) -> Option<String> {
    if version < FIRST {
        return None;
    }
    let field = |name: &str| {
        cpuinfo.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim())
        })
    };
    let (vendor, family) = (field("vendor_id")?, field("cpu family")?);
    let (model, stepping) = (field("model")?, field("stepping")?);
    Some(format!("firecracker {version}, {vendor} {family}/{model}/{stepping}, layout {LAYOUT}"))
}

pub(super) fn here(version: Version) -> Option<String> {
    of(version, &std::fs::read_to_string("/proc/cpuinfo").ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_processor_and_layout_are_in_it() {
        let cpuinfo = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\n\
                       model name\t: Some CPU: fast\nstepping\t: 7\n\nprocessor\t: 1\n";
        let version = Version::new(1, 12, 1);
        assert_eq!(
            of(version, cpuinfo).unwrap(),
            "firecracker 1.12.1, GenuineIntel 6/85/7, layout 2"
        );
        assert_eq!(of(version, "processor : 0\n"), None);
        assert_eq!(of(Version::new(1, 11, 9), cpuinfo), None);
    }
}
