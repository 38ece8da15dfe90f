//! One boot of a simulated guest: its agent, speaking the guest's side of the protocol.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use aether_protocol::{
    Configure, Configured, Data, Done, End, Entry, ErrorCode, Failed, FromGuest, FromGuestBody,
    Listing, Pong, RequestBody, Runs, ShuttingDown, TOKEN_BYTES, ToGuestBody, Token,
    host::{BoxStream, ClientError, GuestAcceptor, GuestSession},
    limits::{CONNECTIONS_MAX, DATA_BYTES_MAX, FINISHED_RUNS_MAX, LIST_ENTRIES_MAX, RUNS_MAX},
};
use aether_types::MachineId;
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    clock::SimClock,
    command::Shell,
    files::{Disk, Refusal},
    run::{Program, Run},
    saved::{SavedGuest, SavedRun},
};
use crate::ExitReason;

/// As a real agent asks for.
const ENTROPY_BYTES_MIN: usize = 32;
const AGENT_VERSION: &str = concat!("sim-", env!("CARGO_PKG_VERSION"));

pub(super) struct Guest {
    boot_id: Mutex<String>,
    clock: SimClock,
    time: Mutex<Time>,
    token: Mutex<Token>,
    disk: Arc<Mutex<Disk>>,
    hostname: Mutex<String>,
    env: Mutex<BTreeMap<String, String>>,
    runs: Mutex<HashMap<String, Arc<Run>>>,
    next_pid: AtomicU32,
    is_paused: watch::Sender<bool>,
    /// What programs do to the guest, against the moment of a snapshot.
    world: RwLock<()>,
    /// Ends the connections that are open.
    connections: Mutex<HashMap<u64, CancellationToken>>,
    next_connection: AtomicU64,
    /// The end of the machine, as its VMM would see it. The first word counts.
    machine_end: mpsc::Sender<ExitReason>,
    halted: CancellationToken,
    /// A child of `halted`.
    agent: CancellationToken,
    tasks: TaskTracker,
}

/// The guest's own time, which stands still while it is paused.
struct Time {
    passed: Duration,
    /// By the host's clock; `None` while it stands still.
    running_since: Option<Duration>,
}

