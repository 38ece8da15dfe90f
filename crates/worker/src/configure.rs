//! What a guest is told when it becomes a VM: after a boot, after a restore, and when a spare
//! machine is claimed.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aether_drivers::{Driver, GuestNetwork};
use aether_protocol::{
    AGENT_PORT, Configure, Configured, Dns, EnvVar, Environment, ErrorCode as GuestCode, Hosts,
    HostsEntry, Interface, Layer, TOKEN_BYTES, Token,
    host::{self, BoxStream, ClientError},
};
use aether_types::{ErrorCode, Fault, MachineId, Origin, Vm};
use bytes::Bytes;

use crate::{
    failure::{Failure, internal},
    fault,
    guest::{AskError, Guest},
    phases::PhaseClock,
    worker::Core,
};

/// Of all but the last try: a VMM may accept the first connection after a load and never carry it.
const EARLY_TRY_SHARE: u32 = 4;
/// A guest that was loaded closes what it is sent until it has heard that its connections are gone.
const RESTORED_TRIES: usize = 12;
/// A resumed guest's clock is stepped on the way of the answer.
const CLOCK_LIMIT: Duration = Duration::from_secs(1);

impl Core {
    /// The environment of every command in the VM: its own variables before its template's.
    pub(crate) async fn environment(&self, vm: &Vm) -> Result<BTreeMap<String, String>, Failure> {
        let template = match vm.spec.origin {
            Origin::Template(id) | Origin::Builder(id) => self.template(id).await?,
            Origin::Image | Origin::Snapshot(_) => None,
        };
        let mut env = template.map(|template| template.spec.env.clone()).unwrap_or_default();
        env.extend(vm.spec.env.clone());
        Ok(env)
    }

    /// After a boot.
    pub(crate) async fn configure_booted(
        &self,
        vm: &Vm,
        guest: &Guest,
        network: &GuestNetwork,
        clock: &mut PhaseClock,
    ) -> Result<(), Failure> {
        let words = Configure {
            layers: guest.layers(),
            interfaces: vec![interface(network, None)],
            dns: Some(dns(network)),
            ..self.identity(vm, guest.machine, network).await?
        };
        let tokens = [&guest.token, &guest.token];
        self.configure(guest, &tokens, words, None, Some(clock)).await
    }

    /// After a restore: all that a boot is told, and that the guest is another one now.
    pub(crate) async fn configure_restored(
        &self,
        vm: &Vm,
        guest: &Guest,
        network: &GuestNetwork,
        before: Before<'_>,
        clock: &mut PhaseClock,
    ) -> Result<(), Failure> {
        let words = Configure {
            layers: guest.layers(),
            interfaces: vec![interface(network, Some(before.mac))],
            dns: Some(dns(network)),
            ..self.identity(vm, guest.machine, network).await?
        };
        let words = restored(words, &guest.token);
        let tokens = [before.token, &guest.token, before.token];
        self.configure(guest, &tokens, words, None, Some(clock)).await
    }

    /// A spare machine of a pool: all but what only its VM has. Gives the guest's boot id.
    pub(crate) async fn configure_spare(
        &self,
        driver: &Arc<dyn Driver>,
        machine: MachineId,
        network: &GuestNetwork,
        token: &Token,
        before: Before<'_>,
        layers: Vec<Layer>,
    ) -> Result<String, Failure> {
        let words = Configure {
            layers,
            interfaces: vec![interface(network, Some(before.mac))],
            dns: Some(dns(network)),
            machine_id: Some(machine_id(machine)),
            ..empty()?
        };
        let words = restored(words, token);
        let tokens = [before.token, token, before.token];
        let to = Agent { driver, machine, limit: self.parts.config.guest_limit };
        let asked = to.configure(&tokens, &words, None, None).await;
        let (configured, _kept) = asked.map_err(|e| Failure::ask(&e))?;
        known_boot(&configured)?;
        known_layers(&words, &configured)?;
        Ok(configured.boot_id)
    }

    /// A spare machine that became a VM, over a connection that it came with. What does not hang
    /// on the VM it was told when it was made.
    pub(crate) async fn configure_claimed(
        &self,
        vm: &Vm,
        guest: &Guest,
        network: &GuestNetwork,
        connection: Option<BoxStream>,
    ) -> Result<(), Failure> {
        let identity = self.identity(vm, guest.machine, network).await?;
        let words = Configure { machine_id: None, layers: guest.layers(), ..identity };
        let tokens = [&guest.token, &guest.token];
        self.configure(guest, &tokens, words, connection, None).await
    }

