//! `aether cp`: files and folders, to and from a VM.

use std::path::PathBuf;

use aether_api::{FileKind, FileView, client::Client};
use aether_types::ErrorCode;

use super::{connect, cp_down, cp_up};
use crate::{
    args::{Cp, Global},
    exit::Exit,
    failure::Failure,
    output,
};

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Standard input or output.
    Stdio,
    Local(PathBuf),
    Vm {
        vm: String,
        path: String,
    },
}

impl Place {
    /// `VM:PATH`; what has a slash before its first colon is a local path.
    fn parse(text: &str) -> Result<Self, Failure> {
        if text == "-" {
            return Ok(Self::Stdio);
        }
        match text.split_once(':') {
            Some((vm, path)) if !vm.is_empty() && !vm.contains('/') => {
                if !path.starts_with('/') {
                    let hint = format!("write {vm}:/root/{path} for a file of root's");
                    return Err(Failure::usage(format!(
                        "{text}: a path in a VM begins with a slash"
                    ))
                    .hint(hint));
                }
                Ok(Self::Vm { vm: vm.to_owned(), path: path.to_owned() })
            }
            _ if text.is_empty() => Err(Failure::usage("a path is empty")),
            _ => Ok(Self::Local(text.into())),
        }
    }
}

/// What the copies in both directions work with.
pub(super) struct Copy<'a> {
    pub(super) client: &'a Client,
    pub(super) vm: &'a str,
    pub(super) user: Option<&'a str>,
    pub(super) recursive: bool,
    pub(super) json: bool,
}

/// What was copied.
#[derive(Debug, Default, serde::Serialize)]
pub(super) struct Copied {
    pub(super) files: u64,
    pub(super) bytes: u64,
}

impl Copy<'_> {
    /// `None`: there is no such file.
    pub(super) async fn stat(&self, path: &str, follow: bool) -> Result<Option<FileView>, Failure> {
        match self.client.stat_file(self.vm, path, follow, self.user).await {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.code() == Some(ErrorCode::FileNotFound) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn is_folder(&self, path: &str) -> Result<bool, Failure> {
        Ok(self.stat(path, true).await?.is_some_and(|file| file.kind == FileKind::Directory))
    }

    pub(super) fn needs_recursive(&self, path: &str) -> Result<(), Failure> {
        if self.recursive {
            return Ok(());
        }
        Err(Failure::usage(format!("{path} is a folder")).hint("-r copies folders"))
    }
}

pub(crate) async fn run(global: &Global, args: Cp) -> Result<Exit, Failure> {
    let (source, target) = (Place::parse(&args.source)?, Place::parse(&args.target)?);
    let client = connect(global)?;
    let copy = |vm| Copy {
        client: &client,
        vm,
        user: args.user.as_deref(),
        recursive: args.recursive,
        json: global.json,
    };
    let copied = match (&source, &target) {
        (Place::Stdio, Place::Vm { vm, path }) => cp_up::stdin(&copy(vm), path).await?,
        (Place::Local(local), Place::Vm { vm, path }) => {
            cp_up::tree(&copy(vm), local, path).await?
        }
        (Place::Vm { vm, path }, Place::Stdio) => {
            // Standard output is the file's.
            cp_down::stdout(&copy(vm), path).await?;
            return Ok(Exit::Success);
        }
        (Place::Vm { vm, path }, Place::Local(local)) => {
            cp_down::tree(&copy(vm), path, local).await?
        }
        (Place::Vm { .. }, Place::Vm { .. }) => {
            return Err(Failure::usage("both ends are in VMs")
                .hint("copy through `-`: aether cp A:/x - | aether cp - B:/x"));
        }
        (Place::Stdio | Place::Local(_), Place::Stdio | Place::Local(_)) => {
            return Err(Failure::usage("neither end is in a VM").hint("write VM:/PATH"));
        }
    };
    if global.json {
        output::json(&copied);
    }
    Ok(Exit::Success)
}

/// `/a/b` and `c` make `/a/b/c`.
pub(super) fn join(folder: &str, name: &str) -> String {
    format!("{}/{name}", folder.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_of_a_copy_is_read() {
        let vm = |vm: &str, path: &str| Place::Vm { vm: vm.into(), path: path.into() };
        assert_eq!(Place::parse("web:/etc/hosts").unwrap(), vm("web", "/etc/hosts"));
        assert_eq!(Place::parse("web:/a:b").unwrap(), vm("web", "/a:b"));
        assert_eq!(Place::parse("./a:b").unwrap(), Place::Local("./a:b".into()));
        assert_eq!(Place::parse("-").unwrap(), Place::Stdio);
        assert_eq!(Place::parse("web:x").unwrap_err().exit, Exit::Usage);
        assert_eq!(join("/", "a"), "/a");
        assert_eq!(join("/b/", "a"), "/b/a");
    }
}
