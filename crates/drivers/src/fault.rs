//! Named points in the making of a VM, where a test can make the driver fail.
//!
//! Each step hits one point before it acts and one after it took effect, so that a test can walk
//! through all of them and see that the undo leaves nothing. Unset, a point is one branch.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use crate::DriverError;

/// Cheap to clone; clones share their plan.
#[derive(Debug, Clone, Default)]
pub struct FaultPoints(Option<Arc<Mutex<Plan>>>);

#[derive(Debug, Default)]
struct Plan {
    /// Every point that was hit.
    seen: BTreeSet<&'static str>,
    /// The point that is to fail, the next time it is hit.
    armed: Option<String>,
    /// It is to panic: what it does not do then, a killed process does not do either.
    crashes: bool,
}

impl FaultPoints {
    /// Never fails: what production uses.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// Writes down the points that are hit, and fails where [`FaultPoints::arm`] says.
    #[must_use]
    pub fn recording() -> Self {
        Self(Some(Arc::default()))
    }

    /// Makes the next hit of `point` fail, once.
    pub fn arm(&self, point: &str) {
        self.with(|plan| (plan.armed, plan.crashes) = (Some(point.to_owned()), false));
    }

    /// Makes the next hit of `point` panic, once. In a thread that owns what it works on, that is
    /// as good as killing the process there: no undo runs.
    pub fn arm_crash(&self, point: &str) {
        self.with(|plan| (plan.armed, plan.crashes) = (Some(point.to_owned()), true));
    }

    /// Whether a point that was armed has not been hit; disarms it.
    pub fn disarm(&self) -> bool {
        self.with(|plan| plan.armed.take()).flatten().is_some()
    }

    /// Every point hit so far, in the order of their names.
    #[must_use]
    pub fn seen(&self) -> Vec<&'static str> {
        self.with(|plan| plan.seen.iter().copied().collect()).unwrap_or_default()
    }

    pub fn hit(&self, point: &'static str) -> Result<(), DriverError> {
        let hit = self.with(|plan| {
            plan.seen.insert(point);
            plan.armed.take_if(|armed| armed == point).map(|_| plan.crashes)
        });
        match hit.flatten() {
            None => Ok(()),
            Some(false) => Err(DriverError::Injected(point.to_owned())),
            Some(true) => panic!("injected crash at {point}"),
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Plan) -> T) -> Option<T> {
        let plan = self.0.as_ref()?;
        Some(change(&mut plan.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_armed_point_fails_once() {
        let fault = FaultPoints::recording();
        fault.hit("a").unwrap();
        fault.arm("b");
        fault.hit("a").unwrap();
        assert!(matches!(fault.hit("b"), Err(DriverError::Injected(p)) if p == "b"));
        fault.hit("b").unwrap();
        assert_eq!(fault.seen(), ["a", "b"]);
        assert!(!fault.disarm());
    }
}
