-- The record of who the users are. Kafka has the record of what happened.
create table users (
    -- UUIDv7, made by the service: rows made one after another are neighbours in the index.
    id uuid primary key,
    -- 1 at registration, one more with every command. It comes from this row alone, so the row lock orders the versions.
    version bigint not null check (version > 0),
    -- As typed, without surrounding blanks. Null once the user is erased; the row stays, for its version.
    email text check (length(email) between 3 and 254),
    display_name text check (length(display_name) between 1 and 100),
    -- Personal data is there as a whole, or gone as a whole.
    check ((email is null) = (display_name is null))
);

-- One account per mailbox. Mail hosts do not tell upper from lower case in practice, so neither do we.
create unique index users_email on users (lower(email));

-- The answers to requests that carried an Idempotency-Key, written in the transaction of what they answer.
create table idempotency_keys (
    -- A keyed hash of the caller's key: callers put anything into it, addresses too.
    key bytea primary key,
    -- A keyed hash of the request. A bare hash of an address would be personal data: anybody can hash addresses.
    request bytea not null,
    -- Null only within the transaction that is making the answer.
    status smallint,
    -- Carries an id and a version, never personal data.
    answer jsonb,
    created_at timestamptz not null default now()
);

-- For the hourly removal of answers older than a day.
create index idempotency_keys_age on idempotency_keys (created_at);
