//! Commands.

use std::time::Duration;

use aether_protocol::host::RunEvent;
use aether_protocol::{Cause, EnvVar, ErrorCode, ExitStatus, Run, Stream, TtySize};
use bytes::Bytes;

use crate::harness::{TestAgent, finish, gone, next, sh, wait_for};

#[tokio::test]
async fn exit_code_streams_and_lengths_are_reported() {
    let agent = TestAgent::start();
    let outcome = agent.sh("printf out; printf error >&2; exit 3").await;
    assert_eq!(outcome.stdout, b"out");
    assert_eq!(outcome.stderr, b"error");
    assert_eq!(outcome.exited.status(), ExitStatus::Code(3));
    assert_eq!(outcome.exited.cause(), Cause::Exited);
    assert_eq!((outcome.exited.stdout_bytes, outcome.exited.stderr_bytes), (3, 5));
    assert!(outcome.exited.duration_us > 0);
}

#[tokio::test]
async fn signal_that_ended_a_command_is_reported() {
    let agent = TestAgent::start();
    assert_eq!(agent.sh("kill -9 $$").await.exited.status(), ExitStatus::Signal(9));
}

#[tokio::test]
async fn unknown_command_is_127_and_a_plain_file_126() {
    let agent = TestAgent::start();
    let outcome = agent.run(Run { command: "no-such-tool".into(), ..Run::default() }).await;
    assert_eq!(outcome.exited.status(), ExitStatus::Code(127));
    assert_eq!(outcome.stderr, b"aether: no-such-tool: command not found\n");
    let path = agent.path("plain");
    std::fs::write(&path, "text").unwrap();
    let command = agent.path_text("plain");
    let outcome = agent.run(Run { command, ..Run::default() }).await;
    assert_eq!(outcome.exited.status(), ExitStatus::Code(126));
    assert!(String::from_utf8(outcome.stderr).unwrap().contains("Permission denied"));
}

#[tokio::test]
async fn script_without_interpreter_line_runs_in_the_shell() {
    use std::os::unix::fs::PermissionsExt as _;
    let agent = TestAgent::start();
    std::fs::write(agent.path("script"), "echo \"$0:$1\"").unwrap();
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(agent.path("script"), mode).unwrap();
    let env = vec![EnvVar::new("PATH", agent.path_text(""))];
    let args = vec!["x".into()];
    let outcome = agent.run(Run { command: "script".into(), args, env, ..Run::default() }).await;
    assert!(String::from_utf8(outcome.stdout).unwrap().ends_with("/script:x\n"));
}

#[tokio::test]
async fn unknown_user_and_directory_are_refused() {
    let agent = TestAgent::start();
    let user = Some("no-such-user".to_owned());
    let error = agent.begin(Run { user, ..sh("true") }).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NoSuchUser));
    let cwd = Some("/no/such/directory".to_owned());
    let error = agent.begin(Run { cwd, ..sh("true") }).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NoSuchDirectory));
}

#[tokio::test]
async fn user_directory_and_environment_are_those_asked_for() {
    let agent = TestAgent::start();
    let run = Run {
        user: Some("12345:54321".into()),
        cwd: Some("/usr".into()),
        env: vec![EnvVar::new("GREETING", "hello there")],
        ..sh("id -u; id -g; id -G; pwd; echo $GREETING; echo $HOME; umask; ulimit -c >/dev/null")
    };
    let outcome = agent.run(run).await;
    let text = String::from_utf8(outcome.stdout).unwrap();
    assert_eq!(text, "12345\n54321\n54321\n/usr\nhello there\n/\n0022\n");
}

#[tokio::test]
async fn nothing_of_the_agent_is_inherited() {
    let agent = TestAgent::start();
    let outcome =
        agent.sh("ls /proc/self/fd | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status").await;
    let text = String::from_utf8(outcome.stdout).unwrap();
    let mut lines = text.lines();
    // Three streams, and the directory that is being listed.
    assert_eq!(lines.next(), Some("4"));
    assert_eq!(lines.next(), Some("SigBlk:\t0000000000000000"));
    let ignored = lines.next().unwrap().strip_prefix("SigIgn:\t").unwrap();
    // Without the real-time signals, of which the C library keeps some to itself.
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & 0x7FFF_FFFF, 0);
}

#[tokio::test]
async fn binary_output_survives() {
    let agent = TestAgent::start();
    let outcome = agent.sh("for i in 0 1 2 3; do printf '\\000\\377\\n\\r\\200'; done").await;
    assert_eq!(outcome.stdout, b"\0\xff\n\r\x80".repeat(4));
}

