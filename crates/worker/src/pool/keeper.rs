//! The one task that makes and discards spare machines.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use aether_types::{DriverKind, Fault, MachineId, Template, TemplateId};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Meter, PoolSet, Spare, Spares, Turn,
    backoff::Backoff,
    memory::{self, Available, Pressure},
    shelf::{Lack, Ready, Want, Watch},
};

/// A machine that has to go.
struct Condemned {
    machine: MachineId,
    driver: DriverKind,
    backoff: Backoff,
}

impl Condemned {
    fn new(machine: MachineId, driver: DriverKind) -> Self {
        Self { machine, driver, backoff: Backoff::default() }
    }
}

/// What is to be done next.
enum Step {
    Discard(Condemned),
    Make {
        pool: usize,
        template: Arc<Template>,
    },
    /// Nothing before then.
    Rest(Option<Instant>),
}

struct Keeper<'a, S> {
    pools: &'a PoolSet,
    spares: Arc<S>,
    turn: Turn,
    available: Available,
    pressure: watch::Receiver<Pressure>,
    /// Strikes of the pressure that were answered.
    answered: u64,
    exits: JoinSet<MachineId>,
    /// The machine that is being made or discarded.
    in_hand: Option<(MachineId, DriverKind)>,
    condemned: VecDeque<Condemned>,
    /// The store did not answer; it is asked again then.
    refresh_at: Option<Instant>,
}

impl PoolSet {
    /// Keeps the pools until `stop`; then nothing more is made or claimed, and what is there is
    /// discarded. Dropped before its end, it leaves the machines as a crash would.
    pub(crate) async fn keep<S: Spares>(
        &self,
        spares: Arc<S>,
        meter: Meter,
        stop: CancellationToken,
    ) {
        let sender = watch::Sender::new(Pressure::default());
        let mut keeper = Keeper {
            pools: self,
            spares,
            turn: self.traffic.turn(),
            available: Arc::clone(&meter.available),
            pressure: sender.subscribe(),
            answered: 0,
            exits: JoinSet::new(),
            in_hand: None,
            condemned: VecDeque::new(),
            refresh_at: None,
        };
        if !self.shelves().all.is_empty() {
            tokio::select! {
                () = stop.cancelled() => {}
                () = memory::watch(meter, self.reserve_mb, &sender) => {}
                () = keeper.work() => {}
            }
        }
        keeper.close().await;
    }
}

