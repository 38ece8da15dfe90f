//! Runs that outlive their connection.

use aether_protocol::host::{self, ClientError, RunSession};
use aether_protocol::limits::RETAINED_BYTES_MAX;
use aether_protocol::{Attach, Cause, ErrorCode, ExitStatus, Forget, Run, RunState};

use crate::harness::{LIMIT, TestAgent, finish, is_alive, sh, wait_for};

fn detached(run_id: &str, script: &str) -> Run {
    Run { run_id: run_id.into(), detached: true, ..sh(script) }
}

impl TestAgent {
    async fn attach(&self, run_id: &str, offset: u64) -> Result<RunSession, ClientError> {
        let attach = Attach { run_id: run_id.into(), stdout_offset: offset, stderr_offset: 0 };
        host::attach(self.connect().await, &self.token, attach, LIMIT).await
    }

    async fn forget(&self, run_id: &str) -> Result<(), ClientError> {
        let forget = Forget { run_id: run_id.into() };
        host::forget(self.connect().await, &self.token, forget, LIMIT).await.map(drop)
    }
}

#[tokio::test]
async fn detached_run_survives_its_connection_and_goes_on_where_asked() {
    let agent = TestAgent::start();
    let script = "echo one; read line < fifo; echo two; exit 7";
    let cwd = Some(agent.path_text(""));
    agent.sh(&format!("mkfifo {}", agent.path_text("fifo"))).await;
    let mut session = agent.begin(Run { cwd, ..detached("a", script) }).await.unwrap();
    wait_for(&mut session, "one\n").await;
    let pid = session.started().pid;
    drop(session);

    let mut session = agent.attach("a", 0).await.unwrap();
    assert_eq!(session.started().pid, pid);
    wait_for(&mut session, "one\n").await;
    drop(session);
    assert!(is_alive(&pid.to_string()));

    let mut session = agent.attach("a", 4).await.unwrap();
    agent.sh(&format!("echo go > {}", agent.path_text("fifo"))).await;
    let outcome = finish(&mut session).await;
    assert_eq!(outcome.stdout, b"two\n");
    assert_eq!(outcome.exited.status(), ExitStatus::Code(7));
    assert_eq!(outcome.exited.stdout_bytes, 8);

    // It has ended, and is kept until it is forgotten.
    let outcome = finish(&mut agent.attach("a", 2).await.unwrap()).await;
    assert_eq!(outcome.stdout, b"e\ntwo\n");
    agent.forget("a").await.unwrap();
    let error = agent.attach("a", 0).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::UnknownRun));
}

#[tokio::test]
async fn run_id_is_taken_once() {
    let agent = TestAgent::start();
    let session = agent.begin(detached("a", "exec sleep 1000")).await.unwrap();
    let error = agent.begin(detached("a", "true")).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::RunExists));
    assert_eq!(agent.forget("a").await.unwrap_err().code(), Some(ErrorCode::RunActive));
    let runs = host::list_runs(agent.connect().await, &agent.token, LIMIT).await.unwrap().runs;
    assert_eq!(runs.len(), 1);
    assert_eq!((runs[0].run_id.as_str(), runs[0].state()), ("a", RunState::Running));
    assert_eq!(runs[0].pid, session.started().pid);
    agent.sh(&format!("kill -9 {}", runs[0].pid)).await;
}

#[tokio::test]
async fn nothing_is_lost_while_nobody_watches() {
    let agent = TestAgent::start();
    let count = 3_000_000_usize;
    let script = format!("yes 0123456 | head -c {count}; echo done >&2");
    drop(agent.begin(detached("a", &script)).await.unwrap());
    // Whatever the first connection was sent is past; the rest has waited in buffer and pipe.
    let mut session = agent.attach("a", 0).await.unwrap();
    let start = usize::try_from(session.started().stdout_offset).unwrap();
    let outcome = finish(&mut session).await;
    assert_eq!(outcome.stdout.len(), count - start);
    let wanted = b"0123456\n".iter().cycle().skip(start % 8);
    assert!(outcome.stdout.iter().zip(wanted).all(|(a, b)| a == b));
    assert_eq!(outcome.stderr, b"done\n");
    assert_eq!(outcome.exited.stdout_bytes, count as u64);
    // Of what was sent the end is kept.
    let again = agent.attach("a", 0).await.unwrap();
    assert_eq!(again.started().stdout_offset, (count - RETAINED_BYTES_MAX) as u64);
}

#[tokio::test]
async fn newest_attachment_replaces_the_one_before() {
    let agent = TestAgent::start();
    let mut first = agent.begin(detached("a", "echo ready; exec sleep 1000")).await.unwrap();
    wait_for(&mut first, "ready").await;
    let mut second = agent.attach("a", 0).await.unwrap();
    let error = first.next().await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Replaced));
    wait_for(&mut second, "ready").await;
    second.input().cancel().await.unwrap();
    assert_eq!(finish(&mut second).await.exited.cause(), Cause::Cancelled);
}

#[tokio::test]
async fn detached_command_that_is_not_found_is_kept_like_any_other() {
    let agent = TestAgent::start();
    let run = Run { command: "no-such-tool".into(), args: Vec::new(), ..detached("a", "") };
    drop(agent.begin(run).await.unwrap());
    let outcome = finish(&mut agent.attach("a", 0).await.unwrap()).await;
    assert_eq!(outcome.exited.status(), ExitStatus::Code(127));
    assert_eq!(outcome.stderr, b"aether: no-such-tool: command not found\n");
}

#[tokio::test]
async fn time_limit_holds_while_nobody_watches() {
    let agent = TestAgent::start();
    let run = Run { timeout_ms: 50, ..detached("a", "exec sleep 1000") };
    drop(agent.begin(run).await.unwrap());
    let outcome = finish(&mut agent.attach("a", 0).await.unwrap()).await;
    assert_eq!(outcome.exited.cause(), Cause::TimedOut);
}
