//! The gateway's side: finds out where a VM is, and keeps a connection to each worker.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use aether_protocol::host::BoxStream;
use aether_tls::{Holder, Peer, server_name};
use aether_types::{ErrorCode, ExecutionId, Fault, Timestamp, VmId, WorkerId};
use async_trait::async_trait;
use bytes::Bytes;
use h2::{RecvStream, client::SendRequest};
use http::{Method, Request, StatusCode, Version};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::split,
    net::TcpStream,
    sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore, mpsc::Sender},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    ANSWER_LIMIT, CONNECTION_WINDOW_BYTES, HANDSHAKE_LIMIT, HEADER_BYTES_MAX, SEND_BUFFER_BYTES,
    STREAM_WINDOW_BYTES, STREAMS_MAX,
    io::H2Stream,
    now, silence, unreachable,
    wire::{ToGateway, ToWorker},
    within,
};
use crate::{
    ClientEnd, GuestConnection, GuestLink, SessionInput, SessionLink, SessionOutput, Sessions,
    WorkerEnd, sessions,
};

/// With the answer to a way to a guest.
pub(super) const TOKEN_HEADER: &str = "aetherium-guest-token";

/// A refusal is a fault, and no longer than a text for clients is.
const REFUSAL_BYTES_MAX: usize = 16 * 1024;

/// Where a VM's worker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub worker: WorkerId,
    /// `host:port`; `None`: it takes no streams from other processes.
    pub address: Option<String>,
}

/// Knows where VMs are.
#[async_trait]
pub trait Whereabouts: Send + Sync + 'static {
    /// `None`: nowhere yet, or there is no such VM. The fault is for the client's eyes.
    async fn of(&self, vm: VmId) -> Result<Option<Place>, Fault>;
}

