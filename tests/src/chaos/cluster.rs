//! The platforms, and the servers that they share.

use std::{
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use aether_api::client::Client;
use aether_postgres::testing::{Server as Postgres, ServerOptions};
use aether_redis::testing::Server as Redis;
use aether_types::WorkerId;
use anyhow::{Context as _, Result, ensure};
use rustix::process::{Signal, kill_process};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tempfile::NamedTempFile;
use tokio::task::block_in_place;

use super::proxy::{Proxy, Way};
use crate::{Platform, Setup};

/// A worker that is silent for so long is lost.
pub(crate) const LEASE: Duration = Duration::from_secs(3);

/// Of a member, so that it can be filled soon.
const DISK_MB: u32 = 256;

/// What a wall clock is moved with: preloaded, it reads the shift from a file each time.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// Whether disks can be filled and clocks moved; where not, it is said.
pub fn can_reach_hosts() -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "a disk of its own needs root"
    } else if !std::path::Path::new(FAKETIME).exists() {
        "a clock that jumps needs faketime; ./dev test installs it"
    } else {
        return true;
    };
    #[expect(clippy::print_stdout, reason = "how a test says that it skipped")]
    {
        println!("skipped: {reason}");
    }
    false
}

/// Whether the servers can be had; where not, it is said.
pub fn available() -> bool {
    aether_postgres::testing::available() && aether_redis::testing::available()
}

/// A platform, and its way to the servers.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) platform: Platform,
    pub(crate) url: String,
    pub(crate) postgres: Proxy,
    pub(crate) redis: Proxy,
    /// By how much its wall clock is wrong.
    shift: NamedTempFile,
}

#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    pub(crate) postgres: Postgres,
    pub(crate) redis: Redis,
    pub(crate) database: PgPool,
    key: String,
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn key(name: &str) -> String {
    format!("{{aetherium}}:queue:{name}")
}

impl Cluster {
    pub(crate) async fn start(count: usize, hosts: bool) -> Result<Self> {
        let options = ServerOptions { connections_max: Some(200), ..ServerOptions::default() };
        let postgres = block_in_place(|| Postgres::start(&options));
        let redis =
            block_in_place(|| Redis::start(&["--appendonly", "yes", "--appendfsync", "everysec"]));
        let mut members = Vec::new();
        for number in 0..count {
            members.push(Member::start(number, hosts, &postgres, &redis).await?);
        }
        let url = format!("postgres://postgres@127.0.0.1:{}/postgres", postgres.port());
        let database = PgPoolOptions::new().max_connections(2).connect_lazy(&url)?;
        let key = std::fs::read_to_string(members[0].platform.data_dir().join("admin-key"))?;
        let key = key.trim().to_owned();
        Ok(Self { members, postgres, redis, database, key })
    }

    /// Ways to all of them, that stay when they are started again.
    pub(crate) fn gateways(&self) -> Vec<Client> {
        let client = |member: &Member| Client::new(&member.url, Some(&self.key));
        self.members.iter().filter_map(|member| client(member).ok()).collect()
    }

    /// What the queue has: entries, leases, ends of leases, delays.
    pub(crate) fn entries(&self) -> [(&'static str, String); 4] {
        let count = |command, name| (name, self.redis.ask(&[command, &key(name)]));
        [count("HLEN", "e"), count("HLEN", "h"), count("ZCARD", "l"), count("ZCARD", "d")]
    }

    /// Everything runs again, and every way is open.
    pub(crate) fn heal(&mut self) -> Result<()> {
        for member in &mut self.members {
            member.postgres.set(Way::Open);
            member.redis.set(Way::Open);
            member.proceed();
            member.start_again()?;
        }
        Ok(())
    }

    /// Ends all, and shows that nothing of them is left.
    pub(crate) async fn finish(self) -> Result<()> {
        for member in self.members {
            block_in_place(|| member.platform.finish())?;
        }
        let line = self.redis.ask(&["ZCARD", &key("line")]);
        ensure!(line == "0", "{line} workers wait in the queue, and all have ended");
        self.database.close().await;
        Ok(())
    }
}

/// The clock that counts on never jumps; only the one on the wall does.
fn shifted_by(file: &std::path::Path) -> Vec<(String, String)> {
    let env = [
        ("LD_PRELOAD", FAKETIME.to_owned()),
        ("FAKETIME_TIMESTAMP_FILE", file.display().to_string()),
        ("FAKETIME_NO_CACHE", "1".to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("DONT_FAKE_MONOTONIC", "1".to_owned()),
    ];
    env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

impl Member {
    async fn start(number: usize, hosts: bool, postgres: &Postgres, redis: &Redis) -> Result<Self> {
        let to_postgres = Proxy::to(local(postgres.port())).await?;
        let to_redis = Proxy::to(local(redis.port())).await?;
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let database = format!("postgres://postgres@{}/postgres", to_postgres.address());
        let mut setup = Setup::sim().with(&["--no-default-template", "--pool", "none"]);
        setup = setup.with(&["--migrate", "--log-level", "info"]);
        setup.listen = format!("127.0.0.1:{port}");
        let env = [
            ("DATABASE_URL", database),
            ("POSTGRES_SSLMODE", "disable".to_owned()),
            ("REDIS_ADDR", to_redis.address().to_string()),
            ("AETHER_WORKER_HOST", format!("member-{number}")),
            ("AETHER_WORKER_HEARTBEAT", "1s".to_owned()),
            ("AETHER_WORKER_LEASE", format!("{}s", LEASE.as_secs())),
        ];
        setup.env = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let shift = NamedTempFile::new()?;
        if hosts {
            setup.disk_mb = Some(DISK_MB);
            setup.env.extend(shifted_by(shift.path()));
        }
        let url = format!("http://{}", setup.listen);
        let platform = block_in_place(|| Platform::start(setup))?;
        let member = Self { platform, url, postgres: to_postgres, redis: to_redis, shift };
        Ok(member)
    }

    pub(crate) fn shift_clock(&self, seconds: i32) -> Result<()> {
        Ok(std::fs::write(self.shift.path(), format!("{seconds:+}s"))?)
    }

    pub(crate) fn worker(&self) -> Result<WorkerId> {
        let id = std::fs::read_to_string(self.platform.data_dir().join("worker-id"))?;
        id.trim().parse().context("the worker's id")
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.platform.pid().context("it does not run")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Goes on, where it was stopped.
    fn proceed(&self) {
        let _ = self.signal(Signal::CONT);
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        block_in_place(|| self.platform.kill())
    }

    /// Where it does not run.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        if self.platform.pid().is_some() {
            return Ok(());
        }
        block_in_place(|| self.platform.restart())
    }
}
