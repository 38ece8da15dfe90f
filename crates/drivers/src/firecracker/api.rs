//! Firecracker's API: HTTP over a Unix socket, as much of it as this driver uses.
//!
//! The VMM is trusted less than the worker: answers have a size and a time limit, and the socket is
//! opened without following links, as the VMM may write to the directory that it is in.

use std::{io, os::fd::BorrowedFd, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

use crate::{DriverError, stream::connect_in};

/// One request and its answer. Starting the machine reads kernel and initramfs.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Of an error's text.
const FAULT_CHARS_MAX: usize = 500;

/// One kept connection, used by one caller at a time.
#[derive(Debug)]
pub(super) struct Session {
    sender: http1::SendRequest<Full<Bytes>>,
    _connection: AbortOnDropHandle<()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum State {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

#[derive(Deserialize)]
struct Instance {
    state: State,
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

fn broken(source: io::Error) -> DriverError {
    DriverError::Io { action: "speak to Firecracker".to_owned(), source }
}

impl Session {
    pub(super) async fn open(directory: BorrowedFd<'_>, name: &str) -> Result<Self, DriverError> {
        Self::over(connect_in(directory, name).await.map_err(broken)?).await
    }

    pub(super) async fn over(stream: UnixStream) -> Result<Self, DriverError> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| broken(io::Error::other(e)))?;
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to Firecracker has ended");
            }
        });
        Ok(Self { sender, _connection: AbortOnDropHandle::new(connection) })
    }

    pub(super) async fn put(
        &mut self,
        path: &'static str,
        body: &impl Serialize,
    ) -> Result<(), DriverError> {
        self.put_within(REQUEST_LIMIT, path, body).await
    }

    pub(super) async fn put_within(
        &mut self,
        limit: Duration,
        path: &'static str,
        body: &impl Serialize,
    ) -> Result<(), DriverError> {
        self.request(limit, Method::PUT, path, Some(&to_json(body)?)).await.map(drop)
    }

    pub(super) async fn set_state(&mut self, state: State) -> Result<(), DriverError> {
        let word = match state {
            State::Paused => "Paused",
            State::Running | State::NotStarted => "Resumed",
        };
        let body = to_json(&serde_json::json!({ "state": word }))?;
        self.request(REQUEST_LIMIT, Method::PATCH, "/vm", Some(&body)).await.map(drop)
    }

    pub(super) async fn state(&mut self) -> Result<State, DriverError> {
        let answer = self.request(REQUEST_LIMIT, Method::GET, "/", None).await?;
        let instance: Instance = serde_json::from_slice(&answer).map_err(|e| broken(e.into()))?;
        Ok(instance.state)
    }

    async fn request(
        &mut self,
        limit: Duration,
        method: Method,
        path: &'static str,
        body: Option<&Bytes>,
    ) -> Result<Bytes, DriverError> {
        let action = format!("{method} {path}");
        let answer = tokio::time::timeout(limit, self.exchange(method, path, body)).await;
        answer.unwrap_or_else(|_| {
            let detail = format!("no answer within {} s", limit.as_secs());
            Err(DriverError::Vmm { action, detail })
        })
    }

    async fn exchange(
        &mut self,
        method: Method,
        path: &'static str,
        body: Option<&Bytes>,
    ) -> Result<Bytes, DriverError> {
        let other = |e: hyper::Error| broken(io::Error::other(e));
        let action = format!("{method} {path}");
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Accept", "application/json");
        if body.is_some() {
            request = request.header("Content-Type", "application/json");
        }
        let request = request
            .body(Full::new(body.cloned().unwrap_or_default()))
            .map_err(|e| broken(io::Error::other(e)))?;
        self.sender.ready().await.map_err(other)?;
        let answer = self.sender.send_request(request).await.map_err(other)?;
        let status = answer.status();
        let read = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let bytes = read.map_err(|e| broken(io::Error::other(e)))?.to_bytes();
        if status.is_success() {
            return Ok(bytes);
        }
        let text = match serde_json::from_slice::<Fault>(&bytes) {
            Ok(fault) => fault.fault_message,
            Err(_) => String::from_utf8_lossy(&bytes).into_owned(),
        };
        let is_printable = |c: char| if c.is_control() { ' ' } else { c };
        let text: String = text.chars().take(FAULT_CHARS_MAX).map(is_printable).collect();
        Err(DriverError::Vmm { action, detail: format!("{status}: {text}") })
    }
}

fn to_json(body: &impl Serialize) -> Result<Bytes, DriverError> {
    serde_json::to_vec(body).map(Bytes::from).map_err(|e| broken(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// A Firecracker that answers one request with `answer`.
    async fn answering(answer: String) -> (Session, tokio::task::JoinHandle<String>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let peer = tokio::spawn(async move {
            let mut seen = vec![0; 4096];
            let n = theirs.read(&mut seen).await.unwrap();
            // The client may hang up before it has read all.
            let _ = theirs.write_all(answer.as_bytes()).await;
            String::from_utf8_lossy(&seen[..n]).into_owned()
        });
        (Session::over(ours).await.unwrap(), peer)
    }

    fn http(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    #[tokio::test]
    async fn a_request_is_made_and_its_answer_read() {
        let (mut session, _peer) =
            answering(http("200 OK", r#"{"state":"Paused","id":"x"}"#)).await;
        assert_eq!(session.state().await.unwrap(), State::Paused);
        let (mut session, peer) = answering("HTTP/1.1 204 No Content\r\n\r\n".to_owned()).await;
        session.put("/entropy", &serde_json::json!({})).await.unwrap();
        let seen = peer.await.unwrap();
        assert!(seen.starts_with("PUT /entropy HTTP/1.1\r\n"), "{seen}");
        assert!(seen.to_lowercase().contains("content-length: 2"), "{seen}");
    }

    #[tokio::test]
    async fn a_fault_is_told_and_an_endless_answer_is_cut_off() {
        let fault = http("400 Bad Request", r#"{"fault_message":"no such\nkernel"}"#);
        let (mut session, _peer) = answering(fault).await;
        let error = session.set_state(State::Paused).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "the VMM refuses to PATCH /vm: 400 Bad Request: no such kernel"
        );
        let (mut session, _peer) =
            answering(http("200 OK", &"x".repeat(ANSWER_BYTES_MAX + 1))).await;
        assert!(session.state().await.is_err());
        let (mut session, _peer) = answering(String::new()).await;
        assert!(session.state().await.is_err());
    }
}
