//! Files.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use aether_protocol::host::{self, ClientError};
use aether_protocol::{ErrorCode, FileKind, List, Mkdir, Move, ReadFile, Remove, Stat, WriteFile};
use bytes::Bytes;

use crate::harness::{LIMIT, TestAgent};

impl TestAgent {
    async fn write(&self, request: WriteFile, data: &[u8]) -> Result<u64, ClientError> {
        let stream = self.connect().await;
        let mut writer = host::write_file(stream, &self.token, request, LIMIT).await?;
        writer.write(Bytes::copy_from_slice(data)).await?;
        writer.finish().await
    }

    async fn read(&self, request: ReadFile) -> Result<Vec<u8>, ClientError> {
        let stream = self.connect().await;
        let mut reader = host::read_file(stream, &self.token, request, LIMIT).await?;
        let mut data = Vec::new();
        while let Some(chunk) = reader.next_chunk().await? {
            data.extend_from_slice(&chunk);
        }
        Ok(data)
    }

    fn to(&self, name: &str) -> WriteFile {
        WriteFile { path: self.path_text(name), ..WriteFile::default() }
    }

    fn from(&self, name: &str) -> ReadFile {
        ReadFile { path: self.path_text(name), ..ReadFile::default() }
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("")).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "agent.sock");
        names.sort();
        names
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    result.unwrap_err().code().unwrap()
}

#[tokio::test]
async fn files_of_all_lengths_come_back_as_they_were() {
    let agent = TestAgent::start();
    for length in [0, 1, 65_535, 65_536, 65_537, 5_000_001_u32] {
        let data: Vec<u8> = (0..length).map(|at| u8::try_from(at * 31 % 256).unwrap()).collect();
        assert_eq!(agent.write(agent.to("file"), &data).await.unwrap(), u64::from(length));
        assert_eq!(agent.read(agent.from("file")).await.unwrap(), data);
    }
    let part = ReadFile { offset: 5_000_000 - 10, limit: Some(5), ..agent.from("file") };
    assert_eq!(agent.read(part).await.unwrap().len(), 5);
    let past = ReadFile { offset: u64::MAX, ..agent.from("file") };
    assert_eq!(agent.read(past).await.unwrap(), b"");
    assert_eq!(agent.names(), ["file"]);
}

#[tokio::test]
async fn replaced_file_keeps_mode_and_link_and_a_new_one_gets_what_was_asked() {
    let agent = TestAgent::start();
    let script = WriteFile { mode: Some(0o750), create_parents: true, ..agent.to("a/b/script") };
    agent.write(script, b"one").await.unwrap();
    symlink("a/b/script", agent.path("link")).unwrap();
    agent.write(agent.to("link"), b"two").await.unwrap();
    assert!(agent.path("link").is_symlink());
    let metadata = std::fs::metadata(agent.path("a/b/script")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o750);
    assert_eq!(std::fs::read(agent.path("a/b/script")).unwrap(), b"two");
    let more = WriteFile { append: true, ..agent.to("link") };
    agent.write(more, b" three").await.unwrap();
    assert_eq!(std::fs::read(agent.path("a/b/script")).unwrap(), b"two three");
}

#[tokio::test]
async fn file_appears_whole_or_not_at_all() {
    let agent = TestAgent::start();
    agent.write(agent.to("file"), b"old").await.unwrap();
    let stream = agent.connect().await;
    let mut writer = host::write_file(stream, &agent.token, agent.to("file"), LIMIT).await.unwrap();
    writer.write(Bytes::from(vec![1; 1_000_000])).await.unwrap();
    // The agent has begun: its temporary file is there.
    while agent.names().len() < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(std::fs::read(agent.path("file")).unwrap(), b"old");
    drop(writer);
    while agent.names().len() > 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(std::fs::read(agent.path("file")).unwrap(), b"old");
}

