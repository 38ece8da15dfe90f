//! Logs: asked for, and followed.

use super::{
    Client, ClientError,
    http::Query,
    socket::{self, Told},
};
use crate::{LogEvent, LogsView, QueryLogs};

/// Where a follower begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogsFrom {
    #[default]
    Now,
    /// Lines of this time and later.
    Time(aether_types::PreciseTime),
    /// After the line of this number.
    After(u64),
}

/// Lines as they come. Keep it going: it also answers the server's pings.
pub type FollowLogs = Told<LogEvent>;

impl Client {
    pub async fn query_logs(&self, query: &QueryLogs) -> Result<LogsView, ClientError> {
        self.post("/logs/query", &Query::default(), Some(query)).await
    }

    /// Of `filter`, times and limit are not looked at.
    pub async fn follow_logs(
        &self,
        filter: &QueryLogs,
        from: LogsFrom,
    ) -> Result<FollowLogs, ClientError> {
        let mut query = Query::default();
        query.opt("vm_id", filter.vm_id.as_deref()).opt("text", filter.text.as_deref());
        query.opt("task_id", filter.task_id.map(|id| id.to_string()).as_deref());
        query.opt("level", filter.level.map(|level| level.to_string()).as_deref());
        match from {
            LogsFrom::Now => {}
            LogsFrom::Time(time) => {
                query.add("since", time.to_string());
            }
            LogsFrom::After(sequence) => {
                query.add("after", sequence.to_string());
            }
        }
        socket::connect(self, "/logs/stream", &query).await.map(Told::new)
    }
}
