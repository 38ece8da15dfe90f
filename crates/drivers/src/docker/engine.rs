//! What this driver asks of an engine, each request bounded, and what its errors mean.

use std::{
    collections::HashMap,
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use bollard::{
    API_DEFAULT_VERSION, Docker,
    container::LogOutput,
    errors::Error,
    models::{ContainerCreateBody, ContainerState},
    query_parameters::{
        CreateContainerOptions, KillContainerOptions, ListContainersOptions, LogsOptions,
        RemoveContainerOptions, WaitContainerOptions,
    },
};
use futures::StreamExt as _;

use super::LABEL_OWNER;
use crate::DriverError;

/// One request but an import. Engines on slow disks take their time over removing a container.
const REQUEST_LIMIT: Duration = Duration::from_mins(1);
/// The client's own bound on an answer, above each of ours.
const CLIENT_LIMIT_S: u64 = 900;
/// Of a container's last words.
const WORDS_BYTES_MAX: usize = 2048;
/// Of an error's text.
const DETAIL_CHARS_MAX: usize = 500;

const NOT_FOUND: u16 = 404;
/// Of a container that does not run, where it would have to.
const CONFLICT: u16 = 409;
const NOT_MODIFIED: u16 = 304;

#[derive(Debug, Clone)]
pub(super) struct Engine {
    pub(super) client: Docker,
    pub(super) socket: PathBuf,
}

impl Engine {
    pub(super) async fn connect(socket: &Path) -> Result<Self, DriverError> {
        let unavailable = |error: &dyn std::fmt::Display| {
            DriverError::Unavailable(format!(
                "no Docker engine answers at {}: {error}; start one, or name its socket with \
                 --docker-socket",
                socket.display()
            ))
        };
        let path = socket.to_str().ok_or_else(|| unavailable(&"its path is not UTF-8"))?;
        let client = Docker::connect_with_unix(path, CLIENT_LIMIT_S, API_DEFAULT_VERSION)
            .map_err(|e| unavailable(&e))?;
        let negotiated = tokio::time::timeout(REQUEST_LIMIT, client.negotiate_version()).await;
        let client = negotiated.map_err(|e| unavailable(&e))?.map_err(|e| unavailable(&e))?;
        Ok(Self { client, socket: socket.to_owned() })
    }

    /// Whether the engine is one that this driver can use; its version.
    pub(super) async fn check(&self) -> Result<String, DriverError> {
        let info = self.ask("describe the engine", self.client.info()).await?;
        let refused = |reason: &str| {
            let socket = self.socket.display();
            Err(DriverError::Unavailable(format!("the Docker engine at {socket} {reason}")))
        };
        if info.os_type.as_deref().is_some_and(|os| os != "linux") {
            return refused("does not run Linux containers");
        }
        let options = info.security_options.unwrap_or_default();
        let has = |name: &str| {
            options.iter().any(|o| o.split(',').any(|o| o.trim_start_matches("name=") == name))
        };
        if has("rootless") || has("userns") {
            return refused(
                "maps users (rootless, or userns-remap), so that its containers cannot use what \
                 the host shares with them; use one that does not",
            );
        }
        if !has("seccomp") {
            return refused("has no seccomp profile, without which containers hold nothing");
        }
        Ok(info.server_version.unwrap_or_else(|| "unknown".to_owned()))
    }

    pub(super) async fn ask<T>(
        &self,
        action: &str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, DriverError> {
        match tokio::time::timeout(REQUEST_LIMIT, request).await {
            Ok(answer) => answer.map_err(|error| refusal(action, &error)),
            Err(_) => Err(DriverError::Vmm {
                action: action.to_owned(),
                detail: format!("the engine gave no answer within {} s", REQUEST_LIMIT.as_secs()),
            }),
        }
    }

    pub(super) async fn create(
        &self,
        name: &str,
        body: ContainerCreateBody,
    ) -> Result<(), DriverError> {
        let options = CreateContainerOptions { name: Some(name.to_owned()), ..Default::default() };
        let request = self.client.create_container(Some(options), body);
        let made = self.ask("create a container", request).await?;
        for warning in made.warnings {
            tracing::warn!(container = name, warning, "the engine warns");
        }
        Ok(())
    }

    pub(super) async fn start(&self, name: &str) -> Result<(), DriverError> {
        self.ask("start a container", self.client.start_container(name, None)).await
    }

    pub(super) async fn state(&self, name: &str) -> Result<ContainerState, DriverError> {
        let inspected = self.client.inspect_container(name, None);
        Ok(self.ask("inspect a container", inspected).await?.state.unwrap_or_default())
    }

    pub(super) async fn pause(&self, name: &str) -> Result<(), DriverError> {
        self.ask("pause a container", self.client.pause_container(name)).await
    }

    pub(super) async fn resume(&self, name: &str) -> Result<(), DriverError> {
        self.ask("resume a container", self.client.unpause_container(name)).await
    }

    /// Ends a container at once, also one that is paused, and waits until the engine knows.
    pub(super) async fn end(&self, name: &str) -> Result<(), DriverError> {
        let signal = KillContainerOptions { signal: "SIGKILL".to_owned() };
        let killed = async {
            match self.client.kill_container(name, Some(signal)).await {
                Err(error) if is_status(&error, &[NOT_FOUND, CONFLICT, NOT_MODIFIED]) => Ok(()),
                killed => killed,
            }
        };
        self.ask("end a container", killed).await?;
        self.ended(name).await.map(drop)
    }

    /// Waits for the end of a container; the status of its PID 1, or `None` where there is no such
    /// container. Bounded: it was killed, or its PID 1 was seen to end.
    pub(super) async fn ended(&self, name: &str) -> Result<Option<i64>, DriverError> {
        let options = WaitContainerOptions { condition: "not-running".to_owned() };
        let mut waiting = Box::pin(self.client.wait_container(name, Some(options)));
        let status = async {
            match waiting.next().await {
                Some(Ok(answer)) => Ok(Some(answer.status_code)),
                Some(Err(Error::DockerContainerWaitError { code, .. })) => Ok(Some(code)),
                Some(Err(error)) if is_status(&error, &[NOT_FOUND]) => Ok(None),
                Some(Err(error)) => Err(error),
                None => Ok(None),
            }
        };
        self.ask("wait for the end of a container", status).await
    }

    pub(super) async fn remove(&self, name: &str) -> Result<(), DriverError> {
        let options = RemoveContainerOptions { force: true, v: true, link: false };
        let removed = async {
            match self.client.remove_container(name, Some(options)).await {
                Err(error) if is_status(&error, &[NOT_FOUND]) => Ok(()),
                removed => removed,
            }
        };
        self.ask("remove a container", removed).await
    }

    /// Names of the containers with this owner, in whatever state.
    pub(super) async fn list(&self, owner: &str) -> Result<Vec<String>, DriverError> {
        let filter = ("label".to_owned(), vec![format!("{LABEL_OWNER}={owner}")]);
        let filters = Some(HashMap::from([filter]));
        let options = ListContainersOptions { all: true, filters, ..Default::default() };
        let listed = self.client.list_containers(Some(options));
        let listed = self.ask("list containers", listed).await?;
        let names = listed.into_iter().filter_map(|c| c.names?.into_iter().next());
        Ok(names.map(|name| name.trim_start_matches('/').to_owned()).collect())
    }

    /// What a container has said last; nothing where the engine does not tell.
    pub(super) async fn last_words(&self, name: &str) -> String {
        let options =
            LogsOptions { stdout: true, stderr: true, tail: "20".to_owned(), ..Default::default() };
        let mut lines = Box::pin(self.client.logs(name, Some(options)));
        let mut words = String::new();
        let reading = async {
            while words.len() < WORDS_BYTES_MAX
                && let Some(Ok(line)) = lines.next().await
            {
                let (LogOutput::StdErr { message }
                | LogOutput::StdOut { message }
                | LogOutput::StdIn { message }
                | LogOutput::Console { message }) = line;
                let room = WORDS_BYTES_MAX - words.len();
                let message = &message[..message.len().min(room)];
                words.push_str(&printable(&String::from_utf8_lossy(message)));
            }
        };
        let _ = tokio::time::timeout(REQUEST_LIMIT, reading).await;
        words.trim().to_owned()
    }
}

pub(super) fn is_status(error: &Error, expected: &[u16]) -> bool {
    matches!(error, Error::DockerResponseServerError { status_code, .. } if expected.contains(status_code))
}

pub(super) fn refusal(action: &str, error: &Error) -> DriverError {
    let detail = match error {
        Error::DockerResponseServerError { message, .. } => message.clone(),
        error => error.to_string(),
    };
    let detail = printable(&detail).chars().take(DETAIL_CHARS_MAX).collect();
    DriverError::Vmm { action: action.to_owned(), detail }
}

/// A container or an engine wrote it: it may have anything in it.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_an_engine_it_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = Engine::connect(&folder.path().join("none.sock")).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("none.sock") && text.contains("--docker-socket"), "{text}");
    }

    #[test]
    fn what_an_engine_says_is_cut_and_has_no_control_characters() {
        let message = format!("no such\nthing\u{1b}[2J{}", "x".repeat(10_000));
        let error = Error::DockerResponseServerError { status_code: 404, message };
        assert!(is_status(&error, &[NOT_FOUND]) && !is_status(&error, &[CONFLICT]));
        let text = refusal("look", &error).to_string();
        assert!(text.starts_with("the VMM refuses to look: no such thing [2J"), "{text}");
        assert!(text.chars().count() < DETAIL_CHARS_MAX + 50);
    }
}
