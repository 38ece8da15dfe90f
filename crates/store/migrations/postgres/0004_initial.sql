-- The truth: VMs, tasks, executions, and what is kept of them. What these tables are for is said
-- in the migrations of SQLite; this is what those had come to when PostgreSQL was added, so that
-- the numbers are the same from here on. A test compares the two schemas.
--
-- Text is compared byte by byte (`collate "C"`): ids and names have no language, an index on them
-- does not depend on the libraries of the server's host, and SQLite does the same.

create table vms (
    id             text   collate "C" primary key not null,
    name           text   collate "C" not null,
    state          text   collate "C" not null,
    reason_code    text   collate "C",
    reason_message text   collate "C",
    spec           text   collate "C" not null,
    driver         text   collate "C" not null,
    worker_id      text   collate "C",
    address        text   collate "C",
    created_at     bigint not null,
    updated_at     bigint not null,
    expires_at     bigint,
    generation     bigint not null,
    start          text   collate "C",
    memory         text   collate "C",
    origin         text   collate "C",
    builder        bigint not null default 0,
    tools          text   collate "C"
);

create unique index vms_live_name on vms (name) where state <> 'deleted';
create index vms_newest on vms (created_at, id);
create index vms_expiry on vms (expires_at)
    where expires_at is not null and state <> 'deleting' and state <> 'deleted';
create index vms_beginning on vms (origin) where state in ('creating', 'starting');
create index vms_building on vms (id) where builder = 1 and state <> 'deleted';

create table vm_labels (
    vm_id text collate "C" not null references vms (id),
    key   text collate "C" not null,
    value text collate "C" not null,
    primary key (vm_id, key)
);

create table vm_changes (
    vm_id          text   collate "C" not null references vms (id),
    generation     bigint not null,
    state          text   collate "C" not null,
    at             bigint not null,
    reason_code    text   collate "C",
    reason_message text   collate "C",
    primary key (vm_id, generation)
);

create table tasks (
    id               text   collate "C" primary key not null,
    kind             text   collate "C" not null,
    state            text   collate "C" not null,
    priority         text   collate "C" not null,
    vm_id            text   collate "C" references vms (id),
    execution_id     text   collate "C",
    attempts         bigint not null,
    max_attempts     bigint not null,
    worker_id        text   collate "C",
    epoch            bigint not null,
    cancel_requested bigint not null,
    created_at       bigint not null,
    started_at       bigint,
    finished_at      bigint,
    error_code       text   collate "C",
    error_message    text   collate "C",
    snapshot_id      text   collate "C",
    tools            text   collate "C",
    progress         text   collate "C"
);

create index tasks_newest on tasks (created_at, id);
create index tasks_of_vm on tasks (vm_id, created_at, id);
create index tasks_open on tasks (created_at, id) where state in ('pending', 'running');
create index tasks_open_of_vm on tasks (vm_id) where state in ('pending', 'running');

create table outbox (
    task_id text collate "C" primary key not null references tasks (id)
);

create table executions (
    id            text   collate "C" primary key not null,
    vm_id         text   collate "C" not null references vms (id),
    task_id       text   collate "C" not null references tasks (id),
    spec          text   collate "C" not null,
    state         text   collate "C" not null,
    boot_id       text   collate "C",
    exit_code     bigint,
    exit_signal   bigint,
    error_code    text   collate "C",
    error_message text   collate "C",
    created_at    bigint not null,
    started_at    bigint,
    finished_at   bigint,
    duration_us   bigint
);

create index executions_of_vm on executions (vm_id, created_at, id);
create index executions_open_of_vm on executions (vm_id) where state in ('pending', 'running');

create table outputs (
    execution_id text   collate "C" not null references executions (id),
    stream       text   collate "C" not null,
    head         bytea  not null,
    tail         bytea  not null,
    total_bytes  bigint not null,
    primary key (execution_id, stream)
);

create table idempotency (
    key        text   collate "C" primary key not null,
    digest     bytea  not null,
    task_id    text   collate "C" not null references tasks (id),
    created_at bigint not null
);

create index idempotency_age on idempotency (created_at);

create table api_keys (
    id         text   collate "C" primary key not null,
    name       text   collate "C" not null,
    prefix     text   collate "C" not null,
    hash       bytea  not null,
    created_at bigint not null
);

create table snapshots (
    id             text   collate "C" primary key not null,
    name           text   collate "C",
    purpose        text   collate "C" not null,
    state          text   collate "C" not null,
    reason_code    text   collate "C",
    reason_message text   collate "C",
    vm_id          text   collate "C" not null references vms (id),
    worker_id      text   collate "C",
    driver         text   collate "C" not null,
    image          text   collate "C" not null,
    vcpus          bigint not null,
    memory_mb      bigint not null,
    disk_mb        bigint not null,
    size_bytes     bigint,
    digest         text   collate "C",
    paused_us      bigint,
    created_at     bigint not null,
    updated_at     bigint not null
);

create unique index snapshots_live_name on snapshots (name)
    where name is not null and state <> 'deleted';
create index snapshots_newest on snapshots (created_at, id);
create index snapshots_of_vm on snapshots (vm_id, created_at, id);
create index snapshots_live on snapshots (created_at, id) where state <> 'deleted';

create table forks (
    snapshot_id text   collate "C" not null references snapshots (id),
    place       bigint not null,
    vm_id       text   collate "C" not null references vms (id),
    task_id     text   collate "C" not null references tasks (id),
    primary key (snapshot_id, place)
);

create table templates (
    id             text   collate "C" primary key not null,
    name           text   collate "C" not null,
    tag            text   collate "C" not null,
    state          text   collate "C" not null,
    reason_code    text   collate "C",
    reason_message text   collate "C",
    spec           text   collate "C" not null,
    digest         text   collate "C",
    snapshot_id    text   collate "C" not null references snapshots (id),
    builder_id     text   collate "C" not null references vms (id),
    task_id        text   collate "C" not null references tasks (id),
    progress       text   collate "C" not null,
    size_bytes     bigint,
    created_at     bigint not null,
    updated_at     bigint not null,
    generation     bigint not null
);

create unique index templates_ready_name on templates (name, tag) where state = 'ready';
create index templates_live_name on templates (name, tag, created_at, id)
    where state <> 'deleted';
create index templates_newest on templates (created_at, id);
create unique index templates_of_task on templates (task_id);
create unique index templates_of_snapshot on templates (snapshot_id);
