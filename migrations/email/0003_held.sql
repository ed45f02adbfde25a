-- Mails whose cause is so old that it comes from a history read again. They wait, as `held`, until an operator releases them.
alter table deliveries drop constraint deliveries_status_check;
alter table deliveries add constraint deliveries_status_check
    check (status in ('pending', 'held', 'sending', 'unknown', 'sent', 'failed', 'cancelled'));

-- When an operator said that it may be sent, whatever its age.
alter table deliveries add column released_at timestamptz;

-- They are not in the index that the sender looks through: a whole history may be held while new users wait for their mails.
create index deliveries_held on deliveries (user_id) where status = 'held';