    /// Leaves the guest's interface without an address, as a template's snapshot has it.
    pub(crate) async fn take_addresses(
        &self,
        driver: &Arc<dyn Driver>,
        machine: MachineId,
        token: &Token,
        network: &GuestNetwork,
    ) -> Result<(), Failure> {
        let bare =
            Interface { addresses: Vec::new(), gateways: Vec::new(), ..interface(network, None) };
        let words = Configure { interfaces: vec![bare], settle: true, ..Configure::default() };
        let to = Agent { driver, machine, limit: self.parts.config.guest_limit };
        let asked = to.configure(&[token], &words, None, None).await;
        asked.map(drop).map_err(|error| Failure::ask(&error))
    }

    /// Best effort: a guest that does not answer now has the time of its pause, and nothing else.
    pub(crate) async fn step_clock(&self, guest: &Guest) {
        let limit = CLOCK_LIMIT.min(self.parts.config.guest_limit);
        let asked = guest.ask(limit, |stream, token| async move {
            let words = Configure { unix_time_ns: Some(unix_time_ns()), ..Configure::default() };
            host::configure(stream, &token, words, limit).await
        });
        match tokio::time::timeout(limit, asked).await {
            Ok(Ok(configured)) => {
                if !configured.boot_id.is_empty() {
                    guest.set_boot_id(&configured.boot_id);
                }
            }
            Ok(Err(error)) => {
                let reason = error.fault().message;
                tracing::warn!(vm.id = %guest.id, reason, "the guest's clock was not stepped");
            }
            Err(_) => tracing::warn!(vm.id = %guest.id, "the guest's clock was not stepped"),
        }
        // It was adopted while it was paused, and its agent does not say it there.
        if guest.boot_id().is_empty() {
            self.refresh_boot_id(guest).await;
        }
    }

    async fn configure(
        &self,
        guest: &Guest,
        tokens: &[&Token],
        words: Configure,
        connection: Option<BoxStream>,
        clock: Option<&mut PhaseClock>,
    ) -> Result<(), Failure> {
        let to = Agent {
            driver: &guest.driver,
            machine: guest.machine,
            limit: self.parts.config.guest_limit,
        };
        let asked = to.configure(tokens, &words, connection, clock).await;
        let (configured, kept) = asked.map_err(|error| Failure::ask(&error))?;
        for warning in &configured.warnings {
            tracing::warn!(vm.id = %guest.id, warning, "the guest is not wholly configured");
        }
        if configured.boot_id.is_empty() && !words.restored && words.layers.is_empty() {
            // An agent of an older image does not say it here.
            return self.refresh_boot_id(guest).await.map(|_| ()).ok_or_else(unreachable);
        }
        known_boot(&configured)?;
        guest.set_boot_id(&configured.boot_id);
        guest.keep_early(kept);
        known_layers(&words, &configured)
    }

    /// Who the guest is, and new randomness; the clock is added at the last moment.
    async fn identity(
        &self,
        vm: &Vm,
        machine: MachineId,
        network: &GuestNetwork,
    ) -> Result<Configure, Failure> {
        let env = self.environment(vm).await?;
        Ok(Configure {
            hostname: Some(vm.name.clone()),
            machine_id: Some(machine_id(machine)),
            env: Some(Environment {
                vars: env.iter().map(|(name, value)| EnvVar::new(name, value)).collect(),
            }),
            hosts: Some(hosts(&vm.name, network)),
            ..empty()?
        })
    }
}

/// By what the guest was known in its snapshot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before<'a> {
    pub(crate) token: &'a Token,
    pub(crate) mac: &'a str,
}

/// The way to one agent.
struct Agent<'a> {
    driver: &'a Arc<dyn Driver>,
    machine: MachineId,
    limit: Duration,
}

