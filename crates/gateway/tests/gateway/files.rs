//! Files, both ways.

use aether_api::{
    MkdirRequest, MoveRequest,
    client::{ClientError, PageQuery, ReadOptions, WriteOptions},
};
use aether_types::ErrorCode;
use bytes::{Bytes, BytesMut};

use crate::rig::{Rig, soon};

fn content(bytes: usize) -> impl futures::Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let chunk = Bytes::from(vec![b'x'; 100_000]);
    let whole = std::iter::repeat_n(chunk.clone(), bytes / 100_000);
    futures::stream::iter(whole.chain([chunk.slice(..bytes % 100_000)]).map(Ok))
}

async fn read(rig: &Rig, path: &str) -> Result<BytesMut, ClientError> {
    let mut file = rig.client.read_file("a", path, &ReadOptions::default()).await?;
    assert_eq!(file.mode(), Some(0o640));
    let mut all = BytesMut::new();
    while let Some(chunk) = soon(file.next_chunk()).await? {
        all.extend_from_slice(&chunk);
    }
    assert_eq!(file.size(), Some(all.len() as u64));
    Ok(all)
}

#[tokio::test]
async fn a_file_of_any_size_goes_in_and_comes_out() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    for bytes in [0, 1, 20_000_007] {
        let options = WriteOptions { mode: Some(0o640), ..WriteOptions::default() };
        let written = rig.client.write_file("a", "/f ü", &options, content(bytes)).await.unwrap();
        assert_eq!(written.bytes, bytes as u64);
        let all = read(&rig, "/f ü").await.unwrap();
        assert!(all.len() == bytes && all.iter().all(|b| *b == b'x'));
    }
}

#[tokio::test]
async fn a_transfer_that_breaks_is_never_a_short_file() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let options = WriteOptions::default();
    rig.client.write_file("a", "/breaks", &options, content(300_000)).await.unwrap();
    assert!(matches!(read(&rig, "/breaks").await, Err(ClientError::Transport { .. })));
    // An upload that breaks leaves nothing.
    let broken = futures::stream::iter([
        Ok(Bytes::from_static(b"half")),
        Err(std::io::Error::other("the disk here failed")),
    ]);
    assert!(rig.client.write_file("a", "/half", &options, broken).await.is_err());
    let gone = rig.client.stat_file("a", "/half", false, None).await;
    assert_eq!(gone.unwrap_err().code(), Some(ErrorCode::FileNotFound));
}

#[tokio::test]
async fn a_full_disk_is_told_while_the_client_still_sends() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    let options = WriteOptions::default();
    let full = rig.client.write_file("a", "/full", &options, content(5_000_000));
    assert_eq!(soon(full).await.unwrap_err().code(), Some(ErrorCode::NoSpace));
}

#[tokio::test]
async fn files_are_described_listed_moved_and_removed() {
    let rig = Rig::new().await;
    rig.vm("a").await;
    rig.client.write_file("a", "/f", &WriteOptions::default(), content(7)).await.unwrap();
    let stat = rig.client.stat_file("a", "/f", true, Some("root")).await.unwrap();
    assert_eq!((stat.size, stat.mode.as_str(), stat.uid, stat.gid), (7, "0640", 1, 2));
    assert_eq!(stat.modified_at.to_string(), "2023-11-14T22:13:20.120Z");
    let page = rig.client.list_files("a", "/", &PageQuery::default(), None).await.unwrap();
    assert_eq!(page.items[0].name, "f");
    // The cursor goes back as it came, whatever bytes are in it.
    let next = PageQuery { limit: Some(5), cursor: page.next_cursor };
    rig.client.list_files("a", "/", &next, None).await.unwrap();
    let rename = MoveRequest { from: "/f".into(), to: "/g".into(), ..MoveRequest::default() };
    rig.client.move_file("a", &rename).await.unwrap();
    rig.client.remove_file("a", "/g", false, None).await.unwrap();
    let gone = rig.client.stat_file("a", "/g", false, None).await.unwrap_err();
    assert_eq!(gone.code(), Some(ErrorCode::FileNotFound));
    let mkdir = MkdirRequest { path: "/d".into(), ..MkdirRequest::default() };
    let exists = rig.client.make_dir("a", &mkdir).await.unwrap_err();
    assert_eq!(exists.code(), Some(ErrorCode::FileConflict));
    let mkdir = MkdirRequest { mode: Some("rwx".into()), ..mkdir };
    let mode = rig.client.make_dir("a", &mkdir).await.unwrap_err();
    assert_eq!(mode.code(), Some(ErrorCode::InvalidRequest));
}
