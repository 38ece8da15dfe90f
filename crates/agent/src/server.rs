//! Accepting connections, and the first exchange of each.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, mpsc};
use std::thread;
use std::time::Instant;

use aether_protocol::limits::{CONNECTIONS_MAX, HANDSHAKE_LIMIT};
use aether_protocol::{
    Configure, Done, ErrorCode, Failed, FromGuest, Pong, Refused, RequestBody, RequestError, Runs,
    TOKEN_BYTES, ToGuestBody, Token, Welcome, check_request, handshake,
};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::conn::Conn;
use crate::connections::{Connections, Socket};
use crate::error::Fail;
use crate::guest::{Guest, uptime_ms};
use crate::registry::{Attached, Attachment, Registry, unknown_run};
use crate::{configure, files, kmsg, power, run, sys};

/// Stack of a connection's thread. Only what is touched costs memory.
const STACK_BYTES: usize = 256 * 1024;

/// Threads that wait for connections: at first one for a connection, one for the next while that
/// one ends, and one so that these two need not see to another.
const WAITING_AT_FIRST: usize = 3;
/// And at most: one that is free where so many wait already ends.
const WAITING_MAX: usize = 8;

/// Everything that connections share.
#[derive(Debug)]
pub struct Agent {
    identity: RwLock<Identity>,
    /// Where the next agent of this guest finds the token, should this one end.
    legacy: Option<File>,
    connections: Arc<Connections>,
    /// Index of the private link's device, where that is the channel.
    link: OnceLock<u32>,
    pub(crate) place: Place,
    pub(crate) guest: Guest,
    pub(crate) registry: Registry,
}

/// What the agent is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A machine with a kernel of its own.
    Machine,
    /// A container: clock, random generator and links are the host's, and so is its end.
    Container,
}

/// The token that an earlier agent was given.
fn left(legacy: Option<&File>) -> Option<Token> {
    let mut bytes = [0; TOKEN_BYTES];
    legacy?.read_exact_at(&mut bytes, 0).ok()?;
    Some(Token::from_bytes(bytes))
}

/// What changes when the guest becomes another VM.
#[derive(Debug)]
struct Identity {
    token: Token,
    boot_id: String,
}

impl Agent {
    pub fn new(token: Token, boot_id: String) -> Arc<Self> {
        Self::with_legacy(token, boot_id, None)
    }

    /// `legacy` is what an earlier agent of the guest left, if there was one, and is kept up to
    /// date.
    pub(crate) fn with_legacy(token: Token, boot_id: String, legacy: Option<File>) -> Arc<Self> {
        Self::placed(Place::Machine, token, boot_id, legacy)
    }

    pub(crate) fn placed(
        place: Place,
        token: Token,
        boot_id: String,
        legacy: Option<File>,
    ) -> Arc<Self> {
        sys::use_one_arena();
        sys::stop_ignoring_signals();
        sys::keep_descriptors_private();
        Arc::new(Self {
            identity: RwLock::new(Identity {
                token: left(legacy.as_ref()).unwrap_or(token),
                boot_id,
            }),
            legacy,
            connections: Arc::default(),
            link: OnceLock::new(),
            place,
            guest: Guest::default(),
            registry: Registry::default(),
        })
    }

    pub(crate) fn welcome(&self, generation: u32) -> Welcome {
        Welcome {
            generation,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: self.boot_id(),
        }
    }

    pub(crate) fn boot_id(&self) -> String {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).boot_id.clone()
    }

    pub(crate) fn link(&self) -> Option<u32> {
        self.link.get().copied()
    }

    pub(crate) fn set_token(&self, token: Token) {
        if let Some(Err(error)) = self.legacy.as_ref().map(|l| l.write_all_at(token.as_bytes(), 0))
        {
            kmsg!("keep the token: {error}");
        }
        self.identity.write().unwrap_or_else(PoisonError::into_inner).token = token;
    }

    /// From now on this is another guest: what was known of the old one must not be attached to,
    /// and whoever had connected to it is cut off, but for the one who says so.
    pub(crate) fn become_another(&self, boot_id: String, caller: &Socket) {
        self.identity.write().unwrap_or_else(PoisonError::into_inner).boot_id = boot_id;
        self.registry.forget_finished();
        // After the token has changed: who was let in by the old one is in the list by now.
        self.connections.end_others(caller);
    }

    fn token(&self) -> Token {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).token.clone()
    }
}

/// Where connections come from.
#[derive(Debug)]
pub struct Listener {
    pub(crate) socket: OwnedFd,
    pub(crate) kind: ListenerKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ListenerKind {
    Unix,
    /// The private link: bound to the device with this index, which is where the check of the peer
    /// is.
    Link(u32),
    /// Only the host, which is context 2, may talk.
    Vsock,
}

impl Listener {
    pub fn unix(listener: UnixListener) -> Self {
        Self { socket: listener.into(), kind: ListenerKind::Unix }
    }

