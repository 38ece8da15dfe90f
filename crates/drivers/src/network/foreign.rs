//! What others on this host say about forwarding: filters that drop it by default (Docker, ufw,
//! a distribution's own), and the kernel's switch for it.
//!
//! A packet must pass every base chain of a hook, so our table cannot overrule another's drop. In
//! each foreign chain that drops forwarded packets by policy, two rules are put at the top, marked
//! by a comment with the instance's name: what comes from our uplink and what goes to it passes.
//! Our own tables have judged the one and let only replies through of the other. The rules are of
//! the form that `iptables` on nftables writes itself; it refuses a table with anything else in it
//! (`ct state` is enough), and Docker with it.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;

use super::{namespace, rules::run_nft};
use crate::DriverError;

#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Object>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Object {
    Chain(Chain),
    Rule(Rule),
    #[serde(untagged)]
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct Chain {
    family: String,
    table: String,
    name: String,
    hook: Option<String>,
    policy: Option<String>,
}

#[derive(Deserialize)]
struct Rule {
    family: String,
    table: String,
    chain: String,
    handle: u64,
    comment: Option<String>,
}

fn list(args: &[&str]) -> Result<Vec<Object>, DriverError> {
    let text = run_nft(args, "")?;
    let listing: Listing = serde_json::from_str(&text)
        .map_err(|e| DriverError::Program { program: "nft", detail: format!("its list: {e}") })?;
    Ok(listing.nftables)
}

fn is_ours(table: &str) -> bool {
    table.starts_with("aether")
}

fn forward_chains() -> Result<Vec<Chain>, DriverError> {
    let objects = list(&["-j", "list", "chains"])?;
    let chains = objects.into_iter().filter_map(|object| match object {
        Object::Chain(chain) => Some(chain),
        Object::Rule(_) | Object::Other(_) => None,
    });
    let ours = chains.filter(|chain| {
        chain.hook.as_deref() == Some("forward")
            && matches!(chain.family.as_str(), "ip" | "inet")
            && !is_ours(&chain.table)
    });
    Ok(ours.collect())
}

/// Lets the uplink pass where others drop. Repeating it changes nothing.
pub(super) fn open(uplink: &str, comment: &str) -> Result<(), DriverError> {
    let dropping: Vec<Chain> =
        forward_chains()?.into_iter().filter(|c| c.policy.as_deref() == Some("drop")).collect();
    if !dropping.is_empty() {
        let present = ours(comment)?;
        for chain in dropping {
            let Chain { family, table, name, .. } = &chain;
            if present.iter().any(|r| r.family == *family && r.table == *table && r.chain == *name)
            {
                continue;
            }
            let at = format!("insert rule {family} {table} {name}");
            let pass = format!("\"{uplink}\" counter accept comment \"{comment}\"");
            let text = format!("{at} iifname {pass}\n{at} oifname {pass}\n");
            run_nft(&["-f", "-"], &text)?;
            tracing::info!(chain = %format!("{family} {table} {name}"), "opened for the uplink");
        }
    }
    legacy(uplink, comment, Legacy::Open)
}

/// Takes the rules out again, wherever they are by now.
pub(super) fn close(uplink: &str, comment: &str) -> Result<(), DriverError> {
    let mut text = String::new();
    for Rule { family, table, chain, handle, .. } in ours(comment)? {
        // Writing to a `String` does not fail.
        let _ = writeln!(text, "delete rule {family} {table} {chain} handle {handle}");
    }
    if !text.is_empty() {
        run_nft(&["-f", "-"], &text)?;
    }
    legacy(uplink, comment, Legacy::Close)
}

/// Our rules in chains of others.
fn ours(comment: &str) -> Result<Vec<Rule>, DriverError> {
    let mut found = Vec::new();
    for Chain { family, table, name, .. } in forward_chains()? {
        let objects = list(&["-j", "-a", "list", "chain", &family, &table, &name])?;
        found.extend(objects.into_iter().filter_map(|object| match object {
            Object::Rule(rule) if rule.comment.as_deref() == Some(comment) => Some(rule),
            Object::Chain(_) | Object::Rule(_) | Object::Other(_) => None,
        }));
    }
    Ok(found)
}

