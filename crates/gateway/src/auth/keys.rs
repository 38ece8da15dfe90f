//! API keys: `aeth_`, 32 random bytes and a check, in hexadecimal digits; kept as a keyed hash.
//!
//! The hash key is a secret of the installation. One process alone keeps it beside the store;
//! processes that share a store share it there.
//!
//! Every request asks the store for its key, so that a key that is revoked anywhere opens nothing
//! anywhere. The check is a keyed one too: who makes keys up is refused without the store.

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aether_api::{KEY_PREFIX, KEY_PREFIX_EARLIER};
use aether_store::{ApiKey, Store, StoreError};
use aether_types::{Access, KeyId, Timestamp};
use subtle::ConstantTimeEq as _;

const KEY_BYTES: usize = 32;
const CHECK_BYTES: usize = 4;

/// Shown of a key to recognise it by: the prefix and eight digits of 64.
const SHOWN_CHARS: usize = KEY_PREFIX.len() + 8;

const KEY_CHARS: usize = KEY_PREFIX.len() + 2 * (KEY_BYTES + CHECK_BYTES);
const EARLIER_KEY_CHARS: usize = KEY_PREFIX_EARLIER.len() + 2 * KEY_BYTES;

/// What is hashed begins with this, so that a hash is of one use only. Programs from before there
/// were roles hash the key alone: they do not find keys that may do less than all.
const HASHED_FOR_STORE: &str = "aetherium api key: ";
const HASHED_FOR_CHECK: &str = "aetherium api key's check: ";

/// The last use of a key is written down this often at most.
const USE_KEPT_EVERY: Duration = Duration::from_mins(5);

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

    fn hash(&self, use_of_it: &str, text: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(use_of_it.as_bytes()).update(text.as_bytes());
        *hasher.finalize().as_bytes()
    }

    /// Under which hash the store would have the key; `None`: it is none of ours.
    fn hash_of(&self, text: &str) -> Option<[u8; 32]> {
        if text.starts_with(KEY_PREFIX_EARLIER) && text.len() == EARLIER_KEY_CHARS {
            return Some(self.hash("", text));
        }
        if !text.starts_with(KEY_PREFIX) || text.len() != KEY_CHARS || !text.is_ascii() {
            return None;
        }
        let (body, check) = text.split_at(KEY_CHARS - 2 * CHECK_BYTES);
        let is_ours = self.check(body).as_bytes().ct_eq(check.as_bytes());
        bool::from(is_ours).then(|| self.hash(HASHED_FOR_STORE, text))
    }

    fn check(&self, body: &str) -> String {
        let hash = blake3::Hash::from_bytes(self.hash(HASHED_FOR_CHECK, body));
        hash.to_hex()[..2 * CHECK_BYTES].to_owned()
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

/// A key to be.
#[derive(Debug, Clone)]
pub struct NewKey {
    pub name: String,
    pub access: Access,
    /// `None`: the installation itself.
    pub created_by: Option<KeyId>,
    /// From now.
    pub expires_in: Option<Duration>,
}

/// Makes keys, and finds them. Clones share what is under way.
#[derive(Clone)]
pub struct KeyRing {
    secret: AuthSecret,
    /// Keys whose use is being written down.
    noting: Arc<Mutex<HashSet<KeyId>>>,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing").finish_non_exhaustive()
    }
}

impl KeyRing {
    #[must_use]
    pub fn new(secret: AuthSecret) -> Self {
        Self { secret, noting: Arc::default() }
    }

    /// Makes a key and stores its hash. The text is shown once and cannot be had again.
    pub async fn create(
        &self,
        store: &dyn Store,
        new: NewKey,
    ) -> Result<(String, ApiKey), CreateKeyError> {
        let digits = blake3::Hash::from_bytes(random()?).to_hex();
        let body = format!("{KEY_PREFIX}{digits}");
        let text = format!("{body}{}", self.secret.check(&body));
        let now = Timestamp::now();
        let ms = new.expires_in.map(|time| i64::try_from(time.as_millis()).unwrap_or(i64::MAX));
        let key = ApiKey {
            id: KeyId::new(),
            name: new.name,
            prefix: text[..SHOWN_CHARS].to_owned(),
            hash: self.secret.hash(HASHED_FOR_STORE, &text),
            project_id: new.access.project,
            role: new.access.role,
            scopes: new.access.scopes,
            created_by: new.created_by,
            created_at: now,
            expires_at: ms.map(|ms| now.plus_ms(ms)),
            last_used_at: None,
            revoked_at: None,
        };
        store.insert_key(key.clone()).await?;
        Ok((text, key))
    }

    /// The key with this text, unless it is revoked; it may be past its time.
    pub async fn find(&self, store: &dyn Store, text: &str) -> Result<Option<ApiKey>, StoreError> {
        let Some(hash) = self.secret.hash_of(text) else { return Ok(None) };
        // How long the index takes tells of the hash, which nobody can choose without the secret.
        let found = store.key_by_hash(&hash).await?;
        Ok(found.filter(|key| bool::from(key.hash.ct_eq(&hash))))
    }

