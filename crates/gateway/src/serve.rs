//! The server: connections with bounds, with TLS or without, and an end in a fixed order.
//!
//! ```text
//!   shutdown ─► no more connections ─► whoever waits or follows is told ─► requests in hand end
//!            ─► at the limit: cut off ─► recordings end ─► the outbox is confirmed
//! ```

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::{
    Request,
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Gateway, fleet, history};

/// For the head of a request, and for how long a connection is kept without one.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

/// For a client to begin, and to come to an agreement on TLS.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// What every TLS connection begins with: a record of a handshake. No HTTP does.
const TLS_BEGINS: u8 = 0x16;

/// To whoever speaks HTTP where TLS is: the one answer that they understand.
const PLAIN_REFUSAL: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\n\
    connection: close\r\ncontent-length: 178\r\n\r\n\
    {\"type\":\"urn:aetherium:problem:invalid_request\",\"title\":\"The request is invalid\",\
    \"status\":400,\"detail\":\"TLS is spoken here; use https://\",\"instance\":\"\",\
    \"code\":\"invalid_request\"}\n";

/// All headers of a request together; hyper's own bound is 100 headers.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// A silent connection whose peer does not answer ends within a minute.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_COUNT: u32 = 3;

/// Out of file descriptors: connections that end give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

impl Gateway {
    /// Serves until `shutdown`, and then ends within the configured limit. Once only.
    pub async fn serve(
        &self,
        listener: TcpListener,
        shutdown: CancellationToken,
    ) -> io::Result<()> {
        let Some(dispatch) = self.dispatch.lock().await.take() else {
            return Err(io::Error::other("the gateway was served before"));
        };
        let stop_dispatch = CancellationToken::new();
        let dispatching = tokio::spawn(dispatch.run(stop_dispatch.clone()));
        let watching = tokio::spawn(fleet::watch(self.app.clone(), stop_dispatch.clone()));
        let reading = tokio::spawn(history::watch(self.app.clone(), stop_dispatch.clone()));

        let connections = TaskTracker::new();
        let cut_off = CancellationToken::new();
        self.accept(&listener, &shutdown, &connections, &cut_off).await;
        drop(listener);

        let deadline = Instant::now() + self.app.parts.config.shutdown_limit;
        self.app.closing.cancel();
        connections.close();
        self.app.tasks.close();
        let ended = timeout_at(deadline, async {
            connections.wait().await;
            self.app.tasks.wait().await;
        })
        .await
        .is_ok();
        if !ended {
            tracing::info!(connections = connections.len(), "cut off what did not end in time");
            cut_off.cancel();
            connections.wait().await;
        }
        stop_dispatch.cancel();
        if let Err(error) = dispatching.await {
            tracing::error!(%error, "the dispatcher ended badly");
        }
        if let Err(error) = watching.await {
            tracing::error!(%error, "the watch over the workers ended badly");
        }
        if let Err(error) = reading.await {
            tracing::error!(%error, "the reader of events ended badly");
        }
        Ok(())
    }

    async fn accept(
        &self,
        listener: &TcpListener,
        shutdown: &CancellationToken,
        connections: &TaskTracker,
        cut_off: &CancellationToken,
    ) {
        let router = self.router();
        let tls = self.app.parts.tls.clone().map(TlsAcceptor::from);
        let places = Arc::new(Semaphore::new(self.app.parts.config.connections_max));
        loop {
            // The semaphore is never closed.
            let place = tokio::select! {
                () = shutdown.cancelled() => return,
                Ok(place) = Arc::clone(&places).acquire_owned() => place,
            };
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let connection = Connection {
                        router: router.clone(),
                        closing: self.app.closing.clone(),
                        cut_off: cut_off.clone(),
                        _place: place,
                    };
                    connections.spawn(connection.begin(stream, peer.ip(), tls.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Where a request comes from: of the last hop, since what proxies say can be made up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

struct Connection {
    router: Router,
    closing: CancellationToken,
    cut_off: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn begin(self, stream: TcpStream, peer: IpAddr, tls: Option<TlsAcceptor>) {
        if let Err(error) = tune(&stream) {
            tracing::debug!(%error, "set a connection's options");
        }
        let Some(tls) = tls else { return self.serve(stream, peer).await };
        let agreed = tokio::select! {
            agreed = timeout(HANDSHAKE_LIMIT, agree(stream, &tls)) => agreed,
            () = self.closing.cancelled() => return,
        };
        match agreed {
            Ok(Ok(Some(stream))) => self.serve(stream, peer).await,
            Ok(Ok(None)) => {}
            Ok(Err(error)) => tracing::debug!(%error, %peer, "no agreement on TLS"),
            Err(_) => tracing::debug!(%peer, "no agreement on TLS in time"),
        }
    }

    async fn serve<S>(self, stream: S, peer: IpAddr)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let routes = TowerToHyperService::new(self.router);
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            routes.call(request)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let mut is_closing = false;
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection broke off");
                    }
                    return;
                }
                () = self.closing.cancelled(), if !is_closing => {
                    is_closing = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = self.cut_off.cancelled() => return,
            }
        }
    }
}

/// `None`: the client spoke plain HTTP, and was told not to.
async fn agree(
    mut stream: TcpStream,
    tls: &TlsAcceptor,
) -> io::Result<Option<tokio_rustls::server::TlsStream<TcpStream>>> {
    let mut first = [0; 1];
    if stream.peek(&mut first).await? > 0 && first[0] != TLS_BEGINS {
        stream.write_all(PLAIN_REFUSAL).await?;
        // What it sent is read before the end, so that the answer is not lost to a reset.
        stream.shutdown().await?;
        let mut rest = [0; 4096];
        let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut rest).await;
        return Ok(None);
    }
    tls.accept(stream).await.map(Some)
}

/// A small answer must not wait for the acknowledgement of the one before, and a client whose host
/// died must be noticed while nothing is sent.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?;
    Ok(())
}
