-- `seq` has no holes: entries come at the end, and go at the beginning.
create table entries (
    seq       integer primary key,
    time_ns   integer not null,
    service   text    not null,
    level     integer not null,
    stream    text    not null,
    vm_id     text,
    task_id   text,
    text      text    not null,
    cut_bytes integer not null,
    missing   integer not null
) strict;

create index entries_by_time on entries (time_ns);
create index entries_by_vm on entries (vm_id, time_ns) where vm_id is not null;
create index entries_by_task on entries (task_id, time_ns) where task_id is not null;

create table facts (
    name  text primary key not null,
    value text not null
) strict;
