//! Templates that are ready, which do not change any more.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aether_types::{Template, TemplateId, TemplateState};

#[derive(Default)]
pub(crate) struct TemplateCache(Mutex<HashMap<TemplateId, Arc<Template>>>);

impl TemplateCache {
    pub(crate) fn get(&self, id: TemplateId) -> Option<Arc<Template>> {
        self.lock().get(&id).cloned()
    }

    pub(crate) fn remember(&self, template: &Arc<Template>) {
        if template.state == TemplateState::Ready {
            self.lock().insert(template.id, Arc::clone(template));
        }
    }

    /// It was deleted, or replaced.
    pub(crate) fn forget(&self, id: TemplateId) {
        self.lock().remove(&id);
    }

    pub(crate) fn forget_all(&self) {
        self.lock().clear();
    }

    // Nothing panics while the lock is held.
    fn lock(&self) -> MutexGuard<'_, HashMap<TemplateId, Arc<Template>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
