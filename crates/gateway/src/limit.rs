//! How many requests a key or a token's subject may send, and an address: the rate that lasts, and the burst before it.
//!
//! A bucket is one moment: when it will be full again. Each request moves that moment on by the
//! time between two; one that would move it further than a burst away is refused, and moves
//! nothing (the generic cell rate algorithm).
//!
//! Who counts is a seam: this process for itself here, or all that share a server.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use aether_types::{ErrorCode, KeyId};
use async_trait::async_trait;
use axum::{
    http::{HeaderMap, HeaderName, HeaderValue},
    response::{IntoResponse as _, Response},
};
use tokio::time::Instant;

use crate::problem::ApiError;

const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const LEFT: HeaderName = HeaderName::from_static("ratelimit");

/// Each takes some fifty bytes. Past this, those that are not known yet share one.
const BUCKETS_MAX: usize = 65_536;

/// One request each `interval`, and `burst` of them at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    interval: Duration,
    burst: u32,
}

impl Rate {
    /// `None`: of one of them there is nothing.
    #[must_use]
    pub fn every(interval: Duration, burst: u32) -> Option<Self> {
        (!interval.is_zero() && burst > 0).then_some(Self { interval, burst })
    }

    #[must_use]
    pub fn per_second(requests: u32, burst: u32) -> Option<Self> {
        Self::every(Duration::from_secs(1).checked_div(requests)?, burst)
    }

    #[must_use]
    pub fn interval(self) -> Duration {
        self.interval
    }

    /// From empty to full.
    #[must_use]
    pub fn window(self) -> Duration {
        self.interval.saturating_mul(self.burst)
    }

    /// What is said to one request more, that is taken or not, where the bucket is full after this
    /// time then.
    #[must_use]
    pub fn verdict(self, taken: bool, full_after: Duration) -> Verdict {
        if !taken {
            let wait = (full_after + self.interval).saturating_sub(self.window());
            return Verdict { retry_after: Some(wait), left: 0, full_after };
        }
        let room = self.window().saturating_sub(full_after);
        let left = room.as_nanos() / self.interval.as_nanos().max(1);
        Verdict { retry_after: None, left: u32::try_from(left).unwrap_or(u32::MAX), full_after }
    }
}

/// What is counted. `None`: without a bound.
#[derive(Debug, Clone, Copy, Default)]
pub struct RateLimits {
    pub key: Option<Rate>,
    pub address: Option<Rate>,
}

/// Whose requests are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sender {
    Key(KeyId),
    /// Of a token: a hash of its name.
    Subject([u8; 16]),
    /// Of IPv6 the network: a host has all of it to choose from.
    Address(IpAddr),
    /// All whose bucket there is no room for.
    Others,
}

impl Sender {
    #[must_use]
    pub fn address(address: IpAddr) -> Self {
        const NETWORK: u128 = u128::MAX << 64;
        match address.to_canonical() {
            IpAddr::V4(address) => Self::Address(address.into()),
            IpAddr::V6(address) => {
                Self::Address(Ipv6Addr::from_bits(address.to_bits() & NETWORK).into())
            }
        }
    }

    fn policy(self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Subject(_) => "subject",
            Self::Address(_) | Self::Others => "address",
        }
    }
}

/// The answer to one request more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// `None`: it may be sent. Else it may after this long.
    pub retry_after: Option<Duration>,
    /// That may be sent at once now.
    pub left: u32,
    /// From now until all of the burst is there.
    pub full_after: Duration,
}

/// Counts requests.
#[async_trait]
pub trait RateLimiter: Send + Sync + 'static {
    async fn take(&self, sender: Sender, rate: Rate) -> Verdict;
}

/// Counts those of this process.
#[derive(Debug, Default)]
pub struct LocalLimiter(Mutex<HashMap<Sender, Instant>>);

#[async_trait]
impl RateLimiter for LocalLimiter {
    async fn take(&self, sender: Sender, rate: Rate) -> Verdict {
        let now = Instant::now();
        // Nothing panics while the lock is held.
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sender = sender;
        if buckets.len() >= BUCKETS_MAX && !buckets.contains_key(&sender) {
            buckets.retain(|_, full_at| *full_at > now);
            if buckets.len() >= BUCKETS_MAX {
                sender = Sender::Others;
            }
        }
        let full_at = buckets.entry(sender).or_insert(now);
        take(full_at, now, rate)
    }
}

