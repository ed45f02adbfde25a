-- The users that were counted: a call that is repeated counts nothing.
create table counted (
    user_id uuid primary key
);

-- Registrations per hour (UTC). A row per shard, because all calls of an hour would wait for one row.
create table registrations (
    hour timestamptz,
    shard int,
    registrations bigint not null check (registrations > 0),
    primary key (hour, shard)
);
