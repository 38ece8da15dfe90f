//! The keys of whoever makes tokens, asked for at their address (RFC 7517).
//!
//! They are asked for when a token comes and never else: the first time, when they begin to be old
//! (the token does not wait), and when a token names one that is not there (it waits). One asks at a
//! time, and not soon again. Where nobody answers, those that are known stay good for a day.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use jsonwebtoken::{Algorithm, DecodingKey};
use reqwest::{Client, Response, Url, redirect::Policy};
use serde::Deserialize;
use tokio::{task::AbortHandle, time::Instant};
use tokio_util::task::TaskTracker;

use crate::problem::chain;

/// Of an answer.
const BYTES_MAX: usize = 64 << 10;
/// In an answer.
const KEYS_MAX: usize = 32;
/// Of the name of a key.
const KID_BYTES_MAX: usize = 256;

/// How long what holds.
#[derive(Debug, Clone, Copy)]
pub struct JwksTimes {
    /// Keys are asked for again after this.
    pub fresh: Duration,
    /// They are good for this long where nobody answers.
    pub kept: Duration,
    /// From one question to the next.
    pub between: Duration,
    /// For an answer.
    pub answer_max: Duration,
}

impl Default for JwksTimes {
    fn default() -> Self {
        Self {
            fresh: Duration::from_mins(10),
            kept: Duration::from_hours(24),
            between: Duration::from_secs(30),
            answer_max: Duration::from_secs(5),
        }
    }
}

/// What is wrong with an address of keys. It is not shown: it may have a password in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JwksUrlError {
    #[error("the address of keys is no URL such as https://id.example/jwks.json")]
    NoUrl,
    #[error("the address of keys is to begin with https:// (http:// on this machine alone)")]
    NotEncrypted,
    #[error("the address of keys has a user or a password in it")]
    HasUser,
    #[error("a client for HTTPS cannot be made here")]
    NoClient,
}

type Key = (Algorithm, DecodingKey);

pub(super) struct Jwks {
    http: Client,
    url: Url,
    times: JwksTimes,
    state: Mutex<State>,
    tasks: TaskTracker,
}

#[derive(Default)]
struct State {
    keys: HashMap<String, Key>,
    /// When they came; `None`: they never did.
    at: Option<Instant>,
    /// The last question but the first one that was answered: what is not known yet may be asked for
    /// right after it.
    asked: Option<Instant>,
    flight: Option<Flight>,
}

/// A question, and what waits for its end; nobody has to.
struct Flight {
    task: AbortHandle,
    ended: Shared<BoxFuture<'static, ()>>,
}

/// There are none that are good any more.
#[derive(Debug)]
pub(super) struct NoKeys;

impl fmt::Debug for Jwks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jwks").field("times", &self.times).finish_non_exhaustive()
    }
}

impl Jwks {
    pub(super) fn new(url: &str, times: JwksTimes) -> Result<Self, JwksUrlError> {
        let url = Url::parse(url).map_err(|_| JwksUrlError::NoUrl)?;
        let host = url.host_str().ok_or(JwksUrlError::NoUrl)?;
        if url.scheme() != "https" && !(url.scheme() == "http" && is_loopback(host)) {
            return Err(JwksUrlError::NotEncrypted);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(JwksUrlError::HasUser);
        }
        // An error: the program has chosen another one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Client::builder()
            .user_agent(concat!("aetherium/", env!("CARGO_PKG_VERSION")))
            .timeout(times.answer_max)
            // Trusted is this address, and nowhere that it points to.
            .redirect(Policy::none())
            // The environment is not read here.
            .no_proxy()
            .build()
            .map_err(|_| JwksUrlError::NoClient)?;
        Ok(Self { http, url, times, state: Mutex::default(), tasks: TaskTracker::new() })
    }