#[tokio::test]
async fn full_disk_is_said_while_the_host_still_writes() {
    let agent = TestAgent::start();
    let script =
        format!("mkdir {0} && mount -t tmpfs -o size=1m tmpfs {0}", agent.path_text("small"));
    if agent.sh(&script).await.exited.exit_code != Some(0) {
        // Without the right to mount there is no small disk to fill.
        return;
    }
    let result = agent.write(agent.to("small/file"), &vec![1; 50_000_000]).await;
    let left = std::fs::read_dir(agent.path("small")).unwrap().count();
    agent.sh(&format!("umount {}", agent.path_text("small"))).await;
    assert_eq!(code(result), ErrorCode::NoSpace);
    assert_eq!(left, 0);
}

#[tokio::test]
async fn what_is_no_file_is_said_to_be_none() {
    let agent = TestAgent::start();
    agent.sh(&format!("mkfifo {}", agent.path_text("fifo"))).await;
    assert_eq!(code(agent.read(agent.from("none")).await), ErrorCode::NotFound);
    assert_eq!(code(agent.read(agent.from("")).await), ErrorCode::IsADirectory);
    assert_eq!(code(agent.read(agent.from("fifo")).await), ErrorCode::NotAFile);
    assert_eq!(code(agent.write(agent.to("fifo"), b"x").await), ErrorCode::NotAFile);
    assert_eq!(code(agent.write(agent.to(""), b"x").await), ErrorCode::InvalidPath);
    assert_eq!(code(agent.write(agent.to("none/file"), b"x").await), ErrorCode::NotFound);
    let device = ReadFile { path: "/dev/zero".into(), ..ReadFile::default() };
    assert_eq!(code(agent.read(device).await), ErrorCode::NotAFile);
    symlink("loop", agent.path("loop")).unwrap();
    assert_eq!(code(agent.write(agent.to("loop"), b"x").await), ErrorCode::InvalidPath);
    // Files of the kernel have no length, but an end.
    let status = ReadFile { path: "/proc/self/status".into(), ..ReadFile::default() };
    assert!(!agent.read(status).await.unwrap().is_empty());
}

