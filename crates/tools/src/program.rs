//! Programs of the host that know what this crate does not: apt, npm, pip.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

/// Longest wait; fetching Debian's lists takes some seconds on a good line.
const TIME_LIMIT_S: &str = "300";
/// How much of a program's complaint goes into an error.
const LAST_LINES: usize = 6;

/// Runs a program to its end, within a bound, and returns what it printed. Blocks. The error is
/// what it complained of last.
pub(crate) fn run<S: AsRef<OsStr>>(
    name: &str,
    args: impl IntoIterator<Item = S>,
) -> Result<String, String> {
    let output = Command::new("timeout")
        .args(["--kill-after=10", TIME_LIMIT_S, name])
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{name} cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("; ");
    Err(format!("{name} ended with {}: {last}", output.status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_carries_the_last_lines() {
        let script = "for i in $(seq 20); do echo line $i >&2; done; exit 3";
        let error = run("sh", ["-c", script]).unwrap_err();
        assert!(error.contains("exit status: 3") && error.contains("line 20"), "{error}");
        assert!(!error.contains("line 12;"), "{error}");
        assert!(run("no-such-program", ["x"]).unwrap_err().contains("no-such-program"));
    }
}
