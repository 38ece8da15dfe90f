//! The arrows between the crates. They point one way: types and protocol at the bottom, the
//! binary on top; gateway and worker never see each other; only the binary names back ends.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// What each crate may depend on, in the product (tests may use more, see [`TEST_ONLY`]). A crate
/// that is not here fails the check, so that a new one is placed on purpose.
const LAYERS: &[(&str, &[&str])] = &[
    ("aether-types", &[]),
    ("aether-protocol", &[]),
    ("aether-api", &["aether-types"]),
    ("aether-agent", &["aether-protocol"]),
    ("aether-postgres", &["aether-types"]),
    ("aether-redis", &["aether-types"]),
    ("aether-events", &["aether-types", "aether-postgres", "aether-redis"]),
    ("aether-store", &["aether-types", "aether-postgres"]),
    ("aether-queue", &["aether-types", "aether-postgres", "aether-redis"]),
    ("aether-logs", &["aether-types"]),
    ("aether-tls", &["aether-types"]),
    ("aether-streams", &["aether-types", "aether-protocol", "aether-tls"]),
    ("aether-images", &[]),
    ("aether-tools", &["aether-types"]),
    ("aether-drivers", &["aether-types", "aether-protocol", "aether-images"]),
    (
        "aether-gateway",
        &[
            "aether-types",
            "aether-protocol",
            "aether-api",
            "aether-store",
            "aether-queue",
            "aether-events",
            "aether-logs",
            "aether-streams",
            "aether-tools",
        ],
    ),
    (
        "aether-worker",
        &[
            "aether-types",
            "aether-protocol",
            "aether-store",
            "aether-queue",
            "aether-events",
            "aether-logs",
            "aether-streams",
            "aether-drivers",
            "aether-images",
            "aether-tools",
        ],
    ),
    (
        "aether",
        &[
            "aether-types",
            "aether-protocol",
            "aether-api",
            "aether-postgres",
            "aether-redis",
            "aether-store",
            "aether-queue",
            "aether-events",
            "aether-logs",
            "aether-streams",
            "aether-drivers",
            "aether-images",
            "aether-tls",
            "aether-tools",
            "aether-gateway",
            "aether-worker",
        ],
    ),
    ("xtask", &[]),
];

/// Crates that only test; they may see everything, and nothing in the product may see them.
const TEST_ONLY: &[&str] = &["aether-tests", "aether-bare-agent"];

/// Arrows that not even tests may draw: these two are never in one place but the binary.
const NEVER: &[(&str, &str)] =
    &[("aether-gateway", "aether-worker"), ("aether-worker", "aether-gateway")];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `None`: a normal one.
    kind: Option<String>,
}

pub(crate) fn check(root: &Path) -> Result<()> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .context("start cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context("read cargo's metadata")?;
    let wrong = violations(&metadata.packages);
    if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("\n")) }
}

fn violations(packages: &[Package]) -> Vec<String> {
    let table: BTreeMap<&str, &[&str]> = LAYERS.iter().copied().collect();
    let ours = |name: &str| table.contains_key(name) || TEST_ONLY.contains(&name);
    let mut wrong = Vec::new();
    for package in packages {
        let from = package.name.as_str();
        if !ours(from) {
            wrong.push(format!("{from} has no place in xtask/src/layers.rs; give it one"));
            continue;
        }
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            // A crate names itself to switch on a feature in its own tests.
            if to == from || !packages.iter().any(|p| p.name == to) {
                continue;
            }
            let in_product = dependency.kind.as_deref() != Some("dev");
            if NEVER.contains(&(from, to)) {
                wrong.push(format!("{from} must never depend on {to}, not even in tests"));
            } else if in_product
                && !TEST_ONLY.contains(&from)
                && !table.get(from).is_some_and(|allowed| allowed.contains(&to))
            {
                wrong.push(format!("{from} must not depend on {to}: that arrow points up"));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependencies: &[(&str, Option<&str>)]) -> Package {
        let dependencies = dependencies
            .iter()
            .map(|(name, kind)| Dependency {
                name: (*name).to_owned(),
                kind: kind.map(str::to_owned),
            })
            .collect();
        Package { name: name.to_owned(), dependencies }
    }

    #[test]
    fn arrows_that_point_up_are_named() {
        let packages = [
            package("aether-types", &[("serde", None)]),
            package("aether-gateway", &[("aether-types", None)]),
            package("aether-agent", &[("aether-types", None)]),
            package("aether-worker", &[("aether-gateway", Some("dev"))]),
            package("aether-store", &[("aether-gateway", Some("dev"))]),
            package("stranger", &[]),
        ];
        assert_eq!(
            violations(&packages),
            [
                "aether-agent must not depend on aether-types: that arrow points up",
                "aether-worker must never depend on aether-gateway, not even in tests",
                "stranger has no place in xtask/src/layers.rs; give it one",
            ]
        );
    }

    #[test]
    fn the_table_has_no_circle() {
        // Each crate depends only on crates that stand above it in the table.
        for (index, (name, allowed)) in LAYERS.iter().enumerate() {
            for below in *allowed {
                let place = LAYERS.iter().position(|(n, _)| n == below);
                assert!(place.is_some_and(|p| p < index), "{name} → {below}");
            }
        }
    }
}
