-- Events that are committed and not published to Kafka yet. They are written in the transaction of
-- the change that they are about. The relay publishes and deletes them. Rows are only inserted and
-- deleted. The columns are those that Debezium's EventRouter expects, so that Debezium could
-- replace the relay.
create table outbox (
    -- The order of publishing. A sequence with a larger cache would hand out 1, 21, 2.
    id bigint generated always as identity (cache 1) primary key,
    event_id uuid not null,
    topic text not null,
    aggregatetype text not null,
    -- The record's key.
    aggregateid uuid not null,
    -- Kafka's hash of the key, from which the partition follows. The relay leaves out the rows of
    -- an unavailable partition by it.
    key_hash int not null check (key_hash >= 0),
    -- The aggregate's version after the event.
    version bigint not null,
    type text not null,
    -- Null is a tombstone. The limit is below the 1 MiB that a broker accepts, so that a larger
    -- event fails here, where the caller gets the error.
    payload bytea check (octet_length(payload) <= 900000),
    -- The ids of what directly caused the event and of the command at the beginning of the chain, and
    -- who gave that command. UUIDs that we make, so no text of a caller is kept with a fact.
    causationid uuid,
    correlationid uuid,
    actor uuid,
    -- W3C trace context of the request that caused the event.
    traceparent text,
    tracestate text,
    -- In the years that the time of an event can have (RFC 3339).
    occurred_at timestamptz not null
        check (occurred_at >= '0001-01-01 00:00:00+00' and occurred_at < '10000-01-01 00:00:00+00')
) with (
    -- Every row is deleted soon. Without these settings the dead rows would slow down each read.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);

-- The relay reads each topic by itself, so that the rows of an unavailable topic cost nothing.
create index outbox_topic on outbox (topic, id);