    /// What writes down that the key is used now, where the last use that is known is long ago.
    pub(super) fn note_use(
        &self,
        store: &Arc<dyn Store>,
        key: &ApiKey,
        now: Timestamp,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let every = i64::try_from(USE_KEPT_EVERY.as_millis()).unwrap_or(i64::MAX);
        let stale = now.plus_ms(-every);
        if key.last_used_at.is_some_and(|at| at > stale) || !self.noting().insert(key.id) {
            return None;
        }
        let (ring, store, id) = (self.clone(), Arc::clone(store), key.id);
        Some(async move {
            if let Err(error) = store.key_used(id, now, stale).await {
                tracing::warn!(key.id = %id, %error, "the use of a key is not written down");
            }
            ring.noting().remove(&id);
        })
    }

    fn noting(&self) -> std::sync::MutexGuard<'_, HashSet<KeyId>> {
        // Nothing panics while the lock is held.
        self.noting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use aether_store::{Durability, SqliteStore};
    use aether_types::{ProjectId, Role};

    use super::*;

    async fn store() -> (Arc<dyn Store>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let store = SqliteStore::open(&path, Durability::Process).await.unwrap();
        (Arc::new(store), folder)
    }

    fn new_key(name: &str) -> NewKey {
        let access = Access { project: ProjectId::DEFAULT, role: Role::Viewer, scopes: Vec::new() };
        NewKey { name: name.to_owned(), access, created_by: None, expires_in: None }
    }

    #[tokio::test]
    async fn each_key_is_found_as_itself_and_nothing_else_is() {
        let (store, _folder) = store().await;
        let ring = KeyRing::new(AuthSecret::generate().unwrap());
        let (text, key) = ring.create(&*store, new_key("a")).await.unwrap();
        let (other, _) = ring.create(&*store, new_key("b")).await.unwrap();
        assert_eq!(ring.find(&*store, &text).await.unwrap().unwrap().id, key.id);
        // As another process has it, which made none of them.
        let elsewhere = KeyRing::new(ring.secret.clone());
        assert_eq!(elsewhere.find(&*store, &text).await.unwrap().unwrap().id, key.id);
        let mixed = format!("{}{}", &text[..40], &other[40..]);
        let wide = format!("{}é", &text[..text.len() - 2]);
        for wrong in ["", "aeth_", "ae_", &text[1..], &format!("{text} "), &mixed, &wide] {
            assert_eq!(ring.find(&*store, wrong).await.unwrap(), None, "{wrong}");
        }
        let stranger = KeyRing::new(AuthSecret::generate().unwrap());
        assert_eq!(stranger.find(&*store, &text).await.unwrap(), None);
        store.revoke_key(key.id).await.unwrap();
        assert_eq!(elsewhere.find(&*store, &text).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_key_of_an_earlier_version_is_found_and_a_new_one_is_not_by_that_version() {
        let (store, _folder) = store().await;
        let ring = KeyRing::new(AuthSecret::generate().unwrap());
        let hashed_earlier =
            |text: &str| *blake3::keyed_hash(ring.secret.as_bytes(), text.as_bytes()).as_bytes();
        let text = format!("ae_{}", "5".repeat(64));
        let (new_text, new) = ring.create(&*store, new_key("new")).await.unwrap();
        let early = ApiKey { id: KeyId::new(), hash: hashed_earlier(&text), ..new };
        store.insert_key(early.clone()).await.unwrap();
        assert_eq!(ring.find(&*store, &text).await.unwrap(), Some(early));
        assert_eq!(store.key_by_hash(&hashed_earlier(&new_text)).await.unwrap(), None);
    }

    #[test]
    fn a_key_that_was_made_up_needs_no_store() {
        let secret = AuthSecret::from_bytes([7; 32]);
        let body = format!("{KEY_PREFIX}{}", "0".repeat(64));
        let good = format!("{body}{}", secret.check(&body));
        assert!(secret.hash_of(&good).is_some());
        for digit in 0..16_u32 {
            let wrong = format!("{body}{digit:08x}");
            assert_eq!(secret.hash_of(&wrong), None);
        }
    }

    #[tokio::test]
    async fn the_use_of_a_key_is_written_once_for_many_requests() {
        let (store, _folder) = store().await;
        let ring = KeyRing::new(AuthSecret::generate().unwrap());
        let (_, key) = ring.create(&*store, new_key("a")).await.unwrap();
        let now = Timestamp::now();
        let first = ring.note_use(&store, &key, now).unwrap();
        assert!(ring.note_use(&store, &key, now).is_none(), "it is being written");
        first.await;
        let used = store.key(key.id).await.unwrap().unwrap();
        assert_eq!(used.last_used_at, Some(now));
        assert!(ring.note_use(&store, &used, now.plus_ms(299_999)).is_none());
        let later = now.plus_ms(300_000);
        ring.note_use(&store, &used, later).unwrap().await;
        assert_eq!(store.key(key.id).await.unwrap().unwrap().last_used_at, Some(later));
    }

    #[test]
    fn secrets_are_never_printed() {
        let ring = KeyRing::new(AuthSecret::from_bytes([7; 32]));
        assert_eq!(format!("{ring:?}"), "KeyRing { .. }");
        assert_eq!(format!("{:?}", ring.secret), "AuthSecret(..)");
    }
}
