//! What a test sees of the host beneath the platform: its namespaces, links and processes, and the
//! bare way to a guest.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv6Addr, SocketAddrV6, TcpStream},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    process::Command,
    sync::mpsc::{Sender, channel},
    thread,
};

use anyhow::{Context, Result, bail};
use rustix::{
    process::Pid,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// The agent's end of every private link.
const GUEST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const NAMESPACES: &str = "/run/aether/netns";

/// Everything on this host that belongs to a data directory and is not a file in it.
pub fn host_leftovers(data_dir: &Path, namespaces: &BTreeSet<String>) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let needle = data_dir.to_string_lossy();
    for process in fs::read_dir("/proc")?.flatten() {
        let dir = process.path();
        let uses = process_uses(&dir, &needle);
        if let (Some(what), true) = (&uses, dir.join("fd").exists()) {
            left.push(format!("process {}: {what}", process.file_name().to_string_lossy()));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    left.extend(mounts.lines().filter(|l| l.contains(&*needle)).map(|l| format!("mount {l}")));
    for name in namespaces {
        if Path::new(NAMESPACES).join(name).exists() {
            left.push(format!("network namespace {name}"));
        }
        let id = name.trim_start_matches("aether-");
        let links = fs::read_dir("/sys/class/net")?.flatten();
        for link in links.map(|link| link.file_name().to_string_lossy().into_owned()) {
            if link.starts_with("ae") && link.contains(id) {
                left.push(format!("link {link}"));
            }
        }
        let tables = Command::new("nft").args(["list", "tables"]).output();
        let tables = tables.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        for table in tables.unwrap_or_default().lines().filter(|line| line.contains(id)) {
            left.push(format!("nftables {table}"));
        }
    }
    Ok(left)
}

/// How a process holds on to a directory: by its arguments or by an open file.
fn process_uses(process: &Path, needle: &str) -> Option<String> {
    let arguments = fs::read(process.join("cmdline")).ok()?;
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
    if arguments.contains(needle) {
        return Some(arguments);
    }
    for file in fs::read_dir(process.join("fd")).ok()?.flatten() {
        let target = fs::read_link(file.path()).unwrap_or_default();
        // This process and its kin hold the log.
        if target.to_string_lossy().contains(needle) {
            return Some(format!("{arguments} holds {}", target.display()));
        }
    }
    None
}

/// A thread that lives in a namespace and connects to the one guest behind it.
#[derive(Debug)]
pub struct Lane {
    asks: Sender<(u16, Sender<Result<TcpStream>>)>,
}

impl Lane {
    pub fn open(namespace: &str) -> Result<Self> {
        let file = fs::File::open(Path::new(NAMESPACES).join(namespace))
            .with_context(|| format!("open the namespace {namespace}"))?;
        let (asks, asked) = channel::<(u16, Sender<Result<TcpStream>>)>();
        let (ready, is_ready) = channel();
        thread::spawn(move || {
            let scope = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(anyhow::Error::from)
                .and_then(|()| private_link());
            let scope = match scope {
                Ok(scope) => scope,
                Err(error) => return drop(ready.send(Err(error))),
            };
            drop(ready.send(Ok(())));
            for (port, answer) in asked {
                drop(answer.send(connect(scope, port)));
            }
        });
        is_ready.recv()??;
        Ok(Self { asks })
    }

    pub fn dial(&self, port: u16) -> Result<TcpStream> {
        let (answer, answered) = channel();
        self.asks.send((port, answer))?;
        answered.recv()?
    }
}

fn connect(scope: u32, port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect(SocketAddrV6::new(GUEST, port, 0, scope))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Index of the one link with the host's end of a private link.
fn private_link() -> Result<u32> {
    let listing = Command::new("ip").args(["-o", "-6", "address"]).output()?;
    let listing = String::from_utf8(listing.stdout)?;
    let links: Vec<&str> = listing
        .lines()
        .filter(|line| line.contains("fe80::1/"))
        .filter_map(|line| line.split(':').next())
        .collect();
    let [index] = links.as_slice() else { bail!("not one private link: {listing}") };
    Ok(index.trim().parse()?)
}

/// Processes in a network namespace: the VMMs of an instance.
pub fn processes_in(namespace: &str) -> Result<Vec<Pid>> {
    let inode = fs::metadata(Path::new(NAMESPACES).join(namespace))?.ino();
    let is_in = |process: &fs::DirEntry| {
        fs::metadata(process.path().join("ns/net")).is_ok_and(|found| found.ino() == inode)
    };
    let processes = fs::read_dir("/proc")?.flatten().filter(is_in);
    Ok(processes.filter_map(|p| Pid::from_raw(p.file_name().to_str()?.parse().ok()?)).collect())
}

/// How many links a network namespace has.
pub fn links_in(namespace: &str) -> Result<usize> {
    let path = Path::new(NAMESPACES).join(namespace);
    let listing = Command::new("nsenter")
        .arg(format!("--net={}", path.display()))
        .args(["ip", "-o", "link"])
        .output()?;
    Ok(String::from_utf8(listing.stdout)?.lines().count())
}
