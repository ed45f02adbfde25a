-- The columns and the index of Waybill's table of the same name, without the owner: this program has
-- no tokens.
create table users (
    id uuid primary key,
    version bigint not null check (version > 0),
    email text not null check (length(email) between 3 and 254),
    display_name text not null check (length(display_name) between 1 and 100)
);

create unique index users_email on users (lower(email));

-- Requests with an Idempotency-Key, written in the transaction of the registration.
create table idempotency_keys (
    -- Keyed hashes of the caller's key and of the request, as in Waybill.
    key bytea primary key,
    request bytea not null,
    user_id uuid not null,
    -- The receivers that are not known to have the registration. A repeated request calls these, and
    -- no others. All of them, until the first request has noted what it reached.
    missing text[] not null,
    -- Until when a request with this key may be making calls. Null: none is. A process that died
    -- leaves a time, after which a repeated request may take over.
    calling_until timestamptz,
    created_at timestamptz not null default now()
);
