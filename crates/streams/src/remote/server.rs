//! The worker's side: gateways come in, and meet sessions and guests of this process.

use std::{fmt, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use aether_tls::Peer;
use aether_types::{ErrorCode, ExecutionId, Fault, Timestamp, VmId};
use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderValue, Request, Response, StatusCode};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncWriteExt as _, copy_bidirectional_with_sizes, split},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{
    CONNECTION_WINDOW_BYTES, HANDSHAKE_LIMIT, HEADER_BYTES_MAX, SEND_BUFFER_BYTES,
    STREAM_WINDOW_BYTES, STREAMS_MAX,
    client::TOKEN_HEADER,
    io::H2Stream,
    now, silence,
    wire::{ToGateway, ToWorker},
};
use crate::{ClientEnd, GuestLink, Sessions};

/// Of gateways, and of those who have not said yet who they are; more wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// After an error of the listener, which is mostly that there are no more files to be opened.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// For the last words of streams, once the server is to end.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// Between the guest and the stream, each way.
const COPY_BYTES: usize = 64 * 1024;

pub struct StreamServerParts {
    pub listener: TcpListener,
    /// Of [`aether_tls::link_server_config`]: nobody without a certificate comes in.
    pub tls: Arc<ServerConfig>,
    pub sessions: Sessions,
    pub links: Arc<dyn GuestLink>,
}

impl fmt::Debug for StreamServerParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamServerParts").finish_non_exhaustive()
    }
}

/// Serves until it is closed; dropped, it cuts everything off.
#[derive(Debug)]
pub struct StreamServer {
    closing: CancellationToken,
    tasks: JoinSet<()>,
    address: SocketAddr,
}

struct Served {
    sessions: Sessions,
    links: Arc<dyn GuestLink>,
    closing: CancellationToken,
}

