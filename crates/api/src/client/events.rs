//! What has happened, followed.

use aether_types::{TaskId, Timestamp};

use super::{
    Client, ClientError,
    http::Query,
    socket::{self, Told},
};
use crate::EventMessage;

/// Which events, of the caller's project.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventQuery {
    /// `vm.running`, `vm.*`; one of them at least. Empty: all.
    pub topics: Vec<String>,
    /// An id or a name.
    pub vm: Option<String>,
    pub task: Option<TaskId>,
    /// Of every project and of the platform, which needs `platform:read`.
    pub all: bool,
    /// Ends with what has happened so far.
    pub past: bool,
}

/// Where a follower begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EventsFrom {
    #[default]
    Now,
    /// Events of this time and later.
    Time(Timestamp),
    /// After the event of this number.
    After(u64),
}

/// Events as they come. Keep it going: it also answers the server's pings.
pub type FollowEvents = Told<EventMessage>;

impl Client {
    pub async fn follow_events(
        &self,
        of: &EventQuery,
        from: EventsFrom,
    ) -> Result<FollowEvents, ClientError> {
        let mut query = Query::default();
        for topic in &of.topics {
            query.add("topic", topic.clone());
        }
        query.opt("vm_id", of.vm.as_deref());
        query.opt("task_id", of.task.map(|id| id.to_string()).as_deref());
        if of.past {
            query.add("follow", "false".to_owned());
        }
        if of.all {
            query.add("all", "true".to_owned());
        }
        match from {
            EventsFrom::Now => {}
            EventsFrom::Time(time) => {
                query.add("since", time.to_string());
            }
            EventsFrom::After(sequence) => {
                query.add("after", sequence.to_string());
            }
        }
        socket::connect(self, "/events", &query).await.map(Told::new)
    }
}
