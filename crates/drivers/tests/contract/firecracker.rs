//! Which Firecracker the contract is tried with: the build that `./dev test` fetches and checks.

use std::path::PathBuf;

use aether_drivers::{BootSource, firecracker::FirecrackerConfig};

use crate::rig::setting;

fn program(variable: &str, name: &str) -> Result<PathBuf, String> {
    let cache = || {
        let cache = setting("AETHER_CACHE")
            .or_else(|| setting("HOME").map(|home| home.join(".cache/aetherium")))?;
        Some(cache.join("firecracker-1.12.1").join(name))
    };
    let path = setting(variable).or_else(cache).filter(|path| path.is_file());
    path.ok_or_else(|| format!("no {name}: ./dev test fetches it and sets {variable}"))
}

pub(crate) fn config(with_jailer: bool, boot: &BootSource) -> Result<FirecrackerConfig, String> {
    let jailer = with_jailer.then(|| program("AETHER_JAILER", "jailer")).transpose()?;
    Ok(FirecrackerConfig {
        firecracker: Some(program("AETHER_FIRECRACKER", "firecracker")?),
        jailer,
        probe: Some(boot.clone()),
        // 1.12.1 is what the machines that test it can run.
        allow_vulnerable: true,
        ..FirecrackerConfig::default()
    })
}
