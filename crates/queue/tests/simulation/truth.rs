//! The store as the queue's users know it: what was acknowledged, and which attempt speaks.

use std::collections::HashMap;

use aether_types::TaskId;

pub(crate) const ATTEMPTS_MAX: u32 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Pending,
    Running,
    Ended,
}

#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) id: TaskId,
    /// The worker that has its VM; `None`: any.
    pub(crate) of: Option<usize>,
    pub(crate) state: State,
    pub(crate) epoch: i64,
    pub(crate) attempts: u32,
    /// Its dispatch was not confirmed.
    pub(crate) owed: bool,
    /// Reasons for one more attempt that were not used yet: a kill, a stop, a failure.
    pub(crate) reasons: u32,
    /// Who began the last attempt.
    pub(crate) by: Option<usize>,
}

#[derive(Debug, Default)]
pub(crate) struct Truth {
    rows: Vec<Row>,
    places: HashMap<TaskId, usize>,
    pub(crate) again: u64,
    pub(crate) refused: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    Go,
    Ended,
    Fenced,
}

impl Truth {
    /// Acknowledged from here on: the task and its dispatch are one transaction.
    pub(crate) fn record(&mut self, of: Option<usize>) -> TaskId {
        let id = TaskId::new();
        self.places.insert(id, self.rows.len());
        self.rows.push(Row {
            id,
            of,
            state: State::Pending,
            epoch: 0,
            attempts: 0,
            owed: true,
            reasons: 0,
            by: None,
        });
        id
    }

    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub(crate) fn row(&self, id: TaskId) -> &Row {
        &self.rows[self.places[&id]]
    }

    pub(crate) fn row_mut(&mut self, id: TaskId) -> &mut Row {
        &mut self.rows[self.places[&id]]
    }

    pub(crate) fn count(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn all_ended(&self) -> bool {
        self.rows.iter().all(|row| row.state == State::Ended)
    }

    pub(crate) fn begin(&mut self, id: TaskId, worker: usize, epoch: i64) -> Begin {
        let row = self.row_mut(id);
        if row.state == State::Ended {
            return Begin::Ended;
        }
        if epoch <= row.epoch {
            return Begin::Fenced;
        }
        assert!(row.of.is_none_or(|of| of == worker), "{id} came to a worker that has not its VM");
        if row.attempts > 0 {
            assert!(row.reasons > 0, "{id} was started again, and nothing had happened to it");
            row.reasons -= 1;
        }
        (row.state, row.epoch, row.by) = (State::Running, epoch, Some(worker));
        row.attempts += 1;
        assert!(row.attempts <= ATTEMPTS_MAX, "{id} is started over and over");
        self.again += u64::from(self.row(id).attempts > 1);
        Begin::Go
    }

    /// Whether the answer counts.
    pub(crate) fn end(&mut self, id: TaskId, epoch: i64) -> bool {
        let row = self.row_mut(id);
        let counts = row.epoch == epoch && row.state == State::Running;
        if counts {
            row.state = State::Ended;
        } else {
            self.refused += 1;
        }
        counts
    }

    /// After a failure of the infrastructure: pending again, and owed.
    pub(crate) fn retry(&mut self, id: TaskId, epoch: i64) -> bool {
        let row = self.row_mut(id);
        let counts = row.epoch == epoch && row.state == State::Running;
        if counts {
            row.state = State::Pending;
            row.owed = true;
            row.reasons += 1;
        }
        counts
    }
}
