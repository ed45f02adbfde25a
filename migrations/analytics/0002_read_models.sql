-- Registrations per hour (UTC); days are sums of hours.
create table registrations (
    hour timestamptz primary key,
    registrations bigint not null check (registrations > 0)
);

-- How far each user came. The two facts come from two topics, in any order, so either may make the row.
create table funnel (
    user_id uuid primary key,
    registered_at timestamptz,
    -- The first mail that a server took over.
    mailed_at timestamptz
);
