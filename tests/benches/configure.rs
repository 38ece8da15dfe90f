//! What a restored guest under emulation is made to translate, in blocks of code that its emulator
//! has not seen yet: by each part of `Configure` alone, and with a first command after it. A block
//! costs some microseconds and some hundred bytes of the host. Counts, and so much the same on a
//! busy machine; with `--enforce` it fails past the bar.

use std::time::{SystemTime, UNIX_EPOCH};

use aether_protocol::{Configure, Dns, EnvVar, Environment, Hosts, HostsEntry, Interface};
use aether_tests::{
    bare::{Bare, From, NETWORK_MAC},
    measure::{has_flag, samples},
};
use anyhow::{Result, ensure};

const MEMORY_MB: u32 = 256;
const COMMAND: &[&str] = &["/bin/sh", "-c", "echo ready"];
/// Of `Configure` and a first command by the agent, over the same command by the bare agent.
const ADDS_MAX: i64 = 4500;

fn main() -> Result<()> {
    let bare = Bare::new(MEMORY_MB, 1)?;
    bare.make_snapshot()?;
    let command = median(&bare, None, Run::Bare)?;
    line("bare command", median(&bare, None, Run::Nothing)?, command);
    bare.make_agent_snapshot(all("builder", [NETWORK_MAC; 2], 5), without_addresses())?;
    let none = Configure::default();
    line("agent", median(&bare, Some(&none), Run::Nothing)?, median(&bare, None, Run::Agent)?);
    for (name, words) in parts() {
        let words = Configure { restored: true, ..words };
        let alone = median(&bare, Some(&words), Run::Nothing)?;
        let whole = median(&bare, Some(&words), Run::Agent)?;
        line(name, alone, whole);
        if name == "all" {
            let adds = whole.blocks - command.blocks;
            print(&format!("adds {adds} blocks (bar {ADDS_MAX})"));
            ensure!(adds <= ADDS_MAX || !has_flag("--enforce"), "{adds} blocks are past the bar");
        }
    }
    Ok(())
}

fn line(name: &str, alone: Cost, whole: Cost) {
    print(&format!("{name:24} alone {alone}   with a command {whole}"));
}

#[expect(clippy::print_stdout, reason = "the output of a benchmark")]
fn print(line: &str) {
    println!("{line}");
}

#[derive(Debug, Clone, Copy)]
struct Cost {
    blocks: i64,
    cpu_ms: f64,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:6} {:6.1} ms", self.blocks, self.cpu_ms)
    }
}

#[derive(Debug, Clone, Copy)]
enum Run {
    Nothing,
    Agent,
    Bare,
}

fn median(bare: &Bare, words: Option<&Configure>, run: Run) -> Result<Cost> {
    let costs: Result<Vec<_>> = (0..samples(5)).map(|_| cost(bare, words, run)).collect();
    let mut costs = costs?;
    costs.sort_by_key(|cost| cost.blocks);
    let blocks = costs[costs.len() / 2].blocks;
    costs.sort_by(|a, b| a.cpu_ms.total_cmp(&b.cpu_ms));
    Ok(Cost { blocks, cpu_ms: costs[costs.len() / 2].cpu_ms })
}

fn cost(bare: &Bare, words: Option<&Configure>, run: Run) -> Result<Cost> {
    bare.prepare(From::Snapshot, 0)?;
    let machine = bare.restore(0)?;
    let mut control = machine.control()?;
    if let Some(words) = words {
        bare.configure(words.clone())?;
    }
    match run {
        Run::Nothing => {}
        Run::Agent => bare.agent_first_byte(COMMAND)?,
        Run::Bare => drop(bare.first_byte(0, COMMAND)?),
    }
    Ok(Cost { blocks: control.translated_blocks()?, cpu_ms: cpu_ms(machine.pid())? })
}

/// Of all threads of a process.
fn cpu_ms(pid: u32) -> Result<f64> {
    let mut ns = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        ns += text.split(' ').next().unwrap_or_default().parse::<f64>()?;
    }
    Ok(ns / 1e6)
}

/// As a template's snapshot is taken.
fn without_addresses() -> Configure {
    let interfaces = vec![Interface { mac: NETWORK_MAC.to_owned(), ..Interface::default() }];
    Configure { interfaces, ..Configure::default() }
}

fn all(name: &str, [mac, new_mac]: [&str; 2], at: u8) -> Configure {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (guest, host) = (format!("10.99.0.{}", at + 1), format!("10.99.0.{at}"));
    Configure {
        unix_time_ns: u64::try_from(time.as_nanos()).ok(),
        entropy: vec![at; 64].into(),
        interfaces: vec![Interface {
            mac: mac.to_owned(),
            new_mac: (mac != new_mac).then(|| new_mac.to_owned()),
            addresses: vec![format!("{guest}/30")],
            gateways: vec![host.clone()],
            mtu: Some(1400),
        }],
        hostname: Some(name.to_owned()),
        machine_id: Some(format!("{at:032x}")),
        dns: Some(Dns { servers: vec![host], search: Vec::new() }),
        hosts: Some(Hosts {
            entries: vec![HostsEntry { address: guest, names: vec![name.to_owned()] }],
        }),
        env: Some(Environment { vars: vec![EnvVar::new("A", "b")] }),
        ..Configure::default()
    }
}

/// Each part of what a clone is told, and the whole.
fn parts() -> Vec<(&'static str, Configure)> {
    let all = all("clone-1", [NETWORK_MAC, "02:ae:01:00:00:09"], 9);
    let Configure {
        unix_time_ns, entropy, interfaces, hostname, machine_id, dns, hosts, env, ..
    } = all.clone();
    // A restored guest is always given randomness.
    let none = || Configure { entropy: entropy.clone(), ..Configure::default() };
    vec![
        ("randomness", none()),
        ("clock", Configure { unix_time_ns, ..none() }),
        ("network", Configure { interfaces, ..none() }),
        ("names and files", Configure { hostname, machine_id, dns, hosts, ..none() }),
        ("environment", Configure { env, ..none() }),
        ("all", all),
    ]
}
