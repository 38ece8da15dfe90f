//! A guest that becomes another: its token, its boot id, and who is cut off.

use aether_protocol::host::{self, ClientError};
use aether_protocol::{
    Attach, Cause, Configure, Configured, EnvVar, Environment, ErrorCode, Interface, Run, RunState,
    Token,
};
use bytes::Bytes;

use crate::harness::{LIMIT, TestAgent, finish, gone, is_alive, sh, wait_for};

impl TestAgent {
    async fn configure(
        &self,
        token: &Token,
        request: Configure,
    ) -> Result<Configured, ClientError> {
        host::configure(self.connect().await, token, request, LIMIT).await
    }
}

fn new_token(byte: u8) -> (Token, Option<Bytes>) {
    (Token::from_bytes([byte; 32]), Some(vec![byte; 32].into()))
}

fn restored() -> Configure {
    let entropy = Bytes::from_static(b"as random as a test needs it, 32");
    Configure { restored: true, entropy, ..Configure::default() }
}

#[tokio::test]
async fn new_token_takes_the_place_of_the_old_one() {
    let agent = TestAgent::start();
    let mut session = agent.begin(sh("echo ready; exec sleep 1000")).await.unwrap();
    wait_for(&mut session, "ready").await;
    let (token, bytes) = new_token(7);
    let request = Configure { new_token: bytes, ..Configure::default() };
    let configured = agent.configure(&agent.token, request.clone()).await.unwrap();
    assert_eq!(configured.boot_id, "test.1");

    let error = host::ping(agent.connect().await, &agent.token, LIMIT).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Unauthorized));
    assert_eq!(host::ping(agent.connect().await, &token, LIMIT).await.unwrap().boot_id, "test.1");
    // A host that has lost the answer asks again.
    agent.configure(&token, request).await.unwrap();
    host::ping(agent.connect().await, &token, LIMIT).await.unwrap();
    // Who was in stays in.
    session.input().cancel().await.unwrap();
    assert_eq!(finish(&mut session).await.exited.cause(), Cause::Cancelled);
}

#[tokio::test]
async fn token_of_a_wrong_length_changes_nothing() {
    let agent = TestAgent::start();
    let request = Configure { new_token: Some(vec![7; 31].into()), ..Configure::default() };
    let error = agent.configure(&agent.token, request).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::InvalidArgument));
    host::ping(agent.connect().await, &agent.token, LIMIT).await.unwrap();
}

#[tokio::test]
async fn restored_guest_is_another_and_its_processes_go_on() {
    let Some(agent) = TestAgent::start_apart() else { return };
    let vars = vec![EnvVar::new("SECRET", "of the source")];
    let env = Some(Environment { vars });
    agent.configure(&agent.token, Configure { env, ..Configure::default() }).await.unwrap();
    let detached =
        |run_id: &str, script| Run { run_id: run_id.into(), detached: true, ..sh(script) };
    let mut attached = agent.begin(sh("echo $$; exec sleep 1000")).await.unwrap();
    let pid = wait_for(&mut attached, "\n").await.trim().to_owned();
    let mut kept = agent.begin(detached("kept", "echo ready; exec sleep 1000")).await.unwrap();
    wait_for(&mut kept, "ready").await;
    let ended = agent.run(detached("ended", "echo output of the source")).await;
    assert_eq!(ended.stdout, b"output of the source\n");

    let (token, bytes) = new_token(8);
    let request = Configure { new_token: bytes, ..restored() };
    let configured = agent.configure(&agent.token, request).await.unwrap();
    assert_eq!(configured.warnings, [""; 0]);
    assert_ne!(configured.boot_id, "test.1");

    // Connections of the source are cut off, and an attached run ends with its own.
    assert!(attached.next().await.unwrap_err().is_connection_lost());
    assert!(kept.next().await.unwrap_err().is_connection_lost());
    gone(&pid).await;
    assert!(is_alive(&kept.started().pid.to_string()));
    let runs = host::list_runs(agent.connect().await, &token, LIMIT).await.unwrap().runs;
    let detached: Vec<_> = runs.iter().filter(|run| run.detached).collect();
    assert_eq!(detached.len(), 1);
    assert_eq!((detached[0].run_id.as_str(), detached[0].state()), ("kept", RunState::Running));

    let script = sh("echo \"[$SECRET]\"");
    let mut session = host::run(agent.connect().await, &token, script, LIMIT).await.unwrap();
    assert_eq!(finish(&mut session).await.stdout, b"[]\n");
    assert_eq!(session.boot_id(), configured.boot_id);
    let attach = Attach { run_id: "kept".into(), ..Attach::default() };
    let mut session = host::attach(agent.connect().await, &token, attach, LIMIT).await.unwrap();
    session.input().cancel().await.unwrap();
    assert_eq!(finish(&mut session).await.exited.cause(), Cause::Cancelled);

    // Once more it is yet another.
    let again = agent.configure(&token, restored()).await.unwrap();
    assert_ne!(again.boot_id, configured.boot_id);
}

