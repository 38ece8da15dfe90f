//! The server: connections with bounds, and an end in a fixed order.
//!
//! ```text
//!   shutdown ─► no more connections ─► whoever waits or follows is told ─► requests in hand end
//!            ─► at the limit: cut off ─► recordings end ─► the outbox is confirmed
//! ```

use std::{io, net::IpAddr, time::Duration};

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
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Gateway, fleet, history};

/// For the head of a request, and for how long a connection is kept without one.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

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
        let places = std::sync::Arc::new(Semaphore::new(self.app.parts.config.connections_max));
        loop {
            // The semaphore is never closed.
            let place = tokio::select! {
                () = shutdown.cancelled() => return,
                Ok(place) = std::sync::Arc::clone(&places).acquire_owned() => place,
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
                    connections.spawn(connection.serve(stream, peer.ip()));
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
    async fn serve(self, stream: TcpStream, peer: IpAddr) {
        if let Err(error) = tune(&stream) {
            tracing::debug!(%error, "set a connection's options");
        }
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
