//! API keys, and the secrets that all processes on a store share.

use aether_types::{KeyId, Timestamp, limits};

use super::{
    Lock, Sql, Tx, projects,
    query::{Builder, Row, query},
    rows,
};
use crate::{ApiKey, Cursor, KeyFilter, Page, PageRequest, StoreError, error::Context};

macro_rules! key_columns {
    () => {
        "id, name, prefix, hash, project_id, role, scopes, created_by, created_at, expires_at, \
         last_used_at, revoked_at"
    };
}

const GET: &str = concat!("select ", key_columns!(), " from api_keys where id = $1");

const BY_HASH: &str =
    concat!("select ", key_columns!(), " from api_keys where hash = $1 and revoked_at is null");

const REVOKE: &str = concat!(
    "update api_keys set revoked_at = coalesce(revoked_at, $2), hash = $3 where id = $1 returning ",
    key_columns!()
);

const DAY_MS: i64 = 24 * 3600 * 1000;

/// Many at once may pass the bound by a few, which does no harm.
pub(super) async fn insert(store: &Sql, key: ApiKey) -> Result<(), StoreError> {
    let kept = i64::from(limits::KEY_KEPT_DAYS) * DAY_MS;
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::ProjectStays(key.project_id)]).await?;
    projects::expect_live(&mut tx, key.project_id).await?;
    query("delete from api_keys where coalesce(revoked_at, expires_at) <= $1")
        .bind(key.created_at.plus_ms(-kept).unix_ms())
        .execute(&mut tx)
        .await
        .context("forget old API keys")?;
    let row = query("select count(*) from api_keys where project_id = $1 and revoked_at is null")
        .bind(key.project_id.to_string())
        .fetch_one(&mut tx)
        .await
        .context("count the API keys")?;
    let there: i64 = rows::Reader { row: &row, noun: "API key" }.get(0)?;
    if there >= i64::from(limits::KEYS_MAX) {
        return Err(StoreError::TooManyKeys { max: limits::KEYS_MAX });
    }
    write(&mut tx, key).await?;
    tx.commit("commit an API key").await
}

async fn write(tx: &mut Tx<'_>, key: ApiKey) -> Result<(), StoreError> {
    let scopes: Vec<_> = key.scopes.iter().map(ToString::to_string).collect();
    query(
        "insert into api_keys (id, name, prefix, hash, project_id, role, scopes, created_by, \
         created_at, expires_at, last_used_at, revoked_at) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    )
    .bind(key.id.to_string())
    .bind(key.name)
    .bind(key.prefix)
    .bind(key.hash.to_vec())
    .bind(key.project_id.to_string())
    .bind(key.role.as_str())
    .bind(scopes.join(","))
    .bind(key.created_by.map(|id| id.to_string()))
    .bind(key.created_at.unix_ms())
    .bind(key.expires_at.map(Timestamp::unix_ms))
    .bind(key.last_used_at.map(Timestamp::unix_ms))
    .bind(key.revoked_at.map(Timestamp::unix_ms))
    .execute(&mut *tx)
    .await
    .context("record an API key")?;
    Ok(())
}

pub(super) async fn get(store: &Sql, id: KeyId) -> Result<Option<ApiKey>, StoreError> {
    let asked = query(GET).bind(id.to_string());
    let row = asked.fetch_optional(store).await.context("read an API key")?;
    row.as_ref().map(key).transpose()
}

pub(super) async fn by_hash(store: &Sql, hash: &[u8; 32]) -> Result<Option<ApiKey>, StoreError> {
    let asked = query(BY_HASH).bind(&hash[..]);
    let row = asked.fetch_optional(store).await.context("look an API key up")?;
    row.as_ref().map(key).transpose()
}

pub(super) async fn list(
    store: &Sql,
    filter: &KeyFilter,
    page: PageRequest,
) -> Result<Page<ApiKey>, StoreError> {
    let limit = page.bounded_limit();
    let mut query = Builder::new(concat!("select ", key_columns!(), " from api_keys where 1 = 1"));
    if let Some(project) = filter.project {
        query.push(" and project_id = ").push_bind(project.to_string());
    }
    if !filter.revoked {
        query.push(" and revoked_at is null");
    }
    if let Some(cursor) = page.after {
        query.push(" and (created_at, id) < (").push_bind(cursor.created_at_ms());
        query.push(", ").push_bind(cursor.id()).push(")");
    }
    query.push(" order by created_at desc, id desc limit ").push_bind(limit + 1);
    let found = query.build().fetch_all(store).await.context("list the API keys")?;
    let position = |key: &ApiKey| Cursor::new(key.created_at.unix_ms(), &key.id.to_string());
    Ok(Page::cut(rows::all(&found, key)?, limit, position))
}

pub(super) async fn revoke(store: &Sql, id: KeyId) -> Result<ApiKey, StoreError> {
    let revoke =
        query(REVOKE).bind(id.to_string()).bind(Timestamp::now().unix_ms()).bind(vec![0_u8; 32]);
    let found = store.writer().await.lone(revoke, "revoke an API key").await?;
    found.first().map(key).transpose()?.ok_or(StoreError::KeyNotFound)
}

pub(super) async fn used(
    store: &Sql,
    id: KeyId,
    at: Timestamp,
    stale: Timestamp,
) -> Result<(), StoreError> {
    let mut writer = store.writer().await;
    query(
        "update api_keys set last_used_at = $2 where id = $1 \
         and (last_used_at is null or last_used_at <= $3)",
    )
    .bind(id.to_string())
    .bind(at.unix_ms())
    .bind(stale.unix_ms())
    .execute(&mut writer)
    .await
    .context("record the use of an API key")?;
    Ok(())
}

pub(super) async fn shared_secret(
    store: &Sql,
    name: &str,
    proposed: &[u8],
) -> Result<Vec<u8>, StoreError> {
    // Of several at once one inserts; the others wait for its commit, and read what it kept.
    let insert = query("insert into secrets (name, value) values ($1, $2) on conflict do nothing")
        .bind(name.to_owned())
        .bind(proposed.to_vec());
    store.writer().await.lone(insert, "keep a secret").await?;
    let row = query("select value from secrets where name = $1")
        .bind(name.to_owned())
        .fetch_one(store)
        .await
        .context("read a secret")?;
    rows::Reader { row: &row, noun: "secret" }.get(0)
}

fn key(row: &Row) -> Result<ApiKey, StoreError> {
    let r = rows::Reader { row, noun: "API key" };
    let scopes = r.get::<&str>(6)?.split(',').filter(|scope| !scope.is_empty());
    Ok(ApiKey {
        id: r.parsed(0)?,
        name: r.get(1)?,
        prefix: r.get(2)?,
        hash: r.get::<Vec<u8>>(3)?.try_into().map_err(|_| r.corrupt())?,
        project_id: r.parsed(4)?,
        role: r.parsed(5)?,
        // One that this program does not know must not be taken for "all".
        scopes: scopes.map(str::parse).collect::<Result<_, _>>().map_err(|_| r.corrupt())?,
        created_by: r.parsed_option(7)?,
        created_at: r.time(8)?,
        expires_at: r.time_option(9)?,
        last_used_at: r.time_option(10)?,
        revoked_at: r.time_option(11)?,
    })
}
