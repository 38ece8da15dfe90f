-- Workers as they registered, what they promised, VMs that wait for one, and dead letters.

create table workers (
    id              text   primary key not null,
    host            text   not null,
    zone            text,
    labels          text   not null,
    drivers         text   not null,
    capacity        text   not null,
    template_folder text,
    version         text   not null,
    presence        text   not null,
    -- An operator's word; it outlives the worker's process.
    draining        bigint not null,
    -- Counts registrations: the fence against what an earlier one writes.
    epoch           bigint not null,
    registered_at   bigint not null,
    heartbeat_at    bigint not null,
    lease_ms        bigint not null
);

-- What a worker has promised is read from here alone, at every creation. A program that does not
-- know what of a VM counts leaves nothing there.
create index vms_of_worker on vms (worker_id, state, vcpus, memory_mb)
    where worker_id is not null and state <> 'deleted';

-- Its VM waits for a worker: it is not to be dispatched yet.
alter table outbox add column waits bigint not null default 0;
create index outbox_waiting on outbox (task_id) where waits = 1;

-- The task that does again what this one had used up its attempts at.
alter table tasks add column retried_as text;
-- Dead letters: few, and looked for among all that ever failed.
create index tasks_dead on tasks (created_at, id)
    where state = 'failed' and attempts >= max_attempts and retried_as is null;
