//! The least that two recorded requests cost on this machine: a bare axum handler that commits one
//! row of SQLite before it answers, asked twice on a connection that is open.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::{Router, extract::State, http::StatusCode, routing::post};
use sqlx::{
    ConnectOptions, Connection, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Mutex,
    task::JoinHandle,
};

const REQUEST: &[u8] = b"POST / HTTP/1.1\r\nHost: floor\r\nContent-Length: 2\r\n\r\n{}";
const ACCEPTED: &[u8] = b"HTTP/1.1 202 ";
const ANSWER_BYTES_MAX: usize = 4096;

#[derive(Debug)]
pub struct Floor {
    client: TcpStream,
    server: JoinHandle<()>,
    _dir: TempDir,
}

impl Floor {
    pub async fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // As our store is opened.
        let options = SqliteConnectOptions::new()
            .filename(dir.path().join("floor.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .disable_statement_logging();
        let mut rows = options.connect().await?;
        sqlx::query("CREATE TABLE tasks (id INTEGER PRIMARY KEY, body TEXT)")
            .execute(&mut rows)
            .await?;
        let app = Router::new().route("/", post(record)).with_state(Arc::new(Mutex::new(rows)));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let client = TcpStream::connect(listener.local_addr()?).await?;
        client.set_nodelay(true)?;
        let server = tokio::spawn(async move {
            // It ends with this process or with the value's drop, not by itself.
            let _ = axum::serve(listener, app).await;
        });
        Ok(Self { client, server, _dir: dir })
    }

    /// One request after the other, each answered.
    pub async fn two_requests(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        for _ in 0..2 {
            self.client.write_all(REQUEST).await?;
            let mut answer = Vec::new();
            while !answer.ends_with(b"\r\n\r\n") {
                ensure!(answer.len() < ANSWER_BYTES_MAX, "an answer without an end");
                let read = self.client.read_buf(&mut answer).await.context("read the answer")?;
                ensure!(read > 0, "the connection ended");
            }
            ensure!(answer.starts_with(ACCEPTED), "not accepted");
        }
        Ok(begun.elapsed())
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn record(State(rows): State<Arc<Mutex<SqliteConnection>>>, body: String) -> StatusCode {
    let mut rows = rows.lock().await;
    match insert(&mut rows, &body).await {
        Ok(()) => StatusCode::ACCEPTED,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

async fn insert(rows: &mut SqliteConnection, body: &str) -> sqlx::Result<()> {
    let mut transaction = rows.begin().await?;
    sqlx::query("INSERT INTO tasks (body) VALUES (?)")
        .bind(body)
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await
}
