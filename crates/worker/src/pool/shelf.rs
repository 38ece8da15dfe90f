//! One pool: what is ready, and what it lacks. Decides, and does nothing.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use aether_streams::PoolStatus;
use aether_types::{DriverKind, MachineId, Template, TemplateId};
use tokio::{task::AbortHandle, time::Instant};

use super::{PoolConfig, Spare, backoff::Backoff, demand::Demand};

/// A spare machine that died so soon would die again: the next one waits.
const YOUNG: Duration = Duration::from_mins(1);

/// What a pool lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lack {
    Nothing,
    /// There are more machines than there shall be.
    TooMany,
    Some(Want),
}

/// Why a pool wants a machine; what is smaller comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Want {
    /// It has fewer than it shall have: so many of a thousand.
    More { permille: u64 },
    /// In the place of one that is too old.
    Younger,
}

/// The end of a spare machine's process is waited for until this is dropped.
#[derive(Debug)]
pub(super) struct Watch(pub(super) AbortHandle);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug)]
pub(super) struct Ready {
    pub(super) spare: Spare,
    pub(super) made: Instant,
    pub(super) _watch: Watch,
}

#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) config: PoolConfig,
    /// The ready one of the pool's name.
    pub(super) template: Option<Arc<Template>>,
    /// It has failed since a machine was last found to be sound.
    backoff: Backoff,
    pub(super) demand: Demand,
    /// Oldest first, which is the order in which they are claimed.
    ready: VecDeque<Ready>,
    hits: u64,
    misses: u64,
}

impl Shelf {
    pub(super) fn new(config: PoolConfig) -> Self {
        Self {
            config,
            template: None,
            backoff: Backoff::default(),
            demand: Demand::default(),
            ready: VecDeque::new(),
            hits: 0,
            misses: 0,
        }
    }

    pub(super) fn is_of(&self, template: TemplateId) -> bool {
        self.template.as_ref().is_some_and(|known| known.id == template)
    }

    /// The oldest machine, for somebody who waits for it.
    pub(super) fn claim(&mut self, now: Instant) -> Option<Spare> {
        self.demand.ask(now);
        let ready = self.ready.pop_front();
        match &ready {
            Some(_) => {
                self.hits += 1;
                // It lived until it was wanted.
                self.backoff = Backoff::default();
            }
            None => self.misses += 1,
        }
        ready.map(|ready| ready.spare)
    }

    /// Takes another template, or none, and gives up the machines of the one before.
    pub(super) fn set_template(&mut self, template: Option<Arc<Template>>) -> VecDeque<Ready> {
        let unchanged = match &template {
            Some(template) => self.is_of(template.id),
            None => self.template.is_none(),
        };
        if unchanged {
            return VecDeque::new();
        }
        self.template = template;
        self.backoff = Backoff::default();
        std::mem::take(&mut self.ready)
    }

    /// Adds a machine; gives up the oldest where that is one too many.
    pub(super) fn put(&mut self, ready: Ready, now: Instant) -> Option<Ready> {
        self.ready.push_back(ready);
        if self.count() > self.target(now) { self.ready.pop_front() } else { None }
    }

    pub(super) fn take_all(&mut self) -> VecDeque<Ready> {
        std::mem::take(&mut self.ready)
    }

    pub(super) fn take_oldest(&mut self) -> Option<Ready> {
        self.ready.pop_front()
    }

    pub(super) fn take_newest(&mut self) -> Option<Ready> {
        self.ready.pop_back()
    }

    /// The process of this machine has ended.
    pub(super) fn take_dead(&mut self, id: MachineId, now: Instant) -> Option<Ready> {
        let at = self.ready.iter().position(|ready| ready.spare.machine == id)?;
        let dead = self.ready.remove(at)?;
        if now.duration_since(dead.made) < YOUNG {
            self.fail(now);
        }
        Some(dead)
    }

    /// No machine could be made, or it died at once. Whether that is news.
    pub(super) fn fail(&mut self, now: Instant) -> bool {
        if self.oldest().is_some_and(|made| now.duration_since(made) >= YOUNG) {
            self.backoff = Backoff::default();
        }
        self.backoff.failed(now)
    }

    pub(super) fn oldest(&self) -> Option<Instant> {
        self.ready.front().map(|ready| ready.made)
    }

    pub(super) fn newest(&self) -> Option<Instant> {
        self.ready.back().map(|ready| ready.made)
    }

    pub(super) fn driver(&self) -> Option<DriverKind> {
        self.template.as_ref().map(|template| template.spec.driver)
    }

    /// Machines that there shall be, as far as memory allows: the demand, within the bounds.
    pub(super) fn target(&mut self, now: Instant) -> u32 {
        if self.template.is_none() {
            return 0;
        }
        let PoolConfig { min, max, .. } = self.config;
        self.demand.peak(now).max(min).min(max)
    }

    pub(super) fn lacks(&mut self, now: Instant, age_max: Duration) -> Lack {
        let target = self.target(now);
        let ready = self.count();
        if ready > target {
            Lack::TooMany
        } else if self.backoff.wait(now).is_some() {
            Lack::Nothing
        } else if ready < target {
            Lack::Some(Want::More { permille: u64::from(ready) * 1000 / u64::from(target) })
        } else if self.oldest().is_some_and(|made| now.duration_since(made) >= age_max) {
            Lack::Some(Want::Younger)
        } else {
            Lack::Nothing
        }
    }

    /// When the answer of `lacks` may change by time alone.
    pub(super) fn next_change(&self, now: Instant, age_max: Duration) -> Option<Instant> {
        let backoff = self.backoff.wait(now);
        // What is too old already waits for something else than time.
        let old = self.oldest().and_then(|made| made.checked_add(age_max)).filter(|at| *at > now);
        // Past its pause a pool is looked at again; until then its age does not matter.
        let old = if backoff.is_some() { None } else { old };
        [backoff, old, self.demand.next_change()].into_iter().flatten().min()
    }

    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.ready.len()).unwrap_or(u32::MAX)
    }

    /// `None` where no template of the pool's name is ready.
    pub(super) fn status(&mut self, now: Instant, is_short: bool) -> Option<PoolStatus> {
        let target = self.target(now);
        let (name, tag) = self.config.name_and_tag();
        Some(PoolStatus {
            template_id: self.template.as_ref()?.id,
            template: format!("{name}:{tag}"),
            ready: self.count(),
            target: if is_short { target.min(self.count()) } else { target },
            min: self.config.min,
            max: self.config.max,
            hits: self.hits,
            misses: self.misses,
        })
    }
}
