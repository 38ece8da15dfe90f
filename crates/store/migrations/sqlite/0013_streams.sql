-- Where a worker takes streams of other processes. Null: it takes none, or its program is an older one.
alter table workers add column stream_address text;
