//! API keys.

use sqlx::sqlite::SqliteRow;

use super::{SqliteStore, rows};
use crate::{ApiKey, StoreError, error::Context};

pub(super) async fn insert(store: &SqliteStore, key: ApiKey) -> Result<(), StoreError> {
    let mut writer = store.writer.lock().await;
    sqlx::query(
        "insert into api_keys (id, name, prefix, hash, created_at) values ($1, $2, $3, $4, $5)",
    )
    .bind(key.id.to_string())
    .bind(key.name)
    .bind(key.prefix)
    .bind(key.hash.to_vec())
    .bind(key.created_at.unix_ms())
    .execute(&mut *writer)
    .await
    .context("record an API key")?;
    Ok(())
}

pub(super) async fn list(store: &SqliteStore) -> Result<Vec<ApiKey>, StoreError> {
    let found = sqlx::query(
        "select id, name, prefix, hash, created_at from api_keys order by created_at, id",
    )
    .fetch_all(&store.readers)
    .await
    .context("list the API keys")?;
    rows::all(&found, key)
}

fn key(row: &SqliteRow) -> Result<ApiKey, StoreError> {
    let r = rows::Reader { row, noun: "API key" };
    Ok(ApiKey {
        id: r.parsed(0)?,
        name: r.get(1)?,
        prefix: r.get(2)?,
        hash: r.get::<Vec<u8>>(3)?.try_into().map_err(|_| r.corrupt())?,
        created_at: r.time(4)?,
    })
}
