-- What a key may do, until when, and by whom it was made. The defaults are what every key was
-- before: all of it, for ever; and what a program that does not know them writes.
--
-- A key that is revoked has no hash any more, so that no program takes it, however old.

alter table api_keys add column project_id text not null
    default '00000000-0000-0000-0000-000000000000';
alter table api_keys add column role text not null default 'admin';
-- With commas between; none: all that the role may.
alter table api_keys add column scopes text not null default '';
alter table api_keys add column created_by text;
alter table api_keys add column expires_at bigint;
alter table api_keys add column last_used_at bigint;
alter table api_keys add column revoked_at bigint;

-- Every request looks a key up by it.
create unique index api_keys_hash on api_keys (hash) where revoked_at is null;
create index api_keys_of_project on api_keys (project_id, created_at, id);
