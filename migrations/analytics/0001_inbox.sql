-- The ids of the events that the read models of this schema have in them, written in the transaction of the effects.
-- Never pruned: facts are kept for ever, so any of them can come back.
create table inbox (
    -- The consumer group: without it two handlers of one event would hide it from each other.
    handler text not null,
    event_id uuid not null,
    primary key (handler, event_id)
);
