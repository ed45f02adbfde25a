-- Registrations per hour (UTC). A day is the sum of its hours.
create table registrations (
    hour timestamptz primary key,
    registrations bigint not null check (registrations > 0)
);

-- The steps that each user has reached. The two facts come from two topics, in any order, so either
-- of them may create the row.
create table funnel (
    user_id uuid primary key,
    registered_at timestamptz,
    -- When a mail server first accepted a mail to the user.
    mailed_at timestamptz
);
