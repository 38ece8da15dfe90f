//! API keys: 32 random bytes in hexadecimal digits behind `ae_`, kept as a keyed hash.
//!
//! The hash key is a secret of the installation. One process alone keeps it beside the store;
//! processes that share a store share it there. Every comparison takes the same time.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use aether_api::KEY_PREFIX;
use aether_store::{ApiKey, Store, StoreError};
use aether_types::{ErrorCode, KeyId, Timestamp};
use axum::{
    extract::{Request, State},
    http::{HeaderMap, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};
use tokio::{sync::Mutex, time::Instant};

use crate::{health, parts::App, problem::ApiError};

const KEY_BYTES: usize = 32;

/// Shown of a key to recognise it by: the prefix and eight digits of 64.
const SHOWN_CHARS: usize = KEY_PREFIX.len() + 8;

/// A longer key is no key; it is not even hashed.
const KEY_CHARS_MAX: usize = 256;

/// Another process may have made a key; it is looked for this often at most, so that who sends
/// wrong keys does not make the store work.
const REREAD_AFTER: Duration = Duration::from_secs(1);

/// The key of the keyed hash. Kept by the composition root.
#[derive(Clone)]
pub struct AuthSecret([u8; 32]);

impl AuthSecret {
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A new one, from the system's random source.
    pub fn generate() -> Result<Self, CreateKeyError> {
        random().map(Self)
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    fn hash(&self, key: &str) -> [u8; 32] {
        *blake3::keyed_hash(&self.0, key.as_bytes()).as_bytes()
    }
}

impl fmt::Debug for AuthSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthSecret(..)")
    }
}

/// Why a key could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateKeyError {
    #[error("read the system's random source")]
    Random(#[source] getrandom::Error),
    #[error("store the key")]
    Store(#[from] StoreError),
}

fn random() -> Result<[u8; 32], CreateKeyError> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes).map_err(CreateKeyError::Random)?;
    Ok(bytes)
}

/// Makes a key and stores its hash. The text is shown once and cannot be had again. A
/// [`KeyRing`] that was loaded before does not know it; see [`KeyRing::create`].
pub async fn create_key(
    store: &dyn Store,
    secret: &AuthSecret,
    name: &str,
) -> Result<(String, ApiKey), CreateKeyError> {
    let digits = blake3::Hash::from_bytes(random()?).to_hex();
    let text = format!("{KEY_PREFIX}{digits}");
    let key = ApiKey {
        id: KeyId::new(),
        name: name.to_owned(),
        prefix: text[..SHOWN_CHARS].to_owned(),
        hash: secret.hash(&text),
        created_at: Timestamp::now(),
    };
    store.insert_key(key.clone()).await?;
    Ok((text, key))
}

type Hashes = Vec<(KeyId, [u8; 32])>;

async fn hashes(store: &dyn Store) -> Result<Hashes, StoreError> {
    Ok(store.keys().await?.into_iter().map(|key| (key.id, key.hash)).collect())
}

/// The keys that open this gateway, in memory. Clones share them.
#[derive(Clone)]
pub struct KeyRing {
    secret: AuthSecret,
    keys: Arc<RwLock<Hashes>>,
    /// When they were last read anew, and whether they could be.
    read: Arc<Mutex<Option<(Instant, bool)>>>,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing").field("keys", &self.len()).finish_non_exhaustive()
    }
}

impl KeyRing {
    pub async fn load(store: &dyn Store, secret: AuthSecret) -> Result<Self, StoreError> {
        let keys = Arc::new(RwLock::new(hashes(store).await?));
        Ok(Self { secret, keys, read: Arc::default() })
    }

