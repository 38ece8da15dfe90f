//! The whole platform over containers.

use aether_api::{
    StreamEvent, TerminalStart,
    client::{CallOptions, ReadOptions, Waited, WriteOptions},
};
use aether_tests::{
    Platform, Setup,
    engine::{Engine, containers},
    platform::{can_run_guests, small_vm},
};
use aether_types::{DriverKind, TtySize, VmState};
use anyhow::{Context, Result, ensure};
use bytes::Bytes;

#[tokio::test]
async fn a_container_lives_as_a_vm_does() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let engine = match Engine::start() {
        Ok(engine) => engine,
        Err(reason) => {
            println!("skipped: {reason}");
            return Ok(());
        }
    };
    let socket = engine.socket();
    let text = socket.to_str().context("a path that is no text")?;
    let setup = Setup::of("docker").with(&["--docker-socket", text]);
    let mut platform = Platform::start(setup)?;
    ensure!(platform.log().contains("weak isolation"), "{}", platform.log());

    let vm = platform.create(&small_vm("boxed")).await?;
    ensure!(vm.driver == DriverKind::Docker, "{vm:?}");
    ensure!(vm.isolation.as_deref().is_some_and(|words| words.contains("weak")), "{vm:?}");
    ensure!(platform.log().contains("a VM that is a container"), "{}", platform.log());
    let id = vm.id.to_string();
    commands(&platform, &id).await?;
    files(&platform, &id).await?;
    terminal(&platform, &id).await?;

    // A worker that is killed finds it again.
    platform.kill()?;
    platform.restart()?;
    let execution = platform.execute(&id, &["cat", "/root/file"]).await?;
    ensure!(execution.stdout.as_deref() == Some("kept"), "{execution:?}");
    stop_and_start(&platform, &id).await?;

    platform.delete(&id).await?;
    ensure!(containers(&socket)?.is_empty(), "{:?}", containers(&socket)?);
    let left = platform.create(&small_vm("left")).await?;
    ensure!(left.state == VmState::Running, "{left:?}");
    platform.delete(&left.id.to_string()).await?;
    platform.finish()?;
    ensure!(containers(&socket)?.is_empty(), "{:?}", containers(&socket)?);
    Ok(())
}

async fn commands(platform: &Platform, vm: &str) -> Result<()> {
    let script = "id -un; cat /etc/hostname; echo err >&2; exit 3";
    let execution = platform.execute(vm, &["sh", "-c", script]).await?;
    ensure!(execution.exit_code == Some(3), "{execution:?}");
    ensure!(execution.stdout.as_deref() == Some("root\nboxed\n"), "{execution:?}");
    ensure!(execution.stderr.as_deref() == Some("err\n"), "{execution:?}");
    // Memory that it may not have.
    let script = "head -c 1G /dev/zero | tail | wc -c";
    let greedy = platform.execute(vm, &["sh", "-c", script]).await?;
    ensure!(greedy.stdout.as_deref() != Some("1073741824\n"), "{greedy:?}");
    // Resolvers and a way out are set, as in a VM.
    let execution = platform.execute(vm, &["sh", "-c", "ip route; cat /etc/resolv.conf"]).await?;
    let said = execution.stdout.unwrap_or_default();
    ensure!(said.contains("default via"), "{said}");
    Ok(())
}

async fn files(platform: &Platform, vm: &str) -> Result<()> {
    let body = futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"kept"))]);
    let client = platform.client();
    client.write_file(vm, "/root/file", &WriteOptions::default(), body).await?;
    let mut file = client.read_file(vm, "/root/file", &ReadOptions::default()).await?;
    let first = file.next_chunk().await?.context("a file with something in it")?;
    ensure!(first == "kept", "{first:?}");
    Ok(())
}

async fn terminal(platform: &Platform, vm: &str) -> Result<()> {
    let tty = Some(TtySize { rows: 24, cols: 80 });
    let start = TerminalStart { tty, ..TerminalStart::default() };
    let (mut input, mut output) = platform.client().terminal(vm, &start).await?;
    input.stdin(Bytes::from_static(b"stty size; exit 7\n")).await?;
    let mut said = Vec::new();
    while let Some(event) = output.next().await? {
        match event {
            StreamEvent::Stdout { data } => said.extend_from_slice(&data),
            StreamEvent::End(end) => {
                let said = String::from_utf8_lossy(&said);
                ensure!(end.exit_code == Some(7) && said.contains("24 80"), "{end:?} {said}");
                return Ok(());
            }
            _ => {}
        }
    }
    anyhow::bail!("the shell did not end: {}", String::from_utf8_lossy(&said))
}

async fn stop_and_start(platform: &Platform, vm: &str) -> Result<()> {
    let (client, wait) = (platform.client(), CallOptions::waiting(aether_tests::platform::LONG));
    for running in [false, true] {
        let changed = if running {
            client.start_vm(vm, &wait).await?
        } else {
            client.stop_vm(vm, &wait).await?
        };
        ensure!(matches!(changed, Waited::Done(_)), "{changed:?}");
    }
    let execution = platform.execute(vm, &["cat", "/root/file"]).await?;
    ensure!(execution.stdout.as_deref() == Some("kept"), "{execution:?}");
    Ok(())
}
