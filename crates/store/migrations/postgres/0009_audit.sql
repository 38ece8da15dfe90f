-- Who did what: written once and never changed. Nothing refers to it and it refers to nothing, so that it
-- outlives what it speaks of.

create table audit (
    id         text collate "C"   primary key not null,
    at         bigint not null,
    -- Of who asked; null: nobody that is known.
    project_id text collate "C",
    key_id     text collate "C",
    key_prefix text collate "C",
    -- What was needed, as `vms:write`; null where that is not known.
    action     text collate "C",
    method     text collate "C"   not null,
    -- As it was asked for, with ids and names.
    path       text collate "C"   not null,
    -- Where what was made can be found.
    made       text collate "C",
    outcome    text collate "C"   not null,
    status     bigint not null,
    code       text collate "C",
    request_id text collate "C"   not null,
    address    text collate "C"
);

create index audit_newest on audit (at, id);
create index audit_of_project on audit (project_id, at, id);