    /// As [`KeyRing::knows`]; a key that is not known may be another process', and is looked for in
    /// the store.
    async fn look_up(&self, store: &dyn Store, text: &str) -> Result<Option<KeyId>, ApiError> {
        if let Some(id) = self.find(text) {
            return Ok(Some(id));
        }
        let mut read = self.read.lock().await;
        // Those that waited for the same reading are answered from it.
        let answer = |found: Option<KeyId>, could_be_read: bool| match found {
            None if !could_be_read => {
                let detail = "the store cannot be asked whether there is such a key";
                Err(ApiError::new(ErrorCode::Unavailable, detail))
            }
            found => Ok(found),
        };
        if let Some((at, could_be_read)) = *read
            && at.elapsed() < REREAD_AFTER
        {
            return answer(self.find(text), could_be_read);
        }
        let hashes = hashes(store).await;
        *read = Some((Instant::now(), hashes.is_ok()));
        match hashes {
            Ok(hashes) => {
                *self.keys.write().unwrap_or_else(PoisonError::into_inner) = hashes;
                answer(self.find(text), true)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether this key opens the gateway.
    #[must_use]
    pub fn knows(&self, text: &str) -> bool {
        self.find(text).is_some()
    }

    /// As [`create_key`]; the key works at once.
    pub async fn create(
        &self,
        store: &dyn Store,
        name: &str,
    ) -> Result<(String, ApiKey), CreateKeyError> {
        let (text, key) = create_key(store, &self.secret, name).await?;
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        keys.push((key.id, key.hash));
        Ok((text, key))
    }

    fn len(&self) -> usize {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Looks at every key, whichever matches.
    fn find(&self, text: &str) -> Option<KeyId> {
        if text.len() > KEY_CHARS_MAX {
            return None;
        }
        let hash = self.secret.hash(text);
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let (mut found, mut place) = (Choice::from(0), 0);
        for (i, (_, known)) in keys.iter().enumerate() {
            let same = known.ct_eq(&hash);
            found |= same;
            place.conditional_assign(&(i as u64), same);
        }
        let place = usize::try_from(place).ok()?;
        if bool::from(found) { keys.get(place).map(|(id, _)| *id) } else { None }
    }
}

/// Whose key it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller(pub(crate) KeyId);

/// Lets nothing through without a key but health; paths that do not exist included.
pub(crate) async fn authenticate(
    State(app): State<App>,
    mut request: Request,
    next: Next,
) -> Response {
    if request.uri().path() == health::PATH {
        return next.run(request).await;
    }
    match caller(&app, request.headers()).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

async fn caller(app: &App, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let refused = |detail| ApiError::new(ErrorCode::Unauthorized, detail);
    let text = bearer(headers).map_err(refused)?;
    let found = app.parts.keys.look_up(app.store(), text).await?;
    found.map(Caller).ok_or_else(|| refused("the key is not known here"))
}

fn bearer(headers: &HeaderMap) -> Result<&str, &'static str> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Err("send the header `Authorization: Bearer KEY`");
    };
    let text = value.to_str().unwrap_or_default();
    match text.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Ok(key.trim()),
        Some(_) | None => Err("the header is not of the form `Authorization: Bearer KEY`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(keys: &[&str]) -> (KeyRing, Vec<KeyId>) {
        let secret = AuthSecret::from_bytes([7; 32]);
        let keys: Vec<_> = keys.iter().map(|k| (KeyId::new(), secret.hash(k))).collect();
        let ids = keys.iter().map(|(id, _)| *id).collect();
        let keys = Arc::new(RwLock::new(keys));
        (KeyRing { secret, keys, read: Arc::default() }, ids)
    }

    #[tokio::test]
    async fn a_key_of_another_process_is_found_and_wrong_ones_ask_the_store_seldom() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let durability = aether_store::Durability::Process;
        let store = aether_store::SqliteStore::open(&path, durability).await.unwrap();
        let secret = AuthSecret::generate().unwrap();
        let ring = KeyRing::load(&store, secret.clone()).await.unwrap();
        // However soon after the start.
        let (early, key) = create_key(&store, &secret, "early").await.unwrap();
        assert_eq!(ring.look_up(&store, &early).await.unwrap(), Some(key.id));
        let (text, key) = create_key(&store, &secret, "other").await.unwrap();
        assert_eq!(ring.look_up(&store, &text).await.unwrap(), None, "it was just read");
        // Paused only here: the store has limits of its own, which must not pass at once.
        tokio::time::pause();
        tokio::time::advance(REREAD_AFTER).await;
        tokio::time::resume();
        assert_eq!(ring.look_up(&store, "ae_wrong").await.unwrap(), None);
        assert_eq!(ring.look_up(&store, &text).await.unwrap(), Some(key.id));
        let (next, _) = create_key(&store, &secret, "next").await.unwrap();
        assert_eq!(ring.look_up(&store, &next).await.unwrap(), None, "it was just read");
    }

    #[test]
    fn each_key_is_found_as_itself_and_nothing_else_is() {
        let (ring, ids) = ring(&["ae_a", "ae_b", "ae_c"]);
        for (key, id) in ["ae_a", "ae_b", "ae_c"].iter().zip(&ids) {
            assert_eq!(ring.find(key), Some(*id));
        }
        for wrong in ["", "ae_", "ae_d", "ae_a ", &"x".repeat(10_000)] {
            assert_eq!(ring.find(wrong), None);
        }
        assert_eq!(self::ring(&[]).0.find("ae_a"), None);
    }

    #[test]
    fn secrets_are_never_printed() {
        let (ring, _) = ring(&["ae_a"]);
        assert_eq!(format!("{ring:?}"), "KeyRing { keys: 1, .. }");
        assert_eq!(format!("{:?}", ring.secret), "AuthSecret(..)");
    }
}