#[tokio::test]
async fn stdin_of_any_length_goes_through_and_ends() {
    let agent = TestAgent::start();
    let mut session = agent.begin(Run { stdin: true, ..sh("wc -c; exit 4") }).await.unwrap();
    session.input().stdin(Bytes::from_static(b"abc")).await.unwrap();
    let (mut input, mut output) = session.split();
    let length = 5_000_000;
    let send = async {
        input.stdin(Bytes::from(vec![b'x'; length])).await.unwrap();
        input.stdin_eof().await.unwrap();
        input
    };
    let receive = async {
        let mut said = Vec::new();
        loop {
            match output.next().await.unwrap() {
                RunEvent::Output { data, .. } => said.extend_from_slice(&data),
                RunEvent::Exited(exited) => return (said, exited),
            }
        }
    };
    let (_input, (said, exited)) = tokio::join!(send, receive);
    assert_eq!(String::from_utf8(said).unwrap().trim(), (length + 3).to_string());
    assert_eq!(exited.status(), ExitStatus::Code(4));
}

#[tokio::test]
async fn cancel_is_not_stuck_behind_stdin_that_nobody_reads() {
    let agent = TestAgent::start();
    let session = agent.begin(Run { stdin: true, ..sh("exec sleep 1000") }).await.unwrap();
    let (mut input, mut output) = session.split();
    let stuck = input.stdin(Bytes::from(vec![0; 10_000_000]));
    // The window is full long before that much is sent.
    assert!(tokio::time::timeout(Duration::from_millis(300), stuck).await.is_err());
    input.cancel().await.unwrap();
    let RunEvent::Exited(exited) = output.next().await.unwrap() else { panic!("output") };
    assert_eq!(exited.cause(), Cause::Cancelled);
    assert_eq!(exited.status(), ExitStatus::Signal(15));
}

#[tokio::test]
async fn time_limit_asks_first_and_kills_after_the_grace() {
    let agent = TestAgent::start();
    let run = Run { timeout_ms: 100, ..sh("trap 'echo asked; exit 9' TERM; sleep 1000 & wait") };
    let outcome = agent.run(run).await;
    assert_eq!(outcome.exited.cause(), Cause::TimedOut);
    assert_eq!(outcome.exited.status(), ExitStatus::Code(9));
    assert_eq!(outcome.stdout, b"asked\n");
    let stubborn = "trap '' TERM; while :; do sleep 1000; done";
    let run = Run { timeout_ms: 100, kill_grace_ms: Some(100), ..sh(stubborn) };
    let outcome = agent.run(run).await;
    assert_eq!(outcome.exited.cause(), Cause::TimedOut);
    assert_eq!(outcome.exited.status(), ExitStatus::Signal(9));
}

#[tokio::test]
async fn cancel_ends_the_whole_group() {
    let agent = TestAgent::start();
    // The child ignores the first signal, and its parent does not wait for it.
    let script = "(trap '' TERM; exec sleep 1000) & echo $!; wait";
    let mut session = agent.begin(sh(script)).await.unwrap();
    let child = wait_for(&mut session, "\n").await;
    session.input().cancel().await.unwrap();
    let outcome = finish(&mut session).await;
    assert_eq!(outcome.exited.cause(), Cause::Cancelled);
    gone(child.trim()).await;
}

#[tokio::test]
async fn lost_connection_kills_group_and_session() {
    let agent = TestAgent::start();
    // The second one is in a group of its own, as the jobs of an interactive shell are.
    let script = "sleep 1000 & echo $!; set -m; sleep 1000 & echo $!; echo end; wait";
    let mut session = agent.begin(sh(script)).await.unwrap();
    let said = wait_for(&mut session, "end").await;
    let pid = session.started().pid.to_string();
    drop(session);
    for pid in said.lines().take(2).chain([pid.as_str()]) {
        gone(pid).await;
    }
}

#[tokio::test]
async fn background_process_that_keeps_the_pipe_does_not_hold_up_the_end() {
    let agent = TestAgent::start();
    let outcome = agent.sh("sleep 1000 & echo $!").await;
    let pid = String::from_utf8(outcome.stdout).unwrap();
    assert_eq!(outcome.exited.status(), ExitStatus::Code(0));
    // It was left alone, as under any shell.
    assert!(crate::harness::is_alive(pid.trim()));
    agent.sh(&format!("kill -9 {pid}")).await;
}

