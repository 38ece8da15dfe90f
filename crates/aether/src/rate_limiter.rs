//! The rates of all processes on one Redis together: each sender's bucket is one key there, which
//! expires when the bucket is full again.
//!
//! Time is the server's. Where it does not answer soon, requests are counted here for a moment, as
//! they are without Redis: a limit is neither waited for nor dropped.

use std::{
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use aether_gateway::{LocalLimiter, Rate, RateLimiter, Sender, Verdict};
use aether_redis::{CallError, Config, Link, Listener, OpenError, redis::Script};
use async_trait::async_trait;
use tokio::time::{Instant, timeout};

/// A busy server takes a millisecond or two; nobody waits for one that is away.
const ANSWER_MAX: Duration = Duration::from_millis(50);
/// So long it is not asked again after that.
const AWAY: Duration = Duration::from_secs(1);

/// The generic cell rate algorithm, in microseconds. ARGV: the time between two requests, and from
/// empty to full. Whether it is taken, and from now until the bucket is full.
const TAKE: &str = "#!lua
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local full = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local after = full - now + ARGV[1]
if after > tonumber(ARGV[2]) then return { 0, full - now } end
redis.call('SET', KEYS[1], string.format('%.0f', now + after), 'PX', math.ceil(after / 1000))
return { 1, after }";

static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(TAKE));

#[derive(Debug)]
pub(crate) struct RedisLimiter {
    link: Link,
    root: String,
    local: LocalLimiter,
    /// Until then it is away.
    away_until: Mutex<Option<Instant>>,
}

struct Deaf;

impl Listener for Deaf {
    fn message(&self, _text: &str) {}

    fn connected(&self, _restarted: bool) {}
}

impl RedisLimiter {
    pub(crate) async fn open(config: Config) -> Result<Self, OpenError> {
        let root = format!("{}:rate:", config.root());
        let link = Link::open_on(config, "rate", Arc::new(Deaf)).await?;
        Ok(Self { link, root, local: LocalLimiter::default(), away_until: Mutex::new(None) })
    }

    async fn ask(&self, sender: Sender, rate: Rate) -> Result<(i64, u64), CallError> {
        let key = match sender {
            Sender::Key(id) => format!("{}key:{id}", self.root),
            Sender::Subject(hash) => {
                format!("{}subject:{:032x}", self.root, u128::from_be_bytes(hash))
            }
            Sender::Address(address) => format!("{}address:{address}", self.root),
            Sender::Others => format!("{}others", self.root),
        };
        let mut call = SCRIPT.key(key);
        call.arg(micros(rate.interval())).arg(micros(rate.window()));
        let call = &call;
        self.link
            .call(|mut connection| async move { call.invoke_async(&mut connection).await })
            .await
    }

    fn is_away(&self) -> bool {
        self.lock().is_some_and(|until| Instant::now() < until)
    }

    // Nothing panics while the lock is held.
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.away_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl RateLimiter for RedisLimiter {
    async fn take(&self, sender: Sender, rate: Rate) -> Verdict {
        if self.is_away() {
            return self.local.take(sender, rate).await;
        }
        match timeout(ANSWER_MAX, self.ask(sender, rate)).await {
            Ok(Ok((taken, full_after))) => {
                rate.verdict(taken != 0, Duration::from_micros(full_after))
            }
            failed => {
                if let Ok(Err(error)) = failed {
                    tracing::debug!(%error, "count a request; it is counted here");
                }
                *self.lock() = Some(Instant::now() + AWAY);
                self.local.take(sender, rate).await
            }
        }
    }
}

fn micros(time: Duration) -> u64 {
    // Whole numbers in a script are exact up to 2^53.
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).clamp(1, 1 << 52)
}

#[cfg(test)]
mod tests {
    use aether_redis::testing::{self, Server};

    use super::*;

    async fn limiter(server: &Server) -> RedisLimiter {
        RedisLimiter::open(server.config()).await.unwrap()
    }

    fn address(last: u8) -> Sender {
        Sender::address(std::net::IpAddr::from([192, 0, 2, last]))
    }

    #[tokio::test]
    async fn processes_count_together() {
        if !testing::available() {
            return;
        }
        let server = Server::forgetful();
        let both = [limiter(&server).await, limiter(&server).await];
        let rate = Rate::every(Duration::from_secs(100), 4).unwrap();
        for left in [3, 2, 1, 0] {
            let verdict = both[left % 2].take(address(1), rate).await;
            assert_eq!((verdict.retry_after, verdict.left), (None, u32::try_from(left).unwrap()));
        }
        for limiter in &both {
            let refused = limiter.take(address(1), rate).await;
            let wait = refused.retry_after.unwrap();
            assert!(wait > Duration::from_secs(90) && wait <= Duration::from_secs(100), "{wait:?}");
            assert_eq!(refused.left, 0);
        }
        assert_eq!(both[0].take(address(2), rate).await.left, 3, "each has its own");
        let keys = server.ask(&["KEYS", "*:rate:*"]);
        assert_eq!(keys.lines().count(), 2);
        for key in keys.lines() {
            assert_ne!(server.ask(&["PTTL", key]), "-1", "{key} stays for ever");
        }
    }

    #[tokio::test]
    async fn what_is_used_up_comes_back() {
        if !testing::available() {
            return;
        }
        let server = Server::forgetful();
        let limiter = limiter(&server).await;
        let rate = Rate::every(Duration::from_millis(20), 1).unwrap();
        assert_eq!(limiter.take(address(1), rate).await.retry_after, None);
        let mut refused = 0;
        // As soon as it may, and not before.
        while limiter.take(address(1), rate).await.retry_after.is_some() {
            refused += 1;
            tokio::task::yield_now().await;
        }
        assert!(refused > 0);
    }

    #[tokio::test]
    async fn a_server_that_is_away_or_full_lifts_no_limit() {
        if !testing::available() {
            return;
        }
        let mut server = Server::forgetful();
        let limiter = limiter(&server).await;
        let rate = Rate::every(Duration::from_secs(100), 1).unwrap();
        server.stop();
        let begun = Instant::now();
        assert_eq!(limiter.take(address(1), rate).await.retry_after, None);
        assert!(limiter.take(address(1), rate).await.retry_after.is_some());
        assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    }
}