/// To VMs of this process straight, to those of others over the network.
pub struct Links {
    here: WorkerId,
    sessions: Sessions,
    guests: Arc<dyn GuestLink>,
    whereabouts: Arc<dyn Whereabouts>,
    tls: TlsConnector,
    shown: Arc<Holder>,
    connections: Mutex<HashMap<WorkerId, Arc<AsyncMutex<Option<Connection>>>>>,
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links").field("here", &self.here).finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Connection {
    requests: SendRequest<Bytes>,
    places: Arc<Semaphore>,
    address: String,
    /// The certificate that we showed: once it was replaced, new streams go over a new connection.
    shown: Bytes,
    /// When the worker's has run out.
    until: Timestamp,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

impl Links {
    /// `tls` is of [`aether_tls::link_client_config`], and shows what `shown` holds.
    #[must_use]
    pub fn new(
        here: WorkerId,
        sessions: Sessions,
        guests: Arc<dyn GuestLink>,
        whereabouts: Arc<dyn Whereabouts>,
        tls: Arc<ClientConfig>,
        shown: Arc<Holder>,
    ) -> Arc<Self> {
        Arc::new(Self {
            here,
            sessions,
            guests,
            whereabouts,
            tls: TlsConnector::from(tls),
            shown,
            connections: Mutex::default(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Cuts off every stream to another process.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// `None`: it is here, or nowhere yet.
    async fn elsewhere(&self, vm: VmId) -> Result<Option<Place>, Fault> {
        let place = self.whereabouts.of(vm).await?;
        Ok(place.filter(|place| place.worker != self.here))
    }

    /// A new stream to a worker, with the headers of its answer. Cancel-safe.
    async fn open(
        &self,
        worker: WorkerId,
        address: &str,
        path: &str,
    ) -> Result<(H2Stream, http::HeaderMap), Fault> {
        // A connection that stood may have ended in this moment; a new one says what is the matter.
        let kept = self.kept(worker, address).await;
        if let Some(connection) = kept
            && let Some(opened) = self.ask(worker, connection, path).await?
        {
            return Ok(opened);
        }
        let connection = self.connection(worker, address).await?;
        self.ask(worker, connection, path).await?.ok_or_else(unreachable)
    }

    fn slot(&self, worker: WorkerId) -> Arc<AsyncMutex<Option<Connection>>> {
        // Nothing panics while the lock is held.
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(connections.entry(worker).or_default())
    }

    fn is_good(&self, connection: &Connection, address: &str) -> bool {
        connection.address == address
            && connection.shown == *self.shown.current().leaf().as_ref()
            && now() < connection.until
    }

    /// The one that stands.
    async fn kept(&self, worker: WorkerId, address: &str) -> Option<Connection> {
        let slot = self.slot(worker);
        let connection = slot.lock().await.clone()?;
        self.is_good(&connection, address).then_some(connection)
    }

    /// A connection that can be used now: another's who was faster, or a new one.
    async fn connection(&self, worker: WorkerId, address: &str) -> Result<Connection, Fault> {
        let slot = self.slot(worker);
        let mut slot = slot.lock().await;
        if let Some(connection) = &*slot
            && self.is_good(connection, address)
        {
            let mut requests = connection.requests.clone();
            // It fails where the connection has ended; where it is only busy, it is alive.
            let ready = std::future::poll_fn(|cx| {
                std::task::Poll::Ready(requests.poll_ready(cx).map_err(|_| ()))
            });
            if !matches!(ready.await, std::task::Poll::Ready(Err(()))) {
                return Ok(connection.clone());
            }
        }
        let late = || {
            tracing::info!(worker.id = %worker, address, "a worker does not answer in time");
            unreachable()
        };
        let made = within(HANDSHAKE_LIMIT, self.connect(worker, address), late).await?;
        *slot = Some(made.clone());
        Ok(made)
    }

    async fn connect(&self, worker: WorkerId, address: &str) -> Result<Connection, Fault> {
        let shown = Bytes::copy_from_slice(self.shown.current().leaf().as_ref());
        let (requests, until) = match self.handshake(worker, address).await {
            Ok(made) => made,
            Err(error) => {
                tracing::warn!(worker.id = %worker, address, error, "connect to a worker");
                return Err(unreachable());
            }
        };
        let places = Arc::new(Semaphore::new(STREAMS_MAX as usize));
        Ok(Connection { requests, places, address: address.to_owned(), shown, until })
    }

    /// The text is for the log.
    async fn handshake(
        &self,
        worker: WorkerId,
        address: &str,
    ) -> Result<(SendRequest<Bytes>, Timestamp), String> {
        let stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
        let _ = stream.set_nodelay(true);
        let name = ServerName::try_from(server_name(worker)).map_err(|e| e.to_string())?;
        let tls = self.tls.connect(name, stream).await.map_err(|e| e.to_string())?;
        let until = check(&tls, worker)?;
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_header_list_size(HEADER_BYTES_MAX)
            .max_send_buffer_size(SEND_BUFFER_BYTES);
        let made = builder.handshake::<_, Bytes>(tls).await.map_err(|e| e.to_string())?;
        let (requests, mut connection) = made;
        let (pings, closing) = (connection.ping_pong(), self.closing.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::info!(worker.id = %worker, %error, "a connection to a worker ended");
                },
                () = silence(pings) => {
                    tracing::warn!(worker.id = %worker, "a worker does not answer any more");
                }
                () = closing.cancelled() => {}
            }
        });
        Ok((requests, until))
    }

    /// `None`: the connection is of no use.
    async fn ask(
        &self,
        worker: WorkerId,
        connection: Connection,
        path: &str,
    ) -> Result<Option<(H2Stream, http::HeaderMap)>, Fault> {
        let full =
            |_| Fault::new(ErrorCode::Unavailable, "there are too many streams to the worker");
        let place = Arc::clone(&connection.places).try_acquire_owned().map_err(full)?;
        let asked = async { Ok(request(connection.requests, worker, path, place).await) };
        let answered = within(ANSWER_LIMIT, asked, || {
            tracing::warn!(worker.id = %worker, "a worker does not answer a request for a stream");
            unreachable()
        });
        match answered.await? {
            Ok((stream, parts)) if parts.status == StatusCode::OK => {
                Ok(Some((stream, parts.headers)))
            }
            Ok((stream, _)) => Err(within(ANSWER_LIMIT, refusal(stream), unreachable)
                .await
                .unwrap_or_else(|fault| fault)),
            Err(error) => {
                tracing::debug!(worker.id = %worker, %error, "ask a worker for a stream");
                Ok(None)
            }
        }
    }
}

/// The worker, and no other, for as long as it says.
fn check(tls: &TlsStream<TcpStream>, worker: WorkerId) -> Result<Timestamp, String> {
    let chain = tls.get_ref().1.peer_certificates();
    let leaf = chain.and_then(|chain| chain.first()).ok_or("there is no certificate")?;
    let peer = Peer::of(leaf).map_err(|e| e.to_string())?;
    if peer.worker != worker {
        return Err(format!("{} answers there", peer.worker));
    }
    aether_tls::valid_until(leaf).map_err(|e| e.to_string())
}

async fn request(
    requests: SendRequest<Bytes>,
    worker: WorkerId,
    path: &str,
    place: OwnedSemaphorePermit,
) -> Result<(H2Stream, http::response::Parts), h2::Error> {
    let request = Request::builder()
        .version(Version::HTTP_2)
        .method(Method::POST)
        .uri(format!("https://{}{path}", server_name(worker)))
        .body(());
    // Its parts are ids and constants.
    let request = request.map_err(|_| h2::Error::from(h2::Reason::INTERNAL_ERROR))?;
    let (answer, send) = requests.ready().await?.send_request(request, false)?;
    let (parts, body): (_, RecvStream) = answer.await?.into_parts();
    Ok((H2Stream::new(send, body, Some(place)), parts))
}

/// Why the worker opens no stream.
async fn refusal(stream: H2Stream) -> Result<Fault, Fault> {
    use tokio::io::AsyncReadExt as _;
    let mut text = Vec::new();
    let read = stream.take(REFUSAL_BYTES_MAX as u64).read_to_end(&mut text).await;
    read.map_err(|_| unreachable())?;
    serde_json::from_slice(&text).map_err(|_| unreachable())
}

#[async_trait]
impl GuestLink for Links {
    async fn connect(&self, vm: VmId) -> Result<GuestConnection, Fault> {
        let Some(Place { worker, address }) = self.elsewhere(vm).await? else {
            return self.guests.connect(vm).await;
        };
        let Some(address) = address else {
            let text =
                "the worker that has the VM is away, or takes no streams from other processes";
            return Err(Fault::new(ErrorCode::WorkerUnreachable, text));
        };
        let (stream, headers) = self.open(worker, &address, &format!("/guests/{vm}")).await?;
        let token = headers.get(TOKEN_HEADER).and_then(|value| value.to_str().ok());
        let token = token.ok_or_else(unreachable)?.to_owned();
        Ok(GuestConnection { stream: Box::new(stream) as BoxStream, token })
    }
}

#[async_trait]
impl SessionLink for Links {
    async fn follow(&self, vm: VmId, id: ExecutionId) -> Result<ClientEnd, Fault> {
        // A worker that takes no streams is not waited for: what it did is read from the store.
        let Some(Place { worker, address: Some(address) }) = self.elsewhere(vm).await? else {
            return Ok(self.sessions.open(id));
        };
        let (stream, _) = self.open(worker, &address, &format!("/sessions/{id}")).await?;
        let (client, far, settled) = sessions::apart();
        let closing = self.closing.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = session(stream, far, settled) => {}
                () = closing.cancelled() => {}
            }
        });
        Ok(client)
    }
}