    /// The key with this name. Cancel-safe: a question goes on without who asked it.
    pub(super) async fn key(self: &Arc<Self>, kid: &str) -> Result<Option<Key>, NoKeys> {
        let flight = {
            let mut state = self.state();
            let found = state.find(kid, self.times.kept);
            let is_fresh = state.at.is_some_and(|at| at.elapsed() < self.times.fresh);
            if is_fresh && let Ok(Some(key)) = found {
                return Ok(Some(key));
            }
            self.ask(&mut state);
            match found {
                Ok(Some(key)) => return Ok(Some(key)),
                Ok(None) | Err(NoKeys) => state.flight.as_ref().map(|flight| flight.ended.clone()),
            }
        };
        if let Some(ended) = flight {
            ended.await;
        }
        self.state().find(kid, self.times.kept)
    }

    /// Begins a question, unless there was one a moment ago.
    fn ask(self: &Arc<Self>, state: &mut State) {
        let is_under_way = state.flight.as_ref().is_some_and(|flight| !flight.task.is_finished());
        let is_soon = state.asked.is_some_and(|at| at.elapsed() < self.times.between);
        if is_under_way || is_soon {
            return;
        }
        state.asked = Some(Instant::now());
        let jwks = Arc::clone(self);
        let asking = self.tasks.spawn(async move { jwks.refresh().await });
        let task = asking.abort_handle();
        state.flight = Some(Flight { task, ended: asking.map(|_| ()).boxed().shared() });
    }

    async fn refresh(&self) {
        match self.fetch().await {
            Ok(keys) => {
                let mut state = self.state();
                if state.at.is_none() {
                    state.asked = None;
                }
                state.at = Some(Instant::now());
                state.keys = keys;
            }
            Err(reason) => {
                tracing::warn!(reason, "the keys of tokens are not read; those known stay");
            }
        }
    }

    async fn fetch(&self) -> Result<HashMap<String, Key>, String> {
        let request = self.http.get(self.url.clone()).send();
        let response = request.await.map_err(told)?;
        if !response.status().is_success() {
            return Err(format!("the answer is {}", response.status().as_u16()));
        }
        let body = bounded(response).await?;
        keys_in(&body)
    }

    // Nothing panics while the lock is held.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn find(&self, kid: &str, kept: Duration) -> Result<Option<Key>, NoKeys> {
        if self.at.is_none_or(|at| at.elapsed() >= kept) {
            return Err(NoKeys);
        }
        Ok(self.keys.get(kid).cloned())
    }
}

/// Without the address, which says more than a log is to know.
fn told(error: reqwest::Error) -> String {
    chain(&error.without_url())
}

