//! `aether man`.

use std::path::Path;

use clap::CommandFactory as _;

use crate::{args::Args, exit::Exit, failure::Failure, output};

/// A page for each command, `aether-vm-create.1` and so on.
pub(crate) fn run(folder: &Path) -> Result<Exit, Failure> {
    let wrong = |error| Failure::io(&format!("write manual pages to {}", folder.display()), &error);
    std::fs::create_dir_all(folder).map_err(wrong)?;
    clap_mangen::generate_to(Args::command(), folder).map_err(wrong)?;
    output::note(&format!("try: man -l {}", folder.join("aether.1").display()));
    Ok(Exit::Success)
}
