-- As whom a worker began an attempt: the number of its registration. What it says of it counts for
-- as long as that registration does.
alter table tasks add column registration bigint not null default 0;