async fn bounded(mut response: Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await.map_err(told)? {
        if body.len() + part.len() > BYTES_MAX {
            return Err(format!("the answer has more than {BYTES_MAX} bytes"));
        }
        body.extend_from_slice(&part);
    }
    Ok(body)
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

/// As it is written; other words of it say nothing to us.
#[derive(Deserialize)]
struct Written {
    kty: String,
    kid: String,
    alg: Option<String>,
    #[serde(rename = "use")]
    used: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// Keys of other kinds, without a name and for other uses are left out: they may stand beside ours.
/// Two with one name are refused, as it is not known then which one is meant.
fn keys_in(body: &[u8]) -> Result<HashMap<String, Key>, String> {
    let document: Document =
        serde_json::from_slice(body).map_err(|_| "the answer is no set of keys".to_owned())?;
    if document.keys.len() > KEYS_MAX {
        return Err(format!("the answer has more than {KEYS_MAX} keys"));
    }
    let mut keys = HashMap::new();
    for written in document.keys {
        let Ok(written) = serde_json::from_value::<Written>(written) else { continue };
        let Some(key) = key_of(&written) else { continue };
        if keys.insert(written.kid, key).is_some() {
            return Err("two keys have one name".to_owned());
        }
    }
    Ok(keys)
}

fn key_of(written: &Written) -> Option<Key> {
    let signs = written.used.as_deref().is_none_or(|used| used == "sig")
        && written.key_ops.as_ref().is_none_or(|ops| ops.iter().any(|op| op == "verify"));
    if !signs || written.kid.is_empty() || written.kid.len() > KID_BYTES_MAX {
        return None;
    }
    let (x, y) = (written.x.as_deref(), written.y.as_deref());
    let (algorithm, name, key) = match (written.kty.as_str(), written.crv.as_deref()) {
        ("RSA", None) => {
            let key =
                DecodingKey::from_rsa_components(written.n.as_deref()?, written.e.as_deref()?);
            (Algorithm::RS256, "RS256", key)
        }
        ("EC", Some("P-256")) => {
            (Algorithm::ES256, "ES256", DecodingKey::from_ec_components(x?, y?))
        }
        ("OKP", Some("Ed25519")) => {
            (Algorithm::EdDSA, "EdDSA", DecodingKey::from_ed_components(x?))
        }
        _ => return None,
    };
    // What a key says of its algorithm is heeded; RFC 9864 has a new word for the last one.
    let said = written.alg.as_deref().unwrap_or(name);
    let fits = said == name || (name == "EdDSA" && said == "Ed25519");
    fits.then_some((algorithm, key.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_encrypted_or_here() {
        let new = |url: &str| Jwks::new(url, JwksTimes::default()).map(|_| ());
        for good in
            ["https://id.example/jwks", "http://127.0.0.1:1/", "http://[::1]/", "http://localhost/"]
        {
            assert_eq!(new(good), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("id.example", JwksUrlError::NoUrl),
            ("http://id.example/jwks", JwksUrlError::NotEncrypted),
            ("http://127.0.0.1.example/", JwksUrlError::NotEncrypted),
            ("file:///etc/keys", JwksUrlError::NoUrl),
            ("ftp://id.example/", JwksUrlError::NotEncrypted),
            ("https://u:p@id.example/", JwksUrlError::HasUser),
        ] {
            assert_eq!(new(bad), Err(why), "{bad}");
        }
    }

    #[test]
    fn keys_of_other_kinds_are_left_out_and_doubles_are_refused() {
        let of = |keys: &str| {
            let found = keys_in(format!("{{\"keys\":[{keys}]}}").as_bytes());
            found.map(|keys| {
                let mut names: Vec<_> = keys.into_keys().collect();
                names.sort();
                names.join(" ")
            })
        };
        let ed = r#"{"kty":"OKP","crv":"Ed25519","kid":"ed","x":"AAAA"}"#;
        assert_eq!(of(ed).as_deref(), Ok("ed"));
        for other in [
            r#"{"kty":"oct","kid":"a","k":"AAAA"}"#,
            r#"{"kty":"OKP","crv":"Ed25519","x":"AAAA"}"#,
            r#"{"kty":"OKP","crv":"X25519","kid":"a","x":"AAAA"}"#,
            r#"{"kty":"OKP","crv":"Ed25519","kid":"a","x":"AAAA","use":"enc"}"#,
            r#"{"kty":"OKP","crv":"Ed25519","kid":"a","x":"AAAA","key_ops":["sign"]}"#,
            r#"{"kty":"OKP","crv":"Ed25519","kid":"a","x":"AAAA","alg":"HS256"}"#,
            r#"{"kty":"OKP","crv":"Ed25519","kid":"a","x":"not base64!"}"#,
            r#"{"kty":"RSA","kid":"a","n":"AAAA"}"#,
            r#"{"kty":"RSA","kid":"a","n":"AAAA","e":"AQAB","alg":"RS512"}"#,
            r#"{"kty":"EC","crv":"P-384","kid":"a","x":"AAAA","y":"AAAA"}"#,
            r#"{"kty":"EC","kid":3}"#,
            "7",
        ] {
            assert_eq!(of(&format!("{other},{ed}")).as_deref(), Ok("ed"), "{other}");
        }
        assert!(of(&format!("{ed},{ed}")).is_err());
        assert!(of(&vec!["7"; KEYS_MAX + 1].join(",")).is_err());
        for bad in ["", "[]", "{}", r#"{"keys":{}}"#] {
            assert!(keys_in(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