/// Until either side has gone. Then the stream is reset, and the client's end closed.
async fn session(stream: H2Stream, far: WorkerEnd, settled: CancellationToken) {
    let WorkerEnd { mut input, output, taken } = far;
    let (mut from, mut to) = split(stream);
    let up = async {
        let mut is_settled = false;
        loop {
            let message = tokio::select! {
                message = next(&mut input) => message,
                () = settled.cancelled(), if !is_settled => {
                    is_settled = true;
                    Some(ToWorker::Settled)
                }
            };
            let Some(message) = message else { return };
            if message.write(&mut to).await.is_err() {
                // The reading half sees why.
                return std::future::pending().await;
            }
        }
    };
    let down = async {
        while let Ok(Some(message)) = ToGateway::read(&mut from).await {
            match message {
                ToGateway::Taken(bytes) => drop(taken.send_replace(bytes)),
                ToGateway::Output(message) => {
                    if deliver(&output, message).await {
                        return;
                    }
                }
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
        // While the worker takes nothing, too.
        () = output.closed() => {}
    }
}

async fn next(input: &mut tokio::sync::mpsc::Receiver<SessionInput>) -> Option<ToWorker> {
    input.recv().await.map(ToWorker::Input)
}

/// Whether it was the last.
async fn deliver(output: &Sender<SessionOutput>, message: SessionOutput) -> bool {
    let is_end = matches!(message, SessionOutput::End { .. });
    output.send(message).await.is_err() || is_end
}
