-- What the queue holds. Times are for a restart only: within a process leases and delays are
-- measured by a monotonic clock.

create table entries (
    task_id      text   primary key not null,
    -- Null for the lane that every worker takes from.
    lane_worker  text,
    priority     text   not null,
    -- The order in which entries came.
    seq          bigint not null,
    -- Not before this wall-clock time, and after a restart not later than delay_ms from then.
    ready_at     bigint not null,
    delay_ms     bigint not null,
    epoch        bigint not null,
    -- The worker that holds the entry, and for how long at a time; null where nobody does.
    lease_worker text,
    lease_ms     bigint not null
);

create table counters (
    name  text   primary key not null,
    value bigint not null
);
