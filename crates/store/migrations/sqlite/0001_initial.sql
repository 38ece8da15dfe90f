-- The truth: VMs, tasks, executions, and what is kept of them.
--
-- Ids and JSON are text, times are milliseconds since 1970 in UTC, flags are 0 and 1: the same
-- text serves PostgreSQL with few changes. A fault is two columns, its code and its message.

create table vms (
    id             text   primary key not null,
    name           text   not null,
    state          text   not null,
    reason_code    text,
    reason_message text,
    spec           text   not null,
    driver         text   not null,
    worker_id      text,
    address        text,
    created_at     bigint not null,
    updated_at     bigint not null,
    expires_at     bigint,
    generation     bigint not null
);

-- A name is taken until its VM is deleted.
create unique index vms_live_name on vms (name) where state <> 'deleted';
create index vms_newest on vms (created_at, id);
create index vms_expiry on vms (expires_at)
    where expires_at is not null and state <> 'deleting' and state <> 'deleted';

create table vm_labels (
    vm_id text not null references vms (id),
    key   text not null,
    value text not null,
    primary key (vm_id, key)
);

-- Every state that a VM has been in; never deleted.
create table vm_changes (
    vm_id          text   not null references vms (id),
    generation     bigint not null,
    state          text   not null,
    at             bigint not null,
    reason_code    text,
    reason_message text,
    primary key (vm_id, generation)
);

create table tasks (
    id               text   primary key not null,
    kind             text   not null,
    state            text   not null,
    priority         text   not null,
    vm_id            text   not null references vms (id),
    execution_id     text,
    attempts         bigint not null,
    max_attempts     bigint not null,
    worker_id        text,
    epoch            bigint not null,
    cancel_requested bigint not null,
    created_at       bigint not null,
    started_at       bigint,
    finished_at      bigint,
    error_code       text,
    error_message    text
);

create index tasks_newest on tasks (created_at, id);
create index tasks_of_vm on tasks (vm_id, created_at, id);
create index tasks_open on tasks (created_at, id) where state in ('pending', 'running');
create index tasks_open_of_vm on tasks (vm_id) where state in ('pending', 'running');

-- Tasks whose dispatch to the queue is owed.
create table outbox (
    task_id text primary key not null references tasks (id)
);

create table executions (
    id            text   primary key not null,
    vm_id         text   not null references vms (id),
    task_id       text   not null references tasks (id),
    spec          text   not null,
    state         text   not null,
    boot_id       text,
    exit_code     bigint,
    exit_signal   bigint,
    error_code    text,
    error_message text,
    created_at    bigint not null,
    started_at    bigint,
    finished_at   bigint,
    duration_us   bigint
);

create index executions_of_vm on executions (vm_id, created_at, id);

create index executions_open_of_vm on executions (vm_id) where state in ('pending', 'running');

create table outputs (
    execution_id text   not null references executions (id),
    stream       text   not null,
    head         blob   not null,
    tail         blob   not null,
    total_bytes  bigint not null,
    primary key (execution_id, stream)
);

create table idempotency (
    key        text   primary key not null,
    digest     blob   not null,
    task_id    text   not null references tasks (id),
    created_at bigint not null
);

create index idempotency_age on idempotency (created_at);

create table api_keys (
    id         text   primary key not null,
    name       text   not null,
    prefix     text   not null,
    hash       blob   not null,
    created_at bigint not null
);
