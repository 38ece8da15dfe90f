//! A worker with a template and a pool of it.

use std::{collections::BTreeMap, time::Duration};

use aether_drivers::{
    Driver as _, Machine,
    sim::{ManualClock, SimClock, SimConfig, SimDriver},
};
use aether_events::{Event, Received};
use aether_queue::{Entry, Lane};
use aether_store::{Capacity, NewTask, NewVm};
use aether_streams::PoolStatus;
use aether_types::{
    DriverKind, MachineId, NetworkPolicy, Origin, Priority, Task, TaskId, TaskKind, TaskState,
    Template, TemplateSpec, TemplateState, Vm, VmId, VmSpec, VmState,
};
use aether_worker::{PoolConfig, ShutdownMode};
use tokio::time::timeout;

use crate::rig::Rig;

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_mins(1);

pub(crate) struct House {
    pub(crate) rig: Rig,
    /// Of the host, where it stands still until it is moved.
    clock: Option<ManualClock>,
    pub(crate) template: Template,
}

fn template_spec() -> TemplateSpec {
    TemplateSpec {
        image: "debian".into(),
        driver: DriverKind::Sim,
        vcpus: 1,
        memory_mb: 256,
        disk_mb: 64,
        env: [("FROM".to_owned(), "template".to_owned())].into(),
        files: Vec::new(),
        steps: Vec::new(),
        start: None,
        ready: None,
        network: NetworkPolicy::default(),
        tools: Vec::new(),
    }
}

