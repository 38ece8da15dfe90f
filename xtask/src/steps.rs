//! Steps of a chore: each is run, timed and told; one that fails does not hide the next.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

pub(crate) struct Steps {
    root: PathBuf,
    quiet: bool,
    done: Vec<(String, Duration, Result<()>)>,
}

impl Steps {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), quiet: false, done: Vec::new() }
    }

    /// For a chore whose output a program reads.
    pub(crate) fn quiet(root: &Path) -> Self {
        Self { quiet: true, ..Self::new(root) }
    }

    pub(crate) fn own(&mut self, name: &str, step: impl FnOnce(&Path) -> Result<()>) {
        self.run(name, |root| step(root));
    }

    pub(crate) fn cargo(&mut self, name: &str, args: &[&str]) {
        self.cargo_with(name, args, &[]);
    }

    pub(crate) fn cargo_with(&mut self, name: &str, args: &[&str], env: &[(&str, &str)]) {
        self.run(name, |root| {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let mut command = Command::new(cargo);
            // What cargo told us of ourselves is not theirs: build scripts that look at it would
            // run again, and all that depends on them would be built again.
            for (name, _) in std::env::vars_os().filter(|(name, _)| is_of_this_package(name)) {
                command.env_remove(name);
            }
            let status = command
                .args(args)
                .envs(env.iter().copied())
                .current_dir(root)
                .status()
                .context("start cargo")?;
            if !status.success() {
                bail!("cargo {} ended with {status}", args.join(" "));
            }
            Ok(())
        });
    }

    fn run(&mut self, name: &str, step: impl FnOnce(&Path) -> Result<()>) {
        if !self.quiet {
            say(&format!("== {name}"));
        }
        let start = Instant::now();
        let outcome = step(&self.root);
        if let (Err(error), false) = (&outcome, self.quiet) {
            complain(&format!("{error:#}"));
        }
        self.done.push((name.to_owned(), start.elapsed(), outcome));
    }

    /// Prints the table of times; fails if any step did.
    pub(crate) fn finish(self) -> Result<()> {
        let mut failed = Vec::new();
        for (name, time, outcome) in &self.done {
            let word = if outcome.is_ok() { "ok" } else { "FAILED" };
            if !self.quiet {
                say(&format!("{word:>8}  {name:<16}{:>8.1} s", time.as_secs_f64()));
            }
            if outcome.is_err() {
                failed.push(name.as_str());
            }
        }
        if failed.is_empty() { Ok(()) } else { bail!("failed: {}", failed.join(", ")) }
    }
}

fn is_of_this_package(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
}

#[expect(clippy::print_stdout, reason = "the chore's own output")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}

#[expect(clippy::print_stderr, reason = "the chore's own output")]
pub(crate) fn complain(line: &str) {
    eprintln!("{line}");
}
