-- Events that are committed here and not yet in Kafka: written in the transaction of the change they tell of, read and
-- deleted by the relay. Insert and delete only. Columns as Debezium's EventRouter reads them, so that it could take over.
create table outbox (
    -- The order of publishing. Cached blocks of ids would hand out 1, 21, 2.
    id bigint generated always as identity (cache 1) primary key,
    event_id uuid not null,
    topic text not null,
    aggregatetype text not null,
    -- The record's key.
    aggregateid uuid not null,
    -- The aggregate's version after the event.
    version bigint not null,
    type text not null,
    -- Null is a tombstone. The bound is below the 1 MiB that a broker takes: what is too large must fail here, where the
    -- caller still hears of it.
    payload bytea check (octet_length(payload) <= 900000),
    -- W3C trace context of the request that caused the event.
    traceparent text,
    tracestate text,
    occurred_at timestamptz not null
) with (
    -- Every row dies young. Without this the dead ones make each read slower.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
