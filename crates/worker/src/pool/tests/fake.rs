//! Machines that are none, and a memory that says what it is told to.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aether_drivers::{
    Driver, GuestNetwork,
    sim::{SimConfig, SimDriver, SimHost},
};
use aether_protocol::Token;
use aether_streams::{PoolStatus, Pools as _};
use aether_types::{
    DriverKind, ErrorCode, Fault, MachineId, NetworkPolicy, ProjectId, SnapshotId, TaskId,
    Template, TemplateId, TemplateProgress, TemplateSpec, TemplateState, Timestamp, VmId,
};
use async_trait::async_trait;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::pool::{Meter, PoolConfig, PoolSet, Spare, Spares, Turn};

/// Of the three steps of making a machine.
pub(super) const STEP: Duration = Duration::from_millis(100);
pub(super) const RESERVE_MB: u64 = 1000;

#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "what goes wrong, each by itself")]
pub(super) struct World {
    pub(super) templates: BTreeMap<String, Template>,
    pub(super) store_is_down: bool,
    pub(super) makes_fail: bool,
    pub(super) discards_fail: bool,
    /// What each machine that goes gives back.
    pub(super) freed_mb: u64,
    /// They die as soon as they are made.
    pub(super) still_born: bool,
    /// Machines that were begun, in order, with the template and the time.
    pub(super) begun: Vec<(MachineId, TemplateId, Instant)>,
    pub(super) in_make: usize,
    /// When each step began.
    pub(super) steps: Vec<Instant>,
    /// Machines that have something on the host.
    pub(super) there: Vec<MachineId>,
    pub(super) discarded: Vec<MachineId>,
    pub(super) dead: Vec<MachineId>,
}

pub(super) struct Fake {
    pub(super) world: watch::Sender<World>,
    available_mb: AtomicU64,
    driver: Arc<dyn Driver>,
}

struct Making<'a>(&'a Fake);

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.0.world.send_modify(|world| world.in_make -= 1);
    }
}

#[async_trait]
impl Spares for Fake {
    async fn template(&self, name: &str, tag: &str) -> Result<Option<Template>, Fault> {
        let world = self.world.borrow();
        if world.store_is_down {
            return Err(Fault::new(ErrorCode::Internal, "the store is down"));
        }
        Ok(world.templates.get(&format!("{name}:{tag}")).cloned())
    }

    async fn make(&self, id: MachineId, template: &Template, turn: &Turn) -> Result<Spare, Fault> {
        self.world.send_modify(|world| {
            assert_eq!(world.in_make, 0, "one at a time");
            world.in_make += 1;
            world.begun.push((id, template.id, Instant::now()));
            world.there.push(id);
        });
        let _making = Making(self);
        for _ in 0..3 {
            turn.pass().await;
            self.world.send_modify(|world| world.steps.push(Instant::now()));
            sleep(STEP).await;
        }
        if self.world.borrow().makes_fail {
            return Err(Fault::new(ErrorCode::VmStartFailed, "it does not start"));
        }
        if self.world.borrow().still_born {
            self.kill(id);
        }
        Ok(Spare {
            machine: id,
            driver: Arc::clone(&self.driver),
            token: Token::from_bytes([7; 32]),
            network: GuestNetwork {
                mac: "02:00:00:00:00:01".into(),
                addresses: vec![(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)), 30)],
                gateways: Vec::new(),
                dns: Vec::new(),
                mtu: 1400,
            },
            boot_id: id.to_string(),
            layers: Vec::new(),
            connection: None,
        })
    }

    async fn discard(&self, id: MachineId, _driver: DriverKind) -> Result<(), Fault> {
        let mut failed = false;
        self.world.send_modify(|world| {
            failed = world.discards_fail;
            if !failed {
                world.there.retain(|there| *there != id);
                world.discarded.push(id);
                self.available_mb.fetch_add(world.freed_mb, Ordering::Relaxed);
            }
        });
        if failed { Err(Fault::new(ErrorCode::Internal, "it stays")) } else { Ok(()) }
    }

    async fn exited(&self, id: MachineId, _driver: DriverKind) {
        let mut world = self.world.subscribe();
        let _ = world.wait_for(|world| world.dead.contains(&id)).await;
    }
}

