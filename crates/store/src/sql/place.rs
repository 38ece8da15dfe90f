//! Where new VMs go. A VM's worker is written in the transaction that found room for it, under the
//! lock of all creations: what a worker has promised is never more than it may.
//!
//! ```text
//!   recorded ──► placed (vms.worker_id) ──► dispatched to the worker's lane
//!      │ nobody fits                 ▲
//!      └──► waits (outbox.waits) ────┘ whenever something has changed
//! ```
//!
//! Where no worker has ever registered (programs of an earlier version) VMs are placed by whoever
//! claims their task.

use super::{
    Lock, Sql, Tx,
    query::{Builder, Row, Target, query, together},
    rows::{self, WORKER_COLUMNS, task_columns, worker_columns},
    write,
};
use crate::{StoreError, error::Context};
use aether_types::{
    Origin, Presence, SnapshotId, Task, TaskProgress, TemplateId, TemplateSpec, Timestamp, Vm,
    VmId, VmSpec, VmState, Worker, WorkerId, WorkerLoad,
    placement::{Holders, Wish, choose},
};

/// Where a VM that is being recorded goes.
#[derive(Debug)]
pub(super) enum Place {
    On(WorkerId),
    /// Why no worker takes it now.
    Waits(String),
    /// There is no registry.
    Anywhere,
}

impl Place {
    pub(super) fn worker(&self) -> Option<WorkerId> {
        match self {
            Self::On(worker) => Some(*worker),
            Self::Waits(_) | Self::Anywhere => None,
        }
    }

    pub(super) fn waits(&self) -> bool {
        matches!(self, Self::Waits(_))
    }

    /// What the task says meanwhile.
    pub(super) fn progress(&self) -> Option<TaskProgress> {
        match self {
            Self::Waits(why) => {
                Some(TaskProgress { now: why.clone(), log: String::new(), generation: 1 })
            }
            Self::On(_) | Self::Anywhere => None,
        }
    }
}

/// All workers, each with what it has promised. What a program of an earlier version recorded without
/// its size counts as the least.
pub(super) async fn with_load(on: impl Target) -> Result<Vec<(Worker, WorkerLoad)>, StoreError> {
    let mut query = Builder::new(concat!(
        "select ",
        worker_columns!(),
        ", coalesce(vm_count, 0), coalesce(vcpu_sum, 0), coalesce(memory_sum, 0) \
         from workers left join (select worker_id as of_worker, count(*) as vm_count, \
         cast(sum(coalesce(nullif(vcpus, 0), 1)) as bigint) as vcpu_sum, \
         cast(sum(coalesce(nullif(memory_mb, 0), 256)) as bigint) as memory_sum \
         from vms where worker_id is not null and state <> 'deleted' and "
    ));
    let holding = VmState::ALL.iter().filter(|state| state.holds_capacity());
    query.push_in("state", holding.map(|state| state.as_str()));
    query.push(" group by worker_id) as held on of_worker = id order by id");
    let found = query.build().fetch_all(on).await.context("read the workers")?;
    rows::all(&found, worker_with_load)
}

fn worker_with_load(row: &Row) -> Result<(Worker, WorkerLoad), StoreError> {
    let r = rows::Reader { row, noun: "worker" };
    let memory_mb: i64 = r.get(WORKER_COLUMNS + 2)?;
    let load = WorkerLoad {
        vms: r.unsigned(WORKER_COLUMNS)?,
        vcpus: r.unsigned(WORKER_COLUMNS + 1)?,
        memory_mb: u64::try_from(memory_mb).map_err(|_| r.corrupt())?,
    };
    Ok((rows::worker(row)?, load))
}

/// The fleet as it is in a transaction that holds the lock of creations; rooms that are given away
/// in it are counted.
pub(super) struct Fleet(Vec<(Worker, WorkerLoad)>);

impl Fleet {
    pub(super) async fn read(tx: &mut Tx<'_>) -> Result<Self, StoreError> {
        with_load(&mut *tx).await.map(Self)
    }

    pub(super) async fn place(
        &mut self,
        tx: &mut Tx<'_>,
        spec: &VmSpec,
    ) -> Result<Place, StoreError> {
        if self.0.is_empty() {
            return Ok(Place::Anywhere);
        }
        let wish = self.wish(tx, spec).await?;
        match choose(&self.0, &wish) {
            Ok(index) => {
                let (worker, load) = &mut self.0[index];
                *load = load.plus(spec.vcpus, spec.memory_mb);
                Ok(Place::On(worker.id))
            }
            Err(why) => Ok(Place::Waits(why)),
        }
    }