fn take(full_at: &mut Instant, now: Instant, rate: Rate) -> Verdict {
    let missing = full_at.saturating_duration_since(now);
    let after = missing + rate.interval;
    if after > rate.window() {
        return rate.verdict(false, missing);
    }
    *full_at = now + after;
    rate.verdict(true, after)
}

/// What an answer says of the limits that were looked at.
#[derive(Debug, Default)]
pub(crate) struct Counted(Vec<(Sender, Rate, Verdict)>);

impl Counted {
    /// Counts one request more. Gives the answer to it where it is one too many.
    pub(crate) async fn count(
        &mut self,
        limiter: &dyn RateLimiter,
        sender: Sender,
        rate: Option<Rate>,
    ) -> Option<Response> {
        let rate = rate?;
        let verdict = limiter.take(sender, rate).await;
        self.0.push((sender, rate, verdict));
        let wait = verdict.retry_after?;
        let wait = seconds(wait).max(1);
        let of = sender.policy();
        let detail = format!("this {of} sends too many requests; come again in {wait} s");
        let refusal = ApiError::new(ErrorCode::RateLimited, detail).retry_after_s(wait);
        let mut response = refusal.into_response();
        self.tell(response.headers_mut());
        Some(response)
    }

    /// As `draft-ietf-httpapi-ratelimit-headers` has it.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        if self.0.is_empty() {
            return;
        }
        let policy = |(sender, rate, _): &(Sender, Rate, Verdict)| {
            format!("\"{}\";q={};w={}", sender.policy(), rate.burst, seconds(rate.window()))
        };
        let left = |(sender, _, verdict): &(Sender, Rate, Verdict)| {
            let (left, full) = (verdict.left, seconds(verdict.full_after));
            format!("\"{}\";r={left};t={full}", sender.policy())
        };
        let join = |parts: Vec<String>| HeaderValue::from_str(&parts.join(", ")).ok();
        for (name, value) in [
            (POLICY, join(self.0.iter().map(policy).collect())),
            (LEFT, join(self.0.iter().map(left).collect())),
        ] {
            if let Some(value) = value {
                headers.insert(name, value);
            }
        }
    }
}

/// Rounded up: who waits so long is not too early.
fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_burst_goes_at_once_and_then_the_rate() {
        let rate = Rate::per_second(10, 3).unwrap();
        let start = Instant::now();
        let mut full_at = start;
        for left in [2, 1, 0] {
            let verdict = take(&mut full_at, start, rate);
            assert_eq!((verdict.retry_after, verdict.left), (None, left));
        }
        let refused = take(&mut full_at, start, rate);
        assert_eq!(refused.retry_after, Some(ms(100)));
        assert_eq!(refused.full_after, ms(300), "a refusal costs nothing");
        assert_eq!(take(&mut full_at, start + ms(99), rate).retry_after, Some(ms(1)));
        assert_eq!(take(&mut full_at, start + ms(100), rate).retry_after, None);
        let late = take(&mut full_at, start + ms(60_000), rate);
        assert_eq!((late.retry_after, late.left), (None, 2), "no more than a burst is saved up");
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_sender() {
        let sender = |text: &str| Sender::address(text.parse().unwrap());
        assert_eq!(sender("2001:db8::1"), sender("2001:db8::ffff:1"));
        assert_ne!(sender("2001:db8::1"), sender("2001:db8:0:1::1"));
        assert_eq!(sender("::ffff:192.0.2.1"), sender("192.0.2.1"));
        assert_ne!(sender("192.0.2.1"), sender("192.0.2.2"));
    }

    #[tokio::test]
    async fn no_more_is_remembered_than_there_is_room_for() {
        let limiter = LocalLimiter::default();
        let rate = Rate::every(Duration::from_hours(1), 1).unwrap();
        for n in 0..u32::try_from(BUCKETS_MAX).unwrap() {
            let sender = Sender::Address(IpAddr::V4(n.into()));
            assert_eq!(limiter.take(sender, rate).await.retry_after, None);
        }
        // The first one more has the bucket of all others, and the second finds it empty.
        let more = |n: u8| Sender::Address(IpAddr::from([250, 0, 0, n]));
        assert_eq!(limiter.take(more(1), rate).await.retry_after, None);
        assert!(limiter.take(more(2), rate).await.retry_after.is_some());
        assert!(limiter.0.lock().unwrap().len() <= BUCKETS_MAX + 1);
    }
}
