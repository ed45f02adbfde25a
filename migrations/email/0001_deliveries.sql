-- The current address of each user: the highest version from user.state.v1, erased by its tombstone
-- or by user.deleted.
create table recipients (
    user_id uuid primary key,
    -- The highest version seen. An erased recipient keeps it, so that a late update cannot bring
    -- the address back.
    version bigint not null,
    -- Null: erased.
    email text,
    display_name text,
    check ((email is null) = (display_name is null))
);

-- The intent to send a mail, and its progress: pending → sending → sent, failed or cancelled;
-- unknown if no answer came after the mail was sent.
create table deliveries (
    -- Also the Message-ID, by which mailboxes recognise copies.
    id uuid primary key,
    user_id uuid not null,
    template text not null,
    -- The version of the user that caused the mail.
    version bigint not null,
    status text not null default 'pending'
        check (status in ('pending', 'sending', 'unknown', 'sent', 'failed', 'cancelled')),
    attempt int not null default 0,
    -- Identifies the sender that has the delivery.
    token uuid,
    -- Until then no other sender may take the delivery. By this database's clock.
    lease_until timestamptz,
    next_attempt_at timestamptz not null default now(),
    -- The code of the mail server's last reply.
    smtp_code smallint,
    -- When the event that caused the mail happened. Mails of a replayed history are recognised by
    -- it.
    requested_at timestamptz not null,
    -- The trace of that event, which the mail and its own events continue.
    traceparent text,
    tracestate text,
    updated_at timestamptz not null default now(),
    -- The business key that makes this service idempotent: one intent per cause, however often the
    -- event arrives.
    unique (user_id, template, version),
    -- A delivery has a token and a lease exactly while it is being sent.
    check ((status = 'sending') = (token is not null and lease_until is not null))
);

-- For the sender's query. Ended deliveries, which are nearly all, are not in the index.
create index deliveries_open on deliveries (next_attempt_at) where status in ('pending', 'unknown', 'sending');