impl Fake {
    pub(super) fn kill(&self, id: MachineId) {
        self.world.send_modify(|world| world.dead.push(id));
    }
}

pub(super) fn template(memory_mb: u32) -> Template {
    let now = Timestamp::now();
    Template {
        id: TemplateId::new(),
        project_id: ProjectId::DEFAULT,
        name: "web".into(),
        tag: "latest".into(),
        state: TemplateState::Ready,
        reason: None,
        spec: TemplateSpec {
            image: "debian".into(),
            driver: DriverKind::Sim,
            vcpus: 1,
            memory_mb,
            disk_mb: 64,
            env: BTreeMap::new(),
            files: Vec::new(),
            steps: Vec::new(),
            start: None,
            ready: None,
            network: NetworkPolicy::default(),
            tools: Vec::new(),
        },
        digest: Some("00".repeat(32)),
        snapshot_id: SnapshotId::new(),
        builder_id: VmId::new(),
        task_id: TaskId::new(),
        progress: TemplateProgress::default(),
        size_bytes: Some(1),
        created_at: now,
        updated_at: now,
        generation: 1,
    }
}

/// Pools, their keeper and its world.
pub(super) struct Rig {
    pub(super) pools: Arc<PoolSet>,
    pub(super) fake: Arc<Fake>,
    pub(super) stop: CancellationToken,
    pub(super) keeper: JoinHandle<()>,
}

pub(super) fn pool(template: &str, min: u32, max: u32) -> PoolConfig {
    PoolConfig { template: template.into(), min, max }
}

impl Rig {
    /// Pools of ready templates.
    pub(super) fn new(configs: &[PoolConfig]) -> Self {
        Self::with_age(configs, Duration::from_hours(1))
    }

    pub(super) fn with_age(configs: &[PoolConfig], age_max: Duration) -> Self {
        let driver = SimDriver::new(SimHost::new(SimConfig::default()));
        let fake = Fake {
            world: watch::Sender::new(World::default()),
            available_mb: AtomicU64::new(1_000_000),
            driver: Arc::new(driver),
        };
        for config in configs {
            fake.world.send_modify(|world| {
                world.templates.insert(config.template.clone(), template(100));
            });
        }
        let pools = PoolSet::new(configs.to_vec(), age_max, RESERVE_MB);
        let mut rig = Self {
            pools: Arc::new(pools),
            fake: Arc::new(fake),
            stop: CancellationToken::new(),
            keeper: tokio::spawn(async {}),
        };
        rig.keep();
        rig
    }

    fn keep(&mut self) {
        let fake = Arc::clone(&self.fake);
        let meter = Meter::of(Arc::new(move || Some(fake.available_mb.load(Ordering::Relaxed))));
        let (pools, fake, stop) =
            (Arc::clone(&self.pools), Arc::clone(&self.fake), self.stop.clone());
        self.keeper = tokio::spawn(async move { pools.keep(fake, meter, stop).await });
    }

    pub(super) fn set_available_mb(&self, mb: u64) {
        self.fake.available_mb.store(mb, Ordering::Relaxed);
    }

    pub(super) fn world<T>(&self, look: impl FnOnce(&World) -> T) -> T {
        look(&self.fake.world.borrow())
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut World)) {
        self.fake.world.send_modify(change);
    }

    /// The pool's template is another one, or none, and the worker hears of it.
    pub(super) fn set_template(&self, name: &str, template: Option<Template>) {
        self.change(|world| match template {
            Some(template) => drop(world.templates.insert(name.to_owned(), template)),
            None => drop(world.templates.remove(name)),
        });
        self.pools.templates_changed();
    }

    pub(super) fn template(&self, name: &str) -> TemplateId {
        self.world(|world| world.templates[name].id)
    }

    pub(super) fn claim(&self, name: &str) -> Option<Spare> {
        let in_hand = self.pools.begin();
        self.pools.claim(self.template(name), &in_hand)
    }

    /// The only pool that has a template.
    pub(super) fn status(&self) -> PoolStatus {
        let mut all = self.pools.pools();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    pub(super) fn ready(&self) -> u32 {
        self.pools.pools().iter().map(|pool| pool.ready).sum()
    }

    /// Lets time go on until the keeper has nothing more to do for a while.
    pub(super) async fn settle(&self) {
        sleep(Duration::from_secs(30)).await;
    }
}
