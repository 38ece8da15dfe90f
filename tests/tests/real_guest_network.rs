//! What a guest can reach, tried from inside it.

use std::net::TcpListener;

use aether_tests::{
    Platform, Setup,
    platform::{can_run_guests, small_vm},
};
use aether_types::{Egress, NetworkPolicy};
use anyhow::{Context, Result, ensure};

/// Whether a connection is made, tried for three seconds.
async fn reaches(platform: &Platform, vm: &str, host: &str, port: u16) -> Result<bool> {
    let port = port.to_string();
    let execution = platform.execute(vm, &["nc", "-z", "-w", "3", host, &port]).await?;
    Ok(execution.exit_code == Some(0))
}

#[tokio::test]
async fn a_guest_reaches_what_it_may_and_nothing_else() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    let host = platform.host_address()?;
    // Two services of the host: one that is allowed to one VM, and one beside it.
    let allowed = TcpListener::bind((host, 0))?;
    let other = TcpListener::bind(("0.0.0.0", 0))?;
    let (allowed_port, other_port) = (allowed.local_addr()?.port(), other.local_addr()?.port());

    let closed = platform.create(&small_vm("closed")).await?;
    let closed_id = closed.id.to_string();
    let mut request = small_vm("open");
    let rule = format!("{host}:{allowed_port}").parse()?;
    request.network = Some(NetworkPolicy { allow: vec![rule], ..NetworkPolicy::default() });
    let open = platform.create(&request).await?;
    let open_id = open.id.to_string();
    let host = host.to_string();

    // A service in the other VM, so that a refusal is a refusal and not an empty port.
    let server = aether_api::ExecuteRequest {
        command: "/bin/sh".into(),
        args: vec!["-c".into(), "nc -l -k -p 7000 & nc -6 -l -k -p 7001 & echo up; wait".into()],
        ..aether_api::ExecuteRequest::default()
    };
    let mut serving = platform.client().execute_stream(&open_id, &server, None).await?;
    while !matches!(serving.next().await?, Some(aether_api::StreamEvent::Stdout { .. })) {}
    ensure!(reaches(&platform, &open_id, "127.0.0.1", 7000).await?, "the service does not listen");

    ensure!(reaches(&platform, &open_id, &host, allowed_port).await?, "the allowed port is closed");
    ensure!(!reaches(&platform, &open_id, &host, other_port).await?, "more than the rule is open");
    let neighbour = open.address.context("no address")?.to_string();
    let own_v6 = platform.execute(&open_id, &["ip", "-o", "-6", "address"]).await?;
    let mut targets = vec![
        (host.clone(), allowed_port, "the host"),
        (host, other_port, "the host's other port"),
        ("127.0.0.1".into(), other_port, "its own loopback, where nothing listens"),
        (neighbour, 7000, "another VM"),
        ("169.254.169.254".into(), 80, "cloud metadata"),
        ("10.0.0.1".into(), 80, "a private range"),
        ("172.16.0.1".into(), 80, "a private range"),
        ("192.168.0.1".into(), 80, "a private range"),
        ("fd00::2".into(), other_port, "a private IPv6 range"),
    ];
    for address in host_addresses()? {
        targets.push((address, other_port, "an address of the host"));
    }
    // The neighbour's link-local addresses, over each interface of our own.
    let stdout = own_v6.stdout.unwrap_or_default();
    for address in stdout.split_whitespace().filter_map(|word| word.split_once('/')) {
        if address.0.starts_with("fe80:") {
            targets.push((format!("{}%eth0", address.0), 7001, "another VM by link-local IPv6"));
        }
    }
    for (address, port, what) in targets {
        let reached = reaches(&platform, &closed_id, &address, port).await?;
        ensure!(!reached, "{what}: {address} port {port} is open\n{stdout}");
    }

    let mut request = small_vm("none");
    request.network = Some(NetworkPolicy { egress: Egress::None, allow: Vec::new() });
    let none = platform.create(&request).await?.id.to_string();
    ensure!(!reaches(&platform, &none, "1.1.1.1", 443).await?);

    for vm in [closed_id, open_id, none] {
        platform.delete(&vm).await?;
    }
    platform.finish()
}

