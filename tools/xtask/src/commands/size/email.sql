-- The same users. Nearly all mails have ended. Others are held, wait for an address, for an operator or
-- for their next attempt, or have a template that only a newer release knows.
insert into recipients (user_id, version, email)
select ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
    case when n % 100 = 97 then 0 else 1 + n % 3 end,
    case when n % 100 <> 97 and n % 50 > 0 then 'user-' || n || '@example.com' end
from generate_series(:from, :to) n;

insert into deliveries (id, user_id, template, version, status, due_at, requested_at)
select gen_random_uuid(), ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
    case when n % 100 = 94 then 'of-a-newer-release' else 'welcome' end, 1,
    case when n % 100 = 99 then 'held' when n % 100 = 98 then 'failed' when n % 100 = 97 then 'unaddressed'
         when n % 100 = 96 then 'unknown' when n % 100 in (94, 95) then 'pending' when n % 50 = 0 then 'cancelled'
         else 'sent' end,
    case when n % 100 = 95 then now() + interval '1 day' when n % 100 = 94 then now() end,
    case when n % 100 between 94 and 97 then now() else now() - interval '100 days' end
from generate_series(:from, :to) n;
