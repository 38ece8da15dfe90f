-- Who did what: written once and never changed. Nothing refers to it and it refers to nothing, so that it
-- outlives what it speaks of.

create table audit (
    id         text   primary key not null,
    at         bigint not null,
    -- Of who asked; null: nobody that is known.
    project_id text,
    key_id     text,
    key_prefix text,
    -- What was needed, as `vms:write`; null where that is not known.
    action     text,
    method     text   not null,
    -- As it was asked for, with ids and names.
    path       text   not null,
    -- Where what was made can be found.
    made       text,
    outcome    text   not null,
    status     bigint not null,
    code       text,
    request_id text   not null,
    address    text
);

create index audit_newest on audit (at, id);
create index audit_of_project on audit (project_id, at, id);
