-- The current address of each user: the highest version from user.state.v1, erased by its tombstone
-- or by user.deleted. The display name is not stored, because no mail contains it.
create table recipients (
    user_id uuid primary key,
    -- The highest version seen. An erased recipient keeps it, so that a late update cannot bring
    -- the address back. 0: nothing is known yet. Both handlers lock this row, so a handler that
    -- finds no row inserts one with version 0.
    version bigint not null,
    -- Null: erased, or not known yet.
    email text,
    check (version > 0 or email is null)
);

-- The intent to send a mail, and its progress. services/email/src/deliveries.rs draws the states.
create table deliveries (
    -- Also the Message-ID, by which mailboxes recognise copies.
    id uuid primary key,
    user_id uuid not null,
    template text not null,
    -- The version of the user that caused the mail.
    version bigint not null,
    status text not null
        check (status in ('unaddressed', 'pending', 'sending', 'unknown', 'sent', 'failed', 'cancelled')),
    -- When a sender may claim the delivery: the time of the next attempt, or the end of the lease
    -- of the sender that has it. By this database's clock. Null: no sender may claim it.
    due_at timestamptz,
    attempt int not null default 0,
    -- Permanent refusals that were not about the recipient or the mail, since the last release by
    -- an operator. After several the delivery fails.
    refusals int not null default 0,
    -- Attempts after which no answer came, since the last release by an operator. After several the
    -- delivery waits for an operator, because each may have delivered a copy.
    unknowns int not null default 0,
    -- Number of events about this delivery, which is the version of the last one.
    events int not null default 0,
    -- Identifies the sender that has the delivery.
    token uuid,
    -- The code of the mail server's last reply.
    smtp_code smallint,
    -- When the event that caused the mail happened. Mails of a replayed history are recognised by
    -- it.
    requested_at timestamptz not null,
    -- That event and its chain, which the events about the mail continue.
    causationid uuid,
    correlationid uuid,
    -- The actor of that event: the principal that registered the user. It and administrators may see
    -- the delivery. Null: registered without a token.
    owner uuid,
    -- The trace of that event, which the mail and its own events continue.
    traceparent text,
    tracestate text,
    updated_at timestamptz not null default now(),
    -- The business key that makes this service idempotent: one intent per cause, however often the
    -- event arrives.
    unique (user_id, template, version),
    -- A delivery has a token exactly while it is being sent.
    check ((status = 'sending') = (token is not null)),
    check (due_at is null or status in ('pending', 'sending', 'unknown')),
    check (status not in ('pending', 'sending') or due_at is not null)
);

-- For the sender's query. It contains only what a sender may claim, so a claim costs the same
-- however many deliveries wait for an address or an operator. By template, because a process claims
-- only the templates that its release has.
create index deliveries_due on deliveries (template, due_at) where due_at is not null;

-- For the metrics. Ended deliveries, which are nearly all, are not in it.
create index deliveries_open on deliveries (status, requested_at)
    where status in ('unaddressed', 'pending', 'sending', 'unknown');

-- For the command that sends mails again whose answer was lost too often. It reads them batch after
-- batch.
create index deliveries_undecided on deliveries (updated_at, id)
    where status = 'unknown' and due_at is null;

-- For the command that sends failed mails again. It reads them by code, in the order in which they
-- failed, batch after batch.
create index deliveries_failed on deliveries (smtp_code, updated_at, id) where status = 'failed';
