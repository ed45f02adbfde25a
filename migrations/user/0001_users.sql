-- The current state of all users. Kafka records what happened to them.
create table users (
    -- A UUIDv7, created by the service: rows that are created one after another are adjacent in the
    -- index.
    id uuid primary key,
    -- 1 at registration, incremented by every command. It is computed only from this row, so the
    -- row's lock orders the versions.
    version bigint not null check (version > 0),
    -- As typed, without surrounding blanks. Null once the user is erased. The row stays, because it
    -- holds the version.
    email text check (length(email) between 3 and 254),
    display_name text check (length(display_name) between 1 and 100),
    -- The principal that registered the user: it and administrators may read and change the row. A
    -- keyed hash. Null: registered without a token, or erased.
    owner uuid,
    -- Personal data is either complete or completely erased.
    check ((email is null) = (display_name is null)),
    check (email is not null or owner is null)
);

-- One account per mailbox. In practice mail servers do not distinguish upper and lower case, so
-- neither does this index.
create unique index users_email on users (lower(email));

-- The answers to requests with an Idempotency-Key, written in the transaction of the request.
create table idempotency_keys (
    -- A keyed hash of the caller's key: callers may put anything into it, including addresses.
    key bytea primary key,
    -- A keyed hash of the request. A plain hash of an address would be personal data, because
    -- anybody can hash addresses.
    request bytea not null,
    -- Null only within the transaction that creates the answer.
    status smallint,
    -- Contains an id and a version, never personal data.
    answer jsonb,
    created_at timestamptz not null default now()
);

-- For the hourly deletion of answers that are older than a day.
create index idempotency_keys_age on idempotency_keys (created_at);
