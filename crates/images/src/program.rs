//! Running the programs that an image is built with.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::ImageError;

/// Longest wait for one program; a root file system takes under a minute on a good line.
const TIME_LIMIT_S: &str = "1800";
/// How much of a program's complaint goes into an error.
const LAST_LINES: usize = 8;

/// A program to run to its end, within a bound, with a plain environment.
#[derive(Debug)]
pub(crate) struct Program {
    name: &'static str,
    command: Command,
}

impl Program {
    /// `package` is what to install when the program is not there.
    pub(crate) fn new(name: &'static str, package: &'static str) -> Result<Self, ImageError> {
        let path = find(name).ok_or_else(|| ImageError::MissingTool {
            what: format!("the program {name}"),
            package,
        })?;
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=10", TIME_LIMIT_S])
            .arg(path)
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null());
        Ok(Self { name, command })
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn folder(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    pub(crate) fn stdin(mut self, file: File) -> Self {
        self.command.stdin(file);
        self
    }

    /// Runs the program and returns what it printed.
    pub(crate) fn output(mut self) -> Result<String, ImageError> {
        let output = self.command.output().map_err(ImageError::io("run", self.name))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(self.failure(output.status, &output.stderr))
    }

    /// Runs the program and returns what it printed as a complaint, where some say their version.
    pub(crate) fn complaint(mut self) -> Result<String, ImageError> {
        let output = self.command.output().map_err(ImageError::io("run", self.name))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Err(self.failure(output.status, &output.stderr))
    }

    /// Runs the program with its output going to a file.
    pub(crate) fn output_to(mut self, file: File) -> Result<(), ImageError> {
        let output = self
            .command
            .stdout(file)
            .stderr(Stdio::piped())
            .spawn()
            .and_then(std::process::Child::wait_with_output)
            .map_err(ImageError::io("run", self.name))?;
        if output.status.success() {
            return Ok(());
        }
        Err(self.failure(output.status, &output.stderr))
    }

    fn failure(&self, status: std::process::ExitStatus, stderr: &[u8]) -> ImageError {
        let text = String::from_utf8_lossy(stderr);
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        ImageError::Program {
            program: self.name.to_owned(),
            status: status.to_string(),
            last_lines: lines[lines.len().saturating_sub(LAST_LINES)..].join("; "),
        }
    }
}

/// Where a program is. The folders of administration programs are looked at too, which are not on
/// every path.
fn find(name: &str) -> Option<PathBuf> {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
}

/// Reads all of a file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    std::fs::read(path).map_err(ImageError::io("read", path))
}

/// Reads all of a file, or nothing where there is none.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, ImageError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ImageError::io("read", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_carries_the_last_lines() {
        let error = Program::new("sh", "dash")
            .unwrap()
            .args(["-c", "for i in $(seq 20); do echo line $i >&2; done; exit 3"])
            .output()
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3") && text.contains("line 20"), "{text}");
        assert!(!text.contains("line 12;"), "{text}");
    }

    #[test]
    fn missing_program_names_its_package() {
        let error = Program::new("no-such-program", "no-such-package").unwrap_err();
        assert_eq!(error.code(), "image_build_tool_missing");
        assert!(error.to_string().contains("no-such-package"));
    }
}
