//! What the gateway remembers of templates, so that no creation of a VM reads the store for it: the
//! default one, until an event says that some template changed, and names, which never change. A
//! default that is gone by the time it is used is refused by the store, and read anew.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aether_events::{Event, EventBus, Received, Subscription};
use aether_store::Store;
use aether_types::{
    Origin, ProjectId, Template, TemplateId, TemplateState,
    template::{DEFAULT_TAG, DEFAULT_TEMPLATE},
};
use futures::FutureExt as _;
use tokio::task::coop::unconstrained;

use crate::problem::ApiResult;

/// Forgotten all at once when there are more: a few thousand names are some hundred kilobytes.
const NAMES_MAX: usize = 4096;
/// As above; one is a template with its files and steps, shared with who uses it.
const DEFAULTS_MAX: usize = 256;

pub(crate) struct Templates {
    default: Mutex<Remembered>,
    names: Mutex<HashMap<TemplateId, String>>,
}

struct Remembered {
    events: Box<dyn Subscription>,
    /// Of what is remembered: counts what was forgotten.
    version: u64,
    /// Of each project that was asked for since; `None`: it has none.
    defaults: HashMap<ProjectId, Option<Arc<Template>>>,
    is_deaf: bool,
}

impl fmt::Debug for Templates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Templates").finish_non_exhaustive()
    }
}

impl Templates {
    pub(crate) fn new(bus: &dyn EventBus) -> Self {
        let events = bus.subscribe();
        let remembered =
            Remembered { events, version: 0, defaults: HashMap::new(), is_deaf: false };
        Self { default: Mutex::new(remembered), names: Mutex::new(HashMap::new()) }
    }

    /// The project's default template, where there is one and it is ready.
    pub(crate) async fn default(
        &self,
        store: &dyn Store,
        project: ProjectId,
    ) -> ApiResult<Option<Arc<Template>>> {
        let version = {
            let mut remembered = lock(&self.default);
            remembered.listen();
            if let Some(default) = remembered.defaults.get(&project) {
                return Ok(default.clone());
            }
            remembered.version
        };
        let found = store.template_by_name(project, DEFAULT_TEMPLATE, DEFAULT_TAG).await?;
        let found = found.filter(|t| t.state == TemplateState::Ready).map(Arc::new);
        let mut remembered = lock(&self.default);
        remembered.listen();
        if remembered.version == version && !remembered.is_deaf {
            if remembered.defaults.len() >= DEFAULTS_MAX {
                remembered.defaults.clear();
            }
            remembered.defaults.insert(project, found.clone());
        }
        Ok(found)
    }

    /// The default template was not what it was taken for.
    pub(crate) fn forget_default(&self) {
        lock(&self.default).forget();
    }

    /// `name:tag` of the template that a VM began as.
    pub(crate) async fn name(
        &self,
        store: &dyn Store,
        origin: Origin,
    ) -> ApiResult<Option<String>> {
        let (Origin::Template(id) | Origin::Builder(id)) = origin else { return Ok(None) };
        if let Some(name) = lock(&self.names).get(&id) {
            return Ok(Some(name.clone()));
        }
        let Some(template) = store.template(id).await? else { return Ok(None) };
        let name = format!("{}:{}", template.name, template.tag);
        let mut names = lock(&self.names);
        if names.len() >= NAMES_MAX {
            names.clear();
        }
        names.insert(id, name.clone());
        Ok(Some(name))
    }
}

impl Remembered {
    /// Hears what was said since the last time; waits for nothing.
    fn listen(&mut self) {
        // Without the runtime's budget, which would end this before the last event is heard.
        while let Some(received) = unconstrained(self.events.next()).now_or_never() {
            match received {
                Received::Event(Event::Template { .. }) | Received::Missed => self.forget(),
                Received::Event(_) => {}
                Received::Closed => {
                    self.is_deaf = true;
                    self.forget();
                    return;
                }
            }
        }
    }

    fn forget(&mut self) {
        self.version += 1;
        self.defaults.clear();
    }
}

// Nothing panics while a lock is held.
fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
