//! Files in a VM.

use bytes::Bytes;
use futures::Stream;
use reqwest::{Body, Method, Response, header::CONTENT_TYPE};

use super::http::{Query, decode, segment};
use super::{Client, ClientError, PageQuery};
use crate::{
    FILE_MODE_HEADER, FILE_SIZE_HEADER, FileListing, FileView, FileWritten, MkdirRequest,
    MoveRequest,
};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadOptions {
    pub offset: Option<u64>,
    pub limit: Option<u64>,
    /// Whose rights; root's where it is not given.
    pub user: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Permission bits.
    pub mode: Option<u32>,
    pub user: Option<String>,
    /// Make missing directories.
    pub parents: bool,
    /// Add to the end in place; not atomic.
    pub append: bool,
    /// Wait until it is on the VM's disk.
    pub sync: bool,
}

/// A file that is being read.
#[derive(Debug)]
pub struct FileDownload {
    response: Response,
    size: Option<u64>,
    mode: Option<u32>,
}

impl FileDownload {
    /// Of the file when it was opened.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// Permission bits.
    #[must_use]
    pub fn mode(&self) -> Option<u32> {
        self.mode
    }

    /// The next bytes; `None` once all have come. A transfer that breaks is an error, never a
    /// short file. Cancel-safe.
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        self.response
            .chunk()
            .await
            .map_err(|error| ClientError::transport("read a file")(error.without_url().into()))
    }
}

impl Client {
    pub async fn read_file(
        &self,
        vm: &str,
        path: &str,
        options: &ReadOptions,
    ) -> Result<FileDownload, ClientError> {
        let mut q = Query::default();
        q.add("path", path).opt("user", options.user.as_deref());
        q.opt("offset", options.offset.map(|o| o.to_string()).as_deref());
        q.opt("limit", options.limit.map(|l| l.to_string()).as_deref());
        let response = self.send(self.request(Method::GET, &files(vm, ""), &q)).await?;
        let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok());
        let size = header(FILE_SIZE_HEADER).and_then(|v| v.parse().ok());
        let mode = header(FILE_MODE_HEADER).and_then(|v| u32::from_str_radix(v, 8).ok());
        Ok(FileDownload { response, size, mode })
    }

    /// The file appears whole under its name, or not at all.
    pub async fn write_file<S>(
        &self,
        vm: &str,
        path: &str,
        options: &WriteOptions,
        content: S,
    ) -> Result<FileWritten, ClientError>
    where
        S: Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static,
    {
        let mut q = Query::default();
        q.add("path", path).opt("user", options.user.as_deref());
        q.opt("mode", options.mode.map(|m| format!("{m:04o}")).as_deref());
        for (name, on) in
            [("parents", options.parents), ("append", options.append), ("sync", options.sync)]
        {
            q.opt(name, on.then_some("true"));
        }
        let request = self
            .request(Method::PUT, &files(vm, ""), &q)
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(Body::wrap_stream(content));
        decode(self.send(request).await?).await
    }

    pub async fn remove_file(
        &self,
        vm: &str,
        path: &str,
        recursive: bool,
        user: Option<&str>,
    ) -> Result<(), ClientError> {
        let mut q = Query::default();
        q.add("path", path).opt("user", user).opt("recursive", recursive.then_some("true"));
        self.send(self.request(Method::DELETE, &files(vm, ""), &q)).await.map(drop)
    }

    /// A symbolic link is described and not followed, unless asked for.
    pub async fn stat_file(
        &self,
        vm: &str,
        path: &str,
        follow: bool,
        user: Option<&str>,
    ) -> Result<FileView, ClientError> {
        let mut q = Query::default();
        q.add("path", path).opt("user", user).opt("follow", follow.then_some("true"));
        self.get(&files(vm, "/stat"), &q).await
    }

    pub async fn list_files(
        &self,
        vm: &str,
        path: &str,
        page: &PageQuery,
        user: Option<&str>,
    ) -> Result<FileListing, ClientError> {
        let mut q = Query::default();
        q.add("path", path).opt("user", user).page(page);
        self.get(&files(vm, "/list"), &q).await
    }

    pub async fn make_dir(&self, vm: &str, request: &MkdirRequest) -> Result<(), ClientError> {
        let call = self.request(Method::POST, &files(vm, "/mkdir"), &Query::default());
        self.send(call.json(request)).await.map(drop)
    }

    pub async fn move_file(&self, vm: &str, request: &MoveRequest) -> Result<(), ClientError> {
        let call = self.request(Method::POST, &files(vm, "/move"), &Query::default());
        self.send(call.json(request)).await.map(drop)
    }
}

fn files(vm: &str, rest: &str) -> String {
    format!("/vms/{}/files{rest}", segment(vm))
}
