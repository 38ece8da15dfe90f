-- What has happened, kept for a while. Triggers write it, in the transaction that it happens in,
-- so that no path, and no older program, leaves anything out.

create table events (
    -- In the order of one subject's changes; of others, a lower one may be committed later.
    id           bigserial primary key,
    -- What followers go by: given to events that are committed, by one after another, so that none
    -- comes to stand before one that was read. Null until somebody reads.
    sequence     bigint,
    -- `vm.running`: the noun and what became of it.
    topic        text   collate "C" not null,
    at           bigint not null,
    -- Null: the platform's own, and no project's.
    project_id   text   collate "C",
    subject      text   collate "C" not null,
    vm_id        text   collate "C",
    task_id      text   collate "C",
    -- The kind of a task, the name of a VM, snapshot or template, the host of a worker.
    detail       text   collate "C",
    code         text   collate "C"
);

create unique index events_sequence on events (sequence);
create index events_unnumbered on events (id) where sequence is null;
create index events_age on events (at);

create function add_event(text, text, text, text, text, text, text) returns void as $$
    insert into events (topic, at, project_id, subject, vm_id, task_id, detail, code)
    values ($1, cast(extract(epoch from clock_timestamp()) * 1000 as bigint),
            $2, $3, $4, $5, $6, $7)
$$ language sql;

create function vm_event() returns trigger as $$
begin
    perform add_event('vm.' || case tg_op when 'INSERT' then 'created' else new.state end,
                      new.project_id, new.id, new.id, null, new.name, new.reason_code);
    return null;
end $$ language plpgsql;
create trigger vm_created after insert on vms
    for each row when (new.builder = 0) execute function vm_event();
create trigger vm_changed after update of state on vms
    for each row when (new.builder = 0 and new.state <> old.state) execute function vm_event();

create function task_event() returns trigger as $$
begin
    perform add_event('task.' || case tg_op when 'INSERT' then 'created' else new.state end,
                      new.project_id, new.id, new.vm_id, new.id, new.kind, new.error_code);
    return null;
end $$ language plpgsql;
create trigger task_created after insert on tasks
    for each row execute function task_event();
create trigger task_changed after update of state on tasks
    for each row when (new.state <> old.state) execute function task_event();

create function execution_event() returns trigger as $$
begin
    perform add_event('execution.' || case tg_op when 'INSERT' then 'created' else new.state end,
                      new.project_id, new.id, new.vm_id, new.task_id, null, new.error_code);
    return null;
end $$ language plpgsql;
create trigger execution_created after insert on executions
    for each row execute function execution_event();
create trigger execution_changed after update of state on executions
    for each row when (new.state <> old.state) execute function execution_event();

create function snapshot_event() returns trigger as $$
begin
    perform add_event('snapshot.' || case tg_op when 'INSERT' then 'created' else new.state end,
                      new.project_id, new.id, new.vm_id, null, new.name, new.reason_code);
    return null;
end $$ language plpgsql;
create trigger snapshot_created after insert on snapshots
    for each row when (new.purpose = 'user') execute function snapshot_event();
create trigger snapshot_changed after update of state on snapshots
    for each row when (new.purpose = 'user' and new.state <> old.state)
    execute function snapshot_event();

create function template_event() returns trigger as $$
begin
    perform add_event('template.' || case tg_op when 'INSERT' then 'created' else new.state end,
                      new.project_id, new.id, null, new.task_id, new.name || ':' || new.tag,
                      new.reason_code);
    return null;
end $$ language plpgsql;
create trigger template_created after insert on templates
    for each row execute function template_event();
create trigger template_changed after update of state on templates
    for each row when (new.state <> old.state) execute function template_event();

create function worker_event() returns trigger as $$
begin
    perform add_event('worker.' || case when new.presence <> 'present' then new.presence
                                        when tg_op = 'INSERT' or new.epoch <> old.epoch
                                            then 'registered'
                                        when new.draining <> 0 then 'draining'
                                        else 'activated' end,
                      null, new.id, null, null, new.host, null);
    return null;
end $$ language plpgsql;
create trigger worker_registered after insert on workers
    for each row execute function worker_event();
create trigger worker_changed after update of presence, draining, epoch on workers
    for each row when (new.presence <> old.presence or new.draining <> old.draining
                       or new.epoch <> old.epoch)
    execute function worker_event();
