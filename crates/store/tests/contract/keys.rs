//! API keys: found by their hashes, bounded in number, revoked for all at once.

use aether_store::{ApiKey, KeyFilter, PageRequest, Store, StoreError};
use aether_types::{ErrorCode, KeyId, ProjectId, Role, Timestamp, limits};

use crate::support::project;

fn new_key(hash: u8) -> ApiKey {
    ApiKey {
        id: KeyId::new(),
        name: "ci".into(),
        prefix: "aeth_12345678".into(),
        hash: [hash; 32],
        project_id: ProjectId::DEFAULT,
        role: Role::Operator,
        scopes: vec!["vms:write".parse().unwrap(), "tasks:read".parse().unwrap()],
        created_by: Some(KeyId::new()),
        created_at: Timestamp::now(),
        expires_at: Some(Timestamp::now().plus_ms(60_000)),
        last_used_at: None,
        revoked_at: None,
    }
}

async fn listed(store: &impl Store, filter: KeyFilter) -> Vec<KeyId> {
    let page = store.keys(filter, PageRequest::default()).await.unwrap();
    page.items.into_iter().map(|key| key.id).collect()
}

pub(crate) async fn a_key_is_found_by_its_hash_and_by_nothing_like_it(store: &impl Store) {
    let key = new_key(7);
    store.insert_key(key.clone()).await.unwrap();
    let bare = ApiKey { scopes: Vec::new(), created_by: None, expires_at: None, ..new_key(8) };
    store.insert_key(bare.clone()).await.unwrap();
    for key in [key, bare] {
        assert_eq!(store.key_by_hash(&key.hash).await.unwrap(), Some(key.clone()));
        assert_eq!(store.key(key.id).await.unwrap(), Some(key));
    }
    assert_eq!(store.key_by_hash(&[9; 32]).await.unwrap(), None);
    assert_eq!(store.key(KeyId::new()).await.unwrap(), None);
    assert!(store.insert_key(new_key(7)).await.is_err(), "two keys with one hash");
}

pub(crate) async fn a_revoked_key_has_no_hash_and_is_kept(store: &impl Store) {
    let (gone, stays) = (new_key(1), new_key(2));
    for key in [&gone, &stays] {
        store.insert_key(key.clone()).await.unwrap();
    }
    let revoked = store.revoke_key(gone.id).await.unwrap();
    assert!(revoked.revoked_at.is_some());
    assert_eq!(revoked.hash, [0; 32]);
    assert_eq!(store.key_by_hash(&gone.hash).await.unwrap(), None);
    assert_eq!(store.key_by_hash(&[0; 32]).await.unwrap(), None);
    // Again, and another: the hashes that are erased do not clash.
    assert_eq!(store.revoke_key(gone.id).await.unwrap().revoked_at, revoked.revoked_at);
    assert_eq!(listed(store, KeyFilter::default()).await, [stays.id]);
    store.revoke_key(stays.id).await.unwrap();
    let all = KeyFilter { revoked: true, ..KeyFilter::default() };
    assert_eq!(listed(store, all).await.len(), 2);
    let unknown = store.revoke_key(KeyId::new()).await.unwrap_err();
    assert_eq!(unknown.code(), ErrorCode::KeyNotFound);
}

pub(crate) async fn the_use_of_a_key_is_kept_coarsely(store: &impl Store) {
    let key = new_key(1);
    store.insert_key(key.clone()).await.unwrap();
    let used = async |at: i64, stale: i64| {
        let time = Timestamp::from_unix_ms;
        store.key_used(key.id, time(at), time(stale)).await.unwrap();
        store.key(key.id).await.unwrap().unwrap().last_used_at.unwrap().unix_ms()
    };
    assert_eq!(used(1000, 900).await, 1000);
    assert_eq!(used(1050, 950).await, 1000);
    assert_eq!(used(1100, 1000).await, 1100);
    store.key_used(KeyId::new(), key.created_at, key.created_at).await.unwrap();
}

pub(crate) async fn keys_are_listed_by_project_and_in_pages(store: &impl Store) {
    let other = project(store, "other").await;
    let mut keys = Vec::new();
    for n in 1..=5 {
        let project_id = if n == 3 { other } else { ProjectId::DEFAULT };
        let created_at = Timestamp::from_unix_ms(n.into());
        let key = ApiKey { project_id, created_at, expires_at: None, ..new_key(n) };
        store.insert_key(key.clone()).await.unwrap();
        keys.insert(0, key.id);
    }
    assert_eq!(listed(store, KeyFilter::default()).await, keys);
    let of = |project| KeyFilter { project: Some(project), ..KeyFilter::default() };
    assert_eq!(listed(store, of(other)).await, [keys[2]]);
    let first = PageRequest { limit: 3, after: None };
    let page = store.keys(of(ProjectId::DEFAULT), first).await.unwrap();
    let next = PageRequest { limit: 3, after: page.next };
    let last = store.keys(of(ProjectId::DEFAULT), next).await.unwrap();
    let ids: Vec<_> = page.items.iter().chain(&last.items).map(|key| key.id).collect();
    assert_eq!((ids, last.next), (vec![keys[0], keys[1], keys[3], keys[4]], None));
}

pub(crate) async fn a_project_has_no_more_keys_than_there_may_be(store: &impl Store) {
    let numbered = |n: u32, project_id| {
        let mut key = ApiKey { project_id, ..new_key(0) };
        key.hash[..4].copy_from_slice(&n.to_be_bytes());
        key
    };
    for n in 0..limits::KEYS_MAX {
        store.insert_key(numbered(n, ProjectId::DEFAULT)).await.unwrap();
    }
    let more = numbered(limits::KEYS_MAX, ProjectId::DEFAULT);
    let refused = store.insert_key(more.clone()).await.unwrap_err();
    assert!(matches!(refused, StoreError::TooManyKeys { max: limits::KEYS_MAX }), "{refused:?}");
    // Others are not held by it, and one that is revoked makes room.
    let other = project(store, "other").await;
    store.insert_key(numbered(limits::KEYS_MAX + 1, other)).await.unwrap();
    let newest = store.keys(KeyFilter::default(), PageRequest::default()).await.unwrap();
    let ours = newest.items.iter().find(|key| key.project_id == ProjectId::DEFAULT).unwrap();
    store.revoke_key(ours.id).await.unwrap();
    store.insert_key(more).await.unwrap();
}

pub(crate) async fn keys_that_are_long_of_no_use_are_forgotten(store: &impl Store) {
    let now = Timestamp::now();
    let days = |n: i64| n * 24 * 3600 * 1000;
    let kept = i64::from(limits::KEY_KEPT_DAYS);
    let (expired, long) = (now.plus_ms(-days(kept - 1)), now.plus_ms(-days(kept)));
    let fresh = ApiKey { expires_at: Some(expired), ..new_key(1) };
    let old = ApiKey { expires_at: Some(long), ..new_key(2) };
    let forever = ApiKey { expires_at: None, ..new_key(3) };
    for key in [&old, &fresh, &forever] {
        store.insert_key(key.clone()).await.unwrap();
    }
    assert_eq!(store.key(old.id).await.unwrap(), None);
    assert!(store.key(fresh.id).await.unwrap().is_some());
    assert!(store.key(forever.id).await.unwrap().is_some());
}
