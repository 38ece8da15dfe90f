-- Snapshots and templates, and VMs that begin as one.

alter table vms add column start text;
-- The snapshot that holds a stopped VM's memory.
alter table vms add column memory text;
-- What it begins as, where that is a snapshot or a template: its id.
alter table vms add column origin text;
-- It exists to build a template, and is not listed.
alter table vms add column builder bigint not null default 0;

-- Counted at every creation; and whatever such a VM begins as is needed until then.
create index vms_beginning on vms (origin) where state in ('creating', 'starting');
-- What is live and not a client's: few, ever.
create index vms_building on vms (id) where builder = 1 and state <> 'deleted';

alter table tasks add column snapshot_id text;

create table snapshots (
    id             text   primary key not null,
    name           text,
    purpose        text   not null,
    state          text   not null,
    reason_code    text,
    reason_message text,
    vm_id          text   not null references vms (id),
    worker_id      text,
    driver         text   not null,
    image          text   not null,
    vcpus          bigint not null,
    memory_mb      bigint not null,
    disk_mb        bigint not null,
    size_bytes     bigint,
    digest         text,
    paused_us      bigint,
    created_at     bigint not null,
    updated_at     bigint not null
);

create unique index snapshots_live_name on snapshots (name)
    where name is not null and state <> 'deleted';
create index snapshots_newest on snapshots (created_at, id);
create index snapshots_of_vm on snapshots (vm_id, created_at, id);
create index snapshots_live on snapshots (created_at, id) where state <> 'deleted';

-- The VMs of a fork, in the order in which they were asked for.
create table forks (
    snapshot_id text   not null references snapshots (id),
    place       bigint not null,
    vm_id       text   not null references vms (id),
    task_id     text   not null references tasks (id),
    primary key (snapshot_id, place)
);

create table templates (
    id             text   primary key not null,
    name           text   not null,
    tag            text   not null,
    state          text   not null,
    reason_code    text,
    reason_message text,
    spec           text   not null,
    digest         text,
    snapshot_id    text   not null references snapshots (id),
    builder_id     text   not null references vms (id),
    task_id        text   not null references tasks (id),
    progress       text   not null,
    size_bytes     bigint,
    created_at     bigint not null,
    updated_at     bigint not null,
    generation     bigint not null
);

-- One has the name; others may be on their way to it.
create unique index templates_ready_name on templates (name, tag) where state = 'ready';
create index templates_live_name on templates (name, tag, created_at, id)
    where state <> 'deleted';
create index templates_newest on templates (created_at, id);
create unique index templates_of_task on templates (task_id);
create unique index templates_of_snapshot on templates (snapshot_id);
