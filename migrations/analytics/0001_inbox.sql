-- The ids of the events that the read models of this schema contain, written in the transaction of
-- their effects. Rows are never deleted: facts are kept permanently, so any of them can be
-- delivered again.
create table inbox (
    -- The consumer group. Without it, two handlers of one event would hide it from each other.
    handler text not null,
    event_id uuid not null,
    primary key (handler, event_id)
);