impl Agent<'_> {
    /// One question on a connection of its own, asked again with the next token where the answer
    /// was lost: the agent may have taken the new token with it. The words twice have the effect of
    /// once.
    async fn configure(
        &self,
        tokens: &[&Token],
        words: &Configure,
        mut connection: Option<BoxStream>,
        mut clock: Option<&mut PhaseClock>,
    ) -> Result<(Configured, Option<BoxStream>), AskError> {
        let tries = if words.restored { RESTORED_TRIES.max(tokens.len()) } else { tokens.len() };
        let deadline = Instant::now() + self.limit;
        for (number, token) in tokens.iter().cycle().take(tries).enumerate() {
            let left = if Instant::now() < deadline { tries - 1 - number } else { 0 };
            let limit = if left == 0 { self.limit } else { self.limit / EARLY_TRY_SHARE };
            let connected = match connection.take() {
                Some(stream) => Ok(stream),
                None => self.driver.connect(self.machine, AGENT_PORT, limit).await,
            };
            mark(&mut clock, "connect");
            let stream = match connected {
                Ok(stream) => stream,
                Err(error) if left > 0 && error.is_retryable() => continue,
                Err(error) => return Err(AskError::Connect(fault::from_driver(&error))),
            };
            let words = Configure { unix_time_ns: Some(unix_time_ns()), ..words.clone() };
            let answer = host::configure_and_keep(stream, token, words, limit).await;
            mark(&mut clock, "configure");
            match answer {
                Err(error) if left > 0 && may_be_elsewhere(&error) => {
                    tracing::debug!(machine.id = %self.machine, error = fault::chain(&error),
                        "configure again");
                }
                answer => return answer.map_err(AskError::Client),
            }
        }
        Err(AskError::Client(ClientError::Timeout { context: "configure the guest" }))
    }
}

fn mark(clock: &mut Option<&mut PhaseClock>, name: &str) {
    if let Some(clock) = clock {
        clock.mark(name);
    }
}

/// The answer was lost, or the agent has the other token.
fn may_be_elsewhere(error: &ClientError) -> bool {
    error.is_connection_lost() || error.code() == Some(GuestCode::Unauthorized)
}

/// A restored guest that does not know what a restore is would keep the snapshot's token.
fn known_boot(configured: &Configured) -> Result<(), Failure> {
    let id = &configured.boot_id;
    let short = id.len() <= aether_protocol::limits::SHORT_TEXT_BYTES_MAX;
    if !id.is_empty() && short && !id.contains(char::is_control) {
        return Ok(());
    }
    let text = "the agent in the snapshot is too old to be restored; build the image again";
    Err(Failure::last(Fault::new(ErrorCode::SnapshotIncompatible, text)))
}

/// A guest that does not know what layers are has none of its tools.
fn known_layers(words: &Configure, configured: &Configured) -> Result<(), Failure> {
    let (wanted, has) = (words.layers.len(), configured.layers);
    if wanted == 0 || u32::try_from(wanted) == Ok(has) {
        return Ok(());
    }
    let text = format!(
        "the guest has {has} of {wanted} layers of tools; if its image is old, build it again"
    );
    Err(Failure::last(Fault::new(ErrorCode::VmStartFailed, text)))
}

fn unreachable() -> Failure {
    Failure::again(Fault::new(ErrorCode::GuestUnreachable, "the guest does not answer"))
}

fn restored(words: Configure, token: &Token) -> Configure {
    Configure { restored: true, new_token: Some(Bytes::copy_from_slice(token.as_bytes())), ..words }
}

pub(crate) fn empty() -> Result<Configure, Failure> {
    let mut entropy = vec![0; 64];
    getrandom::fill(&mut entropy).map_err(|_| Failure::last(internal("read randomness")))?;
    Ok(Configure { entropy: entropy.into(), ..Configure::default() })
}

fn interface(network: &GuestNetwork, before: Option<&str>) -> Interface {
    Interface {
        mac: before.unwrap_or(&network.mac).to_owned(),
        new_mac: before.filter(|mac| *mac != network.mac).map(|_| network.mac.clone()),
        addresses: network.addresses.iter().map(|(a, p)| format!("{a}/{p}")).collect(),
        gateways: network.gateways.iter().map(ToString::to_string).collect(),
        mtu: Some(network.mtu),
    }
}

fn dns(network: &GuestNetwork) -> Dns {
    Dns { servers: network.dns.iter().map(ToString::to_string).collect(), search: Vec::new() }
}

/// The machine's and not the VM's, which a spare machine would have to be told while its VM waits;
/// a VM keeps its machine.
fn machine_id(machine: MachineId) -> String {
    machine.to_string().replace('-', "")
}

fn hosts(name: &str, network: &GuestNetwork) -> Hosts {
    let entry = |address: String, name: &str| HostsEntry { address, names: vec![name.to_owned()] };
    let mut entries =
        vec![entry("127.0.0.1".into(), "localhost"), entry("::1".into(), "localhost")];
    entries.extend(network.addresses.first().map(|(address, _)| entry(address.to_string(), name)));
    Hosts { entries }
}

pub(crate) fn unix_time_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// 256 random bits.
pub(crate) fn new_token() -> Result<Token, Failure> {
    let mut token = [0; TOKEN_BYTES];
    getrandom::fill(&mut token).map_err(|_| Failure::last(internal("make a token")))?;
    Ok(Token::from_bytes(token))
}
