//! Workers, dispatchers and what befalls them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aether_queue::{Depth, Entry, Lane, Lease, ManualClock, Queue, QueueError};
use aether_types::{Priority, TaskId, WorkerId};

use crate::{
    engine::Engine,
    truth::{Begin, Row, State, Truth},
};

const WORKERS: usize = 3;
const STEPS: usize = 120;
const LEASE: Duration = Duration::from_secs(10);
/// Between two renewals of a worker that lives.
const RENEW: Duration = Duration::from_secs(3);
/// Once nothing befalls anybody any more everything has ended within this.
const CALM: Duration = Duration::from_mins(1);
const PRIORITIES: [Priority; 4] =
    [Priority::Critical, Priority::High, Priority::Default, Priority::Low];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Up,
    /// As by SIGSTOP: it has what it had, and does nothing.
    Stopped,
    Dead,
}

/// A lease in a worker's hands.
#[derive(Debug, Clone)]
struct Held {
    lease: Lease,
    begun: bool,
    /// The queue forgot it, or has said that it is over.
    is_lost: bool,
}

#[derive(Debug)]
struct Worker {
    id: WorkerId,
    condition: Condition,
    held: Vec<Held>,
    /// Virtual time since it renewed what it holds.
    unrenewed: Duration,
}

pub(crate) struct World<'e> {
    engine: &'e mut Engine,
    clock: Arc<ManualClock>,
    /// `None` only while another process is about to open it.
    queue: Option<Box<dyn Queue>>,
    random: fastrand::Rng,
    workers: Vec<Worker>,
    pub(crate) truth: Truth,
    story: Story,
    pub(crate) kills: u64,
    pub(crate) stops: u64,
    pub(crate) restarts: u64,
}

/// What has happened so far; printed where the simulation fails.
struct Story {
    seed: u64,
    lines: Vec<String>,
}

impl Drop for Story {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("seed {}:\n{}", self.seed, self.lines.join("\n"));
        }
    }
}

macro_rules! tell {
    ($world:expr, $($line:tt)*) => { $world.story.lines.push(format!($($line)*)) };
}

impl<'e> World<'e> {
    pub(crate) async fn new(engine: &'e mut Engine, seed: u64) -> Self {
        engine.clear();
        let clock = Arc::new(ManualClock::new());
        let queue = engine.open(clock.clone()).await;
        let worker = || Worker {
            id: WorkerId::new(),
            condition: Condition::Up,
            held: Vec::new(),
            unrenewed: Duration::ZERO,
        };
        Self {
            engine,
            clock,
            queue: Some(queue),
            random: fastrand::Rng::with_seed(seed),
            workers: std::iter::repeat_with(worker).take(WORKERS).collect(),
            truth: Truth::default(),
            story: Story { seed, lines: Vec::new() },
            kills: 0,
            stops: 0,
            restarts: 0,
        }
    }

    /// A life of faults, and the calm after it.
    pub(crate) async fn live(&mut self) {
        for _ in 0..STEPS {
            self.step().await;
        }
        for at in 0..WORKERS {
            self.recover(at).await;
        }
        let mut passed = Duration::ZERO;
        while !self.truth.all_ended() || !self.is_empty().await {
            assert!(passed < CALM, "after {CALM:?} of calm: {:#?}", self.truth.rows());
            self.sweep().await;
            for at in 0..WORKERS {
                while self.claim(at).await {}
                while !self.workers[at].held.is_empty() {
                    self.go_on(at, false).await;
                }
            }
            self.pass(Duration::from_secs(1)).await;
            passed += Duration::from_secs(1);
        }
    }

    fn queue(&self) -> &dyn Queue {
        &**self.queue.as_ref().unwrap()
    }

    async fn is_empty(&self) -> bool {
        self.queue().depth().await.unwrap() == Depth::default()
    }

    async fn step(&mut self) {
        let at = self.random.usize(..WORKERS);
        match self.random.u32(..100) {
            0..18 => self.submit().await,
            18..40 => {
                self.claim(at).await;
            }
            40..44 => self.drop_claim(at).await,
            44..66 => self.go_on(at, true).await,
            66..78 => {
                let time = Duration::from_millis(self.random.u64(1..4_000));
                self.pass(time).await;
            }
            78..84 => self.sweep().await,
            84..89 => self.kill(at),
            89..95 => self.recover(at).await,
            95..98 => self.stop(at),
            98 => self.reopen().await,
            _ => self.forget_everything().await,
        }
    }