    fn takes_any(&self) -> bool {
        self.0.iter().any(|(worker, _)| worker.standing.presence == Presence::Present)
    }

    /// Only this worker.
    pub(super) fn alone(self, id: WorkerId) -> Self {
        Self(self.0.into_iter().filter(|(worker, _)| worker.id == id).collect())
    }

    async fn wish<'s>(&self, tx: &mut Tx<'_>, spec: &'s VmSpec) -> Result<Wish<'s>, StoreError> {
        let holders = match spec.origin {
            Origin::Image | Origin::Builder(_) => Holders::All,
            Origin::Snapshot(id) => {
                Holders::Only(holder_of_snapshot(tx, id).await?.into_iter().collect())
            }
            Origin::Template(id) => self.holders_of_template(tx, id).await?,
        };
        let VmSpec { driver, vcpus, memory_mb, placement, .. } = spec;
        Ok(Wish { driver: *driver, vcpus: *vcpus, memory_mb: *memory_mb, placement, holders })
    }

    /// The worker that built it, and those that use the same folder of templates. What is nothing
    /// but its image can be had everywhere.
    async fn holders_of_template(
        &self,
        tx: &mut Tx<'_>,
        id: TemplateId,
    ) -> Result<Holders, StoreError> {
        let row = query(
            "select templates.spec, coalesce(snapshots.worker_id, vms.worker_id) from templates \
             join snapshots on snapshots.id = templates.snapshot_id \
             join vms on vms.id = templates.builder_id where templates.id = $1",
        )
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("look for a template's worker")?;
        let Some(row) = row else { return Ok(Holders::All) };
        let r = rows::Reader { row: &row, noun: "template" };
        let (spec, holder): (TemplateSpec, Option<WorkerId>) = (r.json(0)?, r.parsed_option(1)?);
        let of_holder = self.0.iter().find(|(worker, _)| Some(worker.id) == holder);
        let folder = of_holder.and_then(|(worker, _)| worker.template_folder.as_ref());
        let has = |worker: &Worker| {
            Some(worker.id) == holder
                || folder.is_some() && worker.template_folder.as_ref() == folder
        };
        let holders = self.0.iter().filter(|(worker, _)| has(worker)).map(|(worker, _)| worker.id);
        let holders = holders.collect();
        let is_its_image = spec.files.is_empty()
            && spec.steps.is_empty()
            && spec.start.is_none()
            && spec.ready.is_none();
        Ok(if is_its_image { Holders::Preferred(holders) } else { Holders::Only(holders) })
    }
}

/// A snapshot that is being made is where its VM is.
async fn holder_of_snapshot(
    tx: &mut Tx<'_>,
    id: SnapshotId,
) -> Result<Option<WorkerId>, StoreError> {
    let row = query(
        "select coalesce(snapshots.worker_id, vms.worker_id) from snapshots \
         join vms on vms.id = snapshots.vm_id where snapshots.id = $1",
    )
    .bind(id.to_string())
    .fetch_optional(&mut *tx)
    .await
    .context("look for a snapshot's worker")?;
    let Some(row) = row else { return Ok(None) };
    rows::Reader { row: &row, noun: "snapshot" }.parsed_option(0)
}

/// A VM that is about to be started holds room again; it can be had only where its disk is. One that
/// never was on a worker goes where a new one would.
pub(super) async fn make_room_to_start(tx: &mut Tx<'_>, vm: &mut Vm) -> Result<Place, StoreError> {
    let mut fleet = Fleet::read(tx).await?;
    let Some(id) = vm.worker_id else {
        let place = fleet.place(tx, &vm.spec).await?;
        vm.worker_id = place.worker();
        return Ok(place);
    };
    expect_room(fleet, vm, id)?;
    Ok(Place::On(id))
}

/// The task of a VM that waits for a worker is not to be dispatched.
pub(super) async fn hold_back(
    tx: &mut Tx<'_>,
    task: &mut Task,
    place: &Place,
) -> Result<(), StoreError> {
    let Some(progress) = place.progress() else { return Ok(()) };
    let hold = together(&[
        "update tasks set progress = $2 where id = $1",
        "update outbox set waits = 1 where task_id = $1",
    ])
    .bind(task.id.to_string())
    .bind(rows::json(&progress, "progress to record")?);
    tx.run(hold).await.context("hold a task back")?;
    task.progress = Some(progress);
    Ok(())
}

