-- When each compacted topic of this service last got a record in every partition, by this
-- database's clock. The lock on the row ensures that only one replica writes the records.
create table heartbeats (
    topic text primary key,
    beaten_at timestamptz not null default now()
);

insert into heartbeats (topic) values ('user.state.v1');
