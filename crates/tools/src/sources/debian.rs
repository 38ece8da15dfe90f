//! Debian packages, with package lists of our own: the host's are neither used nor touched. apt
//! checks the signatures of the archive, and so the digests that it names.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use super::{Artefact, Offer, endpoints};
use crate::checksum::Checksum;
use crate::config::BaseImage;
use crate::program::run;
use crate::version::{Version, Wanted};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Age at which the lists are fetched again.
const LISTS_AGE_MAX: Duration = Duration::from_hours(1);
/// What of a package's description counts when another one is chosen with it.
const KEPT_FIELDS: [&str; 3] = ["Provides:", "Multi-Arch:", "Essential:"];

/// Debian's archive, for one suite.
pub(super) struct Debian {
    pub(super) folder: PathBuf,
    pub(super) suite: String,
    pub(super) archive: Option<String>,
    pub(super) security: Option<String>,
}

/// Where the lists of all suites are.
fn apt_folder(tools: &Path) -> PathBuf {
    tools.join("apt")
}

/// Lists that are there, and nobody changes for as long as this is kept.
struct Apt {
    folder: PathBuf,
    _lock: File,
}

impl Debian {
    pub(super) fn offer(&self, package: &str) -> Result<Offer, String> {
        let apt = self.open()?;
        let table = apt.run("apt-cache", &["madison", package], None)?;
        // Columns: package | version | place.
        let mut ids: Vec<&str> =
            table.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim).collect();
        ids.sort_unstable();
        ids.dedup();
        let versions = ids.into_iter().filter_map(Version::parse_debian).collect();
        Ok(Offer { versions, latest: None })
    }

    /// The newest version of a package, and what it needs that the image lacks.
    pub(super) fn newest(&self, package: &str, base: &BaseImage) -> Result<Vec<Artefact>, String> {
        let offer = self.offer(package)?;
        let newest = Wanted::Latest.pick(&offer.versions, None);
        let newest = newest.ok_or_else(|| format!("Debian {} has no {package}", self.suite))?;
        self.closure(&[package.to_owned()], &newest.id, base)
    }

    /// The packages, the first one of this version, and what they need that the image lacks.
    pub(super) fn closure(
        &self,
        packages: &[String],
        version: &str,
        base: &BaseImage,
    ) -> Result<Vec<Artefact>, String> {
        let apt = self.open()?;
        let status = apt.folder.join(format!("status-{}", crate::store::unique()));
        let made = apt.closure(packages, version, base, &status);
        match fs::remove_file(&status) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(format!("{} cannot be removed: {error}", status.display()))
            }
            _ => made,
        }
    }

    /// Fetches the lists where there are none or they are old; old ones are as good as none only
    /// when the archive answers.
    fn open(&self) -> Result<Apt, String> {
        let (archive, security) = self.addresses()?;
        let lines = [
            Some(format!("{archive} {} main", self.suite)),
            Some(format!("{archive} {}-updates main", self.suite)),
            security.map(|security| format!("{security} {}-security main", self.suite)),
        ];
        let lines = lines.into_iter().flatten();
        let lines: Vec<String> =
            lines.map(|line| format!("deb [arch=amd64 signed-by={KEYRING}] {line}\n")).collect();
        let list = lines.concat();
        if !Path::new(KEYRING).is_file() {
            return Err(format!(
                "Debian's keyring {KEYRING} is not there; install debian-archive-keyring"
            ));
        }
        let name = blake3::hash(list.as_bytes()).to_hex();
        let folder = apt_folder(&self.folder).join(format!("{}-{}", self.suite, &name[..16]));
        let apt = Apt::lock(folder).map_err(|error| format!("apt's folder: {error}"))?;
        let stamp = apt.folder.join("fetched");
        if age(&stamp).is_some_and(|age| age < LISTS_AGE_MAX) {
            return Ok(apt);
        }
        fs::write(apt.folder.join("sources.list"), list)
            .map_err(|error| format!("the list of sources cannot be written: {error}"))?;
        match apt.run("apt-get", &["-q", "--error-on=any", "update"], None) {
            Ok(_) => fs::write(&stamp, "").map_err(|error| format!("the stamp: {error}"))?,
            Err(reason) if age(&stamp).is_some() => {
                tracing::warn!(%reason, "use Debian's lists as they were");
            }
            Err(reason) => return Err(reason),
        }
        Ok(apt)
    }

    fn addresses(&self) -> Result<(String, Option<String>), String> {
        if let Some(archive) = &self.archive {
            return Ok((archive.clone(), self.security.clone()));
        }
        let options = ["indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"];
        let targets = run("apt-get", options.into_iter().chain(["Created-By: Packages"]));
        let suite = &self.suite;
        match targets.map(|targets| endpoints::debian_in(&targets, suite)) {
            Ok((Some(archive), security)) => Ok((archive, self.security.clone().or(security))),
            Ok((None, _)) => Err(format!(
                "the host's apt has no archive of Debian {suite}; give one with --debian-mirror"
            )),
            Err(reason) => Err(format!(
                "no Debian archive is configured, and apt cannot be asked for its own ({reason}); \
                 give one with --debian-mirror"
            )),
        }
    }
}

