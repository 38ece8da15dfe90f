//! API keys: 32 random bytes in hexadecimal digits behind `ae_`, kept as a keyed hash.
//!
//! The hash key is a secret of the server that is not in the store, so that a copy of the store
//! alone cannot even be used to test guesses. Every comparison takes the same time.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
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

use crate::{health, parts::App, problem::ApiError};

const KEY_BYTES: usize = 32;

/// Shown of a key to recognise it by: the prefix and eight digits of 64.
const SHOWN_CHARS: usize = KEY_PREFIX.len() + 8;

/// A longer key is no key; it is not even hashed.
const KEY_CHARS_MAX: usize = 256;

/// The key of the keyed hash. Kept by the composition root, mode 0600, beside the store.
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

/// The keys that open this gateway, in memory. Clones share them.
#[derive(Clone)]
pub struct KeyRing {
    secret: AuthSecret,
    keys: Arc<RwLock<Hashes>>,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing").field("keys", &self.len()).finish_non_exhaustive()
    }
}

impl KeyRing {
    pub async fn load(store: &dyn Store, secret: AuthSecret) -> Result<Self, StoreError> {
        let keys = store.keys().await?.into_iter().map(|key| (key.id, key.hash)).collect();
        Ok(Self { secret, keys: Arc::new(RwLock::new(keys)) })
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

    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Looks at every key, whichever matches.
    pub(crate) fn find(&self, text: &str) -> Option<KeyId> {
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
    match caller(&app.parts.keys, request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(detail) => ApiError::new(ErrorCode::Unauthorized, detail).into_response(),
    }
}

fn caller(keys: &KeyRing, headers: &HeaderMap) -> Result<Caller, &'static str> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Err("send the header `Authorization: Bearer KEY`");
    };
    let text = value.to_str().unwrap_or_default();
    let key = match text.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
        Some(_) | None => return Err("the header is not of the form `Authorization: Bearer KEY`"),
    };
    keys.find(key).map(Caller).ok_or("the key is not known here")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(keys: &[&str]) -> (KeyRing, Vec<KeyId>) {
        let secret = AuthSecret::from_bytes([7; 32]);
        let keys: Vec<_> = keys.iter().map(|k| (KeyId::new(), secret.hash(k))).collect();
        let ids = keys.iter().map(|(id, _)| *id).collect();
        (KeyRing { secret, keys: Arc::new(RwLock::new(keys)) }, ids)
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