/// The chains of others that hold a rule of ours.
pub(super) fn marked(comment_prefix: &str) -> Vec<String> {
    let Ok(chains) = forward_chains() else { return Vec::new() };
    let mut found = Vec::new();
    for Chain { family, table, name, .. } in chains {
        let text = run_nft(&["list", "chain", &family, &table, &name], "").unwrap_or_default();
        if text.contains(&format!("comment \"{comment_prefix}")) {
            found.push(format!("rule in {family} {table} {name}"));
        }
    }
    found
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Legacy {
    Open,
    Close,
}

/// The older packet filter of the kernel (`iptables-legacy`), which nft does not see.
fn legacy(uplink: &str, comment: &str, what: Legacy) -> Result<(), DriverError> {
    if !legacy_in_use() {
        return Ok(());
    }
    let run = |args: &[&str]| -> Result<Option<String>, DriverError> {
        match Command::new("iptables-legacy").arg("-w").args(args).output() {
            Ok(out) if out.status.success() => {
                Ok(Some(String::from_utf8_lossy(&out.stdout).into_owned()))
            }
            Ok(_) => Ok(None),
            Err(error) => Err(DriverError::Program {
                program: "iptables-legacy",
                detail: format!("{error}; this host filters by it"),
            }),
        }
    };
    let drops = run(&["-S", "FORWARD"])?.is_some_and(|text| text.contains("-P FORWARD DROP"));
    for direction in ["-i", "-o"] {
        let rule = &["FORWARD", direction, uplink, "-m", "comment", "--comment", comment];
        let rule = &[&rule[..], &["-j", "ACCEPT"]].concat()[..];
        // Taken out first, so that a repetition does not add a second one.
        while run(&[&["-D"], rule].concat())?.is_some() {}
        if what == Legacy::Open && drops && run(&[&["-I"], rule].concat())?.is_none() {
            return Err(DriverError::Program {
                program: "iptables-legacy",
                detail: format!("it refuses to insert a rule for {uplink}"),
            });
        }
    }
    Ok(())
}

fn legacy_in_use() -> bool {
    let tables = fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    tables.lines().any(|table| table == "filter")
}

const STATE_DIRECTORY: &str = "/run/aether";

/// Says, for the host's namespace (a test may have another), that we switched forwarding on.
fn mark() -> Option<PathBuf> {
    let namespace = fs::metadata("/proc/thread-self/ns/net").ok()?.ino();
    Some(PathBuf::from(STATE_DIRECTORY).join(format!("forwarding-{namespace}")))
}

/// Held while an instance of this host chooses its range, comes or goes.
#[derive(Debug)]
pub(super) struct HostLock(fs::File);

impl Drop for HostLock {
    fn drop(&mut self) {
        // The last one out takes the directory along; whoever waits for it notices.
        let _ = fs::remove_dir(STATE_DIRECTORY);
        // Closing alone would leave it to a child that another thread is just forking.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

pub(super) fn lock_host() -> Result<HostLock, DriverError> {
    let path = Path::new(STATE_DIRECTORY);
    let locked = || -> io::Result<HostLock> {
        loop {
            fs::create_dir_all(path)?;
            let directory = match fs::File::open(path) {
                Ok(directory) => directory,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            flock(&directory, FlockOperation::LockExclusive)?;
            let here = fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
            let ours = directory.metadata().map(|m| (m.dev(), m.ino()))?;
            // Otherwise it was removed while we waited, and another may be there by now.
            if here == Some(ours) {
                return Ok(HostLock(directory));
            }
        }
    };
    locked().map_err(|source| DriverError::File { action: "lock", path: path.to_owned(), source })
}

pub(super) fn enable_forwarding() -> Result<(), DriverError> {
    if namespace::get("ipv4/ip_forward").as_deref() == Some("1") {
        return Ok(());
    }
    if let Some(path) = mark() {
        fs::write(&path, b"").map_err(|source| DriverError::File {
            action: "make",
            path,
            source,
        })?;
    }
    namespace::set("ipv4/ip_forward", "1")?;
    tracing::info!("switched net.ipv4.ip_forward on, which it was not");
    Ok(())
}

/// Switches forwarding off if an instance switched it on and none is left, unless someone else
/// filters forwarded packets by now and so relies on it.
pub(super) fn restore_forwarding() -> Result<(), DriverError> {
    let Some(path) = mark().filter(|path| path.exists()) else { return Ok(()) };
    if forward_chains()?.is_empty() && !legacy_in_use() {
        namespace::set("ipv4/ip_forward", "0")?;
    }
    fs::remove_file(&path).map_err(|source| DriverError::File { action: "remove", path, source })
}
