//! The contract on containers, under an engine of the test's own: its socket, its data and its
//! programs go with the test.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use self::engine::Engine;
use crate::{
    layers,
    rig::{Kind, Rig},
    suite,
};
use aether_drivers::{DriverError, MachineSpec, Start, docker::DockerConfig};

/// Also of the tests of the whole platform.
#[expect(unreachable_pub, reason = "it is shown by a library too")]
#[path = "../../../../tests/src/engine.rs"]
mod engine;

/// In a rig's folder: the socket of its engine, for the processes of a test.
const SOCKET_FILE: &str = "engine";

/// The engine of this test process.
static SOCKET: OnceLock<PathBuf> = OnceLock::new();

/// What a rig in this folder drives.
pub(crate) fn config(folder: &Path) -> Result<DockerConfig, String> {
    let file = folder.join(SOCKET_FILE);
    let socket = match SOCKET.get() {
        Some(socket) => {
            std::fs::write(&file, socket.to_str().unwrap()).map_err(|e| e.to_string())?;
            socket.clone()
        }
        None => std::fs::read_to_string(&file).map_err(|e| format!("no engine: {e}"))?.into(),
    };
    Ok(DockerConfig { socket })
}

/// Every container of the rig's engine.
pub(crate) fn containers(folder: &Path) -> Vec<String> {
    engine::containers(&config(folder).expect("an engine").socket).expect("the engine answers")
}

/// One engine and one import for all of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_guest_docker_holds_the_contract() {
    let engine = match Engine::start() {
        Ok(engine) => engine,
        Err(reason) => {
            println!("skipped: Docker: {reason}");
            return;
        }
    };
    SOCKET.set(engine.socket()).unwrap();
    let rig = async || Rig::open(Kind::Docker).await;
    let Some(first) = rig().await else { return };
    println!("{:?}", first.driver().capabilities());
    suite::lifecycle(first).await;
    suite::delete_from_every_state(rig().await.unwrap()).await;
    suite::exit_reasons(rig().await.unwrap()).await;
    suite::adoption(rig().await.unwrap()).await;
    suite::start_is_bounded(rig().await.unwrap()).await;
    suite::channel(rig().await.unwrap(), 64, 64).await;
    layers::many_and_wrong(rig().await.unwrap()).await;
    tools_stay_over_a_start(rig().await.unwrap()).await;
    is_confined(rig().await.unwrap()).await;
    a_link_is_not_followed(rig().await.unwrap()).await;
}

/// Each step fails once, and each kills the worker once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_guest_docker_leaves_nothing_when_a_step_fails() {
    let Ok(engine) = Engine::start() else { return };
    SOCKET.set(engine.socket()).unwrap();
    let Some(rig) = Rig::open(Kind::Docker).await else { return };
    suite::faults(rig).await;
    let rig = Rig::open(Kind::Docker).await.unwrap();
    suite::crashes(rig, "docker::crashing_worker").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashing_worker() {
    suite::crashing_worker(Kind::Docker).await;
}

/// With what was written to `/usr`, and mounted only while the container runs.
async fn tools_stay_over_a_start(rig: Rig) {
    let tools = layers::Tools::new();
    let layers = vec![tools.layer("one", "1", 100), tools.layer("one", "2", 70_000)];
    let spec = MachineSpec { layers: layers.clone(), ..rig.spec() };
    let vm = layers::boot(&rig, spec).await;
    let ask = "one; echo mine >>/usr/bin/own; cat /usr/bin/own";
    assert_eq!(rig.sh(&vm, ask).await.0, b"one 2\nmine\n");
    for layer in &layers {
        std::fs::remove_file(&layer.path).unwrap();
    }
    let driver = rig.driver();
    let mounts =
        || std::fs::read_to_string("/proc/mounts").unwrap().matches(&vm.id.to_string()).count();
    assert_eq!(mounts(), 4);
    driver.kill(vm.id).await.unwrap();
    assert_eq!(mounts(), 0);
    driver.start(vm.id, Start::Boot, rig.boot_limit()).await.expect("start again");
    assert_eq!(rig.sh(&vm, ask).await.0, b"one 2\nmine\nmine\n");
    // A snapshot, a template and a builder are refused in words.
    let builder = MachineSpec { output_mb: Some(64), ..rig.spec() };
    let refused = driver.create(builder).await.unwrap_err();
    assert!(matches!(refused, DriverError::Unavailable(_)), "{refused:?}");
    driver.delete(vm.id).await.unwrap();
    rig.close().await;
}

/// What a container has not: capabilities, privileges, the host's devices, the token, a way out that
/// the policy does not name.
async fn is_confined(rig: Rig) {
    let vm = rig.boot().await;
    let text = async |script: &str| String::from_utf8(rig.sh(&vm, script).await.0).unwrap();
    let status = text("cat /proc/self/status").await;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().to_owned()
    };
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".to_owned(), "2".to_owned()));
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE, SYS_CHROOT.
    assert_eq!(u64::from_str_radix(&field("CapBnd:"), 16).unwrap(), 0x0004_04fb);
    assert_eq!(text("ls /run/aether").await, "agent.sock\nready.sock\n");
    assert_eq!(
        text("setpriv --reuid 1000 ls /run/aether 2>&1 || echo closed").await.lines().last(),
        Some("closed")
    );
    assert_eq!(text("mount -t tmpfs x /mnt 2>/dev/null || echo closed").await, "closed\n");
    assert_eq!(text("ls /dev/vd* /dev/sd* /dev/kmsg 2>/dev/null").await, "");
    let links = text("ls /sys/class/net").await;
    assert!(links.contains("eth0"), "{links}");
    let address = rig.driver().inspect(vm.id).await.unwrap().unwrap().network.unwrap();
    let (ip, prefix) = address.addresses[0];
    let own = text("ip -4 -o addr show eth0; ip route").await;
    assert!(own.contains(&format!("{ip}/{prefix}")), "{own}");
    assert!(own.contains(&format!("default via {}", address.gateways[0])), "{own}");
    // The host's own side of the link is closed, as for every VM.
    let closed = format!(
        "timeout 3 bash -c 'exec 3<>/dev/tcp/{}/80' 2>/dev/null || echo closed",
        address.gateways[0]
    );
    assert_eq!(text(&closed).await, "closed\n");
    rig.driver().delete(vm.id).await.unwrap();
    rig.close().await;
}

/// A socket that the container puts in the place of the agent's is not followed.
async fn a_link_is_not_followed(rig: Rig) {
    let vm = rig.boot().await;
    rig.sh_last(&vm, "rm /run/aether/agent.sock; ln -s /run/docker.sock /run/aether/agent.sock")
        .await;
    let driver = rig.driver();
    let limit = Duration::from_secs(5);
    let error = driver.connect(vm.id, aether_protocol::AGENT_PORT, limit).await.map(drop);
    assert!(error.is_err(), "a link was followed");
    driver.delete(vm.id).await.unwrap();
    rig.close().await;
}