    /// Records a task, and dispatches it, unless the dispatcher dies between any two lines.
    async fn submit(&mut self) {
        let of = (self.random.u32(..3) == 0).then(|| self.random.usize(..WORKERS));
        let id = self.truth.record(of);
        let dies_after = self.random.u32(..6);
        tell!(self, "submit {id} of {of:?}; the dispatcher dies after {dies_after}");
        if dies_after == 0 {
            return;
        }
        let delay = Duration::from_secs(self.random.u64(..4) * u64::from(self.random.bool()));
        self.enqueue(id, delay).await;
        if dies_after > 1 {
            self.truth.row_mut(id).owed = false;
        }
    }

    async fn enqueue(&mut self, id: TaskId, delay: Duration) {
        let lane =
            self.truth.row(id).of.map_or(Lane::Shared, |of| Lane::Worker(self.workers[of].id));
        let priority = PRIORITIES[self.random.usize(..PRIORITIES.len())];
        self.queue().enqueue(&[Entry { task: id, lane, priority, delay }]).await.unwrap();
    }

    async fn claim(&mut self, at: usize) -> bool {
        let worker = &self.workers[at];
        if worker.condition != Condition::Up {
            return false;
        }
        let claimed = self.queue().claim(worker.id, LEASE, Duration::ZERO).await.unwrap();
        let Some(lease) = claimed else { return false };
        tell!(self, "worker {at} claims {} by {}", lease.task, lease.epoch);
        let last = self.truth.row(lease.task).epoch;
        assert!(lease.epoch > last, "{} is claimed by an epoch that is not higher", lease.task);
        self.workers[at].held.push(Held { lease, begun: false, is_lost: false });
        true
    }

    /// The worker dies as it claims: whether the claim was made nobody knows.
    async fn drop_claim(&mut self, at: usize) {
        if self.workers[at].condition != Condition::Up {
            return;
        }
        tell!(self, "worker {at} dies as it claims");
        let id = self.workers[at].id;
        {
            let mut claim = self.queue().claim(id, LEASE, Duration::ZERO);
            let _ = futures::poll!(claim.as_mut());
        }
        self.kill(at);
    }

