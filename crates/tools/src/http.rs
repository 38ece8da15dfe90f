//! Fetching, within bounds of size and time.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use reqwest::{Client, Response, StatusCode, Url};

use crate::checksum::Checksum;

const CONNECT_TIME_LIMIT: Duration = Duration::from_secs(20);
/// Longest wait for the next bytes.
const READ_TIME_LIMIT: Duration = Duration::from_mins(1);
/// Longest wait for all of a listing.
const LISTING_TIME_LIMIT: Duration = Duration::from_mins(2);
/// The listing of a package with thousands of versions is 20 MiB.
const LISTING_BYTES_MAX: usize = 128 << 20;
const TRIES: usize = 3;

#[derive(Debug, Clone)]
pub(crate) struct Http {
    client: Client,
}

/// Why there is nothing, in words for an error. The address is in it, without a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HttpError {
    /// The server says that there is no such thing.
    NotFound(String),
    /// The local file could not be written for want of room.
    NoSpace,
    Other(String),
}

impl HttpError {
    pub(crate) fn reason(self) -> String {
        match self {
            Self::NotFound(url) => format!("{url} is not there"),
            Self::NoSpace => "the disk is full".to_owned(),
            Self::Other(reason) => reason,
        }
    }
}

pub(crate) struct Listing {
    /// Where it was at last, after redirections.
    pub(crate) url: Url,
    pub(crate) kind: String,
    pub(crate) bytes: Vec<u8>,
}

impl Http {
    pub(crate) fn new() -> Result<Self, String> {
        // An error says that the process has one already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .user_agent(concat!("aetherium/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIME_LIMIT)
            .read_timeout(READ_TIME_LIMIT)
            .build()
            .map_err(|error| format!("the HTTP client cannot be made: {}", with_causes(&error)))?;
        Ok(Self { client })
    }

    /// A listing, as the server has it of these kinds.
    pub(crate) async fn listing(&self, url: &str, accept: &str) -> Result<Listing, HttpError> {
        let fetch = async {
            let response = self.get(url, accept).await?;
            let kind = response.headers().get(CONTENT_TYPE);
            let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_owned();
            let at = response.url().clone();
            let mut bytes = Vec::new();
            let mut body = response.bytes_stream();
            while let Some(part) = body.next().await {
                let part = part.map_err(|error| broken(url, &error))?;
                if bytes.len() + part.len() > LISTING_BYTES_MAX {
                    let reason = format!("{} is larger than {LISTING_BYTES_MAX} bytes", shown(url));
                    return Err(HttpError::Other(reason));
                }
                bytes.extend_from_slice(&part);
            }
            Ok(Listing { url: at, kind, bytes })
        };
        tokio::time::timeout(LISTING_TIME_LIMIT, fetch).await.unwrap_or_else(|_| {
            let seconds = LISTING_TIME_LIMIT.as_secs();
            Err(HttpError::Other(format!("{} took longer than {seconds} s", shown(url))))
        })
    }

    /// Writes what is there into an empty file, and checks it. The one who calls has a time limit.
    pub(crate) async fn download(
        &self,
        url: &str,
        file: &mut File,
        checksum: &Checksum,
        size_bytes_max: u64,
    ) -> Result<u64, HttpError> {
        let response = self.get(url, "*/*").await?;
        let mut hasher = checksum.hasher();
        let mut size = 0u64;
        let mut body = response.bytes_stream();
        while let Some(part) = body.next().await {
            let part = part.map_err(|error| broken(url, &error))?;
            size += part.len() as u64;
            if size > size_bytes_max {
                let reason = format!("{} is larger than {size_bytes_max} bytes", shown(url));
                return Err(HttpError::Other(reason));
            }
            hasher.update(&part);
            file.write_all(&part).map_err(|error| match error.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    HttpError::NoSpace
                }
                _ => HttpError::Other(format!("the file cannot be written: {error}")),
            })?;
        }
        let found = hasher.finish();
        if found == checksum.hex() {
            return Ok(size);
        }
        let url = shown(url);
        Err(HttpError::Other(format!(
            "{url} has the wrong checksum: {checksum} is expected, and {found} was delivered"
        )))
    }

    /// Tries again what may go well the next time.
    async fn get(&self, url: &str, accept: &str) -> Result<Response, HttpError> {
        let mut last = HttpError::Other(format!("{} was not asked", shown(url)));
        for _ in 0..TRIES {
            match self.client.get(url).header(ACCEPT, accept).send().await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let status = response.status();
                    let may_pass = status.is_server_error()
                        || status == StatusCode::TOO_MANY_REQUESTS
                        || status == StatusCode::REQUEST_TIMEOUT;
                    if matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE) {
                        return Err(HttpError::NotFound(shown(url)));
                    }
                    last = HttpError::Other(format!("{} answers {status}", shown(url)));
                    if !may_pass {
                        return Err(last);
                    }
                }
                Err(error) => last = broken(url, &error),
            }
        }
        Err(last)
    }
}

fn broken(url: &str, error: &reqwest::Error) -> HttpError {
    HttpError::Other(format!("{} does not answer: {}", shown(url), with_causes(error)))
}

/// The innermost cause says what is wrong; the outer ones only where, address and all.
fn with_causes(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// An address for an error: without user and password.
pub(crate) fn shown(url: &str) -> String {
    match Url::parse(url) {
        Ok(mut url) => {
            let _ = url.set_username("");
            let _ = url.set_password(None);
            url.to_string()
        }
        Err(_) => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_of_an_address_is_not_shown() {
        assert_eq!(shown("https://me:secret@host/x"), "https://host/x");
        assert_eq!(shown("nonsense"), "nonsense");
    }
}
