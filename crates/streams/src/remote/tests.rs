use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aether_tls::{Authority, Credentials, Holder, Peer, Request};
use aether_types::{ErrorCode, ExecutionId, Fault, OutputStream, VmId, WorkerId};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    net::TcpListener,
    sync::mpsc,
    time::timeout,
};

use super::{Links, Place, StreamServer, StreamServerParts, Whereabouts};
use crate::{GuestConnection, GuestLink, SessionInput, SessionLink, SessionOutput, Sessions};

const DAY: Duration = Duration::from_hours(24);
/// Nothing here takes so long.
const LONG: Duration = Duration::from_secs(30);

fn certify(authority: &Authority, peer: Peer, lifetime: Duration) -> Arc<Holder> {
    let request = Request::make().unwrap();
    let certificate = authority.issue_peer(request.der(), peer, lifetime).unwrap();
    Holder::new(request.answered(certificate, authority.certificate().clone()).unwrap())
}

fn gateway(worker: WorkerId) -> Peer {
    Peer { worker, is_gateway: true }
}

/// Guests whose other ends the test holds.
struct Guests(mpsc::Sender<DuplexStream>);

#[async_trait::async_trait]
impl GuestLink for Guests {
    async fn connect(&self, _: VmId) -> Result<GuestConnection, Fault> {
        let (near, far) = duplex(64 * 1024);
        // One that nobody wants to see is as good as gone.
        if let Err(mpsc::error::TrySendError::Closed(_)) = self.0.try_send(far) {
            return Err(Fault::new(ErrorCode::VmStateConflict, "it does not run here"));
        }
        Ok(GuestConnection { stream: Box::new(near), token: "abcd".into() })
    }
}

struct At(Place);

#[async_trait::async_trait]
impl Whereabouts for At {
    async fn of(&self, _: VmId) -> Result<Option<Place>, Fault> {
        Ok(Some(self.0.clone()))
    }
}

struct Far {
    authority: Authority,
    id: WorkerId,
    server: StreamServer,
    sessions: Sessions,
    guests: mpsc::Receiver<DuplexStream>,
}

impl Far {
    /// Shows a certificate of this peer.
    async fn showing(peer: Peer) -> Self {
        let authority = Authority::make().unwrap();
        let shown = certify(&authority, peer, DAY);
        let (sender, guests) = mpsc::channel(8);
        let sessions = Sessions::default();
        let server = StreamServer::start(StreamServerParts {
            listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            tls: aether_tls::link_server_config(authority.certificate(), shown).unwrap(),
            sessions: sessions.clone(),
            links: Arc::new(Guests(sender)),
        });
        Self { authority, id: peer.worker, server: server.unwrap(), sessions, guests }
    }

    async fn start() -> Self {
        Self::showing(Peer { worker: WorkerId::new(), is_gateway: false }).await
    }

    /// Of a gateway that trusts `authority` and shows this.
    fn links_with(&self, authority: &Authority, shown: Arc<Holder>) -> Arc<Links> {
        let tls = aether_tls::link_client_config(authority.certificate(), Arc::clone(&shown));
        let address = Some(self.server.address().to_string());
        let at = Arc::new(At(Place { worker: self.id, address }));
        let none = Arc::new(Guests(mpsc::channel(1).0));
        Links::new(WorkerId::new(), Sessions::default(), none, at, tls.unwrap(), shown)
    }

    fn links(&self) -> Arc<Links> {
        let shown = certify(&self.authority, gateway(WorkerId::new()), DAY);
        self.links_with(&self.authority, shown)
    }
}

async fn refused(links: &Links) {
    let error = links.connect(VmId::new()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::WorkerUnreachable, "{error:?}");
}

#[tokio::test]
async fn a_session_is_as_in_one_process() {
    let far = Far::start().await;
    let links = far.links();
    let id = ExecutionId::new();
    let mut client = links.follow(VmId::new(), id).await.unwrap();
    let mut worker = far.sessions.take(id).unwrap();
    client.input.send(SessionInput::Signal(2)).await.unwrap();
    assert_eq!(worker.input.recv().await, Some(SessionInput::Signal(2)));
    worker.taken.send_replace(7);
    client.taken.wait_for(|taken| *taken == 7).await.unwrap();
    let data = Bytes::from(vec![b'x'; 60_000]);
    for _ in 0..100 {
        let message = SessionOutput::Data { stream: OutputStream::Stdout, data: data.clone() };
        let (sent, got) = tokio::join!(worker.output.send(message.clone()), client.output.recv());
        sent.unwrap();
        assert!(got == Some(message));
    }
    let end = SessionOutput::End { exit: None, error: None, duration_us: Some(1) };
    worker.output.send(end.clone()).await.unwrap();
    assert_eq!(client.output.recv().await, Some(end));
    assert_eq!(client.output.recv().await, None);
    drop(client);

    // A client that goes is heard of.
    let client = links.follow(VmId::new(), id).await.unwrap();
    let mut worker = far.sessions.take(id).unwrap();
    drop(client);
    assert_eq!(timeout(LONG, worker.input.recv()).await.unwrap(), None);

    // One that nobody took closes when its task has ended.
    let mut client = links.follow(VmId::new(), id).await.unwrap();
    client.settle();
    assert_eq!(timeout(LONG, client.output.recv()).await.unwrap(), None);
    assert!(far.sessions.take(id).is_none());

    // A worker that goes ends the stream, and is away from then on.
    let mut client = links.follow(VmId::new(), id).await.unwrap();
    drop(far);
    assert_eq!(timeout(LONG, client.output.recv()).await.unwrap(), None);
    refused(&links).await;
}

