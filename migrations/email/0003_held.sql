-- Mails whose cause is so old that it comes from a replayed history. They have the status `held`
-- until an operator releases them.
alter table deliveries drop constraint deliveries_status_check;
alter table deliveries add constraint deliveries_status_check
    check (status in ('unaddressed', 'pending', 'held', 'sending', 'unknown', 'sent', 'failed', 'cancelled'));

-- When an operator released the delivery. A released delivery is sent whatever its age.
alter table deliveries add column released_at timestamptz;

-- Held deliveries have an index of their own and are not in the index of the sender's query: a
-- whole history may be held while new users wait for mails.
create index deliveries_held on deliveries (requested_at) where status = 'held';