fn expect_room(fleet: Fleet, vm: &Vm, id: WorkerId) -> Result<(), StoreError> {
    let Some((worker, load)) = fleet.0.into_iter().find(|(worker, _)| worker.id == id) else {
        return Ok(());
    };
    if worker.standing.presence == Presence::Lost {
        let action = "be started while the worker that has its disk is lost";
        return Err(StoreError::WrongState { vm: Box::new(vm.clone()), action });
    }
    if load.plus(vm.spec.vcpus, vm.spec.memory_mb).is_within(&worker.capacity) {
        return Ok(());
    }
    let detail = format!(
        "worker {} on {}, which has the VM's disk, has no room for it now: stop or delete others",
        worker.id, worker.host
    );
    Err(StoreError::NoRoom { detail })
}

/// Gives places to creations that wait for one, oldest first; one for which there is none does not
/// hold up those behind it. Returns how many.
pub(super) async fn place_waiting(store: &Sql, limit: u32) -> Result<u64, StoreError> {
    // Nearly always there is none.
    let waiting = query("select 1 from outbox where waits = 1 limit 1").fetch_all(store).await;
    if waiting.context("look for VMs that wait for a worker")?.is_empty() {
        return Ok(0);
    }
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Creation]).await?;
    let mut fleet = Fleet::read(&mut tx).await?;
    if !fleet.takes_any() {
        return Ok(0);
    }
    let mut placed = 0;
    for vm in waiting_vms(&mut tx, limit).await? {
        tx.lock(Lock::Vm(vm)).await?;
        let vm = write::vm(&mut tx, vm).await?.ok_or(StoreError::Corrupt("task"))?;
        let is_wanted = matches!(vm.state, VmState::Creating | VmState::Starting);
        if !is_wanted || vm.worker_id.is_some() {
            continue;
        }
        if let Place::On(worker) = fleet.place(&mut tx, &vm.spec).await? {
            put(&mut tx, vm.id, worker).await?;
            placed += 1;
        }
    }
    tx.commit("commit the places of VMs").await?;
    Ok(placed)
}

/// VMs that wait for a worker.
pub(super) async fn count_waiting(store: &Sql) -> Result<u64, StoreError> {
    let row = query(
        "select count(*) from outbox join tasks on tasks.id = outbox.task_id where waits = 1 \
         and tasks.state = 'pending' and tasks.kind in ('vm:create', 'template:build', 'vm:start')",
    )
    .fetch_one(store)
    .await
    .context("count the VMs that wait for a worker")?;
    rows::Reader { row: &row, noun: "task" }.unsigned(0).map(u64::from)
}

async fn waiting_vms(tx: &mut Tx<'_>, limit: u32) -> Result<Vec<VmId>, StoreError> {
    const WAITING: &str = concat!(
        "select ",
        task_columns!(),
        " from tasks where id in (select task_id from outbox where waits = 1) \
         and state = 'pending' and kind in ('vm:create', 'template:build', 'vm:start') \
         order by created_at, id limit $1"
    );
    let found = query(WAITING).bind(limit).fetch_all(&mut *tx).await.context("read what waits")?;
    let tasks = rows::all(&found, rows::task)?;
    Ok(tasks.into_iter().filter_map(|task| task.vm_id).collect())
}

/// The VM is this worker's, and all that was asked of it meanwhile may be dispatched.
pub(super) async fn put(tx: &mut Tx<'_>, vm: VmId, worker: WorkerId) -> Result<(), StoreError> {
    let put = together(&[
        "update vms set worker_id = $2, updated_at = $3, generation = generation + 1 \
         where id = $1",
        "update tasks set progress = null where vm_id = $1 and state = 'pending' \
         and kind in ('vm:create', 'template:build', 'vm:start')",
        "update outbox set waits = 0 \
         where task_id in (select tasks.id from tasks where tasks.vm_id = $1)",
    ])
    .bind(vm.to_string())
    .bind(worker.to_string())
    .bind(Timestamp::now().unix_ms());
    tx.run(put).await.context("place a VM")
}

/// The VM waits for a worker again, with all that is pending on it.
pub(super) async fn unplace(tx: &mut Tx<'_>, vm: VmId) -> Result<(), StoreError> {
    let unplace = together(&[
        "update vms set worker_id = null, address = null, updated_at = $2, \
         generation = generation + 1 where id = $1",
        "insert into outbox (task_id, waits) select tasks.id, 1 from tasks \
         where tasks.vm_id = $1 and tasks.state = 'pending' \
         on conflict (task_id) do update set waits = 1",
    ])
    .bind(vm.to_string())
    .bind(Timestamp::now().unix_ms());
    tx.run(unplace).await.context("take a VM from its worker")
}