impl<S: Spares> Keeper<'_, S> {
    async fn work(&mut self) {
        loop {
            self.refresh().await;
            self.relieve().await;
            if !self.turn.is_free() {
                let turn = self.turn.clone();
                tokio::select! {
                    () = turn.pass() => {}
                    () = self.news(None) => {}
                }
                continue;
            }
            match self.next_step(Instant::now()) {
                Step::Discard(condemned) => self.discard(condemned).await,
                Step::Make { pool, template } => self.make(pool, &template).await,
                Step::Rest(until) => self.news(until).await,
            }
        }
    }

    /// Completes when there may be something else to do.
    async fn news(&mut self, until: Option<Instant>) {
        let timer = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.pools.wake.notified() => {}
            () = self.turn.ebb() => {}
            _ = self.pressure.changed() => {}
            // An error: the machine was claimed or taken, and nobody watches it here any more.
            Some(ended) = self.exits.join_next() => {
                if let Ok(id) = ended {
                    self.ended(id);
                }
            }
            () = timer => {}
        }
    }

    fn ended(&mut self, id: MachineId) {
        let now = Instant::now();
        let dead = {
            let mut shelves = self.pools.shelves();
            shelves.all.iter_mut().find_map(|shelf| {
                let dead = shelf.take_dead(id, now)?;
                Some((dead, shelf.driver()?))
            })
        };
        if let Some((dead, driver)) = dead {
            tracing::warn!(machine.id = %id, "a spare machine ended by itself");
            self.condemn(dead.spare.machine, driver);
        }
    }

    /// Reads which templates the pools are of, where that may have changed.
    async fn refresh(&mut self) {
        let is_due = self.refresh_at.is_some_and(|at| at <= Instant::now());
        if !self.pools.is_stale.swap(false, Ordering::AcqRel) && !is_due {
            return;
        }
        self.refresh_at = None;
        let count = self.pools.shelves().all.len();
        for pool in 0..count {
            let config = self.pools.shelves().all[pool].config.clone();
            let (name, tag) = config.name_and_tag();
            match self.spares.template(name, tag).await {
                Ok(template) => self.set_template(pool, template.map(Arc::new)),
                Err(fault) => {
                    tracing::warn!(pool = config.template, error = %fault, "read a pool's template");
                    self.refresh_at = Some(Instant::now() + memory::SWEEP);
                }
            }
        }
    }

    fn set_template(&mut self, pool: usize, template: Option<Arc<Template>>) {
        let (driver, old) = {
            let shelf = &mut self.pools.shelves().all[pool];
            (shelf.driver(), shelf.set_template(template))
        };
        for ready in old {
            // Machines are there only of a template.
            if let Some(driver) = driver {
                self.condemn(ready.spare.machine, driver);
            }
        }
    }

    fn condemn(&mut self, machine: MachineId, driver: DriverKind) {
        self.condemned.push_back(Condemned::new(machine, driver));
    }

    async fn discard(&mut self, mut condemned: Condemned) {
        // Remembered over the wait: whoever stops this meanwhile discards it again.
        self.in_hand = Some((condemned.machine, condemned.driver));
        let discarded = self.spares.discard(condemned.machine, condemned.driver).await;
        self.in_hand = None;
        if let Err(fault) = discarded {
            if condemned.backoff.failed(Instant::now()) {
                tracing::error!(machine.id = %condemned.machine, error = %fault,
                    "remove a spare machine; it is tried again");
            }
            self.condemned.push_back(condemned);
        }
    }

    /// Gives machines back while the host is short of memory, the newest first: one when it shows,
    /// and as many as it takes for the reserve to be available.
    async fn relieve(&mut self) {
        loop {
            let pressure = *self.pressure.borrow_and_update();
            let shown_again = self.answered < pressure.strikes;
            self.answered = pressure.strikes;
            if !pressure.is_high || !(shown_again || self.is_below(self.pools.reserve_mb)) {
                return;
            }
            if let Some(condemned) = self.due(Instant::now()) {
                self.discard(condemned).await;
                continue;
            }
            let Some((machine, driver)) = self.take_newest() else { return };
            tracing::info!(machine.id = %machine, "a spare machine is given back for its memory");
            self.discard(Condemned::new(machine, driver)).await;
        }
    }

    fn is_below(&self, mb: u64) -> bool {
        (self.available)().is_some_and(|available| available < mb)
    }

    fn take_newest(&mut self) -> Option<(MachineId, DriverKind)> {
        let mut shelves = self.pools.shelves();
        let shelf = shelves.all.iter_mut().max_by_key(|shelf| shelf.newest())?;
        let driver = shelf.driver()?;
        shelf.take_newest().map(|ready| (ready.spare.machine, driver))
    }

    /// A machine whose removal is to be tried now.
    fn due(&mut self, now: Instant) -> Option<Condemned> {
        let at = self.condemned.iter().position(|c| c.backoff.wait(now).is_none())?;
        self.condemned.remove(at)
    }

    fn next_step(&mut self, now: Instant) -> Step {
        if let Some(condemned) = self.due(now) {
            return Step::Discard(condemned);
        }
        let age_max = self.pools.age_max;
        let mut shelves = self.pools.shelves();
        let mut emptiest: Option<(Want, usize, Arc<Template>)> = None;
        for (pool, shelf) in shelves.all.iter_mut().enumerate() {
            let Some(template) = shelf.template.clone() else { continue };
            match shelf.lacks(now, age_max) {
                Lack::Nothing => {}
                Lack::TooMany => {
                    if let Some(ready) = shelf.take_oldest() {
                        let driver = template.spec.driver;
                        return Step::Discard(Condemned::new(ready.spare.machine, driver));
                    }
                }
                Lack::Some(want) => {
                    if emptiest.as_ref().is_none_or(|(other, _, _)| want < *other) {
                        emptiest = Some((want, pool, template));
                    }
                }
            }
        }
        let mut until = shelves.all.iter().filter_map(|s| s.next_change(now, age_max)).min();
        shelves.is_short = self.pressure.borrow().is_high;
        if let Some((_, pool, template)) = emptiest
            && !shelves.is_short
        {
            // The guest may come to use all of its memory as soon as somebody claims it.
            let room = memory::comfortable_mb(self.pools.reserve_mb)
                .saturating_add(u64::from(template.spec.memory_mb));
            if !self.is_below(room) {
                return Step::Make { pool, template };
            }
            shelves.is_short = true;
            until = earliest(until, Some(now + memory::SWEEP));
        }
        let retried = self.condemned.iter().filter_map(|c| c.backoff.wait(now)).min();
        Step::Rest(earliest(earliest(until, retried), self.refresh_at))
    }

    async fn make(&mut self, pool: usize, template: &Arc<Template>) {
        let begun = Instant::now();
        let (id, driver) = (MachineId::new(), template.spec.driver);
        self.in_hand = Some((id, driver));
        let (spares, turn) = (Arc::clone(&self.spares), self.turn.clone());
        let made = {
            let mut making = spares.make(id, template, &turn);
            loop {
                tokio::select! {
                    made = &mut making => break Some(made),
                    () = self.news(None) => {
                        self.refresh().await;
                        if !self.is_wanted(pool, template.id) {
                            break None;
                        }
                    }
                }
            }
        };
        self.in_hand = None;
        match made {
            Some(Ok(spare)) => self.shelve(pool, driver, spare, begun),
            Some(Err(fault)) => {
                self.condemn(id, driver);
                self.failed(pool, &fault);
            }
            None => self.condemn(id, driver),
        }
    }

    fn is_wanted(&self, pool: usize, template: TemplateId) -> bool {
        !self.pressure.borrow().is_high && self.pools.shelves().all[pool].is_of(template)
    }

    fn shelve(&mut self, pool: usize, driver: DriverKind, spare: Spare, begun: Instant) {
        let now = Instant::now();
        let (spares, id) = (Arc::clone(&self.spares), spare.machine);
        let watch = Watch(self.exits.spawn(async move {
            spares.exited(id, driver).await;
            id
        }));
        let surplus = {
            let shelf = &mut self.pools.shelves().all[pool];
            shelf.demand.refilled(now.duration_since(begun));
            shelf.put(Ready { spare, made: now, _watch: watch }, now)
        };
        if let Some(surplus) = surplus {
            self.condemn(surplus.spare.machine, driver);
        }
    }

    fn failed(&mut self, pool: usize, fault: &Fault) {
        let shelf = &mut self.pools.shelves().all[pool];
        let template = shelf.config.template.clone();
        if shelf.fail(Instant::now()) {
            tracing::warn!(pool = template, error = %fault,
                "make a machine for a pool; creations restore until it succeeds");
        } else {
            tracing::debug!(pool = template, error = %fault, "make a machine for a pool");
        }
    }

    /// Nothing is claimed from now on, and everything goes.
    async fn close(mut self) {
        {
            let mut shelves = self.pools.shelves();
            shelves.is_closed = true;
            for shelf in &mut shelves.all {
                if let Some(driver) = shelf.driver() {
                    let all = shelf.take_all().into_iter();
                    self.condemned.extend(all.map(|r| Condemned::new(r.spare.machine, driver)));
                }
            }
        }
        if let Some((machine, driver)) = self.in_hand.take() {
            self.condemn(machine, driver);
        }
        let mut discards = JoinSet::new();
        for Condemned { machine, driver, .. } in self.condemned {
            let spares = Arc::clone(&self.spares);
            discards.spawn(async move { (machine, spares.discard(machine, driver).await) });
        }
        while let Some(discarded) = discards.join_next().await {
            if let Ok((machine, Err(fault))) = discarded {
                tracing::error!(machine.id = %machine, error = %fault,
                    "remove a spare machine; the next start does it");
            }
        }
    }
}

fn earliest(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}
