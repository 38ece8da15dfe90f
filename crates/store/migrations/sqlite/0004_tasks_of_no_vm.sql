-- no-transaction
-- A task may be of no VM. A column's `not null` goes only with its table, and others refer to this
-- one: that has to be done with the check of references off, which no transaction can begin with.
-- Done twice (it was cut off after `commit`) it comes to the same.

pragma foreign_keys = off;

begin immediate;

create table tasks_rebuilt (
    id               text   primary key not null,
    kind             text   not null,
    state            text   not null,
    priority         text   not null,
    vm_id            text   references vms (id),
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
    error_message    text,
    snapshot_id      text,
    tools            text,
    progress         text
);

insert into tasks_rebuilt
    (id, kind, state, priority, vm_id, execution_id, attempts, max_attempts, worker_id, epoch,
     cancel_requested, created_at, started_at, finished_at, error_code, error_message, snapshot_id,
     tools, progress)
select
    id, kind, state, priority, vm_id, execution_id, attempts, max_attempts, worker_id, epoch,
    cancel_requested, created_at, started_at, finished_at, error_code, error_message, snapshot_id,
    tools, progress
from tasks;

drop table tasks;
alter table tasks_rebuilt rename to tasks;

create index tasks_newest on tasks (created_at, id);
create index tasks_of_vm on tasks (vm_id, created_at, id);
create index tasks_open on tasks (created_at, id) where state in ('pending', 'running');
create index tasks_open_of_vm on tasks (vm_id) where state in ('pending', 'running');

commit;

pragma foreign_keys = on;
