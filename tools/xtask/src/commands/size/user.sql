-- The users from :from to :to, as they are after some years: some are erased. Many expired
-- idempotency keys, and many events of a topic that Kafka does not accept.
insert into users (id, version, email, display_name)
select ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 1 + n % 3,
    case when n % 50 > 0 then 'user-' || n || '@example.com' end, case when n % 50 > 0 then 'User ' || n end
from generate_series(:from, :to) n;

insert into idempotency_keys (key, request, status, answer, created_at)
select sha256(n::text::bytea), sha256(('request ' || n)::bytea), 201,
    jsonb_build_object('id', gen_random_uuid(), 'version', 1),
    now() - case when n % 5 = 0 then interval '25 hours' + n * interval '1 millisecond' else interval '1 hour' end
from generate_series(:from, :to) n;

insert into outbox (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, occurred_at)
select gen_random_uuid(), 'missing.v1', 'user', gen_random_uuid(), n % 1000, 1, 'user.registered', '{}', now()
from generate_series(:from, :to, 5) n;
