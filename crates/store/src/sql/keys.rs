//! API keys, and the secrets that all processes on a store share.

use super::{
    Sql,
    query::{Row, query},
    rows,
};
use crate::{ApiKey, StoreError, error::Context};

pub(super) async fn insert(store: &Sql, key: ApiKey) -> Result<(), StoreError> {
    let insert = query(
        "insert into api_keys (id, name, prefix, hash, created_at) values ($1, $2, $3, $4, $5)",
    )
    .bind(key.id.to_string())
    .bind(key.name)
    .bind(key.prefix)
    .bind(key.hash.to_vec())
    .bind(key.created_at.unix_ms());
    store.writer().await.lone(insert, "record an API key").await?;
    Ok(())
}

pub(super) async fn list(store: &Sql) -> Result<Vec<ApiKey>, StoreError> {
    let found =
        query("select id, name, prefix, hash, created_at from api_keys order by created_at, id")
            .fetch_all(store)
            .await
            .context("list the API keys")?;
    rows::all(&found, key)
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
    Ok(ApiKey {
        id: r.parsed(0)?,
        name: r.get(1)?,
        prefix: r.get(2)?,
        hash: r.get::<Vec<u8>>(3)?.try_into().map_err(|_| r.corrupt())?,
        created_at: r.time(4)?,
    })
}
