-- When each compacted topic of this service last got a record in every partition, by this database's clock. A row is a topic, so
-- that of all replicas one writes the records.
create table heartbeats (
    topic text primary key,
    beaten_at timestamptz not null default now()
);

insert into heartbeats (topic) values ('user.state.v1');
