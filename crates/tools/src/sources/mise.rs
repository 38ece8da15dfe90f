//! Back ends that have the names that mise gives them: a package of npm or of a Python index with
//! all that it depends on. The registries' own clients say what that is; they install nothing, and
//! run nothing of any package.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Artefact, Offer, npm};
use crate::checksum::Checksum;
use crate::config::BaseImage;
use crate::program::run;
use crate::recipe::Backend;
use crate::version::Version;

const PIP: &str = include_str!("pip.py");
/// The most files that one tool is made of.
const ARTEFACTS_MAX: usize = 2000;
/// Stands for `/` in the name of a file that is a package: no name of a package has it.
const SLASH: &str = "+";
/// The wheels that the C library of the base image can load, the newest first.
const PLATFORMS: [&str; 8] = [
    "manylinux_2_36_x86_64",
    "manylinux_2_35_x86_64",
    "manylinux_2_34_x86_64",
    "manylinux_2_31_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "linux_x86_64",
];

/// A folder that goes when this does; what a process that died has left goes with its session's.
struct Scratch(PathBuf);

impl Scratch {
    fn new(folder: &Path) -> Result<Self, String> {
        let path = folder.join(format!("resolve-{}", crate::store::unique()));
        fs::create_dir_all(&path).map_err(|error| format!("a folder to resolve in: {error}"))?;
        Ok(Self(path))
    }

    fn text(&self) -> Result<&str, String> {
        self.0.to_str().ok_or_else(|| "the folder of the tools is no text".to_owned())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, "remove a folder that was resolved in");
        }
    }
}

#[derive(Deserialize)]
struct PackageLock {
    #[serde(default)]
    packages: BTreeMap<String, Package>,
}

#[derive(Deserialize)]
struct Package {
    /// Where the place is called otherwise.
    name: Option<String>,
    #[serde(default)]
    version: String,
    #[serde(default)]
    resolved: String,
    #[serde(default)]
    integrity: String,
    #[serde(default)]
    os: Vec<String>,
    #[serde(default)]
    cpu: Vec<String>,
    #[serde(default)]
    libc: Vec<String>,
    /// A folder elsewhere in the project, which a package of a registry cannot have.
    #[serde(default)]
    link: bool,
}

/// What npm would install for a package, each file at its place in the tree. Blocks.
pub(super) fn npm_closure(
    folder: &Path,
    registry: &str,
    (package, version): (&str, &str),
) -> Result<Vec<Artefact>, String> {
    let scratch = Scratch::new(folder)?;
    let project = serde_json::json!({ "private": true, "dependencies": { package: version } });
    fs::write(scratch.0.join("package.json"), project.to_string())
        .map_err(|error| format!("a project to resolve: {error}"))?;
    let prefix = scratch.text()?;
    let cache = format!("{prefix}/cache");
    run(
        "npm",
        [
            "install",
            "--package-lock-only",
            "--ignore-scripts",
            // A package that is in no registry, but a repository, is not cloned here.
            "--git",
            "false",
            "--no-audit",
            "--no-fund",
            "--no-update-notifier",
            "--prefix",
            prefix,
            "--cache",
            &cache,
            "--registry",
            registry,
        ],
    )?;
    let lock = fs::read(scratch.0.join("package-lock.json"))
        .map_err(|error| format!("npm wrote no lock: {error}"))?;
    in_lock(&lock, registry)
}

fn in_lock(lock: &[u8], registry: &str) -> Result<Vec<Artefact>, String> {
    let lock: PackageLock = serde_json::from_slice(lock)
        .map_err(|error| format!("npm's lock is not readable: {error}"))?;
    let packages = lock.packages.iter().filter(|(place, package)| {
        !place.is_empty()
            && is_for(&package.os, "linux")
            && is_for(&package.cpu, "x64")
            && is_for(&package.libc, "glibc")
    });
    let artefacts: Result<Vec<Artefact>, String> =
        packages.map(|(place, package)| artefact_at(place, package, registry)).collect();
    bounded(artefacts?)
}

/// As npm reads these lists: names that fit, or names that do not, each after a `!`.
fn is_for(list: &[String], this: &str) -> bool {
    let is_named = |name: &String| name == this;
    let (not, only): (Vec<_>, Vec<_>) = list.iter().partition(|name| name.starts_with('!'));
    !not.iter().any(|name| name[1..] == *this)
        && (only.is_empty() || only.into_iter().any(is_named))
}

fn artefact_at(place: &str, package: &Package, registry: &str) -> Result<Artefact, String> {
    let is_plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.@~".contains(&b))
    };
    if package.link || !place.starts_with("node_modules/") || !place.split('/').all(is_plain) {
        return Err(format!("npm's lock has the package {place:?}, which is none of a registry"));
    }
    let checksum = Checksum::of_integrity(&package.integrity).ok_or_else(|| {
        format!("npm:{place} has no SHA-512 or SHA-256 digest, and cannot be checked")
    })?;
    let own = place.rsplit("node_modules/").next().unwrap_or_default();
    let own = package.name.as_deref().unwrap_or(own);
    // A lock may have been told to leave them out.
    let mut urls = vec![npm::tarball(registry, own, &package.version)];
    if package.resolved.starts_with("http") && !urls.contains(&package.resolved) {
        urls.push(package.resolved.clone());
    }
    let name = format!("{}.tgz", place.replace('/', SLASH));
    Ok(Artefact { name, urls, checksum, size_bytes: None })
}

