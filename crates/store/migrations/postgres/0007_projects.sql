-- Projects, and whose everything is. What there was is the default project's, and so is what a
-- program writes that knows of none.

create table projects (
    id         text   collate "C" primary key not null,
    name       text   collate "C" not null,
    created_at bigint not null,
    deleted_at bigint
);

create unique index projects_live_name on projects (name) where deleted_at is null;
create index projects_newest on projects (created_at, id);

insert into projects (id, name, created_at)
values ('00000000-0000-0000-0000-000000000000', 'default',
        cast(extract(epoch from now()) * 1000 as bigint));

alter table vms add column project_id text collate "C" not null
    default '00000000-0000-0000-0000-000000000000';
alter table tasks add column project_id text collate "C" not null
    default '00000000-0000-0000-0000-000000000000';
alter table executions add column project_id text collate "C" not null
    default '00000000-0000-0000-0000-000000000000';
alter table snapshots add column project_id text collate "C" not null
    default '00000000-0000-0000-0000-000000000000';
alter table templates add column project_id text collate "C" not null
    default '00000000-0000-0000-0000-000000000000';

-- A name is taken in its project. The names of the indexes stay: programs know a name that is
-- taken by them.
drop index vms_live_name;
create unique index vms_live_name on vms (project_id, name) where state <> 'deleted';
drop index snapshots_live_name;
create unique index snapshots_live_name on snapshots (project_id, name)
    where name is not null and state <> 'deleted';
drop index templates_ready_name;
create unique index templates_ready_name on templates (project_id, name, tag)
    where state = 'ready';
drop index templates_live_name;
create index templates_live_name on templates (project_id, name, tag, created_at, id)
    where state <> 'deleted';

create index vms_of_project on vms (project_id, created_at, id);
create index tasks_of_project on tasks (project_id, created_at, id);
create index snapshots_of_project on snapshots (project_id, created_at, id);
create index templates_of_project on templates (project_id, created_at, id);
