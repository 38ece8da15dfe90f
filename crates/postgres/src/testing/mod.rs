//! A real server for tests, in a temporary folder, as a user without rights.
//!
//! One server serves all tests of a run: under nextest, which gives each test a process, that is
//! the whole run, else one test program. Each test has a database of its own, copied from one
//! that was migrated once. Nothing polls and nothing is left: a keeper, which is the server's parent, ends it and removes
//! its folder when the process that runs the tests is gone, however it went.

mod server;

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::fs::FlockOperation;

pub use server::{Server, ServerOptions};

use crate::{Config, Parts};

/// A database of one test. It goes with this value.
#[derive(Debug)]
pub struct TestDatabase {
    pub config: Config,
    name: String,
    socket: PathBuf,
}

/// `None`: this host has no server's programs. The test says `skipped: ` and why.
pub fn available() -> bool {
    let there = server::programs().is_some();
    if !there {
        #[expect(clippy::print_stdout, reason = "the line that `./dev test` collects")]
        {
            println!("skipped: no PostgreSQL server is installed here");
        }
    }
    there
}

/// A database like the template of this name, which `prepare` makes where nobody has before.
pub async fn database<F>(template: &str, prepare: impl FnOnce(Config) -> F) -> TestDatabase
where
    F: Future<Output = ()>,
{
    let folder = run_folder();
    let socket = {
        let _lock = locked(&folder);
        let server = Server::shared(&folder);
        let template = format!("template_{template}");
        if !exists(&server, &template) {
            let making = format!("making_{template}");
            psql(&server, &format!("drop database if exists {making}"));
            psql(&server, &format!("create database {making}"));
            prepare(config(&server, &making)).await;
            psql(&server, &format!("alter database {making} rename to {template}"));
        }
        server
    };
    let name = format!("test_{}", uuid::Uuid::new_v4().simple());
    psql(&socket, &format!("create database {name} template template_{template}"));
    TestDatabase { config: config(&socket, &name), name, socket }
}

/// An empty database on the shared server.
pub async fn empty_database() -> TestDatabase {
    database("empty", async |_| {}).await
}

impl TestDatabase {
    /// Runs SQL as the server's owner, beside whoever uses the database.
    pub fn execute(&self, sql: &str) -> String {
        run_psql(&self.socket, &self.name, sql)
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            psql(&self.socket, &format!("drop database if exists {} with (force)", self.name));
        }
    }
}

fn config(socket: &Path, database: &str) -> Config {
    let parts = Parts {
        host: Some(socket.display().to_string()),
        user: Some("postgres".to_owned()),
        database: Some(database.to_owned()),
        ..Parts::default()
    };
    Config::from_parts(parts).expect("a configuration for tests")
}

fn exists(socket: &Path, database: &str) -> bool {
    let sql = format!("select 1 from pg_database where datname = '{database}'");
    run_psql(socket, "postgres", &sql).trim() == "1"
}

fn psql(socket: &Path, sql: &str) {
    run_psql(socket, "postgres", sql);
}

fn run_psql(socket: &Path, database: &str, sql: &str) -> String {
    let programs = server::programs().expect("PostgreSQL's programs");
    let output = Command::new(programs.join("psql"))
        .args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "-v", "ON_ERROR_STOP=1"])
        .args(["--username", "postgres", "--dbname", database, "--command", sql, "--host"])
        .arg(socket)
        .stdin(Stdio::null())
        .output()
        .expect("psql");
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The process whose end is the end of the run, and the run's folder.
fn run_folder() -> PathBuf {
    std::env::temp_dir().join(format!("aether-test-postgres-{}", runner()))
}

fn runner() -> u32 {
    // nextest says so to the tests that it runs.
    let under_nextest = std::env::var_os("NEXTEST").is_some();
    if under_nextest { std::os::unix::process::parent_id() } else { std::process::id() }
}

/// Other processes of the run wait meanwhile. The lock ends with the file.
fn locked(folder: &Path) -> File {
    std::fs::create_dir_all(folder).expect("a folder for the test server");
    let lock = File::create(folder.join("lock")).expect("the test server's lock");
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).expect("lock the test server");
    lock
}
