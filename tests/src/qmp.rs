//! QEMU's control, for machines that are driven by hand.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bare::LIMIT;

/// A machine's control, as plainly as it can be spoken.
#[derive(Debug)]
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let mut qmp = Self(BufReader::new(connect_soon(path)?));
        qmp.line()?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "QEMU has ended");
        Ok(serde_json::from_str(&line)?)
    }

    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        self.0.get_mut().write_all(format!("{line}\n").as_bytes())?;
        loop {
            let line = self.line()?;
            if let Some(value) = line.get("return") {
                return Ok(value.clone());
            }
            ensure!(line.get("error").is_none(), "{command}: {line}");
        }
    }

    /// Blocks of the guest's code that the emulator has translated.
    pub fn translated_blocks(&mut self) -> Result<i64> {
        let arguments = json!({ "command-line": "info jit" });
        let text = self.execute("human-monitor-command", &arguments)?;
        let text = text.as_str().context("no text")?;
        let line = text.lines().find(|line| line.starts_with("TB count")).context("no count")?;
        Ok(line["TB count".len()..].trim().split('/').next().unwrap_or_default().parse()?)
    }

    pub(crate) fn capabilities(&mut self, names: &[&str]) -> Result<()> {
        let list: Vec<Value> =
            names.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        self.execute("migrate-set-capabilities", &json!({ "capabilities": list })).map(drop)
    }

    pub(crate) fn event(&mut self, wanted: impl Fn(&str, &Value) -> bool) -> Result<()> {
        loop {
            let line = self.line()?;
            if line["event"].as_str().is_some_and(|event| wanted(event, &line["data"])) {
                return Ok(());
            }
        }
    }
}

/// A VMM makes its socket a moment after it was started; a script has to look for it.
#[expect(clippy::disallowed_methods, reason = "as a script has to")]
pub fn connect_soon(path: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(LIMIT))?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}
