//! Chores of the repository: `cargo xtask check`, `test`, `bench`. `./dev` is the door to them.

mod layers;
mod length;
mod skips;
mod steps;

use std::{env, path::Path, process::ExitCode};

use anyhow::{Result, bail};

use crate::steps::Steps;

const USAGE: &str = "usage: cargo xtask COMMAND

  check           format, file lengths, layers, lints, documentation, fast tests
  test            every test, real guests included; says what was skipped and why
  layers          only the dependency arrows
  bench NAME ...  runs a benchmark; what follows is passed on
";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            steps::complain(&format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let args: Vec<String> = env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["check"] => check(&root),
        ["test"] => test(&root),
        ["layers"] => layers::check(&root),
        ["bench", rest @ ..] => bench(&root, rest),
        _ => bail!("{USAGE}"),
    }
}

fn check(root: &Path) -> Result<()> {
    let mut steps = Steps::new(root);
    steps.cargo("format", &["fmt", "--all", "--", "--check"]);
    steps.own("file lengths", length::check);
    steps.own("layers", layers::check);
    steps.cargo(
        "lints",
        &["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"],
    );
    steps.cargo_with(
        "documentation",
        &["doc", "--workspace", "--no-deps", "--all-features", "--document-private-items"],
        &[("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links")],
    );
    steps.cargo(
        "fast tests",
        &["nextest", "run", "--workspace", "--all-features", "--profile", "fast"],
    );
    steps.finish()
}

fn test(root: &Path) -> Result<()> {
    let report = root.join("target/nextest/ci/junit.xml");
    if report.exists() {
        std::fs::remove_file(&report)?;
    }
    let mut steps = Steps::new(root);
    steps.own("file lengths", length::check);
    steps.own("layers", layers::check);
    steps.cargo("format", &["fmt", "--all", "--", "--check"]);
    steps.cargo("tests", &["nextest", "run", "--workspace", "--all-features", "--profile", "ci"]);
    let outcome = steps.finish();
    let tests = skips::report(&report);
    // The count stands last, whatever happened before it.
    outcome.and(tests)
}

fn bench(root: &Path, args: &[&str]) -> Result<()> {
    let Some((name, rest)) = args.split_first() else {
        bail!("bench: name a benchmark; they are in tests/benches and crates/*/benches");
    };
    let package = package_of_bench(root, name)?;
    let mut steps = Steps::quiet(root);
    let mut command = vec!["bench", "--quiet", "-p", &package, "--bench", name, "--"];
    command.extend(rest);
    steps.cargo("bench", &command);
    steps.finish()
}

/// Those of one crate are beside it, those of the whole platform in `tests`.
fn package_of_bench(root: &Path, name: &str) -> Result<String> {
    let file = format!("benches/{name}.rs");
    if root.join("tests").join(&file).exists() {
        return Ok("aether-tests".to_owned());
    }
    for entry in std::fs::read_dir(root.join("crates"))? {
        let entry = entry?;
        if entry.path().join(&file).exists() {
            return Ok(format!("aether-{}", entry.file_name().to_string_lossy()));
        }
    }
    bail!("bench: there is no benchmark {name}; see tests/benches and crates/*/benches")
}