    fn accept(&self) -> rustix::io::Result<OwnedFd> {
        match self.kind {
            ListenerKind::Vsock => sys::accept_from_host(self.socket.as_fd()),
            ListenerKind::Unix | ListenerKind::Link(_) => {
                accept_with(&self.socket, SocketFlags::CLOEXEC)
            }
        }
    }
}

/// Serves for ever; returns only where the listener itself breaks.
///
/// Threads wait in `accept` and serve what they get. The one that takes the last place sees to it
/// that another waits, so that a connection mostly costs no thread: what makes and ends one is a
/// tenth of a short command's time, and more in a guest that has just been restored.
pub fn serve(agent: &Arc<Agent>, listener: Listener) -> io::Result<Infallible> {
    if let ListenerKind::Link(index) = listener.kind {
        agent.link.get_or_init(|| index);
    }
    let (broken, is_broken) = mpsc::channel();
    let server =
        Server { agent: Arc::clone(agent), listener, waiting: AtomicUsize::new(0), broken };
    let server = Arc::new(server);
    for _ in 0..WAITING_AT_FIRST {
        server.add_thread()?;
    }
    drop(server);
    let gone = |_| io::Error::other("nobody accepts connections any more");
    Err(is_broken.recv().unwrap_or_else(gone))
}

/// What the threads that accept connections share.
#[derive(Debug)]
struct Server {
    agent: Arc<Agent>,
    listener: Listener,
    /// Threads in `accept`, or on their way there.
    waiting: AtomicUsize,
    broken: mpsc::Sender<io::Error>,
}

/// Whether a thread may serve another connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thread {
    IsFree,
    /// It has given up rights that it cannot take back.
    IsSpent,
}

impl Server {
    fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let server = Arc::clone(self);
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let builder = thread::Builder::new().stack_size(STACK_BYTES);
        let spawned = builder.spawn(move || server.accept_and_serve());
        if spawned.is_err() {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        }
        spawned.map(drop)
    }

    fn accept_and_serve(self: &Arc<Self>) {
        loop {
            let accepted = self.listener.accept();
            let socket = match accepted {
                Ok(socket) => socket,
                // Of the one connection, or of a passing lack: the listener is well.
                Err(Errno::CONNABORTED | Errno::INTR | Errno::PERM | Errno::PROTO) => continue,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                    // Connections that end give back what is missing.
                    thread::yield_now();
                    continue;
                }
                Err(errno) => {
                    // Nobody to tell is left only where another thread has told it.
                    let _ = self.broken.send(errno.into());
                    return;
                }
            };
            let others = self.waiting.fetch_sub(1, Ordering::AcqRel) - 1;
            let is_served = others > 0 || self.add_thread().is_ok();
            let after = if is_served {
                let conn = Conn::new(self.agent.connections.enter(socket));
                serve_connection(&self.agent, conn)
            } else {
                crate::kmsg!("drop a connection: no thread would be left to accept others");
                Thread::IsFree
            };
            // More may count themselves in than wait at last: what matters is that it has a bound.
            if after == Thread::IsSpent || self.waiting.load(Ordering::Acquire) >= WAITING_MAX {
                return;
            }
            self.waiting.fetch_add(1, Ordering::AcqRel);
        }
    }
}

fn serve_connection(agent: &Agent, mut conn: Conn) -> Thread {
    loop {
        let (generation, request) = match open(agent, &mut conn) {
            Ok(Some(opened)) => opened,
            // Gone, or too slow, before it had asked for anything.
            Ok(None) => return Thread::IsFree,
            Err(refused) => {
                conn.queue(refused);
                conn.finish();
                return Thread::IsFree;
            }
        };
        if let RequestBody::Configure(configure) = request {
            match be_configured(agent, conn, generation, &configure) {
                Some(kept) => conn = kept,
                None => return Thread::IsFree,
            }
        } else {
            let after = after(&request);
            dispatch(agent, conn, generation, request);
            return after;
        }
    }
}

/// Gives the connection back for another request: to end it now and to begin another one is a good
/// part of what a command costs a guest that was just restored.
fn be_configured(
    agent: &Agent,
    mut conn: Conn,
    generation: u32,
    request: &Configure,
) -> Option<Conn> {
    let answer = configure::configure(agent, conn.socket(), request);
    conn.queue(agent.welcome(generation));
    match answer {
        Ok(configured) => conn.send(configured).is_ok().then_some(conn),
        Err(fail) => {
            conn.queue(Failed::from(fail));
            conn.finish();
            None
        }
    }
}

