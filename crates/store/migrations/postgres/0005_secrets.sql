-- What all processes on one store must know alike, and nobody else: the first that needs it makes it.

create table secrets (
    name  text  collate "C" primary key not null,
    value bytea not null
);
