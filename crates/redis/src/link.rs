//! One connection to Redis, which comes back by itself, for calls and for messages.
//!
//! ```text
//!   keeper:  connect ─► subscribe ─► serve ─► lost ─┐      calls wait a little for the
//!               ▲                                   │      connection, and are repeated on
//!               └────────────── pause ──────────────┘      the next one
//! ```
//!
//! All calls share the connection; what they send goes out together and is answered in order. A
//! call that is repeated may have been done before: whoever calls must be able to bear that.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use redis::{
    AsyncConnectionConfig, Client, FromRedisValue, PushInfo, PushKind, RedisError, RedisResult,
    Value, aio::MultiplexedConnection,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    CallError, Config, ConfigError, Info, Place, Trouble, VERSION_MIN,
    trouble::{trouble, wants_another_connection},
};

/// From losing the connection to telling callers so. A server that is restarted is back within it;
/// whoever asks later, while it is still away, is told at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// For one answer. Ours take well under a millisecond.
const ANSWER_MAX: Duration = Duration::from_secs(2);
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// Between tries to connect; it doubles, up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// A connection on which nothing is said may have been cut without a word, by a router that forgot
/// it: it is asked after so long.
const QUIET_MAX: Duration = Duration::from_secs(15);

/// Who hears what comes by itself. Called on the connection's own task: it must not wait.
pub trait Listener: Send + Sync + 'static {
    /// Something was published on our channel.
    fn message(&self, text: &str);

    /// The connection is there again; what was published meanwhile was not heard. `restarted`: the
    /// server is another process than before, and what it was told last may be gone.
    fn connected(&self, restarted: bool);
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Connect(#[from] CallError),
    #[error("Redis at {place} is version {version}; {VERSION_MIN} or newer is needed")]
    TooOld { place: Place, version: String },
}

/// Dropping it ends the connection.
pub struct Link {
    inner: Arc<Inner>,
    keeper: JoinHandle<()>,
}

struct Inner {
    config: Config,
    client: Client,
    channel: String,
    listener: Arc<dyn Listener>,
    state: watch::Sender<State>,
    /// The last generation that somebody could not use.
    broken: watch::Sender<u64>,
    info: Mutex<Info>,
}

#[derive(Clone)]
struct State {
    generation: u64,
    connection: Option<MultiplexedConnection>,
    /// Of the last change.
    since: Instant,
    why: Option<RedisError>,
}

/// A connection that was just made.
struct Line {
    connection: MultiplexedConnection,
    closed: Arc<Notify>,
    info: Info,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Link {
    /// With a channel of its own. Connects once, so that what is wrong is found now, and said as it
    /// is.
    pub async fn open(config: Config, listener: Arc<dyn Listener>) -> Result<Self, OpenError> {
        let channel = format!("at:{}", uuid::Uuid::new_v4().simple());
        Self::open_on(config, &channel, listener).await
    }

    /// On a channel that others are on too.
    pub async fn open_on(
        config: Config,
        channel: &str,
        listener: Arc<dyn Listener>,
    ) -> Result<Self, OpenError> {
        // Another part of the program may have done so before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let place = config.place();
        if let Some(weakness) = config.weakness() {
            tracing::warn!(%place, weakness, "the way to Redis is weaker than it could be");
        }
        let client = config.client()?;
        let channel = format!("{}:{channel}", config.root());
        let inner = Arc::new(Inner {
            client,
            channel,
            listener,
            state: watch::Sender::new(State {
                generation: 0,
                connection: None,
                since: Instant::now(),
                why: None,
            }),
            broken: watch::Sender::new(0),
            info: Mutex::default(),
            config,
        });
        let line = inner.connect().await.map_err(|source| inner.failed(source))?;
        let info = line.info.clone();
        if info.major < VERSION_MIN {
            let place = inner.config.place().clone();
            return Err(OpenError::TooOld { place, version: info.version });
        }
        if info.evicts() {
            tracing::warn!(
                eviction = info.eviction,
                "Redis may throw entries away when it is full; set maxmemory-policy noeviction"
            );
        }
        inner.set_info(info);
        inner.put(&line);
        let keeper = tokio::spawn(keep(Arc::clone(&inner), line));
        Ok(Self { inner, keeper })
    }

    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// As the server knows it.
    pub fn channel(&self) -> &str {
        &self.inner.channel
    }

    /// As it was when the connection was made.
    pub fn info(&self) -> Info {
        self.inner.info.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Completes when there is a connection.
    pub async fn is_up(&self) {
        let mut state = self.inner.state.subscribe();
        // The sender lives as long as this borrow.
        let _ = state.wait_for(|state| state.connection.is_some()).await;
    }

    /// Asks, and asks again on the next connection where this one is lost.
    pub async fn call<T, F>(&self, ask: impl Fn(MultiplexedConnection) -> F) -> Result<T, CallError>
    where
        T: FromRedisValue,
        F: Future<Output = RedisResult<T>>,
    {
        let inner = &*self.inner;
        let deadline = Instant::now() + PATIENCE;
        let (mut seen, mut last) = (0, None);
        loop {
            let Some((generation, connection)) = inner.connection(seen, deadline).await else {
                let source = last.or_else(|| inner.state.borrow().why.clone());
                return Err(inner.error(Trouble::Away, source));
            };
            let error = match timeout(ANSWER_MAX, ask(connection)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => error,
                Err(_) => RedisError::from(io::Error::from(io::ErrorKind::TimedOut)),
            };
            let trouble = trouble(&error);
            if trouble != Trouble::Away || Instant::now() >= deadline {
                if wants_another_connection(&error) {
                    inner.give_up(generation);
                }
                return Err(inner.error(trouble, Some(error)));
            }
            if wants_another_connection(&error) {
                inner.give_up(generation);
                seen = generation;
            } else {
                sleep(PAUSE_MIN).await;
            }
            last = Some(error);
        }
    }
}

impl Inner {
    async fn connect(self: &Arc<Self>) -> RedisResult<Line> {
        let closed = Arc::new(Notify::new());
        let (listener, gone) = (Arc::clone(&self.listener), Arc::clone(&closed));
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_MAX))
            .set_response_timeout(Some(ANSWER_MAX))
            .set_push_sender(move |push: PushInfo| {
                hear(&push, &*listener, &gone);
                Ok::<(), ()>(())
            });
        let connecting = async {
            let mut connection =
                self.client.get_multiplexed_async_connection_with_config(&settings).await?;
            connection.subscribe(self.channel.as_str()).await?;
            let text: String = redis::cmd("INFO").query_async(&mut connection).await?;
            RedisResult::Ok((connection, Info::read(&text)))
        };
        let late = |_| RedisError::from(io::Error::from(io::ErrorKind::TimedOut));
        let (connection, info) =
            timeout(CONNECT_MAX + ANSWER_MAX, connecting).await.map_err(late)??;
        Ok(Line { connection, closed, info })
    }