async fn while_time_passes<T>(clock: Option<&ManualClock>, until: impl Future<Output = T>) -> T {
    let Some(clock) = clock else { return until.await };
    let passing = async {
        loop {
            clock.advance(Duration::from_secs(1));
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        done = until => done,
        () = passing => unreachable!("time passes for ever"),
    }
}

impl House {
    /// A worker whose pool is full.
    pub(crate) async fn new(config: SimConfig, min: u32, max: u32) -> Self {
        let mut house = Self::without_pool(config).await;
        house.open(min, max, 0).await;
        house.filled(min).await;
        house
    }

    /// A worker with the default template, and no pool yet.
    pub(crate) async fn without_pool(config: SimConfig) -> Self {
        let clock = match &config.clock {
            SimClock::Manual(clock) => Some(clock.clone()),
            SimClock::Tokio { .. } => None,
        };
        let rig = Rig::new(config).await;
        let template = while_time_passes(clock.as_ref(), Self::build(&rig)).await;
        Self { rig, clock, template }
    }

    async fn build(rig: &Rig) -> Template {
        let mut events = rig.listen();
        let worker = rig.worker.as_ref().unwrap();
        let mut template = worker.ensure_default_template(template_spec()).await.unwrap();
        while template.state == TemplateState::Building {
            match events.next().await {
                Received::Event(Event::Template { .. }) => {
                    template = rig.store().template(template.id).await.unwrap().unwrap();
                }
                Received::Event(_) | Received::Missed => {}
                Received::Closed => panic!("the bus closed"),
            }
        }
        assert_eq!(template.state, TemplateState::Ready, "{:?}", template.reason);
        // Nothing of the build goes on beside what a test looks at.
        rig.in_state(template.builder_id, VmState::Deleted).await;
        template
    }

    /// The worker again, with a pool.
    pub(crate) async fn open(&mut self, min: u32, max: u32, memory_reserve_mb: u64) {
        self.shut_down().await;
        let config = &mut self.rig.parts.config;
        config.pools = vec![PoolConfig { template: "default:latest".into(), min, max }];
        config.memory_reserve_mb = memory_reserve_mb;
        self.start().await;
    }

    /// What an earlier worker began takes its time to end.
    pub(crate) async fn start(&mut self) {
        let clock = self.clock.clone();
        while_time_passes(clock.as_ref(), self.rig.start()).await;
    }

    async fn shut_down(&mut self) {
        let clock = self.clock.clone();
        while_time_passes(clock.as_ref(), self.rig.shut_down(ShutdownMode::KeepVms)).await;
    }

    pub(crate) fn status(&self) -> Option<PoolStatus> {
        self.rig.worker.as_ref().unwrap().pools().pools().pop()
    }

    /// Lets the host's time pass until then.
    pub(crate) async fn passing<T>(&self, until: impl Future<Output = T>) -> T {
        while_time_passes(self.clock.as_ref(), until).await
    }

    /// A pool sends no event; this looks whenever anything else had a turn.
    pub(crate) async fn until(&self, what: &str, seen: impl Fn(Option<PoolStatus>) -> bool) {
        let looking = async {
            while !seen(self.status()) {
                tokio::task::yield_now().await;
            }
        };
        timeout(LIMIT, looking).await.unwrap_or_else(|_| panic!("{what}: {:?}", self.status()));
    }

    pub(crate) async fn filled(&self, ready: u32) {
        let full = self.until("a full pool", |pool| pool.is_some_and(|pool| pool.ready == ready));
        self.passing(full).await;
    }

    pub(crate) async fn machines(&self) -> Vec<Machine> {
        SimDriver::new(self.rig.host.clone()).list().await.unwrap()
    }

    /// Machines that are no VM's.
    pub(crate) async fn spares(&self) -> Vec<MachineId> {
        let is_spare = |machine: &Machine| machine.spec.as_ref().is_some_and(|s| s.vm.is_none());
        self.machines().await.into_iter().filter(is_spare).map(|machine| machine.id).collect()
    }

    pub(crate) async fn machine_of(&self, vm: VmId) -> MachineId {
        let machines = self.machines().await;
        let of_vm = |machine: &&Machine| machine.spec.as_ref().is_some_and(|s| s.vm == Some(vm));
        machines.iter().find(of_vm).unwrap().id
    }

    pub(crate) async fn request(&self, name: &str, origin: Origin) -> Task {
        let spec = VmSpec {
            vcpus: 1,
            memory_mb: 256,
            disk_mb: 64,
            image: "debian".into(),
            driver: DriverKind::Sim,
            env: [("GREETING".to_owned(), format!("hello, {name}"))].into(),
            labels: BTreeMap::new(),
            timeout_s: None,
            network: NetworkPolicy::default(),
            origin,
            tools: Vec::new(),
            placement: aether_types::Placement::default(),
        };
        let vm = NewVm { id: VmId::new(), name: name.to_owned(), spec };
        let (id, kind, priority) = (TaskId::new(), TaskKind::VmCreate, Priority::Default);
        let task = NewTask { id, kind, priority, max_attempts: 3, project: None };
        let accepted = self.rig.store().create_vm(vm, task, Capacity::default(), None).await;
        let accepted = accepted.unwrap();
        let entry = Entry { task: id, lane: Lane::Shared, priority, delay: Duration::ZERO };
        self.rig.parts.queue.enqueue(&[entry]).await.unwrap();
        self.rig.store().confirm_dispatched(&[id]).await.unwrap();
        accepted.task
    }

    pub(crate) async fn created(&self, task: &Task) -> Vm {
        let task = timeout(LIMIT, self.rig.ended(task.id)).await.unwrap();
        assert_eq!(task.state, TaskState::Completed, "{task:?}");
        self.rig.store().vm(task.vm_id.unwrap()).await.unwrap().unwrap()
    }

    /// A VM of the template.
    pub(crate) async fn create(&self, name: &str) -> Vm {
        let task = self.request(name, Origin::Template(self.template.id)).await;
        self.created(&task).await
    }

    /// The worker ends; the pool's machines go with it, and `vms` are deleted before.
    pub(crate) async fn close(mut self, vms: &[VmId]) {
        for &vm in vms {
            let task = self.rig.request(vm, TaskKind::VmDelete).await;
            let ended = self.passing(self.rig.ended(task.id)).await;
            assert_eq!(ended.state, TaskState::Completed);
        }
        self.shut_down().await;
        self.rig.assert_clean().await;
    }
}
