-- How much each project may have, and what of a VM counts. No quota is no bound. A program that does
-- not know the columns writes VMs that count as nothing but one VM, until they are made anew.

alter table projects add column quota_vms bigint;
alter table projects add column quota_vcpus bigint;
alter table projects add column quota_memory_mb bigint;
alter table projects add column quota_waiting_tasks bigint;

alter table vms add column vcpus bigint not null default 0;
alter table vms add column memory_mb bigint not null default 0;

update vms set vcpus = coalesce(json_extract(spec, '$.vcpus'), 0),
               memory_mb = coalesce(json_extract(spec, '$.memory_mb'), 0)
where state <> 'deleted';

create index vms_counted on vms (project_id, state, builder, vcpus, memory_mb)
    where state <> 'deleted';
create index tasks_waiting on tasks (project_id) where state = 'pending';