#[tokio::test]
async fn operations_have_the_rights_of_their_user() {
    let agent = TestAgent::start();
    let user = Some("12345:54321".to_owned());
    std::fs::set_permissions(agent.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    agent.write(WriteFile { mode: Some(0o600), ..agent.to("secret") }, b"x").await.unwrap();
    let read = ReadFile { user: user.clone(), ..agent.from("secret") };
    assert_eq!(code(agent.read(read).await), ErrorCode::PermissionDenied);
    let write = WriteFile { user: user.clone(), ..agent.to("new") };
    assert_eq!(code(agent.write(write.clone(), b"x").await), ErrorCode::PermissionDenied);
    std::fs::set_permissions(agent.path(""), std::fs::Permissions::from_mode(0o777)).unwrap();
    agent.write(write, b"x").await.unwrap();
    let metadata = std::fs::metadata(agent.path("new")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (12345, 54321));
    let unknown = ReadFile { user: Some("nobody-here".into()), ..agent.from("secret") };
    assert_eq!(code(agent.read(unknown).await), ErrorCode::NoSuchUser);
}

#[tokio::test]
async fn listing_comes_in_pages_with_hostile_names_in_it() {
    let agent = TestAgent::start();
    std::fs::create_dir(agent.path("many")).unwrap();
    for number in 0..1200 {
        std::fs::write(agent.path(&format!("many/{number:04}")), "x").unwrap();
    }
    let hostile = std::ffi::OsStr::from_bytes(b"zz\xff\n");
    std::fs::write(agent.path("many").join(hostile), "").unwrap();
    let (mut names, mut after, mut pages) = (Vec::new(), Bytes::new(), 0);
    let last = loop {
        let list = List { path: agent.path_text("many"), limit: 500, after, user: None };
        let page = host::list(agent.connect().await, &agent.token, list, LIMIT).await.unwrap();
        pages += 1;
        names.extend(page.entries.iter().map(|entry| entry.name.clone()));
        if page.next.is_empty() {
            break page.entries.last().cloned().unwrap();
        }
        after = page.next;
    };
    assert_eq!((names.len(), pages), (1201, 3));
    assert!(names.is_sorted());
    assert_eq!(last.raw_name, &b"zz\xff\n"[..]);
    let list = List { path: agent.path_text("many/0000"), ..List::default() };
    let result = host::list(agent.connect().await, &agent.token, list, LIMIT).await;
    assert_eq!(code(result), ErrorCode::NotADirectory);
}

#[tokio::test]
async fn directories_are_made_moved_and_removed() {
    let agent = TestAgent::start();
    let token = &agent.token;
    let mkdir =
        |name: &str, parents| Mkdir { path: agent.path_text(name), parents, ..Mkdir::default() };
    let make = async |request| host::mkdir(agent.connect().await, token, request, LIMIT).await;
    assert_eq!(code(make(mkdir("a/b", false)).await), ErrorCode::NotFound);
    make(Mkdir { mode: Some(0o777), ..mkdir("a/b", true) }).await.unwrap();
    assert_eq!(std::fs::metadata(agent.path("a/b")).unwrap().mode() & 0o7777, 0o777);
    make(mkdir("a/b", true)).await.unwrap();
    assert_eq!(code(make(mkdir("a/b", false)).await), ErrorCode::Exists);
    std::fs::write(agent.path("a/file"), "x").unwrap();
    assert_eq!(code(make(mkdir("a/file", true)).await), ErrorCode::NotADirectory);

    let names = |from: &str, to: &str, overwrite| {
        let (from, to) = (agent.path_text(from), agent.path_text(to));
        Move { from, to, overwrite, user: None }
    };
    let rename = async |request| host::move_(agent.connect().await, token, request, LIMIT).await;
    std::fs::write(agent.path("other"), "y").unwrap();
    assert_eq!(code(rename(names("other", "a/file", false)).await), ErrorCode::Exists);
    rename(names("other", "a/file", true)).await.unwrap();
    rename(names("a", "c", false)).await.unwrap();
    assert_eq!(std::fs::read(agent.path("c/file")).unwrap(), b"y");

    let target =
        |name: &str, recursive| Remove { path: agent.path_text(name), recursive, user: None };
    let remove = async |request| host::remove(agent.connect().await, token, request, LIMIT).await;
    assert_eq!(code(remove(target("c", false)).await), ErrorCode::NotEmpty);
    // A link to a directory is removed, not what it leads to.
    std::fs::create_dir(agent.path("kept")).unwrap();
    std::fs::write(agent.path("kept/file"), "x").unwrap();
    symlink(agent.path("kept"), agent.path("c/link")).unwrap();
    remove(target("c", true)).await.unwrap();
    assert_eq!(agent.names(), ["kept"]);
    assert!(Path::new(&agent.path("kept/file")).exists());
    assert_eq!(code(remove(target("c", true)).await), ErrorCode::NotFound);
    let root = Remove { path: "//".into(), recursive: true, user: None };
    assert_eq!(code(remove(root).await), ErrorCode::InvalidPath);
}

#[tokio::test]
async fn stat_describes_a_link_and_what_it_leads_to() {
    let agent = TestAgent::start();
    std::fs::write(agent.path("file"), "hello").unwrap();
    symlink("file", agent.path("link")).unwrap();
    let stat = async |follow| {
        let request = Stat { path: agent.path_text("link"), user: None, follow };
        host::stat(agent.connect().await, &agent.token, request, LIMIT).await.unwrap()
    };
    let link = stat(false).await;
    assert_eq!((link.kind(), link.link_target.as_deref()), (FileKind::Symlink, Some("file")));
    let file = stat(true).await;
    assert_eq!((file.kind(), file.size, file.link_target), (FileKind::File, 5, None));
    assert!(file.modified_unix_ns > 1_600_000_000_000_000_000);
}
