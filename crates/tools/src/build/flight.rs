//! One build of a layer, however many wait for it: each gets what happens, and the end.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use aether_types::limits;
use tokio::sync::{broadcast, watch};
use tokio_util::task::TaskTracker;

use crate::error::ToolError;
use crate::store::PinnedLayer;
use crate::tools::ToolEvent;

/// How far one who waits may be behind before lines are left out for it.
const EVENTS_BEHIND_MAX: usize = 1024;

type Ending = Result<PinnedLayer, ToolError>;

/// The builds in hand, by the layer's key.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    flights: Arc<Mutex<HashMap<String, Arc<Flight>>>>,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Flight {
    events: Arc<Events>,
    ending: watch::Receiver<Option<Ending>>,
}

/// What has happened, for those who wait now and those who come later. Bounded: of the
/// installer's output only the end is kept, and who does not listen misses some.
#[derive(Debug)]
pub(crate) struct Events {
    tail: Mutex<Tail>,
    sender: broadcast::Sender<ToolEvent>,
}

#[derive(Debug, Default)]
struct Tail {
    events: VecDeque<ToolEvent>,
    bytes: usize,
}

impl Default for Events {
    fn default() -> Self {
        Self { tail: Mutex::default(), sender: broadcast::channel(EVENTS_BEHIND_MAX).0 }
    }
}

impl Events {
    pub(crate) fn push(&self, event: ToolEvent) {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.bytes += bytes_of(&event);
        tail.events.push_back(event.clone());
        while tail.bytes > limits::TOOL_LOG_BYTES {
            let Some(oldest) = tail.events.pop_front() else { break };
            tail.bytes -= bytes_of(&oldest);
        }
        // Under the lock, so that one who comes now gets it once. That nobody listens is no error.
        let _ = self.sender.send(event);
    }

    fn follow(&self) -> (Vec<ToolEvent>, broadcast::Receiver<ToolEvent>) {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        (tail.events.iter().cloned().collect(), self.sender.subscribe())
    }

    /// The installer's last lines.
    pub(crate) fn last_lines(&self, count: usize, bytes_max: usize) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines = Vec::new();
        let mut bytes = 0;
        for event in tail.events.iter().rev() {
            let ToolEvent::Line { line, .. } = event else { continue };
            bytes += line.len() + 1;
            if lines.len() == count || bytes > bytes_max {
                break;
            }
            lines.push(line.as_str());
        }
        lines.reverse();
        lines.join("\n")
    }
}

fn bytes_of(event: &ToolEvent) -> usize {
    let own = match event {
        ToolEvent::Stage { stage, .. } => stage.len(),
        ToolEvent::Line { line, .. } => line.len(),
        ToolEvent::Ready { .. } => 0,
    };
    // What the event itself takes.
    own + 64
}

impl Flights {
    /// Waits for the build of a layer, and begins it when nobody has. The build is a task of its
    /// own: it goes on when all who wait have gone, and is then found in the cache.
    pub(crate) async fn join<F>(
        &self,
        key: &str,
        progress: &(dyn Fn(ToolEvent) + Send + Sync),
        build: impl FnOnce(Arc<Events>) -> F,
    ) -> Ending
    where
        F: Future<Output = Ending> + Send + 'static,
    {
        let flight = self.find_or_begin(key, build);
        let (before, mut events) = flight.events.follow();
        let mut ending = flight.ending.clone();
        drop(flight);
        before.into_iter().for_each(progress);
        loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Ok(event) => progress(event),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => break,
                },
                // The sender is dropped without an ending only by a panic.
                _ = ending.changed() => break,
            }
        }
        while let Ok(event) = events.try_recv() {
            progress(event);
        }
        // An error: the task has panicked.
        let result = ending.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        result.unwrap_or_else(|| {
            let reason = "the task that built it ended early".to_owned();
            Err(ToolError::Io { action: "build", path: key.into(), reason })
        })
    }

    fn find_or_begin<F>(&self, key: &str, build: impl FnOnce(Arc<Events>) -> F) -> Arc<Flight>
    where
        F: Future<Output = Ending> + Send + 'static,
    {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(key) {
            return Arc::clone(flight);
        }
        let events = Arc::new(Events::default());
        let (sender, ending) = watch::channel(None);
        let flight = Arc::new(Flight { events: Arc::clone(&events), ending });
        flights.insert(key.to_owned(), Arc::clone(&flight));
        let landing = Landing { flights: Arc::clone(&self.flights), key: key.to_owned() };
        let work = build(events);
        self.tasks.spawn(async move {
            let result = work.await;
            // Whoever asks from now on finds the layer, or begins anew after an error.
            drop(landing);
            // An error: nobody waits.
            let _ = sender.send(Some(result));
        });
        flight
    }

    /// Waits for the builds in hand.
    pub(crate) async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
    }
}

/// Takes a flight off the list, whichever way its task ends.
struct Landing {
    flights: Arc<Mutex<HashMap<String, Arc<Flight>>>>,
    key: String,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}