#[tokio::test]
async fn a_reader_that_stands_still_holds_up_no_other_stream() {
    let mut far = Far::start().await;
    let links = far.links();
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let near = links.connect(VmId::new()).await.unwrap();
        let mut guest = far.guests.recv().await.unwrap();
        let writer = tokio::spawn(async move {
            let piece = vec![0; 64 * 1024];
            let mut sent = 0;
            while guest.write_all(&piece).await.is_ok() {
                sent += piece.len();
            }
            sent
        });
        stalled.push((near, writer));
    }
    let GuestConnection { mut stream, token } = links.connect(VmId::new()).await.unwrap();
    assert_eq!(token, "abcd");
    let mut guest = far.guests.recv().await.unwrap();
    let sent = vec![7; 4 << 20];
    let ((), got) = tokio::join!(
        async {
            guest.write_all(&sent).await.unwrap();
            guest.shutdown().await.unwrap();
        },
        async {
            let mut got = Vec::new();
            timeout(LONG, stream.read_to_end(&mut got)).await.unwrap().unwrap();
            got
        }
    );
    assert!(got == sent);
    for (near, writer) in stalled {
        drop(near);
        let sent = timeout(LONG, writer).await.unwrap().unwrap();
        assert!(sent < 2 << 20, "{sent} bytes were taken for a reader that stood still");
    }
}

#[tokio::test]
async fn who_shows_the_wrong_certificate_is_refused() {
    let far = Far::start().await;
    let other = Authority::make().unwrap();
    let id = WorkerId::new();
    let worker = Peer { worker: id, is_gateway: false };
    let ours = |peer, lifetime| certify(&far.authority, peer, lifetime);
    // A worker that is no gateway; somebody of another fleet; a server's certificate.
    refused(&far.links_with(&far.authority, ours(worker, DAY))).await;
    refused(&far.links_with(&far.authority, certify(&other, gateway(id), DAY))).await;
    refused(&far.links_with(&other, ours(gateway(id), DAY))).await;
    let server: Credentials = far.authority.issue_server(&["localhost".into()], DAY).unwrap();
    refused(&far.links_with(&far.authority, Holder::new(server))).await;
    // One whose time is over, which it is after at most two seconds.
    let shown = ours(gateway(id), Duration::from_secs(1));
    let start = Instant::now();
    while far.links_with(&far.authority, Arc::clone(&shown)).connect(VmId::new()).await.is_ok() {
        assert!(start.elapsed() < LONG);
    }
    // Another worker, and a gateway, where the store says that this one is.
    for is_gateway in [false, true] {
        let mut impostor = Far::showing(Peer { worker: WorkerId::new(), is_gateway }).await;
        impostor.id = far.id;
        refused(&impostor.links()).await;
    }
    assert!(far.links().connect(VmId::new()).await.is_ok(), "one that is good is served");
}

#[tokio::test]
async fn what_a_worker_refuses_comes_with_its_reason() {
    let mut far = Far::start().await;
    far.guests.close();
    let error = far.links().connect(VmId::new()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::VmStateConflict);
}

#[tokio::test]
async fn a_stream_goes_on_over_a_new_certificate_and_new_ones_show_it() {
    let mut far = Far::start().await;
    let id = WorkerId::new();
    let shown = certify(&far.authority, gateway(id), DAY);
    let links = far.links_with(&far.authority, Arc::clone(&shown));
    let mut before = links.connect(VmId::new()).await.unwrap().stream;
    let mut guest = far.guests.recv().await.unwrap();
    // From now on it is no gateway any more: what stands goes on, nothing new begins.
    shown.replace(certify(&far.authority, Peer { worker: id, is_gateway: false }, DAY).current());
    refused(&links).await;
    before.write_all(b"on").await.unwrap();
    let mut word = [0; 2];
    guest.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"on");
    shown.replace(certify(&far.authority, gateway(id), DAY).current());
    links.connect(VmId::new()).await.unwrap();
    guest.write_all(b"go").await.unwrap();
    before.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"go");
}

/// Figures for the decision record: run with `--run-ignored all --no-capture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn throughput_and_first_byte() {
    const TOTAL: usize = 64 << 20;
    async fn pass(mut guest: DuplexStream, mut near: aether_protocol::host::BoxStream) -> Duration {
        let start = Instant::now();
        let writer = tokio::spawn(async move {
            let piece = vec![7; 64 * 1024];
            for _ in 0..TOTAL / piece.len() {
                guest.write_all(&piece).await.unwrap();
            }
        });
        let mut piece = vec![0; 64 * 1024];
        let mut got = 0;
        while got < TOTAL {
            got += near.read(&mut piece).await.unwrap();
        }
        writer.await.unwrap();
        start.elapsed()
    }
    let mut far = Far::start().await;
    let links = far.links();
    let (sender, mut here) = mpsc::channel(1);
    let local = Guests(sender);
    for round in 0..3 {
        let start = Instant::now();
        let near = links.connect(VmId::new()).await.unwrap().stream;
        let opened = start.elapsed();
        let remote = pass(far.guests.recv().await.unwrap(), near).await;
        let near = local.connect(VmId::new()).await.unwrap().stream;
        let direct = pass(here.recv().await.unwrap(), near).await;
        let ratio = remote.as_secs_f64() / direct.as_secs_f64();
        println!(
            "{round}: opened in {opened:?}; 64 MiB: {remote:?}, in process {direct:?}, {ratio:.1}x"
        );
    }
}