#[derive(Deserialize)]
struct Report {
    install: Vec<Install>,
}

#[derive(Deserialize)]
struct Install {
    download_info: DownloadInfo,
}

#[derive(Deserialize)]
struct DownloadInfo {
    url: String,
    #[serde(default)]
    archive_info: ArchiveInfo,
}

#[derive(Deserialize, Default)]
struct ArchiveInfo {
    #[serde(default)]
    hashes: BTreeMap<String, String>,
}

/// The versions of a package of a Python index that pip would take. Blocks.
pub(super) fn pip_offer(
    index: &str,
    package: &str,
    base: Option<&BaseImage>,
) -> Result<Offer, String> {
    let base = base.ok_or("which wheels there are depends on the base image")?;
    let mut args = vec!["index", "versions", package, "--index-url", index];
    let python = python_of(base)?;
    args.extend(["--only-binary=:all:", "--python-version", python]);
    for platform in PLATFORMS {
        args.extend(["--platform", platform]);
    }
    Ok(Offer { versions: versions_in(&pip(python, &args)?), latest: None })
}

/// Of pip's line `Available versions: 3.2.4, 3.2.3`.
fn versions_in(text: &str) -> Vec<Version> {
    let line = text.lines().find_map(|line| line.strip_prefix("Available versions:"));
    line.into_iter()
        .flat_map(|line| line.split(','))
        .filter_map(|id| Version::parse(id.trim()))
        .collect()
}

/// The wheels that pip would install for a package. Blocks.
pub(super) fn pip_closure(
    folder: &Path,
    index: &str,
    (package, version): (&str, &str),
    base: &BaseImage,
) -> Result<Vec<Artefact>, String> {
    let (scratch, python) = (Scratch::new(folder)?, python_of(base)?);
    let wanted = format!("{package}=={version}");
    let mut args = vec!["install", &wanted, "--dry-run", "--quiet", "--report", "-"];
    args.extend(["--ignore-installed", "--no-cache-dir", "--only-binary=:all:"]);
    args.extend(["--index-url", index, "--target", scratch.text()?]);
    args.extend(["--implementation", "cp", "--python-version", python]);
    for platform in PLATFORMS {
        args.extend(["--platform", platform]);
    }
    in_report(&pip(python, &args)?)
}

fn in_report(report: &str) -> Result<Vec<Artefact>, String> {
    let report: Report = serde_json::from_str(report)
        .map_err(|error| format!("pip's report is not readable: {error}"))?;
    let artefact = |Install { download_info: DownloadInfo { url, archive_info } }: Install| {
        let path = url.split(['?', '#']).next().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.+".contains(&b);
        if name.strip_suffix(".whl").is_none()
            || name.starts_with('.')
            || !name.bytes().all(is_plain)
        {
            return Err(format!("pip's report has the file {name:?}, which is no wheel"));
        }
        let hex = archive_info.hashes.get("sha256");
        let checksum = hex.and_then(|hex| Checksum::new("sha256", hex)).ok_or_else(|| {
            format!("the wheel {name} has no SHA-256 digest, and cannot be checked")
        })?;
        Ok(Artefact { name, urls: vec![url], checksum, size_bytes: None })
    };
    bounded(report.install.into_iter().map(artefact).collect::<Result<_, String>>()?)
}

fn bounded(artefacts: Vec<Artefact>) -> Result<Vec<Artefact>, String> {
    match artefacts.len() {
        0 => Err("the package is made of no files".to_owned()),
        count if count > ARTEFACTS_MAX => {
            Err(format!("the package needs {count} others; at most {ARTEFACTS_MAX} are taken"))
        }
        _ => Ok(artefacts),
    }
}

/// Of the suite, whose package it is run by.
fn python_of(base: &BaseImage) -> Result<&'static str, String> {
    match base.suite.as_str() {
        "bookworm" => Ok("3.11"),
        "trixie" => Ok("3.13"),
        suite => Err(format!("which Python is in Debian {suite} is not known here")),
    }
}

/// pip, for another Python than its own, and starting no program: see the driver.
fn pip(python: &str, args: &[&str]) -> Result<String, String> {
    let own = ["-c", PIP, python];
    let usual = ["--disable-pip-version-check", "--no-input"];
    run("python3", own.iter().copied().chain(args.iter().copied()).chain(usual))
}

