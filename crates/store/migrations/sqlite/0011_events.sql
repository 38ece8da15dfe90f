-- What has happened, kept for a while. Triggers write it, in the transaction that it happens in,
-- so that no path, and no older program, leaves anything out.

create table events (
    -- In the order of one subject's changes; of others, a lower one may be committed later.
    id           integer primary key autoincrement not null,
    -- What followers go by: given to events that are committed, by one after another, so that none
    -- comes to stand before one that was read. Null until somebody reads.
    sequence     bigint,
    -- `vm.running`: the noun and what became of it.
    topic        text   not null,
    at           bigint not null,
    -- Null: the platform's own, and no project's.
    project_id   text,
    subject      text   not null,
    vm_id        text,
    task_id      text,
    -- The kind of a task, the name of a VM, snapshot or template, the host of a worker.
    detail       text,
    code         text
);

create unique index events_sequence on events (sequence);
create index events_unnumbered on events (id) where sequence is null;
create index events_age on events (at);

create trigger vm_created after insert on vms when new.builder = 0 begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('vm.created', cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            new.id, null, new.name, new.reason_code);
end;
create trigger vm_changed after update of state on vms
when new.builder = 0 and new.state <> old.state begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('vm.' || new.state, cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            new.id, null, new.name, new.reason_code);
end;

create trigger task_created after insert on tasks begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('task.created', cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            new.vm_id, new.id, new.kind, new.error_code);
end;
create trigger task_changed after update of state on tasks
when new.state <> old.state begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('task.' || new.state, cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            new.vm_id, new.id, new.kind, new.error_code);
end;

create trigger execution_created after insert on executions begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('execution.created', cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            new.vm_id, new.task_id, null, new.error_code);
end;
create trigger execution_changed after update of state on executions
when new.state <> old.state begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('execution.' || new.state, cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            new.vm_id, new.task_id, null, new.error_code);
end;

create trigger snapshot_created after insert on snapshots when new.purpose = 'user' begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('snapshot.created', cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            new.vm_id, null, new.name, new.reason_code);
end;
create trigger snapshot_changed after update of state on snapshots
when new.purpose = 'user' and new.state <> old.state begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('snapshot.' || new.state, cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            new.vm_id, null, new.name, new.reason_code);
end;

create trigger template_created after insert on templates begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('template.created', cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            null, new.task_id, new.name || ':' || new.tag, new.reason_code);
end;
create trigger template_changed after update of state on templates
when new.state <> old.state begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('template.' || new.state, cast(unixepoch('subsec') * 1000 as integer), new.project_id, new.id,
            null, new.task_id, new.name || ':' || new.tag, new.reason_code);
end;

create trigger worker_registered after insert on workers begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ('worker.registered', cast(unixepoch('subsec') * 1000 as integer), null, new.id,
            null, null, new.host, null);
end;
create trigger worker_changed after update of presence, draining, epoch on workers
when new.presence <> old.presence or new.draining <> old.draining or new.epoch <> old.epoch begin
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values (case when new.presence <> 'present' then 'worker.' || new.presence
                 when new.epoch <> old.epoch then 'worker.registered'
                 when new.draining <> 0 then 'worker.draining' else 'worker.activated' end, cast(unixepoch('subsec') * 1000 as integer), null, new.id,
            null, null, new.host, null);
end;