/// What a request leaves of its thread: files are touched with the rights of their user.
fn after(request: &RequestBody) -> Thread {
    match request {
        RequestBody::ReadFile(_)
        | RequestBody::WriteFile(_)
        | RequestBody::List(_)
        | RequestBody::Stat(_)
        | RequestBody::Mkdir(_)
        | RequestBody::Move(_)
        | RequestBody::Remove(_) => Thread::IsSpent,
        RequestBody::Ping(_)
        | RequestBody::Configure(_)
        | RequestBody::Shutdown(_)
        | RequestBody::Run(_)
        | RequestBody::Attach(_)
        | RequestBody::Forget(_)
        | RequestBody::ListRuns(_) => Thread::IsFree,
    }
}

/// Reads the first two frames.
fn open(agent: &Agent, conn: &mut Conn) -> Result<Option<(u32, RequestBody)>, Refused> {
    let deadline = Some(Instant::now() + HANDSHAKE_LIMIT);
    let bad = |_| Refused::new(ErrorCode::BadMessage, "not a frame of this protocol");
    let Some(first) = conn.receive(deadline).map_err(bad)? else { return Ok(None) };
    let Some(ToGuestBody::Hello(hello)) = first.body else {
        return Err(Refused::new(ErrorCode::BadMessage, "a hello was wanted"));
    };
    let generation = handshake::accept(&hello, &agent.token())?;
    if agent.connections.count() > CONNECTIONS_MAX {
        let message = format!("{CONNECTIONS_MAX} connections are open");
        return Err(Refused::new(ErrorCode::TooManyConnections, message));
    }
    conn.trust();
    let Some(second) = conn.receive(deadline).map_err(bad)? else { return Ok(None) };
    let Some(ToGuestBody::Request(request)) = second.body else {
        return Err(Refused::new(ErrorCode::BadMessage, "a request was wanted"));
    };
    let request = request.body.ok_or(RequestError::Unknown)?;
    check_request(&request)?;
    if conn.socket().is_ended() {
        // Asked of the guest that this one was.
        return Ok(None);
    }
    Ok(Some((generation, request)))
}

fn dispatch(agent: &Agent, mut conn: Conn, generation: u32, request: RequestBody) {
    let answer: Result<FromGuest, Fail> = match request {
        RequestBody::Run(run) => {
            let attach = run::from_the_start(&run.run_id);
            let attachment = Attachment { conn, generation, attach };
            if let Err((attachment, fail)) = run::serve(agent, attachment, &run) {
                refuse(attachment.conn, fail);
            }
            return;
        }
        RequestBody::Attach(attach) => {
            match agent.registry.attach(Attachment { conn, generation, attach }) {
                Attached::HandedOver => {}
                Attached::Finished(attachment, finished) => {
                    run::serve_finished(agent, attachment, &finished);
                }
                Attached::Unknown(Attachment { conn, attach, .. }) => {
                    refuse(conn, unknown_run(&attach.run_id));
                }
            }
            return;
        }
        RequestBody::ReadFile(read) => {
            conn.queue(agent.welcome(generation));
            files::read(conn, &read);
            return;
        }
        RequestBody::WriteFile(write) => {
            conn.queue(agent.welcome(generation));
            files::write(conn, &write);
            return;
        }
        RequestBody::Shutdown(shutdown) => {
            conn.queue(agent.welcome(generation));
            power::shut_down(conn, agent.place, &shutdown);
            return;
        }
        RequestBody::Forget(forget) => match agent.registry.forget(&forget.run_id) {
            Ok(()) => Ok(Done::default().into()),
            Err(fail) => return refuse(conn, fail),
        },
        RequestBody::Ping(_) => Ok(Pong {
            boot_id: agent.boot_id(),
            uptime_ms: uptime_ms(),
            runs: u32::try_from(agent.registry.active()).unwrap_or(u32::MAX),
        }
        .into()),
        RequestBody::ListRuns(_) => Ok(Runs { runs: agent.registry.list() }.into()),
        // Is answered before it comes here, on a connection that goes on.
        RequestBody::Configure(_) => return,
        RequestBody::List(list) => files::list(&list).map(Into::into),
        RequestBody::Stat(stat) => files::stat(&stat).map(Into::into),
        RequestBody::Mkdir(mkdir) => files::mkdir(&mkdir).map(Into::into),
        RequestBody::Move(names) => files::rename(&names).map(Into::into),
        RequestBody::Remove(remove) => files::remove(&remove).map(Into::into),
    };
    conn.queue(agent.welcome(generation));
    match answer {
        Ok(answer) => conn.queue(answer),
        Err(fail) => conn.queue(Failed::from(fail)),
    }
    conn.finish();
}

fn refuse(mut conn: Conn, fail: Fail) {
    conn.queue(Refused::from(fail));
    conn.finish();
}