    /// A connection later than `seen`; `None` where there is none in time.
    async fn connection(
        &self,
        seen: u64,
        deadline: Instant,
    ) -> Option<(u64, MultiplexedConnection)> {
        let mut state = self.state.subscribe();
        let usable = |state: &State| state.connection.is_some() && state.generation > seen;
        let limit = {
            let now = state.borrow();
            if now.connection.is_none() { deadline.min(now.since + PATIENCE) } else { deadline }
        };
        let found = timeout_at(limit, state.wait_for(usable)).await.ok()?.ok()?;
        found.connection.clone().map(|connection| (found.generation, connection))
    }

    fn put(&self, line: &Line) -> u64 {
        let mut generation = 0;
        self.state.send_modify(|state| {
            state.generation += 1;
            state.connection = Some(line.connection.clone());
            state.since = Instant::now();
            state.why = None;
            generation = state.generation;
        });
        generation
    }

    fn take(&self) {
        self.state.send_modify(|state| {
            state.connection = None;
            state.since = Instant::now();
        });
    }

    fn give_up(&self, generation: u64) {
        self.broken.send_modify(|last| *last = generation.max(*last));
    }

    fn set_info(&self, info: Info) {
        *self.info.lock().unwrap_or_else(PoisonError::into_inner) = info;
    }

    fn failed(&self, source: RedisError) -> CallError {
        self.error(trouble(&source), Some(source))
    }

    fn error(&self, trouble: Trouble, source: Option<RedisError>) -> CallError {
        CallError { trouble, place: self.config.place().clone(), source }
    }
}

fn hear(push: &PushInfo, listener: &dyn Listener, closed: &Notify) {
    match push.kind {
        PushKind::Disconnection => closed.notify_one(),
        PushKind::Message => {
            if let Some(Value::BulkString(text)) = push.data.get(1)
                && let Ok(text) = std::str::from_utf8(text)
            {
                listener.message(text);
            }
        }
        _ => {}
    }
}

/// Aborted with the link; it holds nothing that an abort could leave half done.
async fn keep(inner: Arc<Inner>, mut line: Line) {
    let mut generation = inner.state.borrow().generation;
    loop {
        serve(&inner, &mut line, generation).await;
        inner.take();
        tracing::warn!(place = %inner.config.place(), "the connection to Redis is lost");
        line = connect_again(&inner).await;
        let before = {
            let mut info = inner.info.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *info, line.info.clone())
        };
        let restarted = before.run_id != line.info.run_id;
        tracing::info!(place = %inner.config.place(), restarted, "connected to Redis again");
        generation = inner.put(&line);
        inner.listener.connected(restarted);
    }
}

/// Completes when the connection is of no use any more.
async fn serve(inner: &Inner, line: &mut Line, generation: u64) {
    let mut broken = inner.broken.subscribe();
    loop {
        let given_up = async {
            // What it gives is no matter, and is not held over an await.
            let _ = broken.wait_for(|last| *last >= generation).await;
        };
        tokio::select! {
            () = line.closed.notified() => return,
            () = given_up => return,
            () = sleep(QUIET_MAX) => {}
        }
        if !answers(&mut line.connection).await {
            return;
        }
    }
}

async fn answers(connection: &mut MultiplexedConnection) -> bool {
    let ping = redis::cmd("PING");
    matches!(timeout(ANSWER_MAX, ping.query_async::<()>(connection)).await, Ok(Ok(())))
}

async fn connect_again(inner: &Arc<Inner>) -> Line {
    let mut pause = PAUSE_MIN;
    loop {
        match inner.connect().await {
            Ok(line) => return line,
            Err(error) => {
                tracing::debug!(%error, "connect to Redis");
                inner.state.send_modify(|state| state.why = Some(error));
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}
