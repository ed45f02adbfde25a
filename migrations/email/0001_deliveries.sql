-- Where each user can be reached now: folded from user.state.v1 by version, erased by its tombstone or by user.deleted.
create table recipients (
    user_id uuid primary key,
    -- The highest version seen. An erased recipient keeps it, so that a late update cannot bring the address back.
    version bigint not null,
    -- Null: erased.
    email text,
    display_name text,
    check ((email is null) = (display_name is null))
);

-- The intent to send a mail, and what became of it:
-- pending → sending → sent | failed | cancelled, and unknown where the server's last answer never came.
create table deliveries (
    -- Also the Message-ID, so that a mailbox shows copies as one.
    id uuid primary key,
    user_id uuid not null,
    template text not null,
    -- The version of the user that caused the mail.
    version bigint not null,
    status text not null default 'pending'
        check (status in ('pending', 'sending', 'unknown', 'sent', 'failed', 'cancelled')),
    attempt int not null default 0,
    -- Who is sending, and until when nobody else may. By this database's clock only.
    token uuid,
    lease_until timestamptz,
    next_attempt_at timestamptz not null default now(),
    -- The code of the server's last answer.
    smtp_code smallint,
    -- When the cause happened. Mails of a replayed history are recognised by it.
    requested_at timestamptz not null,
    -- The cause's trace, so that the mail and what follows from it belong to it.
    traceparent text,
    tracestate text,
    updated_at timestamptz not null default now(),
    -- The business key that makes this service idempotent: one intent per cause, however often the event comes.
    unique (user_id, template, version),
    -- Nobody sends without a token and a lease.
    check ((status = 'sending') = (token is not null and lease_until is not null))
);

-- What the sender looks for. Settled deliveries, which will be nearly all, are not in it.
create index deliveries_open on deliveries (next_attempt_at) where status in ('pending', 'unknown', 'sending');
