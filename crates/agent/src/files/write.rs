//! Writing a file: under another name first, then whole under its own.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use aether_protocol::{Done, ErrorCode, Failed, ToGuestBody, WriteFile};

use super::act_as;
use crate::conn::Conn;
use crate::error::Fail;

/// Of a file that did not exist.
const DEFAULT_MODE: u32 = 0o644;
const PARENT_MODE: u32 = 0o755;
const MODE_MASK: u32 = 0o7777;

/// Links followed from the name to the file.
const LINKS_MAX: usize = 40;

/// Makes the names of temporary files differ within this agent.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);

pub(crate) fn write(mut conn: Conn, request: &WriteFile) {
    let mut target = match Target::open(request) {
        Ok(target) => target,
        Err(fail) => {
            conn.queue(Failed::from(fail));
            return conn.finish();
        }
    };
    // The host may wait for the welcome before it sends.
    if conn.flush_all().is_err() {
        return;
    }
    match receive(&mut conn, &mut target) {
        Ok(Some(bytes)) => match target.complete(request) {
            Ok(()) => conn.queue(Done { bytes }),
            Err(fail) => conn.queue(Failed::from(fail)),
        },
        // The host is gone; dropping the target removes what there is.
        Ok(None) => return,
        Err(fail) => {
            drop(target);
            conn.queue(Failed::from(fail));
        }
    }
    conn.finish();
}

/// Takes data up to its end; `None` where the host did not come to it.
fn receive(conn: &mut Conn, target: &mut Target) -> Result<Option<u64>, Fail> {
    let mut bytes = 0;
    loop {
        let bad = || Fail::new(ErrorCode::BadMessage, "not a message of a file");
        let Some(message) = conn.receive(None).map_err(|_| bad())? else { return Ok(None) };
        match message.body {
            Some(ToGuestBody::Data(data)) => {
                let what = || format!("write {}", target.path.display());
                target.file.write_all(&data.data).map_err(|error| Fail::io(what())(error))?;
                bytes += data.data.len() as u64;
            }
            Some(ToGuestBody::End(_)) => return Ok(Some(bytes)),
            Some(
                ToGuestBody::Hello(_)
                | ToGuestBody::Request(_)
                | ToGuestBody::Stdin(_)
                | ToGuestBody::StdinEof(_)
                | ToGuestBody::Signal(_)
                | ToGuestBody::Resize(_)
                | ToGuestBody::Cancel(_),
            )
            | None => return Err(bad()),
        }
    }
}

/// A file on its way to its name.
struct Target {
    file: File,
    path: PathBuf,
    /// Absent for an append, and once the file has its name.
    temporary: Option<PathBuf>,
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Nothing better can be done where this fails.
            drop(fs::remove_file(temporary));
        }
    }
}

impl Target {
    fn open(request: &WriteFile) -> Result<Self, Fail> {
        act_as(request.user.as_deref())?;
        let path = follow_links(Path::new(&request.path))?;
        let shown = path.display();
        if path.file_name().is_none() || request.path.ends_with(['/']) {
            return Err(Fail::new(ErrorCode::InvalidPath, format!("{shown} names no file")));
        }
        let existing = match fs::symlink_metadata(&path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Fail::io(format!("look at {shown}"))(error)),
        };
        if let Some(metadata) = &existing {
            if metadata.is_dir() {
                return Err(Fail::new(ErrorCode::IsADirectory, format!("{shown} is a directory")));
            }
            if !metadata.is_file() {
                return Err(Fail::new(ErrorCode::NotAFile, format!("{shown} is not a file")));
            }
        } else if request.create_parents
            && let Some(parent) = path.parent()
        {
            super::tree::make_directories(parent, PARENT_MODE)?;
        }
        if request.append {
            Self::append(request, path)
        } else {
            Self::replace(request, path, existing.as_ref())
        }
    }

    fn append(request: &WriteFile, path: PathBuf) -> Result<Self, Fail> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(request.mode.unwrap_or(DEFAULT_MODE) & MODE_MASK)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path)
            .map_err(Fail::io(format!("open {}", path.display())))?;
        Ok(Self { file, path, temporary: None })
    }

    fn replace(
        request: &WriteFile,
        path: PathBuf,
        existing: Option<&fs::Metadata>,
    ) -> Result<Self, Fail> {
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        // Short, as the name beside it may have the full length already.
        let name = format!(".aether-{}-{number}", std::process::id());
        let temporary = path.with_file_name(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(Fail::io(format!("create a file beside {}", path.display())))?;
        let target = Self { file, path, temporary: Some(temporary) };
        if let Some(metadata) = existing {
            // Only root can; for others the file is theirs from now on, as with any editor.
            drop(std::os::unix::fs::fchown(
                &target.file,
                Some(metadata.uid()),
                Some(metadata.gid()),
            ));
        }
        let mode = request.mode.or_else(|| existing.map(MetadataExt::mode)).unwrap_or(DEFAULT_MODE);
        let permissions = Permissions::from_mode(mode & MODE_MASK);
        let set = target.file.set_permissions(permissions);
        set.map_err(Fail::io(format!("set the mode of {}", target.path.display())))?;
        Ok(target)
    }

    fn complete(mut self, request: &WriteFile) -> Result<(), Fail> {
        let shown = self.path.display();
        if request.sync {
            self.file.sync_all().map_err(Fail::io(format!("sync {shown}")))?;
        }
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.path).map_err(Fail::io(format!("replace {shown}")))?;
        }
        self.temporary = None;
        Ok(())
    }
}

/// The path of the file that a name stands for, which need not exist.
fn follow_links(name: &Path) -> Result<PathBuf, Fail> {
    let mut path = name.to_owned();
    for _ in 0..LINKS_MAX {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            // No link, or nothing there: what it is shows when it is opened.
            Err(_) => return Ok(path),
        }
    }
    Err(Fail::new(ErrorCode::InvalidPath, format!("{} has too many links", name.display())))
}
