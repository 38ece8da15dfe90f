//! Streams between this process and the others of its fleet: the certificate that it shows them,
//! where it finds them, and both sides of the connections.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use aether_store::Store;
use aether_streams::{
    GuestLink, Sessions,
    remote::{Links, Place, StreamServer, StreamServerParts, Whereabouts},
};
use aether_tls::{Authority, Credentials, Holder, Peer, Request, TlsError};
use aether_types::{ErrorCode, Fault, Presence, Timestamp, VmId, WorkerId};
use tokio::{net::TcpListener, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    args::StreamOptions,
    authority::{self, Known},
    exit::Exit,
    failure::{Failure, chain},
};

/// After a renewal that failed, and between two looks at a clock that may jump.
const LOOK_MAX: Duration = Duration::from_mins(10);
const LOOK_MIN: Duration = Duration::from_millis(100);
/// In the registry.
const ADDRESS_BYTES_MAX: usize = 255;

/// What was asked for, with the listener bound.
pub(crate) struct StreamPlan {
    listener: TcpListener,
    address: SocketAddr,
    advertise: Option<String>,
    lifetime: Duration,
}

impl StreamPlan {
    /// `None`: the process has no streams with others.
    pub(crate) async fn bind(options: StreamOptions) -> Result<Option<Self>, Failure> {
        let StreamOptions { stream_listen, stream_advertise, stream_certificate_lifetime } =
            options;
        let Some(address) = stream_listen else {
            return match stream_advertise {
                Some(_) => {
                    Err(Failure::usage("--stream-advertise is there without --stream-listen"))
                }
                None => Ok(None),
            };
        };
        if let Some(advertised) = &stream_advertise {
            check_address(advertised)?;
        }
        if stream_certificate_lifetime < Duration::from_secs(1) {
            return Err(Failure::usage("--stream-certificate-lifetime: at least 1s"));
        }
        let unavailable = |error: std::io::Error| {
            let text = format!("listen on {address} for streams: {error}");
            Failure::new("address_unavailable", Exit::Unavailable, text)
        };
        let listener = TcpListener::bind(address).await.map_err(unavailable)?;
        let address = listener.local_addr().map_err(unavailable)?;
        let (advertise, lifetime) = (stream_advertise, stream_certificate_lifetime);
        Ok(Some(Self { listener, address, advertise, lifetime }))
    }

    /// What the others are told; `host` is what this worker is called.
    pub(crate) fn advertised(&self, host: &str) -> String {
        match &self.advertise {
            Some(address) => address.clone(),
            None if self.address.ip().is_unspecified() => format!("{host}:{}", self.address.port()),
            None => self.address.to_string(),
        }
    }

    /// Before the worker registers: who is told of the address finds a certificate there.
    pub(crate) fn certify(self, known: &Known, worker: WorkerId) -> Result<Certified, Failure> {
        let Known::Held(authority) = known else {
            let text = "the key of the platform's authority is on another host";
            return Err(Failure::new("authority_elsewhere", Exit::Failure, text)
                .hint("--stream-listen needs --authority-dir with a copy of its folder"));
        };
        let issuer = Issuer {
            authority: Arc::clone(authority),
            peer: Peer { worker, is_gateway: true },
            lifetime: self.lifetime,
        };
        let holder = Holder::new(issuer.issue().map_err(|e| authority::failure(&e))?);
        Ok(Certified { plan: self, issuer, holder })
    }
}

fn check_address(address: &str) -> Result<(), Failure> {
    let parts = address.rsplit_once(':');
    let is_good = parts.is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if is_good && address.len() <= ADDRESS_BYTES_MAX && !address.contains(char::is_whitespace) {
        return Ok(());
    }
    Err(Failure::usage(format!("--stream-advertise: {address:?} is no HOST:PORT")))
}

/// Makes this process' certificates, with keys that are new each time.
struct Issuer {
    authority: Arc<Authority>,
    peer: Peer,
    lifetime: Duration,
}