impl Backend {
    /// What mise has besides, and why it is not here.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (kind, package) = text.split_once(':').unwrap_or(("", text));
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.@/".contains(&b);
        let is_package =
            !package.is_empty() && package.bytes().all(is_plain) && !package.contains("..");
        match kind {
            "npm" | "pipx" if !is_package => Err(format!("source: {package:?} is no package")),
            "npm" => Ok(Self::Npm(package.to_owned())),
            "pipx" if package.contains(['@', '/']) => {
                Err(format!("source: {package:?} is no package of a Python index"))
            }
            "pipx" => Ok(Self::Pipx(package.to_owned())),
            _ => Err(format!(
                "source: the back end {text:?} is not served: `npm:` and `pipx:` are. Others of \
                 mise's fetch while they install, and a builder has no network; `kind = \
                 \"archive\"` takes a release by its digest"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_ends_that_are_not_served_say_so() {
        assert_eq!(Backend::parse("npm:@a/b"), Ok(Backend::Npm("@a/b".to_owned())));
        assert_eq!(Backend::parse("pipx:httpie"), Ok(Backend::Pipx("httpie".to_owned())));
        for text in ["npm:", "npm:../x", "npm:a b", "pipx:git+https://x", "pipx:a/b", "prettier"] {
            assert!(Backend::parse(text).is_err(), "{text}");
        }
        assert!(Backend::parse("cargo:eza").unwrap_err().contains("archive"));
    }

    #[test]
    fn packages_of_other_platforms_are_left_out_and_odd_ones_refused() {
        let integrity = "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg==";
        let package = |more: &str| {
            format!(r#"{{"resolved":"http://127.0.0.1/x.tgz","integrity":"{integrity}"{more}}}"#)
        };
        let lock = |place: &str, more: &str| {
            let (one, other) = (package(""), package(more));
            format!(r#"{{"packages":{{"":{{}},"node_modules/a":{one},"{place}":{other}}}}}"#)
        };
        let names = |place: &str, more: &str| {
            in_lock(lock(place, more).as_bytes(), "http://127.0.0.1/npm/")
                .map(|found| found.into_iter().map(|a| a.name).collect::<Vec<_>>())
        };
        let nested = "node_modules/a/node_modules/@s/b";
        let both = ["node_modules+a.tgz", "node_modules+a+node_modules+@s+b.tgz"];
        assert_eq!(names(nested, "").unwrap(), both);
        assert_eq!(names(nested, r#","os":["linux"],"cpu":["!arm64"]"#).unwrap(), both);
        for other in [r#","os":["darwin"]"#, r#","cpu":["!x64"]"#, r#","libc":["musl"]"#] {
            assert_eq!(names(nested, other).unwrap(), both[..1], "{other}");
        }
        for place in ["node_modules/../x", "elsewhere/x", "node_modules/.bin", "node_modules/a+b"] {
            assert!(names(place, "").is_err(), "{place}");
        }
        assert!(names(nested, r#","link":true"#).is_err());
        assert!(names(nested, r#","integrity":"sha1-AAAA""#).is_err());
    }

    #[test]
    fn only_wheels_with_a_digest_are_taken_of_a_report() {
        let report = |url: &str, hash: &str| {
            format!(
                r#"{{"install":[{{"download_info":{{"url":"{url}","archive_info":{{"hashes":{{{hash}}}}}}}}}]}}"#
            )
        };
        let digest = format!(r#""sha256":"{}""#, "0".repeat(64));
        let found = in_report(&report("http://127.0.0.1/a-1-py3-none-any.whl", &digest)).unwrap();
        assert_eq!(found[0].name, "a-1-py3-none-any.whl");
        for (url, hash) in [
            ("http://127.0.0.1/a-1.tar.gz", digest.as_str()),
            ("http://127.0.0.1/a b.whl", &digest),
            ("http://127.0.0.1/a-1-py3-none-any.whl", ""),
        ] {
            assert!(in_report(&report(url, hash)).is_err(), "{url}");
        }
        assert!(in_report(r#"{"install":[]}"#).is_err());
    }

    /// What pip would build it does not: a build runs what the package says.
    #[test]
    fn pip_starts_nothing_that_a_package_brings() {
        if run("python3", ["-m", "pip", "--version"]).is_err() {
            println!("skipped: the host has no pip");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("mark");
        let setup = format!(
            "open({:?}, 'w').close()\nfrom setuptools import setup\nsetup(name='a', version='1')\n",
            mark.to_str().unwrap()
        );
        std::fs::write(folder.path().join("setup.py"), setup).unwrap();
        let project = folder.path().to_str().unwrap();
        let install =
            ["install", "--dry-run", "--no-index", "--no-build-isolation", "--no-deps", project];
        let error = pip("3.11", &install).unwrap_err();
        assert!(error.contains("wheels are needed"), "{error}");
        assert!(!mark.exists());
    }

    #[test]
    fn versions_are_those_of_the_line() {
        let text = "httpie (3.2.4)\nAvailable versions: 3.2.4, 3.2.3, 3.0.0\n";
        let ids: Vec<_> = versions_in(text).into_iter().map(|version| version.id).collect();
        assert_eq!(ids, ["3.2.4", "3.2.3", "3.0.0"]);
        assert_eq!(versions_in("nothing").len(), 0);
    }
}
