-- Who did what to a user, when, and because of what: one row per fact of user.events.v1. Rows are
-- inserted only. They hold ids, no personal data, and stay when the user is erased.
create table audit (
    -- The event. The key makes the table its own inbox: an event that is delivered again has a row.
    event_id uuid primary key,
    user_id uuid not null,
    -- The user's version after the event. 1 is the registration; its actor owns the user.
    version bigint not null,
    -- Such as user.registered.
    type text not null,
    occurred_at timestamptz not null,
    -- The principal that gave the command: a keyed hash. Null: without a token, or not known.
    actor uuid,
    -- The command, and the command at the beginning of the chain. Null: not known.
    causation_id uuid,
    correlation_id uuid
);

-- For the pages of one user.
create index audit_user on audit (user_id, version, event_id);