impl Apt {
    fn lock(folder: PathBuf) -> io::Result<Self> {
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let path = folder.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(path)?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))?;
        // What a process that died has left. Nobody else writes here now.
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("status-") {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self { folder, _lock: lock })
    }

    fn closure(
        &self,
        packages: &[String],
        version: &str,
        base: &BaseImage,
        status: &Path,
    ) -> Result<Vec<Artefact>, String> {
        let names = base.packages.iter().filter_map(|package| package.split_once('='));
        let (names, versions): (Vec<&str>, Vec<&str>) = names.unzip();
        let show: Vec<&str> =
            ["show", "--no-all-versions"].into_iter().chain(names.iter().copied()).collect();
        // Complains of packages that the archive no longer has, which is no harm.
        let described = self.run("apt-cache", &show, None).unwrap_or_default();
        let installed = names.into_iter().zip(versions);
        fs::write(status, status_of(installed, &described))
            .map_err(|error| format!("{} cannot be written: {error}", status.display()))?;

        let mut args: Vec<String> =
            ["-qq", "-y", "--no-install-recommends", "--reinstall", "--print-uris", "install"]
                .map(str::to_owned)
                .to_vec();
        args.extend(packages.iter().enumerate().map(|(place, package)| match place {
            0 => format!("{package}={version}"),
            _ => package.clone(),
        }));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        artefacts_in(&self.run("apt-get", &args, Some(status))?)
    }

    fn run(&self, name: &str, args: &[&str], status: Option<&Path>) -> Result<String, String> {
        let folder = self.folder.display();
        let none = self.folder.join("no-status");
        if status.is_none() {
            fs::write(&none, "").map_err(|error| format!("{}: {error}", none.display()))?;
        }
        let status = status.unwrap_or(&none).display();
        let options = [
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State::lists={folder}/lists"),
            format!("Dir::State::status={status}"),
            format!("Dir::State::extended_states={folder}/extended-states"),
            format!("Dir::Cache={folder}/cache"),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            // The folder is private to the one who made it, and so are the files in it.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=2".to_owned(),
            "Acquire::ForceHash=SHA256".to_owned(),
        ];
        let options = options.iter().flat_map(|option| ["-o", option.as_str()]);
        run(name, options.chain(args.iter().copied()))
    }
}

fn age(stamp: &Path) -> Option<Duration> {
    let modified = fs::metadata(stamp).and_then(|meta| meta.modified()).ok()?;
    // A time in the future is a clock that was set back.
    Some(SystemTime::now().duration_since(modified).unwrap_or(Duration::MAX))
}

/// A list of installed packages that has what apt needs to choose others with them.
fn status_of<'a>(installed: impl Iterator<Item = (&'a str, &'a str)>, described: &str) -> String {
    let mut status = String::new();
    for (name, version) in installed {
        let stanza = format!(
            "Package: {name}\nStatus: install ok installed\nVersion: {version}\n\
             Architecture: amd64\nMaintainer: none\nDescription: none\n"
        );
        status += &stanza;
        let heading = format!("Package: {name}\n");
        let known = described.split("\n\n").find(|part| part.trim_start().starts_with(&heading));
        for line in known.unwrap_or_default().lines() {
            if KEPT_FIELDS.iter().any(|field| line.starts_with(field)) {
                status += line;
                status.push('\n');
            }
        }
        status.push('\n');
    }
    status
}

/// Of lines `'http://…/x_1_amd64.deb' x_1_amd64.deb 1234 SHA256:…`.
fn artefacts_in(text: &str) -> Result<Vec<Artefact>, String> {
    let artefact = |line: &str| {
        let mut words = line.split(' ');
        let url = words.next()?.trim_matches('\'');
        let (name, size) = (words.next()?, words.next()?.parse().ok()?);
        let checksum = Checksum::new("sha256", words.next()?.strip_prefix("SHA256:")?)?;
        let is_plain =
            !name.contains('/') && Path::new(name).extension().is_some_and(|kind| kind == "deb");
        (is_plain && url.starts_with("http")).then(|| Artefact {
            name: name.to_owned(),
            urls: vec![url.to_owned()],
            checksum,
            size_bytes: Some(size),
        })
    };
    let lines = text.lines().filter(|line| line.starts_with('\''));
    let artefacts: Option<Vec<_>> = lines.map(artefact).collect();
    match artefacts {
        Some(artefacts) if !artefacts.is_empty() => Ok(artefacts),
        _ => Err(format!("apt-get answers otherwise than expected: {}", text.trim())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_with_their_digests() {
        let hex = "1".repeat(64);
        let text = format!(
            "'http://127.0.0.1/pool/j/jq_1%2b2_amd64.deb' jq_1+2_amd64.deb 99 SHA256:{hex}\n"
        );
        let artefacts = artefacts_in(&text).unwrap();
        assert_eq!(artefacts[0].name, "jq_1+2_amd64.deb");
        assert_eq!(artefacts[0].size_bytes, Some(99));
        for text in ["", "'ftp://x/y.deb' y.deb 1 SHA256:11", &text.replace("SHA256", "MD5Sum")] {
            assert!(artefacts_in(text).is_err(), "{text}");
        }
    }

    #[test]
    fn installed_packages_keep_what_they_provide() {
        let described = "Package: mawk\nVersion: 2\nProvides: awk\nDepends: libc6\n\nPackage: x\n";
        let status = status_of([("mawk", "1"), ("gone", "3")].into_iter(), described);
        assert!(status.contains("Version: 1\n") && status.contains("Provides: awk\n"), "{status}");
        assert!(!status.contains("Depends") && status.contains("Package: gone\n"), "{status}");
    }
}