fn host_addresses() -> Result<Vec<String>> {
    let output = std::process::Command::new("ip").args(["-o", "-4", "address"]).output()?;
    let listing = String::from_utf8(output.stdout)?;
    let addresses = listing
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3)?.split('/').next())
        .filter(|address| !address.starts_with("127."))
        .map(ToOwned::to_owned);
    Ok(addresses.collect())
}

/// Three VMs at once, each clones a repository from a real git server and checks out a commit of
/// its own.
#[tokio::test]
async fn three_vms_clone_and_check_out_at_once() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    let host = platform.host_address()?.to_string();
    let folder = tempfile::TempDir::new()?;
    let commits = make_repository(&folder.path().join("demo.git"))?;
    let server = GitServer::start(folder.path(), &host)?;
    let work = commits.iter().enumerate().map(|(n, commit)| {
        let (platform, host, port) = (&platform, &host, server.port);
        async move {
            let mut request = small_vm(&format!("clone-{n}"));
            let rule = format!("{host}:{port}").parse()?;
            request.network = Some(NetworkPolicy { allow: vec![rule], ..NetworkPolicy::default() });
            let vm = platform.create(&request).await?.id.to_string();
            let url = format!("git://{host}:{port}/demo.git");
            for command in [
                vec!["git", "clone", "--quiet", &url, "/root/demo"],
                vec!["git", "-C", "/root/demo", "checkout", "--quiet", commit],
            ] {
                let done = platform.execute(&vm, &command).await?;
                ensure!(done.exit_code == Some(0), "{done:?}");
            }
            let head = platform.execute(&vm, &["git", "-C", "/root/demo", "rev-parse", "HEAD"]);
            ensure!(head.await?.stdout.as_deref().map(str::trim) == Some(commit.as_str()));
            platform.delete(&vm).await
        }
    });
    futures::future::try_join_all(work).await?;
    drop(server);
    platform.finish()
}

/// Three commits; their ids.
fn make_repository(path: &std::path::Path) -> Result<Vec<String>> {
    let script = r#"
        set -e
        work=$(mktemp -d)
        git init --quiet --initial-branch=main "$work"
        cd "$work"
        git config user.name test && git config user.email test@example.org
        for n in 1 2 3; do
            echo "$n" > file && git add file && git commit --quiet -m "commit $n"
            git rev-parse HEAD
        done
        git clone --quiet --bare "$work" "$1"
        touch "$1/git-daemon-export-ok"
        rm -rf "$work"
    "#;
    let output = std::process::Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(path)
        .output()
        .context("make a repository")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(ToOwned::to_owned).collect())
}

struct GitServer {
    child: std::process::Child,
    port: u16,
}

impl GitServer {
    fn start(folder: &std::path::Path, host: &str) -> Result<Self> {
        use std::io::BufRead as _;
        let port = TcpListener::bind((host, 0))?.local_addr()?.port();
        let mut child = std::process::Command::new("git")
            .args(["daemon", "--reuseaddr", "--verbose"])
            .arg(format!("--listen={host}"))
            .arg(format!("--port={port}"))
            .arg(format!("--base-path={}", folder.display()))
            .stderr(std::process::Stdio::piped())
            .spawn()
            .context("start git daemon")?;
        let mut words = std::io::BufReader::new(child.stderr.take().context("no stderr")?);
        let mut line = String::new();
        words.read_line(&mut line)?;
        ensure!(line.contains("Ready to rumble"), "{line}");
        // Its words are read to the end, so that it never waits for a reader.
        std::thread::spawn(move || std::io::copy(&mut words, &mut std::io::sink()));
        Ok(Self { child, port })
    }
}

impl Drop for GitServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