impl Issuer {
    fn issue(&self) -> Result<Credentials, TlsError> {
        let request = Request::make()?;
        let certificate = self.authority.issue_peer(request.der(), self.peer, self.lifetime)?;
        request.answered(certificate, self.authority.certificate().clone())
    }

    /// Replaces the certificate at two thirds of its time. Streams that live go on.
    async fn keep(self, holder: Arc<Holder>, closing: CancellationToken) {
        loop {
            let left = holder.current().renew_at().unix_ms() - Timestamp::now().unix_ms();
            let left = Duration::from_millis(u64::try_from(left).unwrap_or(0));
            tokio::select! {
                () = closing.cancelled() => return,
                () = sleep(left.clamp(LOOK_MIN, LOOK_MAX)) => {}
            }
            if Timestamp::now() < holder.current().renew_at() {
                continue;
            }
            match self.issue() {
                Ok(credentials) => {
                    holder.replace(credentials);
                    tracing::info!("the certificate for streams was replaced");
                }
                Err(error) => {
                    tracing::error!(error = chain(&error), "replace the certificate for streams");
                }
            }
        }
    }
}

pub(crate) struct Certified {
    plan: StreamPlan,
    issuer: Issuer,
    holder: Arc<Holder>,
}

/// Both sides, running.
pub(crate) struct FleetLinks {
    server: StreamServer,
    links: Arc<Links>,
}

impl Certified {
    pub(crate) fn start(
        self,
        sessions: &Sessions,
        guests: &Arc<dyn GuestLink>,
        store: &Arc<dyn Store>,
        closing: CancellationToken,
    ) -> Result<FleetLinks, Failure> {
        let Self { plan, issuer, holder } = self;
        let here = issuer.peer.worker;
        let authority = issuer.authority.certificate();
        let failed = |e: TlsError| authority::failure(&e);
        let tls = aether_tls::link_server_config(authority, Arc::clone(&holder)).map_err(failed)?;
        let client =
            aether_tls::link_client_config(authority, Arc::clone(&holder)).map_err(failed)?;
        let server = StreamServer::start(StreamServerParts {
            listener: plan.listener,
            tls,
            sessions: sessions.clone(),
            links: Arc::clone(guests),
        });
        let server = server.map_err(|e| Failure::io("serve streams", &e))?;
        let places = Arc::new(Places { here, store: Arc::clone(store) });
        let (sessions, guests) = (sessions.clone(), Arc::clone(guests));
        let links = Links::new(here, sessions, guests, places, client, Arc::clone(&holder));
        tokio::spawn(issuer.keep(holder, closing));
        Ok(FleetLinks { server, links })
    }
}

impl FleetLinks {
    pub(crate) fn links(&self) -> Arc<Links> {
        Arc::clone(&self.links)
    }

    /// Once the worker has ended and the gateway's clients have had their answers.
    pub(crate) async fn close(self) {
        tokio::join!(self.server.close(), self.links.close());
    }
}

/// As the store says.
struct Places {
    here: WorkerId,
    store: Arc<dyn Store>,
}

#[async_trait::async_trait]
impl Whereabouts for Places {
    async fn of(&self, vm: VmId) -> Result<Option<Place>, Fault> {
        let failed = |error: aether_store::StoreError| {
            tracing::error!(vm.id = %vm, error = chain(&error), "find a VM's worker");
            Fault::new(ErrorCode::Unavailable, "the store does not say where the VM is")
        };
        let found = self.store.vm(vm).await.map_err(failed)?;
        let Some(worker) = found.and_then(|vm| vm.worker_id) else { return Ok(None) };
        if worker == self.here {
            return Ok(Some(Place { worker, address: None }));
        }
        let known = self.store.worker(worker).await.map_err(failed)?;
        let there = known.map(|(worker, _)| worker);
        let there = there.filter(|worker| worker.standing.presence == Presence::Present);
        Ok(Some(Place { worker, address: there.and_then(|worker| worker.stream_address) }))
    }
}
