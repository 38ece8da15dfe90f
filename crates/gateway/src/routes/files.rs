//! Files in a VM, straight over the guest's channel: no task, no queue, nothing held whole.

use std::{io, time::Duration};

use aether_api::{
    FILE_MODE_HEADER, FILE_SIZE_HEADER, FileEntry, FileKind, FileListing, FileView, FileWritten,
    MkdirRequest, MoveRequest,
};
use aether_protocol::{
    Entry, FileKind as GuestKind, FileStat, List, Mkdir, Move, ReadFile, Remove, Stat, Token,
    WriteFile,
    host::{self, BoxStream, FileReader},
};
use aether_types::{ErrorCode, Timestamp, VmState, limits, schema};
use axum::{
    Json as JsonAnswer,
    body::{Body, BodyDataStream},
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use futures::StreamExt as _;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use crate::{
    auth::Caller,
    extract::{Json, Params, drain_stream, read_mode},
    openapi::{Operation, bytes, of, operation, text},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::vms::find,
};

/// Of a file that was refused, so that its client reads why; past these it is cut off.
const UPLOAD_DRAIN_BYTES_MAX: usize = 1024 * 1024 * 1024;
const UPLOAD_DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// For the opening of a session in the guest, and for one question and its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// From the last byte of an upload to the guest's word that the file is in its place, on its disk
/// where that was asked for.
const FINISH_LIMIT: Duration = Duration::from_mins(2);

struct Guest {
    stream: BoxStream,
    token: Token,
}

/// A connection to the agent of a VM that runs.
async fn connect(app: &App, caller: &Caller, vm: &str) -> ApiResult<Guest> {
    let vm = find(app, caller, vm).await?;
    if vm.state != VmState::Running {
        let detail = format!("VM `{}` is {}; files need it running", vm.name, vm.state);
        return Err(ApiError::new(ErrorCode::VmStateConflict, detail).vm_state(vm.state));
    }
    let connection = app.parts.links.connect(vm.id).await?;
    let token = Token::from_hex(&connection.token).map_err(|error| {
        tracing::error!(vm.id = %vm.id, %error, "the link gave a token that is none");
        ApiError::internal()
    })?;
    Ok(Guest { stream: connection.stream, token })
}

/// Checked here so that a mistake needs no guest.
fn check_path(field: &str, path: &str) -> ApiResult<()> {
    let fits = path.len() <= limits::PATH_BYTES_MAX && !path.contains('\0');
    if path.starts_with('/') && fits {
        Ok(())
    } else {
        let max = limits::PATH_BYTES_MAX;
        Err(ApiError::invalid(format!(
            "{field}: an absolute path of at most {max} bytes is needed"
        )))
    }
}

fn path_and_user(params: &mut Params) -> ApiResult<(String, Option<String>)> {
    let path = params.need("path")?;
    check_path("path", &path)?;
    Ok((path, params.one("user")?))
}

pub(super) async fn read(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    mut params: Params,
) -> ApiResult<Response> {
    let (path, user) = path_and_user(&mut params)?;
    let offset = params.number("offset")?.unwrap_or(0);
    let limit = params.number("limit")?;
    params.finish()?;
    let place = app.stream_place()?;
    let guest = connect(&app, &caller, &vm).await?;
    let request = ReadFile { path, offset, limit, user };
    let reader = host::read_file(guest.stream, &guest.token, request, ANSWER_LIMIT).await?;
    let headers = [
        (header::CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        (FILE_SIZE_HEADER, reader.stat().size.to_string()),
        (FILE_MODE_HEADER, mode_text(reader.stat().mode)),
    ];
    let download = Download { reader, idle_limit: app.parts.config.idle_limit, _place: place };
    let chunks = futures::stream::try_unfold(download, |mut download| async move {
        let chunk = download.next().await?;
        Ok::<_, io::Error>(chunk.map(|chunk| (chunk, download)))
    });
    // No length: a file may grow while it is read. One that breaks off ends the connection
    // without the last chunk, so that it cannot be taken for whole.
    Ok((headers, Body::from_stream(chunks)).into_response())
}

struct Download {
    reader: FileReader,
    idle_limit: Duration,
    _place: OwnedSemaphorePermit,
}

impl Download {
    /// Asked only when the client takes more, so that the bound is on the guest alone.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        match timeout(self.idle_limit, self.reader.next_chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => {
                tracing::info!(error = crate::problem::chain(&error), "a download broke off");
                Err(io::Error::other(error))
            }
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

pub(super) async fn write(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    mut params: Params,
    body: Body,
) -> ApiResult<JsonAnswer<FileWritten>> {
    let (path, user) = path_and_user(&mut params)?;
    let request = WriteFile {
        path,
        mode: params.mode("mode")?,
        user,
        create_parents: params.flag("parents")?,
        append: params.flag("append")?,
        sync: params.flag("sync")?,
    };
    params.finish()?;
    let _place = app.stream_place()?;
    let mut chunks = body.into_data_stream();
    let written = write_chunks(&app, &caller, &vm, request, &mut chunks).await;
    if written.is_err() {
        drain_stream(&mut chunks, UPLOAD_DRAIN_BYTES_MAX, UPLOAD_DRAIN_LIMIT).await;
    }
    Ok(JsonAnswer(FileWritten { bytes: written? }))
}

/// Where this returns early the writer is dropped, and the guest discards the file.
async fn write_chunks(
    app: &App,
    caller: &Caller,
    vm: &str,
    request: WriteFile,
    chunks: &mut BodyDataStream,
) -> ApiResult<u64> {
    let guest = connect(app, caller, vm).await?;
    let mut writer = host::write_file(guest.stream, &guest.token, request, ANSWER_LIMIT).await?;
    let idle_limit = app.parts.config.idle_limit;
    loop {
        let chunk = match timeout(idle_limit, chunks.next()).await {
            Ok(Some(Ok(chunk))) => chunk,
            Ok(None) => break,
            Ok(Some(Err(_))) => {
                return Err(ApiError::new(ErrorCode::MalformedBody, "the body was cut off"));
            }
            Err(_) => {
                let detail = format!("the body stood still for {} s", idle_limit.as_secs());
                return Err(ApiError::new(ErrorCode::MalformedBody, detail)
                    .status(StatusCode::REQUEST_TIMEOUT));
            }
        };
        match timeout(idle_limit, writer.write(chunk)).await {
            Ok(written) => written?,
            Err(_) => return Err(stalled()),
        }
    }
    let finished = timeout(FINISH_LIMIT, writer.finish()).await;
    Ok(finished.map_err(|_| stalled())??)
}

fn stalled() -> ApiError {
    ApiError::new(ErrorCode::GuestUnreachable, "the guest stopped taking data")
}

pub(super) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    mut params: Params,
) -> ApiResult<StatusCode> {
    let (path, user) = path_and_user(&mut params)?;
    let recursive = params.flag("recursive")?;
    params.finish()?;
    let guest = connect(&app, &caller, &vm).await?;
    let request = Remove { path, recursive, user };
    host::remove(guest.stream, &guest.token, request, ANSWER_LIMIT).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn stat(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<FileView>> {
    let (path, user) = path_and_user(&mut params)?;
    let follow = params.flag("follow")?;
    params.finish()?;
    let guest = connect(&app, &caller, &vm).await?;
    let request = Stat { path, user, follow };
    let stat = host::stat(guest.stream, &guest.token, request, ANSWER_LIMIT).await?;
    Ok(JsonAnswer(file_view(stat)))
}

pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<FileListing>> {
    let (path, user) = path_and_user(&mut params)?;
    let max = aether_protocol::limits::LIST_ENTRIES_MAX;
    let limit = params.number("limit")?.unwrap_or(max);
    if !(1..=max).contains(&limit) {
        return Err(ApiError::invalid(format!("limit: 1 to {max}")));
    }
    let bad_cursor = |_| ApiError::invalid("cursor: not one that a page ended with".into());
    let after = match params.one("cursor")? {
        Some(cursor) => Bytes::from(URL_SAFE_NO_PAD.decode(cursor).map_err(bad_cursor)?),
        None => Bytes::new(),
    };
    params.finish()?;
    let guest = connect(&app, &caller, &vm).await?;
    let request = List { path, limit, after, user };
    let listing = host::list(guest.stream, &guest.token, request, ANSWER_LIMIT).await?;
    let next = (!listing.next.is_empty()).then(|| URL_SAFE_NO_PAD.encode(&listing.next));
    let items = listing.entries.into_iter().map(entry_view).collect();
    Ok(JsonAnswer(FileListing { items, next_cursor: next }))
}

pub(super) async fn mkdir(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    params: Params,
    body: Json<MkdirRequest>,
) -> ApiResult<StatusCode> {
    params.finish()?;
    let MkdirRequest { path, parents, mode, user } = body.value;
    check_path("path", &path)?;
    let mode = mode.map(|mode| read_mode("mode", &mode)).transpose()?;
    let guest = connect(&app, &caller, &vm).await?;
    let request = Mkdir { path, parents, mode, user };
    host::mkdir(guest.stream, &guest.token, request, ANSWER_LIMIT).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn rename(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    params: Params,
    body: Json<MoveRequest>,
) -> ApiResult<StatusCode> {
    params.finish()?;
    let MoveRequest { from, to, overwrite, user } = body.value;
    check_path("from", &from)?;
    check_path("to", &to)?;
    let guest = connect(&app, &caller, &vm).await?;
    let request = Move { from, to, overwrite, user };
    host::move_(guest.stream, &guest.token, request, ANSWER_LIMIT).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn mode_text(mode: u32) -> String {
    format!("{mode:04o}")
}

fn entry_view(entry: Entry) -> FileEntry {
    FileEntry {
        name_base64: (!entry.raw_name.is_empty()).then(|| STANDARD.encode(&entry.raw_name)),
        name: entry.name,
        file: file_view(entry.stat.unwrap_or_default()),
    }
}

fn file_view(stat: FileStat) -> FileView {
    let kind = match stat.kind() {
        GuestKind::File => FileKind::File,
        GuestKind::Directory => FileKind::Directory,
        GuestKind::Symlink => FileKind::Symlink,
        GuestKind::Other | GuestKind::Unspecified => FileKind::Other,
    };
    FileView {
        kind,
        size: stat.size,
        mode: mode_text(stat.mode),
        uid: stat.uid,
        gid: stat.gid,
        modified_at: Timestamp::from_unix_ms(stat.modified_unix_ns.div_euclid(1_000_000)),
        link_target: stat.link_target,
    }
}

/// What can go wrong with a file of a guest.
const OF_FILES: &[ErrorCode] = &[
    ErrorCode::VmStateConflict,
    ErrorCode::FileNotFound,
    ErrorCode::FilePermissionDenied,
    ErrorCode::FileConflict,
    ErrorCode::NoSpace,
    ErrorCode::GuestUnreachable,
    ErrorCode::GuestProtocol,
    ErrorCode::GuestRefused,
    ErrorCode::VmStopped,
    ErrorCode::WorkerLost,
];

fn on_path(id: &'static str, summary: &'static str) -> Operation {
    operation(id, summary)
        .need("path", of::<schema::AbsolutePath>, "In the guest.")
        .query("user", of::<schema::User>, "Act as this user; root where it is not given.")
        .refuses(OF_FILES)
}

pub(super) fn read_op() -> Operation {
    on_path("readFile", "Read a file")
        .about("An answer that breaks off before its last chunk is not whole.")
        .query("offset", of::<u64>, "Where to begin.")
        .query("limit", of::<u64>, "Bytes at most.")
        .gives_bytes("The file's bytes.", &[FILE_SIZE_HEADER, FILE_MODE_HEADER])
}

pub(super) fn write_op() -> Operation {
    on_path("writeFile", "Write a file, whole or not at all")
        .query("mode", of::<schema::Mode>, "Permission bits in octal.")
        .flag("parents", "Make missing parents.")
        .flag("append", "To what there is.")
        .flag("sync", "Answer when it is on the guest's disk.")
        .raw_body("application/octet-stream", bytes, false)
        .gives::<FileWritten>("It is there.")
}

pub(super) fn remove_op() -> Operation {
    on_path("removeFile", "Remove a file")
        .flag("recursive", "A folder with all in it.")
        .gives_nothing("It is gone.")
}

pub(super) fn stat_op() -> Operation {
    on_path("statFile", "Show size, mode, owner, time and kind of a file")
        .flag("follow", "Where a link leads to.")
        .gives::<FileView>("The file.")
}

pub(super) fn list_op() -> Operation {
    on_path("listFiles", "List a folder")
        .query("limit", entries, "Of the page.")
        .query("cursor", text, "`next_cursor` of the page before.")
        .gives::<FileListing>("A page, by name.")
}

fn entries(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let max = aether_protocol::limits::LIST_ENTRIES_MAX;
    schemars::json_schema!({ "type": "integer", "minimum": 1, "maximum": max, "default": max })
}

pub(super) fn mkdir_op() -> Operation {
    operation("makeFolder", "Make a folder")
        .body::<MkdirRequest>()
        .gives_nothing("It is there.")
        .refuses(OF_FILES)
}

pub(super) fn rename_op() -> Operation {
    operation("moveFile", "Move a file")
        .about("At once within one file system of the VM; refused across two.")
        .body::<MoveRequest>()
        .gives_nothing("It is moved.")
        .refuses(OF_FILES)
}
