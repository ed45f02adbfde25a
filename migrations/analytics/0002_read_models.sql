-- Registrations per hour (UTC). A day is the sum of its hours.
create table registrations (
    hour timestamptz,
    -- The partition of user.events.v1 that the registrations came from. Each partition has a consumer
    -- of its own, and with one row for all of them the consumers would wait for each other.
    partition int,
    registrations bigint not null check (registrations > 0),
    primary key (hour, partition)
);

-- The steps that each user has reached. The two facts come from two topics, in any order, so either
-- of them may create the row.
create table funnel (
    user_id uuid primary key,
    registered_at timestamptz,
    -- When a mail server first accepted a mail to the user.
    mailed_at timestamptz
);

-- How many users have reached each step, so that a query need not count the funnel. One row per
-- topic and partition, for the same reason as above; the sum over all rows is the answer. Which row
-- counts a user depends on the order of the facts, the sum does not.
create table funnel_totals (
    topic text,
    partition int,
    registered bigint not null,
    -- Registered users to whom a mail was sent.
    mailed bigint not null,
    primary key (topic, partition)
);