impl StreamServer {
    pub fn start(parts: StreamServerParts) -> std::io::Result<Self> {
        let StreamServerParts { listener, tls, sessions, links } = parts;
        let address = listener.local_addr()?;
        let closing = CancellationToken::new();
        let served = Arc::new(Served { sessions, links, closing: closing.clone() });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, TlsAcceptor::from(tls), served));
        Ok(Self { closing, tasks, address })
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no new streams, and gives those that live a moment to end.
    pub async fn close(mut self) {
        self.closing.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, served: Arc<Served>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            // The semaphore is never closed.
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            Some((place, listener.accept().await))
        };
        let (place, accepted) = tokio::select! {
            () = served.closing.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            next = next => match next {
                Some(next) => next,
                None => break,
            },
        };
        match accepted {
            Ok((stream, from)) => {
                let (acceptor, served) = (acceptor.clone(), Arc::clone(&served));
                connections.spawn(async move {
                    let _place = place;
                    if let Err(error) = connection(stream, acceptor, served).await {
                        tracing::debug!(%from, error, "a connection to the streams ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept a connection to the streams");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(GOODBYE_LIMIT, ended).await;
}

/// The text is for the log.
async fn connection(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    served: Arc<Served>,
) -> Result<(), String> {
    let handshake = async {
        let _ = stream.set_nodelay(true);
        let tls = acceptor.accept(stream).await.map_err(|e| e.to_string())?;
        let until = gateway(tls.get_ref().1.peer_certificates())?;
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(STREAMS_MAX)
            .max_header_list_size(HEADER_BYTES_MAX)
            .max_send_buffer_size(SEND_BUFFER_BYTES);
        let connection = builder.handshake::<_, Bytes>(tls).await.map_err(|e| e.to_string())?;
        Ok::<_, String>((connection, until))
    };
    let (mut connection, until) =
        timeout(HANDSHAKE_LIMIT, handshake).await.map_err(|_| "the handshake took too long")??;
    let mut silent = std::pin::pin!(silence(connection.ping_pong()));
    // Those of one connection end with it.
    let mut streams = JoinSet::new();
    let mut is_closing = false;
    loop {
        tokio::select! {
            () = served.closing.cancelled(), if !is_closing => {
                is_closing = true;
                connection.graceful_shutdown();
            }
            () = &mut silent => return Err("the gateway does not answer".to_owned()),
            Some(_) = streams.join_next() => {}
            request = connection.accept() => match request {
                Some(Ok((request, answer))) => {
                    streams.spawn(serve(request, answer, until, Arc::clone(&served)));
                }
                Some(Err(error)) => return Err(error.to_string()),
                None => return Ok(()),
            }
        }
    }
}

/// Until when the peer may call, if it may.
fn gateway(
    certificates: Option<&[rustls::pki_types::CertificateDer<'_>]>,
) -> Result<Timestamp, String> {
    let leaf = certificates.and_then(|chain| chain.first()).ok_or("there is no certificate")?;
    let peer = Peer::of(leaf).map_err(|e| e.to_string())?;
    if !peer.is_gateway {
        let text = "a worker that is no gateway came to the streams of another";
        tracing::warn!(worker.id = %peer.worker, "{text}");
        return Err(text.to_owned());
    }
    aether_tls::valid_until(leaf).map_err(|e| e.to_string())
}

async fn serve(
    request: Request<RecvStream>,
    mut answer: SendResponse<Bytes>,
    until: Timestamp,
    served: Arc<Served>,
) {
    let opened = async {
        if now() > until {
            let text = "the gateway's certificate has run out";
            return Err(Fault::new(ErrorCode::WorkerUnreachable, text));
        }
        open(request.uri().path(), &served).await
    };
    let opened = tokio::select! {
        opened = opened => opened,
        // Whoever asked has gone.
        _ = std::future::poll_fn(|cx| answer.poll_reset(cx)) => return,
    };
    let mut response = Response::new(());
    let (work, token): (_, Option<String>) = match opened {
        Ok(Opened::Session(client)) => (Work::Session(client), None),
        Ok(Opened::Guest(guest)) => (Work::Guest(guest.stream), Some(guest.token)),
        Err(fault) => {
            refuse(answer, &fault);
            return;
        }
    };
    if let Some(token) = token {
        let Ok(mut value) = HeaderValue::try_from(token) else { return };
        value.set_sensitive(true);
        response.headers_mut().insert(TOKEN_HEADER, value);
    }
    let Ok(send) = answer.send_response(response, false) else { return };
    let stream = H2Stream::new(send, request.into_body(), None);
    match work {
        Work::Session(client) => session(stream, client).await,
        Work::Guest(guest) => relay(stream, guest).await,
    }
}

enum Opened {
    Session(ClientEnd),
    Guest(crate::GuestConnection),
}

enum Work {
    Session(ClientEnd),
    Guest(aether_protocol::host::BoxStream),
}

async fn open(path: &str, served: &Served) -> Result<Opened, Fault> {
    let unknown = || Fault::new(ErrorCode::RouteNotFound, "there is no such stream");
    if let Some(id) = path.strip_prefix("/sessions/") {
        let id = id.parse::<ExecutionId>().map_err(|_| unknown())?;
        return Ok(Opened::Session(served.sessions.open(id)));
    }
    let id = path.strip_prefix("/guests/").ok_or_else(unknown)?;
    let id = id.parse::<VmId>().map_err(|_| unknown())?;
    Ok(Opened::Guest(served.links.connect(id).await?))
}

fn refuse(mut answer: SendResponse<Bytes>, fault: &Fault) {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::UNPROCESSABLE_ENTITY;
    let body = serde_json::to_vec(fault).unwrap_or_default();
    // What cannot be sent has nobody to read it.
    if let Ok(mut send) = answer.send_response(response, false) {
        let _ = send.send_data(body.into(), true);
    }
}

/// Ends when the guest has ended its side and the gateway its own, or one of them is gone.
async fn relay(mut stream: H2Stream, mut guest: aether_protocol::host::BoxStream) {
    let copied = copy_bidirectional_with_sizes(&mut stream, &mut guest, COPY_BYTES, COPY_BYTES);
    let _ = copied.await;
}

async fn session(stream: H2Stream, client: ClientEnd) {
    let (mut from, mut to) = split(stream);
    let ClientEnd { input, mut output, mut taken, entry } = client;
    let up = async {
        while let Ok(Some(message)) = ToWorker::read(&mut from).await {
            match message {
                // A worker that has ended takes nothing; reading on is how the client's end is heard.
                ToWorker::Input(message) => drop(input.send(message).await),
                ToWorker::Settled => entry.settle(),
            }
        }
    };
    let down = async {
        loop {
            let message = tokio::select! {
                message = output.recv() => message.map(ToGateway::Output),
                Ok(()) = taken.changed() => Some(ToGateway::Taken(*taken.borrow_and_update())),
            };
            let Some(message) = message else { break };
            let is_end = matches!(message, ToGateway::Output(crate::SessionOutput::End { .. }));
            if message.write(&mut to).await.is_err() {
                return;
            }
            if is_end {
                break;
            }
        }
        // Without an end the gateway looks for it in the store.
        let _ = to.shutdown().await;
    };
    either(up, down).await;
}

async fn either(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    tokio::select! {
        () = one => {}
        () = other => {}
    }
}
