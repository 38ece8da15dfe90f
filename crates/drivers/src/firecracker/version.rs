//! Which Firecracker this is, and what is known against it.

use std::{path::Path, process::Stdio, time::Duration};

use crate::{DriverError, host::file_error};

const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// The least that nothing is known against, nor against any later one.
pub(super) const SOUND: Version = Version(1, 15, 1);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u32, u32, u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// A published vulnerability, with the first and the last version of each range that has it.
struct Vulnerability {
    name: &'static str,
    ranges: &'static [(Version, Version)],
}

/// As the advisories give it (AWS-2026-003 with GHSA-36j2-f825-qvgc, AWS-2026-015 with
/// GHSA-776c-mpj7-jm3r). Both are refused whole: the first needs the jailer and the second
/// `--enable-pci`, which this driver never gives, but a version that has them is also behind on
/// what was mended after it.
const KNOWN: &[Vulnerability] = &[
    // The jailer follows symbolic links while it copies into the jail.
    Vulnerability {
        name: "CVE-2026-1386",
        ranges: &[(Version(0, 0, 0), Version(1, 13, 1)), (Version(1, 14, 0), Version(1, 14, 0))],
    },
    // A guest writes out of bounds through the virtio PCI transport.
    Vulnerability {
        name: "CVE-2026-5747",
        ranges: &[(Version(1, 13, 0), Version(1, 14, 3)), (Version(1, 15, 0), Version(1, 15, 0))],
    },
];

impl Version {
    pub(super) const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self(major, minor, patch)
    }

    /// The numbers after `prefix` on the first line of `--version`.
    pub(super) fn parse(text: &str, prefix: &str) -> Option<Self> {
        let rest = text.lines().next()?.strip_prefix(prefix)?;
        let numbers = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let mut parts = numbers.split('.').map(|part| part.parse::<u32>().ok());
        let version = Self(parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(version)
    }

    /// Asks a program, `name` being what it calls itself.
    pub(super) async fn of(program: &Path, name: &'static str) -> Result<Self, DriverError> {
        let failed = |detail: String| DriverError::Program { program: name, detail };
        let output = tokio::process::Command::new(program)
            .arg("--version")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(VERSION_LIMIT, output)
            .await
            .map_err(|_| failed("no answer to --version".to_owned()))?
            .map_err(|e| file_error("run", program, e))?;
        let text = String::from_utf8_lossy(&output.stdout);
        match Self::parse(&text, &format!("{name} v")) {
            Some(version) if output.status.success() => Ok(version),
            Some(_) | None => {
                Err(failed(format!("not a version: {:.80}", text.lines().next().unwrap_or(""))))
            }
        }
    }

    /// The names of what is known against this version.
    pub(super) fn vulnerabilities(self) -> Vec<&'static str> {
        let is_in = |(first, last): &(Self, Self)| *first <= self && self <= *last;
        let has = |known: &&Vulnerability| known.ranges.iter().any(is_in);
        KNOWN.iter().filter(has).map(|known| known.name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<&'static str> {
        let version = Version::parse(&format!("Firecracker v{text}\n"), "Firecracker v").unwrap();
        version.vulnerabilities()
    }

    #[test]
    fn the_ranges_are_those_of_the_advisories() {
        let (jailer, pci) = ("CVE-2026-1386", "CVE-2026-5747");
        assert_eq!(names("1.12.1"), [jailer]);
        assert_eq!(names("1.13.0"), [jailer, pci]);
        assert_eq!(names("1.13.1"), [jailer, pci]);
        assert_eq!(names("1.13.2"), [pci]);
        assert_eq!(names("1.14.0"), [jailer, pci]);
        assert_eq!(names("1.14.3"), [pci]);
        assert!(names("1.14.4").is_empty());
        assert_eq!(names("1.15.0"), [pci]);
        assert!(names("1.15.1").is_empty());
        assert!(names("1.16.1").is_empty());
        assert!(names("2.0.0").is_empty());
    }

    #[test]
    fn what_is_no_version_is_none() {
        let parse = |text| Version::parse(text, "Firecracker v");
        assert_eq!(parse("Firecracker v1.12.1-dirty\n\nlog line"), Some(Version(1, 12, 1)));
        for text in
            ["", "Firecracker v", "Firecracker v1.12", "Jailer v1.12.1", "Firecracker v1.2.3.4"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
