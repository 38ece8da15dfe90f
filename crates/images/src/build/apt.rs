//! Debian's packages, without touching the host's own package lists.

use std::fs;
use std::path::{Path, PathBuf};

use super::{BuildRequest, Mirror};
use crate::ImageError;
use crate::program::Program;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const ARCHIVE: &str = "http://deb.debian.org/debian";
const SECURITY: &str = "http://deb.debian.org/debian-security";

/// Where a build gets its packages.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    pub(crate) suite: String,
    pub(crate) mirror: Mirror,
}

impl Sources {
    pub(crate) fn find(request: &BuildRequest) -> Result<Self, ImageError> {
        let mirror = match &request.mirror {
            Some(mirror) => mirror.clone(),
            None => host_mirror(&request.suite)?,
        };
        Ok(Self { suite: request.suite.clone(), mirror })
    }

    /// One line for each part of the archive.
    pub(crate) fn lines(&self) -> [String; 3] {
        let Self { suite, mirror } = self;
        [
            format!("deb {} {suite} main", mirror.archive),
            format!("deb {} {suite}-updates main", mirror.archive),
            format!("deb {} {suite}-security main", mirror.security),
        ]
    }

    /// What the image itself uses: the mirror may be reachable by this host alone.
    pub(crate) fn guest_list(&self) -> String {
        let mirror = Mirror { archive: ARCHIVE.to_owned(), security: SECURITY.to_owned() };
        let mut list = Self { mirror, ..self.clone() }.lines().join("\n");
        list.push('\n');
        list
    }
}

/// The keyring that says which packages are Debian's.
pub(crate) fn keyring() -> Result<&'static str, ImageError> {
    if Path::new(KEYRING).is_file() {
        return Ok(KEYRING);
    }
    let what = format!("Debian's keyring {KEYRING}");
    Err(ImageError::MissingTool { what, package: "debian-archive-keyring" })
}

/// What the host's apt has for this suite of Debian, else Debian's own addresses.
fn host_mirror(suite: &str) -> Result<Mirror, ImageError> {
    let targets = Program::new("apt-get", "apt")?
        .args(["indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"])
        .arg("Created-By: Packages")
        .output()?;
    Ok(mirror_in(&targets, suite))
}

fn mirror_in(targets: &str, suite: &str) -> Mirror {
    let find = |codename: &str, default: &str| {
        targets
            .lines()
            .filter_map(|line| line.strip_prefix("Debian ")?.split_once(' '))
            .find(|(found, uri)| *found == codename && uri.starts_with("http"))
            .map_or(default, |(_, uri)| uri)
            .trim_end_matches('/')
            .to_owned()
    };
    Mirror { archive: find(suite, ARCHIVE), security: find(&format!("{suite}-security"), SECURITY) }
}

/// Package lists of our own, in a folder that goes away with the build.
#[derive(Debug)]
pub(crate) struct Apt<'a> {
    sources: &'a Sources,
    folder: PathBuf,
}

impl<'a> Apt<'a> {
    /// Fetches the lists.
    pub(crate) fn update(sources: &'a Sources, folder: PathBuf) -> Result<Self, ImageError> {
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(ImageError::io("make the folder", path))?;
        }
        let keyring = keyring()?;
        let options = format!("deb [arch=amd64 signed-by={keyring}] ");
        let list = sources.lines().map(|line| line.replacen("deb ", &options, 1)).join("\n");
        let path = folder.join("sources.list");
        fs::write(&path, list + "\n").map_err(ImageError::io("write", path))?;
        let path = folder.join("status");
        fs::write(&path, "").map_err(ImageError::io("write", path))?;
        let apt = Self { sources, folder };
        apt.program("apt-get")?.args(["-q", "update"]).output()?;
        Ok(apt)
    }

    /// The packages that a package depends on, of those whose name starts so.
    pub(crate) fn dependency(&self, package: &str, prefix: &str) -> Result<String, ImageError> {
        let missing = || ImageError::MissingPackage {
            package: package.to_owned(),
            suite: self.sources.suite.clone(),
            mirror: self.sources.mirror.archive.clone(),
        };
        let text = match self.program("apt-cache")?.args(["depends", package]).output() {
            Err(ImageError::Program { .. }) => return Err(missing()),
            other => other?,
        };
        text.lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .ok_or_else(missing)
    }

    /// Fetches a package, checks it, and unpacks it into a folder. Nothing of it is run.
    pub(crate) fn unpack(&self, package: &str, target: &Path) -> Result<(), ImageError> {
        let packages = self.folder.join("packages");
        self.program("apt-get")?.args(["-q", "download", package]).folder(&packages).output()?;
        let file = crate::store::file_names(&packages)?
            .into_iter()
            .find(|name| name.starts_with(&format!("{package}_")))
            .ok_or_else(|| ImageError::MissingPackage {
                package: package.to_owned(),
                suite: self.sources.suite.clone(),
                mirror: self.sources.mirror.archive.clone(),
            })?;
        Program::new("dpkg-deb", "dpkg")?
            .arg("--extract")
            .arg(packages.join(file))
            .arg(target)
            .output()?;
        Ok(())
    }

    fn program(&self, name: &'static str) -> Result<Program, ImageError> {
        let folder = self.folder.display();
        let options = [
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State::lists={folder}/lists"),
            format!("Dir::State::status={folder}/status"),
            format!("Dir::Cache={folder}/cache"),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            // The folder is private to root, and so are the files in it.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ];
        let program = Program::new(name, "apt")?;
        Ok(options.iter().fold(program, |program, option| program.args(["-o", option])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_is_the_hosts_for_the_suite_and_debians_own_otherwise() {
        let targets = "Google bookworm http://packages.example/apt\n\
                       Debian bookworm http://mirror.example/debian/\n\
                       Debian bookworm-updates http://mirror.example/debian/\n\
                       Debian trixie-security http://other.example/security/\n";
        let mirror = mirror_in(targets, "bookworm");
        assert_eq!(mirror.archive, "http://mirror.example/debian");
        assert_eq!(mirror.security, SECURITY);
        let mirror = mirror_in("Ubuntu jammy http://archive.example/ubuntu/\n", "bookworm");
        assert_eq!(mirror.archive, ARCHIVE);
    }

    #[test]
    fn guest_has_debians_own_addresses() {
        let mirror = Mirror { archive: "http://a".to_owned(), security: "http://b".to_owned() };
        let list = Sources { suite: "bookworm".to_owned(), mirror }.guest_list();
        assert_eq!(
            list,
            "deb http://deb.debian.org/debian bookworm main\n\
             deb http://deb.debian.org/debian bookworm-updates main\n\
             deb http://deb.debian.org/debian-security bookworm-security main\n"
        );
    }
}