#[tokio::test]
async fn hundred_megabytes_arrive_whole_with_bounded_memory_while_the_reader_stalls() {
    let agent = TestAgent::start();
    let count = 100_000_000_usize;
    let script = format!("yes 0123456 | head -c {count}; printf end >&2");
    let mut session = agent.begin(sh(&script)).await.unwrap();
    // Not reading holds back this command only.
    for _ in 0..10 {
        assert_eq!(agent.sh("echo other").await.stdout, b"other\n");
    }
    let (mut read, mut peak) = (0, 0);
    let exited = loop {
        match next(&mut session).await {
            RunEvent::Output { stream: Stream::Stdout, data, offset } => {
                assert_eq!(offset, read as u64);
                let wanted = b"0123456\n".iter().cycle().skip(read % 8);
                assert!(data.iter().zip(wanted).all(|(a, b)| a == b));
                read += data.len();
                peak = peak.max(agent.resident_kib());
            }
            RunEvent::Output { data, .. } => assert_eq!(data, &b"end"[..]),
            RunEvent::Exited(exited) => break exited,
        }
    };
    assert_eq!(read, count);
    assert_eq!(exited.stdout_bytes, count as u64);
    assert!(peak < 12 * 1024, "{peak} KiB");
}

#[tokio::test]
async fn sixty_four_commands_at_once_work() {
    let agent = TestAgent::start();
    let mut sessions = Vec::new();
    for number in 0..64 {
        let run = Run { stdin: true, ..sh(&format!("read line; echo $line {number}")) };
        sessions.push(agent.begin(run).await.unwrap());
    }
    assert_eq!(
        aether_protocol::host::ping(agent.connect().await, &agent.token, crate::harness::LIMIT)
            .await
            .unwrap()
            .runs,
        64
    );
    for session in &mut sessions {
        session.input().stdin(Bytes::from_static(b"go\n")).await.unwrap();
    }
    for (number, session) in sessions.iter_mut().enumerate() {
        assert_eq!(finish(session).await.stdout, format!("go {number}\n").into_bytes());
    }
    assert!(agent.resident_kib() < 24 * 1024, "{} KiB", agent.resident_kib());
}

#[tokio::test]
async fn terminal_is_one_and_can_be_resized() {
    let agent = TestAgent::start();
    let tty = Some(TtySize { rows: 24, cols: 80 });
    let script = "trap 'stty size; exit 5' WINCH; tty; stty size; test -t 0 && test -t 2 && \
                  echo terminal; echo ready; while :; do sleep 0.05; done";
    let mut session = agent.begin(Run { tty, ..sh(script) }).await.unwrap();
    let said = wait_for(&mut session, "ready").await;
    assert!(said.contains("/dev/pts/"), "{said}");
    assert!(said.contains("24 80\r\nterminal\r\n"), "{said}");
    session.input().resize(50, 132).await.unwrap();
    let outcome = finish(&mut session).await;
    assert!(String::from_utf8_lossy(&outcome.stdout).contains("50 132"));
    assert_eq!(outcome.exited.status(), ExitStatus::Code(5));
}

#[tokio::test]
async fn terminal_takes_keys_and_their_signals() {
    let agent = TestAgent::start();
    let tty = Some(TtySize { rows: 24, cols: 80 });
    let mut session =
        agent.begin(Run { tty, ..sh("cat; echo after; exec sleep 1000") }).await.unwrap();
    session.input().stdin(Bytes::from_static(b"typed\n")).await.unwrap();
    wait_for(&mut session, "typed\r\ntyped").await;
    session.input().stdin_eof().await.unwrap();
    wait_for(&mut session, "after").await;
    session.input().stdin(Bytes::from_static(&[3])).await.unwrap();
    assert_eq!(finish(&mut session).await.exited.status(), ExitStatus::Signal(2));
}

#[tokio::test]
async fn signals_reach_the_command() {
    let agent = TestAgent::start();
    let script = "trap 'echo got; exit 6' USR1; echo ready; while :; do sleep 0.05; done";
    let mut session = agent.begin(sh(script)).await.unwrap();
    wait_for(&mut session, "ready").await;
    session.input().signal(10).await.unwrap();
    let outcome = finish(&mut session).await;
    assert_eq!(outcome.stdout, b"got\n");
    assert_eq!(outcome.exited.status(), ExitStatus::Code(6));
}
