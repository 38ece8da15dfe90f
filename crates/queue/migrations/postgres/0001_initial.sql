-- What the queue holds, for any number of processes. Times are milliseconds by the server's clock:
-- one clock for all.

create table queue_entries (
    task_id      text   collate "C" primary key not null,
    -- `shared` is every worker's, else a worker's id.
    lane         text   collate "C" not null,
    -- 0 is the most urgent.
    priority     bigint not null,
    -- The order in which entries came.
    seq          bigint generated always as identity,
    -- Not before this time; null where it is ready, or leased.
    due_at       bigint,
    -- The worker that holds the entry, for how long at a time, and until when.
    lease_worker text   collate "C",
    lease_ms     bigint not null default 0,
    lease_until  bigint,
    epoch        bigint not null default 0
)
-- Rows come and go all the time: they are few, and swept up early.
with (autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0);

create index queue_ready on queue_entries (lane, priority, seq)
    where lease_worker is null and due_at is null;
create index queue_delayed on queue_entries (due_at) where due_at is not null;
create index queue_leased on queue_entries (lease_until) where lease_until is not null;
create index queue_leased_by on queue_entries (lease_worker) where lease_worker is not null;

-- It rises with every claim, whatever becomes of the entry.
create sequence queue_epochs;
