//! Entries in SQLite.

use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt as _, path::Path, time::Duration};

use sqlx::{
    ConnectOptions as _, Row as _, Sqlite, SqliteConnection, SqlitePool,
    query_builder::QueryBuilder,
    sqlite::{
        SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow,
        SqliteSynchronous,
    },
};

use crate::{LogEntry, LogError, LogFilter, LogLevel, Logged, error::Context as _};

pub(super) const COLUMNS: &str =
    "seq, time_ns, service, level, stream, vm_id, task_id, text, cut_bytes, missing";
/// For the lock of a process before, which may be closing still.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Rows of one statement: each size is prepared once and kept.
const INSERT_SIZES: [usize; 3] = [64, 8, 1];

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations/embedded");

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        // A commit survives SIGKILL; a power loss may take the last moments, and damages nothing.
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(BUSY_TIMEOUT)
        .disable_statement_logging()
}

/// The one connection that writes.
pub(super) async fn open(path: &Path) -> Result<SqliteConnection, LogError> {
    // SQLite gives its log the mode of the file. Lines of guests are nobody else's business.
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(sqlx::Error::Io)
        .context("open the log store")?;
    let mut db = options(path)
        .auto_vacuum(SqliteAutoVacuum::Incremental)
        .pragma("journal_size_limit", "16777216")
        .connect()
        .await
        .context("open the log store")?;
    // Not `run`: its future is not `Send` for every lifetime, and callers spawn.
    MIGRATIONS
        .run_direct(None, &mut db, false)
        .await
        .map_err(|e| LogError::Migration(Box::new(e)))?;
    Ok(db)
}

/// Connections that read while the writer writes.
pub(super) fn readers(path: &Path, count: u32, wait: Duration) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(count)
        .acquire_timeout(wait)
        .test_before_acquire(false)
        .connect_lazy_with(options(path).read_only(true).row_buffer_size(64))
}

pub(super) async fn insert(
    db: &mut SqliteConnection,
    entries: &[std::sync::Arc<Logged>],
) -> Result<(), sqlx::Error> {
    let mut rest = entries;
    while !rest.is_empty() {
        let size = INSERT_SIZES.into_iter().find(|size| *size <= rest.len()).unwrap_or(1);
        let (now, later) = rest.split_at(size);
        let mut query = QueryBuilder::<Sqlite>::new(format!("insert into entries ({COLUMNS}) "));
        query.push_values(now, |mut row, logged| {
            let Logged { sequence, entry } = &**logged;
            row.push_bind(signed(*sequence))
                .push_bind(entry.time_ns)
                .push_bind(entry.service.as_str())
                .push_bind(weight_of(entry.level))
                .push_bind(entry.stream.as_str())
                .push_bind(entry.vm_id.map(|id| id.to_string()))
                .push_bind(entry.task_id.map(|id| id.to_string()))
                .push_bind(entry.text())
                .push_bind(signed(entry.cut_bytes()))
                .push_bind(signed(entry.missing));
        });
        query.build().execute(&mut *db).await?;
        rest = later;
    }
    Ok(())
}

/// Every value is bound: none can change the statement. `plain` keeps SQLite from the indexes by
/// VM and task, for a walk in the order of numbers.
pub(super) fn push_filter(query: &mut QueryBuilder<Sqlite>, filter: &LogFilter, plain: bool) {
    let plus = if plain { "+" } else { "" };
    if let Some(id) = filter.vm_id {
        query.push(format!(" and {plus}vm_id = ")).push_bind(id.to_string());
    }
    if let Some(id) = filter.task_id {
        query.push(format!(" and {plus}task_id = ")).push_bind(id.to_string());
    }
    if let Some(level) = filter.level {
        query.push(" and level >= ").push_bind(weight_of(level));
    }
    if let Some(text) = &filter.text {
        query.push(" and instr(text, ").push_bind(text.clone()).push(") > 0");
    }
}

pub(super) fn read(row: &SqliteRow) -> Result<Logged, LogError> {
    let corrupt = |_: sqlx::Error| LogError::Corrupt("log entry");
    let level: i64 = row.try_get("level").map_err(corrupt)?;
    let level = usize::try_from(level).ok().and_then(|index| LogLevel::ALL.get(index));
    let text: &str = row.try_get("text").map_err(corrupt)?;
    let entry = LogEntry::new(
        word(row, "service")?,
        *level.ok_or(LogError::Corrupt("level"))?,
        word(row, "stream")?,
        text,
    )
    .and_cut(unsigned(row.try_get("cut_bytes").map_err(corrupt)?))
    .at(row.try_get("time_ns").map_err(corrupt)?)
    .of_vm(id(row, "vm_id")?)
    .of_task(id(row, "task_id")?);
    let missing = unsigned(row.try_get("missing").map_err(corrupt)?);
    let sequence = unsigned(row.try_get("seq").map_err(corrupt)?);
    Ok(Logged { sequence, entry: entry.after_missing(missing) })
}

fn word<T: std::str::FromStr>(row: &SqliteRow, name: &'static str) -> Result<T, LogError> {
    let text: &str = row.try_get(name).map_err(|_| LogError::Corrupt(name))?;
    text.parse().map_err(|_| LogError::Corrupt(name))
}

fn id<T: std::str::FromStr>(row: &SqliteRow, name: &'static str) -> Result<Option<T>, LogError> {
    let text: Option<&str> = row.try_get(name).map_err(|_| LogError::Corrupt(name))?;
    text.map(|text| text.parse().map_err(|_| LogError::Corrupt(name))).transpose()
}

fn weight_of(level: LogLevel) -> i64 {
    LogLevel::ALL.iter().position(|known| *known == level).map_or(0, |index| signed(index as u64))
}

/// SQLite has no unsigned numbers; ours stay far below its largest.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
