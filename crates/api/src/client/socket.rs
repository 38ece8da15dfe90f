//! WebSockets to the server.

use std::{fmt, io, marker::PhantomData, sync::Arc};

use futures::StreamExt as _;
use reqwest::header::AUTHORIZATION;
use rustls::pki_types::ServerName;
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, client::IntoClientRequest as _},
};

use super::{
    Client, ClientError,
    http::{CONNECT_LIMIT, Query, bearer},
};
use crate::{PREFIX, Problem};

/// A connection with TLS or without.
pub(super) trait Wire: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> Wire for T {}

pub(super) type Socket = WebSocketStream<Box<dyn Wire>>;

/// What the server tells, one after another.
#[derive(Debug)]
pub struct Told<T> {
    socket: Socket,
    of: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Told<T> {
    pub(super) fn new(socket: Socket) -> Self {
        Self { socket, of: PhantomData }
    }

    /// `None`: the stream has ended. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => return event(&text).map(Some),
                Some(Ok(Message::Close(_))) | None => return Ok(None),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(lost(error)),
            }
        }
    }

    pub async fn close(mut self) -> Result<(), ClientError> {
        self.socket.close(None).await.map_err(lost)
    }
}

/// `path` is below the prefix.
pub(super) async fn connect(
    client: &Client,
    path: &str,
    query: &Query,
) -> Result<Socket, ClientError> {
    // `http` becomes `ws`, `https` becomes `wss`.
    let base = client.base.strip_prefix("http").unwrap_or(&client.base);
    let wrong = || ClientError::Url { url: client.base.clone() };
    let mut url = reqwest::Url::parse(&format!("ws{base}{PREFIX}{path}")).map_err(|_| wrong())?;
    if !query.is_empty() {
        url.query_pairs_mut().extend_pairs(query.pairs());
    }
    let mut request = url.as_str().into_client_request().map_err(|_| wrong())?;
    if let Some(value) = client.key.as_deref().and_then(bearer) {
        request.headers_mut().insert(AUTHORIZATION, value);
    }
    let opened = timeout(CONNECT_LIMIT, async {
        let wire = dial(client, &url).await?;
        tokio_tungstenite::client_async(request, wire).await
    });
    let opened =
        opened.await.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()));
    let (socket, _response) = opened.map_err(|error| refused(client, error))?;
    Ok(socket)
}

async fn dial(client: &Client, url: &reqwest::Url) -> io::Result<Box<dyn Wire>> {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let port = url.port_or_known_default().unwrap_or(80);
    let stream = TcpStream::connect((host, port)).await?;
    // A key that is pressed goes out at once.
    stream.set_nodelay(true)?;
    let Some(config) = &client.tls else { return Ok(Box::new(stream)) };
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let connector = TlsConnector::from(Arc::clone(config));
    Ok(Box::new(connector.connect(name, stream).await?))
}

/// A refusal comes as a problem document, since the answer to the handshake is already out.
pub(super) fn event<T: DeserializeOwned>(text: &str) -> Result<T, ClientError> {
    serde_json::from_str(text).map_err(|error| match serde_json::from_str::<Problem>(text) {
        Ok(problem) => ClientError::Problem(Box::new(problem)),
        Err(_) => ClientError::unexpected(error.to_string()),
    })
}

fn refused(client: &Client, error: tungstenite::Error) -> ClientError {
    match error {
        tungstenite::Error::Http(response) => {
            let body = response.body().as_deref().unwrap_or_default();
            match serde_json::from_slice::<Problem>(body) {
                Ok(problem) => ClientError::Problem(Box::new(problem)),
                Err(_) => ClientError::unexpected(format!("status {}", response.status())),
            }
        }
        tungstenite::Error::Io(source) => ClientError::connect(&client.base, source.into()),
        error => ClientError::transport("open a WebSocket")(error.into()),
    }
}

pub(super) fn lost(error: tungstenite::Error) -> ClientError {
    ClientError::transport("use a WebSocket")(error.into())
}
