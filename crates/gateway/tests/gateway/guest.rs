//! A guest with files in memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use aether_protocol::{
    Data, Done, End, Entry, ErrorCode as GuestCode, Failed, FileKind, FileStat, Listing,
    RequestBody, ToGuestBody, Token,
    host::{GuestAcceptor, GuestSession},
};
use aether_streams::{GuestConnection, GuestLink};
use aether_types::{Fault, VmId};
use async_trait::async_trait;
use bytes::Bytes;

const TOKEN: [u8; 32] = [9; 32];

/// One file system for every VM.
#[derive(Default)]
pub(crate) struct ScriptedLink {
    files: Arc<Mutex<BTreeMap<String, Bytes>>>,
}

type Files = Arc<Mutex<BTreeMap<String, Bytes>>>;

#[async_trait]
impl GuestLink for ScriptedLink {
    async fn connect(&self, _: VmId) -> Result<GuestConnection, Fault> {
        let (host, guest) = tokio::io::duplex(128 * 1024);
        let files = Arc::clone(&self.files);
        tokio::spawn(async move {
            let token = Token::from_bytes(TOKEN);
            if let Ok((acceptor, request)) = GuestAcceptor::read(guest, &token).await {
                serve(acceptor, request, &files).await;
            }
        });
        let token = Token::from_bytes(TOKEN).to_hex();
        Ok(GuestConnection { stream: Box::new(host), token })
    }
}

async fn serve(acceptor: GuestAcceptor, request: RequestBody, files: &Files) {
    let mut session = acceptor.welcome("test", "boot").await.unwrap();
    let get = |path: &str| files.lock().unwrap().get(path).cloned();
    // An error here is a host that has gone.
    let _ = match request {
        RequestBody::ReadFile(read) => match get(&read.path) {
            Some(content) => send_file(&mut session, &content, read.path == "/breaks").await,
            None => session.send(failed(GuestCode::NotFound)).await,
        },
        RequestBody::WriteFile(write) => take_file(&mut session, write.path, files).await,
        RequestBody::Stat(stat) => match get(&stat.path) {
            Some(content) => session.send(stat_of(&content)).await,
            None => session.send(failed(GuestCode::NotFound)).await,
        },
        RequestBody::List(_) => {
            let files = files.lock().unwrap().clone();
            let entry = |(path, content): (String, Bytes)| Entry {
                name: path.trim_start_matches('/').to_owned(),
                stat: Some(stat_of(&content)),
                raw_name: Bytes::new(),
            };
            let entries = files.into_iter().map(entry).collect();
            session.send(Listing { entries, next: Bytes::from_static(b"\xffz") }).await
        }
        RequestBody::Remove(remove) => {
            files.lock().unwrap().remove(&remove.path);
            session.send(Done { bytes: 0 }).await
        }
        RequestBody::Move(rename) => {
            let content = files.lock().unwrap().remove(&rename.from).unwrap();
            files.lock().unwrap().insert(rename.to, content);
            session.send(Done { bytes: 0 }).await
        }
        RequestBody::Mkdir(_) => session.send(failed(GuestCode::Exists)).await,
        other => panic!("no script for {other:?}"),
    };
}

async fn send_file(
    session: &mut GuestSession,
    content: &Bytes,
    breaks: bool,
) -> Result<(), aether_protocol::host::ClientError> {
    session.send(stat_of(content)).await?;
    for chunk in content.chunks(64 * 1024) {
        session.send(Data { data: Bytes::copy_from_slice(chunk) }).await?;
    }
    if breaks { session.send(failed(GuestCode::Io)).await } else { session.send(End {}).await }
}

async fn take_file(
    session: &mut GuestSession,
    path: String,
    files: &Files,
) -> Result<(), aether_protocol::host::ClientError> {
    let mut content = Vec::new();
    while let Some(body) = session.next().await? {
        match body {
            ToGuestBody::Data(data) => content.extend_from_slice(&data.data),
            ToGuestBody::End(_) => {
                let bytes = content.len() as u64;
                files.lock().unwrap().insert(path, content.into());
                return session.send(Done { bytes }).await;
            }
            other => panic!("{other:?} in a file"),
        }
        if path == "/full" && content.len() > 1_000_000 {
            return session.send(failed(GuestCode::NoSpace)).await;
        }
    }
    Ok(())
}

fn failed(code: GuestCode) -> Failed {
    Failed { code: code.into(), message: format!("the guest says {code}") }
}

fn stat_of(content: &Bytes) -> FileStat {
    FileStat {
        kind: FileKind::File.into(),
        size: content.len() as u64,
        mode: 0o640,
        uid: 1,
        gid: 2,
        modified_unix_ns: 1_700_000_000_120_000_000,
        link_target: None,
    }
}
