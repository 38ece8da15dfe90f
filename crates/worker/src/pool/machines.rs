//! The machines of this worker's pools.

use std::{sync::Arc, time::Duration};

use aether_drivers::{Driver, DriverError};
use aether_events::{Event, Received, Subscription};
use aether_protocol::{
    AGENT_PORT, Configure, Environment, Forget, Hosts, HostsEntry, Run, Token,
    host::{self, ClientError, RunEvent},
};
use aether_types::{DriverKind, ErrorCode, Fault, MachineId, ProjectId, Template, TemplateState};
use async_trait::async_trait;
use tokio::time::{Instant, timeout};

use super::{Meter, Spare, Spares, Turn};
use crate::{
    failure::{Failure, internal},
    fault,
    toolset::Toolset,
    worker::Core,
};

/// Run ahead: from the third on, a command costs what it costs for good.
const COMMANDS: usize = 3;
/// Name of a guest that is no VM's yet.
const HOSTNAME: &str = "spare";

/// Keeps the worker's pools until it drains.
pub(crate) async fn keep(core: Arc<Core>) {
    let pools = Arc::clone(&core.pools);
    let draining = core.draining.clone();
    pools.keep(core, Meter::of_host(), draining).await;
}

/// Hears of templates that are ready, replaced or deleted.
pub(crate) async fn listen(core: Arc<Core>, mut events: Box<dyn Subscription>) {
    loop {
        let received = tokio::select! {
            () = core.draining.cancelled() => return,
            received = events.next() => received,
        };
        match received {
            Received::Event(Event::Template { state, .. }) => match state {
                // Progress of a build, or its end without a template.
                TemplateState::Building | TemplateState::Failed => {}
                TemplateState::Ready | TemplateState::Deleted => core.pools.templates_changed(),
            },
            Received::Event(_) => {}
            Received::Missed => core.pools.templates_changed(),
            Received::Closed => return,
        }
    }
}

#[async_trait]
impl Spares for Core {
    async fn template(&self, name: &str, tag: &str) -> Result<Option<Template>, Fault> {
        let found = self.parts.store.template_by_name(ProjectId::DEFAULT, name, tag).await;
        let found = found.map_err(|error| Failure::store(&error).fault)?;
        Ok(found.filter(|template| template.state == TemplateState::Ready))
    }

    async fn make(&self, id: MachineId, template: &Template, turn: &Turn) -> Result<Spare, Fault> {
        let begun = Instant::now();
        let limit = self.parts.config.guest_limit;
        let mut spare = self
            .restore_spare(template, id, turn, &Toolset::default())
            .await
            .map_err(|f| f.fault)?;
        turn.pass().await;
        let guest = Agent { driver: &spare.driver, machine: id, token: &spare.token, limit };
        guest.warm(turn).await?;
        turn.pass().await;
        spare.connection = Some(guest.connect().await?);
        let failed = |error: DriverError| Failure::machine(&error, id).fault;
        spare.driver.pause(id).await.map_err(failed)?;
        // A paused machine takes no processor, so whoever claims it need not think of this.
        spare.driver.set_background(id, false).await.map_err(failed)?;
        tracing::debug!(machine.id = %id, template.id = %template.id,
            took_ms = begun.elapsed().as_millis(), "made a spare machine");
        Ok(spare)
    }

    async fn discard(&self, id: MachineId, driver: DriverKind) -> Result<(), Fault> {
        let driver = self.driver_of(driver).map_err(|failure| failure.fault)?;
        driver.delete(id).await.map_err(|error| Failure::machine(&error, id).fault)
    }

    async fn exited(&self, id: MachineId, driver: DriverKind) {
        match self.driver_of(driver) {
            // An error: the driver has no such machine any more.
            Ok(driver) => drop(driver.exited(id).await),
            // Drivers do not go while a worker runs.
            Err(_) => std::future::pending().await,
        }
    }
}

/// The way to one agent.
pub(crate) struct Agent<'a> {
    pub(crate) driver: &'a Arc<dyn Driver>,
    pub(crate) machine: MachineId,
    pub(crate) token: &'a Token,
    pub(crate) limit: Duration,
}

impl Agent<'_> {
    async fn connect(&self) -> Result<host::BoxStream, Fault> {
        let connected = self.driver.connect(self.machine, AGENT_PORT, self.limit).await;
        connected.map_err(|error| Failure::machine(&error, self.machine).fault)
    }

    /// Has the guest do once what it does when it becomes a VM and runs its first command. What
    /// the VMM translates, and the guest reads from its disk, is there when somebody waits.
    async fn warm(&self, turn: &Turn) -> Result<(), Fault> {
        let (words, stream) = (self.words()?, self.connect().await?);
        host::configure(stream, self.token, words, self.limit).await.map_err(of_guest)?;
        for round in 0..COMMANDS {
            turn.pass().await;
            self.run_script(&format!("warm-{round}"), "echo warm").await?;
        }
        Ok(())
    }

    /// Under this name, of which the agent remembers nothing; how it ends is of no interest.
    pub(crate) async fn run_script(&self, name: &str, script: &str) -> Result<(), Fault> {
        let run_id = format!("{name}-{}", self.machine);
        let run = Run {
            run_id: run_id.clone(),
            command: "sh".into(),
            args: vec!["-c".into(), script.into()],
            detached: true,
            ..Run::default()
        };
        timeout(self.limit, self.run_to_end(run)).await.map_err(|_| late())??;
        let (forget, stream) = (Forget { run_id }, self.connect().await?);
        host::forget(stream, self.token, forget, self.limit).await.map_err(of_guest)?;
        Ok(())
    }

    /// What a claim says, with nobody's name in it.
    fn words(&self) -> Result<Configure, Fault> {
        let mut entropy = vec![0; 64];
        getrandom::fill(&mut entropy).map_err(|_| internal("read randomness"))?;
        let local = |address: &str| HostsEntry {
            address: address.to_owned(),
            names: vec!["localhost".to_owned()],
        };
        Ok(Configure {
            hostname: Some(HOSTNAME.to_owned()),
            machine_id: Some(self.machine.to_string().replace('-', "")),
            env: Some(Environment::default()),
            hosts: Some(Hosts { entries: vec![local("127.0.0.1"), local("::1")] }),
            entropy: entropy.into(),
            ..Configure::default()
        })
    }

    async fn run_to_end(&self, run: Run) -> Result<(), Fault> {
        let stream = self.connect().await?;
        let session = host::run(stream, self.token, run, self.limit).await;
        let mut session = session.map_err(of_guest)?;
        // What it says is of no interest, and the guest decides how much: the caller has the limit.
        while let RunEvent::Output { .. } = session.next().await.map_err(of_guest)? {}
        Ok(())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn of_guest(error: ClientError) -> Fault {
    tracing::debug!(error = fault::chain(&error), "warm a spare machine");
    fault::from_client(&error)
}

fn late() -> Fault {
    Fault::new(ErrorCode::GuestUnreachable, "the guest did not finish its first command in time")
}