    /// One step of one lease: begin, end, fail or be found over.
    async fn go_on(&mut self, at: usize, may_fail: bool) {
        let worker = &mut self.workers[at];
        if worker.condition != Condition::Up || worker.held.is_empty() {
            return;
        }
        let place = self.random.usize(..worker.held.len());
        let held = worker.held[place].clone();
        let Lease { task, epoch, .. } = held.lease;
        if !held.begun {
            let begin = self.truth.begin(task, at, epoch);
            tell!(self, "worker {at} begins {task} by {epoch}: {begin:?}");
            match begin {
                Begin::Go => self.workers[at].held[place].begun = true,
                Begin::Ended => self.complete(at, place).await,
                Begin::Fenced => drop(self.workers[at].held.remove(place)),
            }
            return;
        }
        match self.random.u32(..10) {
            // The attempt failed by no fault of the command: it is given back for a while.
            0..2 if may_fail && self.truth.retry(task, epoch) => {
                tell!(self, "worker {at} fails at {task} by {epoch}");
                self.workers[at].held.remove(place);
                let delay = Duration::from_secs(self.random.u64(..3));
                match self.queue().release(&held.lease, delay).await {
                    Ok(()) | Err(QueueError::Lost) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            // It dies between its answer and the queue's hearing of it.
            2 if may_fail => {
                let counted = self.truth.end(task, epoch);
                tell!(self, "worker {at} ends {task} by {epoch}: {counted}, and dies");
                self.kill(at);
            }
            _ => {
                let counted = self.truth.end(task, epoch);
                tell!(self, "worker {at} ends {task} by {epoch}: {counted}");
                if counted {
                    self.complete(at, place).await;
                } else {
                    self.workers[at].held.remove(place);
                }
            }
        }
    }

    async fn complete(&mut self, at: usize, place: usize) {
        let held = self.workers[at].held.remove(place);
        match self.queue().complete(&held.lease).await {
            Ok(()) | Err(QueueError::Lost) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// Time passes in steps, so that who lives renews in time. A lease that a living worker renews
    /// is never taken from it, unless the queue forgot it.
    async fn pass(&mut self, time: Duration) {
        tell!(self, "{time:?} pass");
        self.clock.advance(time);
        for at in 0..WORKERS {
            self.workers[at].unrenewed += time;
            if self.workers[at].condition == Condition::Up && self.workers[at].unrenewed >= RENEW {
                self.renew(at).await;
            }
        }
    }

    /// Who loses a lease goes on: whether its answer counts is the store's word.
    async fn renew(&mut self, at: usize) {
        let in_time = self.workers[at].unrenewed < LEASE;
        self.workers[at].unrenewed = Duration::ZERO;
        for place in 0..self.workers[at].held.len() {
            let held = self.workers[at].held[place].clone();
            match self.queue().renew(&held.lease).await {
                Ok(()) => {}
                Err(QueueError::Lost) => {
                    let task = held.lease.task;
                    let was_kept = in_time && !held.is_lost;
                    assert!(!was_kept, "worker {at} renewed {task} in time, and lost it");
                    tell!(self, "worker {at} has lost {task}");
                    self.workers[at].held[place].is_lost = true;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What any worker that lives does every few seconds.
    async fn sweep(&mut self) {
        if self.workers.iter().all(|worker| worker.condition != Condition::Up) {
            return;
        }
        let taken = self.queue().sweep().await.unwrap();
        tell!(self, "a sweep takes back {taken}");
        let owed: Vec<TaskId> = self
            .truth
            .rows()
            .iter()
            .filter(|row| row.owed && row.state == State::Pending)
            .map(|row| row.id)
            .collect();
        for id in owed {
            let of = self.truth.row(id).of;
            let lane = of.map_or(Lane::Shared, |of| Lane::Worker(self.workers[of].id));
            let priority = Priority::Default;
            let entry = Entry { task: id, lane, priority, delay: Duration::ZERO };
            let moved = self.queue().relocate(entry).await.unwrap();
            tell!(self, "{id} is dispatched again: {moved}");
            if moved {
                self.truth.row_mut(id).owed = false;
            }
        }
    }

    /// SIGKILL: what it had in hand may be started once more.
    fn kill(&mut self, at: usize) {
        if self.workers[at].condition == Condition::Dead {
            return;
        }
        tell!(self, "worker {at} is killed");
        self.kills += 1;
        self.workers[at].condition = Condition::Dead;
        self.excuse(at);
        self.workers[at].held.clear();
    }

    fn stop(&mut self, at: usize) {
        if self.workers[at].condition != Condition::Up {
            return;
        }
        tell!(self, "worker {at} stands still");
        self.stops += 1;
        self.workers[at].condition = Condition::Stopped;
        self.excuse(at);
    }

    /// Whatever this worker runs or has claimed may have to be run once more.
    fn excuse(&mut self, at: usize) {
        let runs = |row: &&Row| row.state == State::Running && row.by == Some(at);
        let mut its: Vec<_> = self.truth.rows().iter().filter(runs).map(|row| row.id).collect();
        its.extend(self.workers[at].held.iter().map(|held| held.lease.task));
        for id in its {
            self.truth.row_mut(id).reasons += 1;
        }
    }

    /// A dead worker starts again under its name; one that stood still goes on with what it had.
    async fn recover(&mut self, at: usize) {
        let condition = std::mem::replace(&mut self.workers[at].condition, Condition::Up);
        match condition {
            Condition::Up => {}
            Condition::Stopped => {
                tell!(self, "worker {at} goes on");
                self.renew(at).await;
            }
            Condition::Dead => {
                let freed = self.queue().reclaim(self.workers[at].id).await.unwrap();
                tell!(self, "worker {at} starts again, and frees {freed}");
                self.workers[at].unrenewed = Duration::ZERO;
            }
        }
    }

    /// The process that has the queue ends, and another opens it. What is in hand is in hand still.
    async fn reopen(&mut self) {
        tell!(self, "the queue is opened again");
        self.restarts += 1;
        self.queue = None;
        self.queue = Some(self.engine.open(self.clock.clone()).await);
    }

    /// The queue comes back empty. Who has the truth dispatches everything: what runs, after a
    /// lease.
    async fn forget_everything(&mut self) {
        tell!(self, "the queue forgets everything");
        self.restarts += 1;
        self.queue = None;
        self.engine.clear();
        self.await_wall_clock();
        self.queue = Some(self.engine.open(self.clock.clone()).await);
        let open: Vec<(TaskId, State)> = self
            .truth
            .rows()
            .iter()
            .filter(|row| row.state != State::Ended)
            .map(|row| (row.id, row.state))
            .collect();
        for (id, state) in open {
            let delay = if state == State::Running { LEASE } else { Duration::ZERO };
            self.truth.row_mut(id).reasons += 1;
            self.enqueue(id, delay).await;
        }
        for held in self.workers.iter_mut().flat_map(|worker| &mut worker.held) {
            held.is_lost = true;
        }
    }

    /// A queue that knows nothing begins its epochs with the wall clock in microseconds. One that was
    /// opened again and again within a millisecond, as only here, is ahead of it by as many as it
    /// had set aside.
    fn await_wall_clock(&self) {
        let claimed = self.workers.iter().flat_map(|worker| &worker.held);
        let last = claimed.map(|held| held.lease.epoch);
        let last = last.chain(self.truth.rows().iter().map(|row| row.epoch)).max().unwrap_or(0);
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros();
        while now() <= u128::try_from(last).unwrap() {
            std::hint::spin_loop();
        }
    }
}