/// One line of text of a command in the agent's network.
async fn line(agent: &TestAgent, token: &Token, script: &str) -> String {
    let mut session = host::run(agent.connect().await, token, sh(script), LIMIT).await.unwrap();
    let outcome = finish(&mut session).await;
    assert_eq!(outcome.stderr, b"", "{script}");
    String::from_utf8(outcome.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn interface_of_a_restored_guest_has_nothing_of_the_sources() {
    let Some(agent) = TestAgent::start_apart() else { return };
    let token = &agent.token;
    let source = "
        set -e
        ip link set lo up
        ip link add dev eth7 address 02:00:00:00:00:01 mtu 1400 type veth peer name eth8
        ip link set eth8 up
        ip link set eth7 up
        ip address add 10.9.0.2/24 dev eth7
        ip address add 10.9.0.77/24 dev eth7
        ip address add fd09::2/64 dev eth7 nodad
        ip route add default via 10.9.0.1 dev eth7
        ip route add 10.77.0.0/16 via 10.9.0.1 dev eth7
        ip -6 route add fd77::/64 via fd09::1 dev eth7
        ip -6 route add default via fd09::1 dev eth7
        ip neighbour add 10.9.0.1 lladdr 02:00:00:00:00:99 dev eth7
        ip -6 neighbour add fd09::1 lladdr 02:00:00:00:00:99 dev eth7";
    line(&agent, token, source).await;
    let interface = Interface {
        mac: "02:00:00:00:00:01".into(),
        new_mac: Some("02:00:00:00:00:0a".into()),
        addresses: vec!["10.9.0.2/24".into(), "10.8.0.2/30".into(), "fd08::2/64".into()],
        gateways: vec!["10.8.0.1".into(), "fd08::1".into()],
        mtu: Some(1300),
    };
    let interfaces = vec![interface];
    // Twice has the effect of once: the second finds the device by its new MAC.
    for request in [
        Configure { interfaces: interfaces.clone(), ..restored() },
        Configure { interfaces: interfaces.clone(), ..restored() },
        Configure { interfaces, ..Configure::default() },
    ] {
        let configured = agent.configure(token, request).await.unwrap();
        assert_eq!(configured.warnings, [""; 0]);
        let link = line(&agent, token, "ip -o link show dev eth7").await;
        assert!(link.contains("mtu 1300") && link.contains("02:00:00:00:00:0a"), "{link}");
        let addresses = "ip -o address show dev eth7 | awk '{print $4}' | sort | xargs";
        let wanted = "10.8.0.2/30 10.9.0.2/24 fd08::2/64 fe80::ff:fe00:a/64";
        assert_eq!(line(&agent, token, addresses).await, wanted);
        let routes = line(&agent, token, "ip route; ip -6 route show dev eth7").await;
        assert!(routes.contains("default via 10.8.0.1"), "{routes}");
        assert!(routes.contains("default via fd08::1"), "{routes}");
        for gone in ["via 10.9.0.1", "10.77.", "fd77::", "fd09::"] {
            assert!(!routes.contains(gone), "{gone} in {routes}");
        }
        let neighbours = line(&agent, token, "ip neighbour show nud all dev eth7").await;
        assert!(!neighbours.contains("02:00:00:00:00:99"), "{neighbours}");
    }
}
