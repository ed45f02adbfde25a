-- The same users. Half of the mails have ended. The others are held, wait for an address, for an
-- operator or for their next attempt, or have a template that only a newer release knows: more of each
-- kind than the services count.
insert into recipients (user_id, version, email)
select ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
    case when n % 10 = 1 then 0 else 1 + n % 3 end,
    case when n % 10 <> 1 and n % 50 > 0 then 'user-' || n || '@example.com' end
from generate_series(:from, :to) n;

insert into deliveries (id, user_id, template, version, status, due_at, smtp_code, requested_at)
select gen_random_uuid(), ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
    case when n % 10 = 4 then 'of-a-newer-release' else 'welcome' end, 1,
    case n % 10 when 1 then 'unaddressed' when 2 then 'unknown' when 3 then 'pending' when 4 then 'pending'
        when 5 then 'held' when 6 then 'failed' else case when n % 50 = 0 then 'cancelled' else 'sent' end end,
    case n % 10 when 3 then now() + interval '1 day' when 4 then now() end,
    case n % 10 when 6 then 550 end,
    case when n % 10 between 1 and 4 then now() else now() - interval '100 days' end
from generate_series(:from, :to) n;
