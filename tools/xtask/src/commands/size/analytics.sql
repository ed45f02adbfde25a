-- The same users, registered over the two years before today. One event of each kind per user.
insert into inbox (handler, event_id)
select handler, gen_random_uuid()
from generate_series(:from, :to) n, (values ('analytics.users'), ('analytics.emails')) handlers (handler);

insert into funnel (user_id, registered_at, mailed_at)
select ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, now() - n % 17520 * interval '1 hour', now()
from generate_series(:from, :to) n;

insert into registrations as stored (hour, partition, registrations)
select date_trunc('hour', now() - n % 17520 * interval '1 hour', 'UTC'), n % 6, count(*)
from generate_series(:from, :to) n group by 1, 2
on conflict (hour, partition) do update set registrations = stored.registrations + excluded.registrations;

insert into funnel_totals as stored (topic, partition, registered, mailed)
select 'user.events.v1', n % 6, count(*), count(*) from generate_series(:from, :to) n group by 2
on conflict (topic, partition) do update
    set registered = stored.registered + excluded.registered, mailed = stored.mailed + excluded.mailed;

insert into audit (event_id, user_id, version, type, occurred_at, actor, causation_id, correlation_id)
select gen_random_uuid(), ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 1, 'user.registered',
    now() - n % 17520 * interval '1 hour', gen_random_uuid(), gen_random_uuid(), gen_random_uuid()
from generate_series(:from, :to) n;