impl Time {
    fn at(&self, host_now: Duration) -> Duration {
        let running = self.running_since.map(|since| host_now.saturating_sub(since));
        self.passed + running.unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn new_boot_id() -> String {
    MachineId::new().to_string()
}

impl Guest {
    pub(super) fn boot(
        clock: SimClock,
        token: Token,
        disk: Arc<Mutex<Disk>>,
        machine_end: mpsc::Sender<ExitReason>,
    ) -> Arc<Self> {
        let saved = SavedGuest {
            boot_id: new_boot_id(),
            uptime: Duration::ZERO,
            token: String::new(),
            hostname: "localhost".to_owned(),
            env: BTreeMap::new(),
            next_pid: 100,
            has_agent: true,
            runs: BTreeMap::new(),
        };
        Self::restore(saved, clock, token, disk, machine_end)
    }

    /// Goes on from where the guest of a snapshot was; `token` is what that one was saved with.
    pub(super) fn restore(
        saved: SavedGuest,
        clock: SimClock,
        token: Token,
        disk: Arc<Mutex<Disk>>,
        machine_end: mpsc::Sender<ExitReason>,
    ) -> Arc<Self> {
        let halted = CancellationToken::new();
        let guest = Arc::new(Self {
            boot_id: Mutex::new(saved.boot_id),
            time: Mutex::new(Time { passed: saved.uptime, running_since: Some(clock.now()) }),
            clock,
            token: Mutex::new(token),
            disk,
            hostname: Mutex::new(saved.hostname),
            env: Mutex::new(saved.env),
            runs: Mutex::default(),
            next_pid: AtomicU32::new(saved.next_pid),
            is_paused: watch::Sender::new(false),
            world: RwLock::default(),
            connections: Mutex::default(),
            next_connection: AtomicU64::new(0),
            machine_end,
            agent: halted.child_token(),
            halted,
            tasks: TaskTracker::new(),
        });
        if !saved.has_agent {
            guest.agent.cancel();
        }
        for (name, saved) in saved.runs {
            let run = Arc::new(Run::restore(saved));
            lock(&guest.runs).insert(name, Arc::clone(&run));
            if !run.has_ended() {
                guest.carry_out(run);
            }
        }
        guest
    }

    /// What a snapshot keeps, but for the disk. The guest is paused.
    pub(super) fn save(&self) -> SavedGuest {
        let _still = self.world.write().unwrap_or_else(PoisonError::into_inner);
        let save = |(name, run): (&String, &Arc<Run>)| -> (String, SavedRun) {
            (name.clone(), run.save())
        };
        SavedGuest {
            boot_id: lock(&self.boot_id).clone(),
            uptime: self.now(),
            token: lock(&self.token).to_hex(),
            hostname: self.hostname(),
            env: lock(&self.env).clone(),
            next_pid: self.next_pid.load(Ordering::Relaxed),
            has_agent: self.has_agent(),
            runs: lock(&self.runs).iter().map(save).collect(),
        }
    }

    /// Time since the boot, as the guest counts it.
    pub(super) fn now(&self) -> Duration {
        lock(&self.time).at(self.clock.now())
    }

    pub(super) async fn sleep_until(&self, wake_at: Duration) {
        loop {
            self.unpaused().await;
            let left = wake_at.saturating_sub(self.now());
            if left.is_zero() {
                return;
            }
            let mut paused = self.is_paused.subscribe();
            tokio::select! {
                () = self.clock.sleep(left) => {}
                // The sender is in `self`.
                _ = paused.wait_for(|paused| *paused) => {}
            }
        }
    }

    /// What a program does at one moment: a snapshot has all of it or nothing.
    pub(super) async fn effect<T>(&self, act: impl FnOnce() -> T) -> T {
        loop {
            self.unpaused().await;
            let _world = self.world.read().unwrap_or_else(PoisonError::into_inner);
            if !*self.is_paused.borrow() {
                return act();
            }
        }
    }

    pub(super) fn hostname(&self) -> String {
        lock(&self.hostname).clone()
    }

    pub(super) fn disk(&self) -> MutexGuard<'_, Disk> {
        lock(&self.disk)
    }

    pub(super) fn pause(&self, paused: bool) {
        // After effects that have begun.
        let _still = self.world.write().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        let mut time = lock(&self.time);
        *time = Time { passed: time.at(now), running_since: (!paused).then_some(now) };
        drop(time);
        self.is_paused.send_replace(paused);
    }

    /// Waits while the machine is paused.
    pub(super) async fn unpaused(&self) {
        // The sender is in `self`.
        let _ = self.is_paused.subscribe().wait_for(|paused| !paused).await;
    }

    pub(super) fn shut_down(&self) {
        self.end(ExitReason::GuestShutdown);
    }

    pub(super) fn panic(&self) {
        self.end(ExitReason::GuestPanic);
    }

    fn end(&self, reason: ExitReason) {
        // Full: an earlier reason is on its way.
        let _ = self.machine_end.try_send(reason);
    }

    /// Everything in the guest stops at once.
    pub(super) fn halt(&self) {
        self.halted.cancel();
        self.tasks.close();
    }

    pub(super) fn kill_agent(&self) {
        self.agent.cancel();
    }

    pub(super) fn has_agent(&self) -> bool {
        !self.agent.is_cancelled()
    }

    /// Serves one connection in a task that ends with the guest.
    pub(super) fn accept(self: &Arc<Self>, stream: BoxStream) {
        if self.tasks.len() > CONNECTIONS_MAX + RUNS_MAX {
            return;
        }
        let guest = Arc::clone(self);
        let number = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let end = self.agent.child_token();
        lock(&self.connections).insert(number, end.clone());
        self.tasks.spawn(async move {
            // How a session ended is for the host to say; a simulated guest keeps no log.
            let _ = end.run_until_cancelled(guest.session(stream, number)).await;
            lock(&guest.connections).remove(&number);
        });
    }

    async fn session(self: &Arc<Self>, stream: BoxStream, number: u64) -> Result<(), ClientError> {
        let token = lock(&self.token).clone();
        let (acceptor, request) = GuestAcceptor::read(stream, &token).await?;
        self.unpaused().await;
        // Refusals come before the welcome, as nothing was done.
        let run = match &request {
            RequestBody::Run(run) => match self.start_run(run) {
                Ok(run) => Some((run, [0, 0])),
                Err((code, message)) => return acceptor.refuse(code, &message).await,
            },
            RequestBody::Attach(attach) => {
                let run = lock(&self.runs).get(&attach.run_id).cloned();
                run.map(|run| (run, [attach.stdout_offset, attach.stderr_offset]))
            }
            _ => None,
        };
        if run.is_none() && matches!(request, RequestBody::Attach(_)) {
            return acceptor.refuse(ErrorCode::UnknownRun, "no such run").await;
        }
        let boot_id = lock(&self.boot_id).clone();
        let mut session = acceptor.welcome(AGENT_VERSION, &boot_id).await?;
        if let Some((run, offsets)) = run {
            let watch = ConnectionWatch(&run);
            let served = run.serve(self, session, offsets).await;
            if served.is_ok() && run.has_ended() {
                std::mem::forget(watch);
            }
            return served;
        }
        match self.answer(&mut session, request, number).await {
            Ok(answer) => session.send(FromGuest { body: Some(answer) }).await?,
            Err(Stop::Refusal(refusal)) => {
                let failed = Failed { code: refusal.code.into(), message: refusal.message };
                session.send(FromGuest { body: Some(FromGuestBody::Failed(failed)) }).await?;
            }
            Err(Stop::Connection(error)) => return Err(error),
        }
        // The host closes first; until then its last answer is on the way.
        while session.next().await?.is_some() {}
        Ok(())
    }

    fn start_run(
        self: &Arc<Self>,
        request: &aether_protocol::Run,
    ) -> Result<Arc<Run>, (ErrorCode, String)> {
        if let Some(cwd) = &request.cwd
            && self.disk().list(cwd).is_err()
        {
            return Err((ErrorCode::NoSuchDirectory, format!("{cwd}: no such directory")));
        }
        if let Some(user) = &request.user
            && !["root", "0", "root:root", "0:0"].contains(&user.as_str())
        {
            return Err((ErrorCode::NoSuchUser, format!("{user}: no such user")));
        }
        let pid = self.next_pid.fetch_add(1, Ordering::Relaxed);
        let mut env = BTreeMap::from([
            ("PATH".to_owned(), "/usr/local/bin:/usr/bin:/bin".to_owned()),
            ("HOME".to_owned(), "/root".to_owned()),
        ]);
        env.extend(lock(&self.env).clone());
        env.extend(request.env.iter().map(|var| (var.name.clone(), var.value.clone())));
        let program = Program {
            words: std::iter::once(&request.command).chain(&request.args).cloned().collect(),
            env,
            cwd: request.cwd.clone().unwrap_or_else(|| "/root".to_owned()),
        };
        let run = Arc::new(Run::new(request, pid, program, self.now()));
        {
            let mut runs = lock(&self.runs);
            // A run without a name is known by its process.
            let name = if run.id.is_empty() { format!("pid:{pid}") } else { run.id.clone() };
            if runs.contains_key(&name) {
                return Err((ErrorCode::RunExists, format!("run {name} exists")));
            }
            runs.retain(|_, run| run.is_detached || !run.has_ended());
            let ended = runs.values().filter(|run| run.has_ended()).count();
            if runs.len() - ended >= RUNS_MAX || ended >= FINISHED_RUNS_MAX {
                return Err((ErrorCode::TooManyRuns, "too many runs".to_owned()));
            }
            runs.insert(name, Arc::clone(&run));
        }
        self.carry_out(Arc::clone(&run));
        Ok(run)
    }

    /// Runs a run's program in a task that ends with the guest.
    fn carry_out(self: &Arc<Self>, run: Arc<Run>) {
        let (guest, halted) = (Arc::clone(self), self.halted.clone());
        self.tasks.spawn(halted.run_until_cancelled_owned(async move {
            let shell = Shell::new(Arc::clone(&guest), Arc::clone(&run));
            run.carry_out(&guest, shell.run()).await;
        }));
    }

    /// Everything but runs: one answer, perhaps after data.
    async fn answer(
        &self,
        session: &mut GuestSession,
        request: RequestBody,
        connection: u64,
    ) -> Result<FromGuestBody, Stop> {
        Ok(match request {
            RequestBody::Ping(_) => FromGuestBody::Pong(self.pong()),
            RequestBody::Configure(configure) => {
                FromGuestBody::Configured(self.configure(configure, connection)?)
            }
            RequestBody::Shutdown(_) => {
                session.send(ShuttingDown {}).await?;
                self.shut_down();
                // The machine ends without a further word.
                return std::future::pending().await;
            }
            RequestBody::ListRuns(_) => {
                let runs = lock(&self.runs).values().map(|run| run.summary()).collect();
                FromGuestBody::Runs(Runs { runs })
            }
            RequestBody::Forget(forget) => {
                let mut runs = lock(&self.runs);
                match runs.get(&forget.run_id).map(|run| run.has_ended()) {
                    Some(true) => {
                        runs.remove(&forget.run_id);
                        done(0)
                    }
                    Some(false) => return Err(stop(ErrorCode::RunActive, "the run has not ended")),
                    None => return Err(stop(ErrorCode::UnknownRun, "no such run")),
                }
            }
            RequestBody::ReadFile(read) => {
                let data = self.disk().read(&read.path)?;
                let stat = self.disk().stat(&read.path)?;
                session.send(stat).await?;
                let start = usize::try_from(read.offset).unwrap_or(usize::MAX).min(data.len());
                let limit =
                    read.limit.map_or(usize::MAX, |l| usize::try_from(l).unwrap_or(usize::MAX));
                let mut rest = data.slice(start..start.saturating_add(limit).min(data.len()));
                while !rest.is_empty() {
                    let data = rest.split_to(rest.len().min(DATA_BYTES_MAX));
                    session.send(Data { data }).await?;
                }
                FromGuestBody::End(End {})
            }
            RequestBody::WriteFile(write) => self.write_file(session, write).await?,
            RequestBody::List(list) => FromGuestBody::Listing(self.list(&list)?),
            RequestBody::Stat(stat) => FromGuestBody::FileStat(self.disk().stat(&stat.path)?),
            RequestBody::Mkdir(mkdir) => {
                self.disk().mkdir(&mkdir.path, mkdir.parents, mkdir.mode)?;
                done(0)
            }
            RequestBody::Move(files) => {
                self.disk().rename(&files.from, &files.to, files.overwrite)?;
                done(0)
            }
            RequestBody::Remove(remove) => {
                self.disk().remove(&remove.path, remove.recursive)?;
                done(0)
            }
            RequestBody::Run(_) | RequestBody::Attach(_) => {
                return Err(stop(ErrorCode::Internal, "a run is served elsewhere"));
            }
        })
    }

    fn configure(&self, configure: Configure, connection: u64) -> Result<Configured, Refusal> {
        let refuse = |message: &str| {
            Err(Refusal { code: ErrorCode::InvalidArgument, message: message.to_owned() })
        };
        let new_token = match configure.new_token.as_deref().map(<[u8; TOKEN_BYTES]>::try_from) {
            Some(Err(_)) => return refuse("a token is 32 bytes"),
            Some(Ok(bytes)) => Some(Token::from_bytes(bytes)),
            None => None,
        };
        if configure.restored && configure.entropy.len() < ENTROPY_BYTES_MIN {
            return refuse("a restored guest needs 32 bytes of entropy");
        }
        if let Some(hostname) = configure.hostname {
            *lock(&self.hostname) = hostname;
        }
        if configure.restored {
            self.leave_the_past(connection);
        }
        if let Some(env) = configure.env {
            *lock(&self.env) = env.vars.into_iter().map(|var| (var.name, var.value)).collect();
        }
        if let Some(token) = new_token {
            *lock(&self.token) = token;
        }
        let boot_id = lock(&self.boot_id).clone();
        let layers = u32::try_from(configure.layers.len()).unwrap_or(u32::MAX);
        Ok(Configured { boot_id, layers, ..Configured::default() })
    }

    /// Ends what a clone must not have in common with the guest that it comes from, but for the
    /// connection that asks for it.
    fn leave_the_past(&self, connection: u64) {
        lock(&self.env).clear();
        for (number, end) in &*lock(&self.connections) {
            if *number != connection {
                end.cancel();
            }
        }
        let mut runs = lock(&self.runs);
        runs.retain(|_, run| !run.has_ended());
        // Also those whose connection is of before the snapshot.
        for run in runs.values() {
            run.connection_lost();
        }
        drop(runs);
        *lock(&self.boot_id) = new_boot_id();
    }

    fn pong(&self) -> Pong {
        let runs = lock(&self.runs).values().filter(|run| !run.has_ended()).count();
        Pong {
            boot_id: lock(&self.boot_id).clone(),
            uptime_ms: u64::try_from(self.now().as_millis()).unwrap_or(u64::MAX),
            runs: u32::try_from(runs).unwrap_or(u32::MAX),
        }
    }

    async fn write_file(
        &self,
        session: &mut GuestSession,
        write: aether_protocol::WriteFile,
    ) -> Result<FromGuestBody, Stop> {
        let mut data = Vec::new();
        loop {
            match session.next().await? {
                Some(ToGuestBody::Data(more)) => {
                    data.extend_from_slice(&more.data);
                    if !self.disk().has_room(data.len()) {
                        return Err(stop(ErrorCode::NoSpace, "no space"));
                    }
                }
                Some(ToGuestBody::End(_)) => break,
                Some(_) => return Err(stop(ErrorCode::BadMessage, "data was wanted")),
                // The host is gone: the file stays as it was.
                None => return Err(stop(ErrorCode::Io, "the host is gone")),
            }
        }
        let parents = write.create_parents;
        self.disk().write(&write.path, &data, write.mode, write.append, parents)?;
        Ok(done(data.len() as u64))
    }

    fn list(&self, list: &aether_protocol::List) -> Result<Listing, Refusal> {
        let limit = match list.limit {
            0 => LIST_ENTRIES_MAX,
            limit => limit.min(LIST_ENTRIES_MAX),
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let after = list.after.as_ref();
        let mut names = self.disk().list(&list.path)?;
        names.retain(|(name, _)| name.as_bytes() > after);
        let is_last = names.len() <= limit;
        names.truncate(limit);
        let next = match names.last() {
            Some((name, _)) if !is_last => name.clone().into_bytes().into(),
            Some(_) | None => bytes::Bytes::new(),
        };
        let entries = names
            .into_iter()
            .map(|(name, stat)| Entry { name, stat: Some(stat), ..Entry::default() })
            .collect();
        Ok(Listing { entries, next })
    }
}

/// A session that ends before its run, however it ends, is a lost connection.
struct ConnectionWatch<'a>(&'a Run);

impl Drop for ConnectionWatch<'_> {
    fn drop(&mut self) {
        self.0.connection_lost();
    }
}

/// Why a request has no answer.
enum Stop {
    Refusal(Refusal),
    Connection(ClientError),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

impl From<ClientError> for Stop {
    fn from(error: ClientError) -> Self {
        Self::Connection(error)
    }
}

fn stop(code: ErrorCode, message: &str) -> Stop {
    Stop::Refusal(Refusal { code, message: message.to_owned() })
}

fn done(bytes: u64) -> FromGuestBody {
    FromGuestBody::Done(Done { bytes })
}
