//! A delivery belongs to its sender until the lease ends. A sender that was frozen for longer finds
//! this out before it sends.

use tests::users::address;
use tests::{System, eventually_eq};
use topology::EMAIL;
use uuid::Uuid;

use super::{email_events, until_another_mail_is_sent, until_email_events};

const SHORT_LEASE: (&str, &str) = ("LEASE_MS", "2000");
const LONG_LEASE: (&str, &str) = ("LEASE_MS", "60000");
const ONE_SENDER: (&str, &str) = ("SENDERS", "1");
/// Freezes the process immediately before a sender checks its lease and sends the mail.
const FREEZE_BEFORE_CHECK: (&str, &str) = ("FAULT_AT", "email.before_check:1:stop");
/// Freezes the process after the server's 250 and before the sender records it.
const FREEZE_AFTER_ANSWER: (&str, &str) = ("FAULT_AT", "email.after_answer:1:stop");
/// The log line of a sender that must not send a mail any more.
const NOT_SENT: &str = "mail not sent";

/// A system whose only sender is frozen while it sends a mail. Returns also the user and the
/// address.
async fn frozen_sender(settings: &[(&str, &str)]) -> (System, Uuid, String) {
    let mut system = System::start_mailing(settings).await;
    let email = address();
    let id = system.users.register_as(&email).await;
    system.processes.until_frozen(EMAIL).await;
    (system, id, email)
}

/// T24, I6: a sender is frozen past its lease (here 2 s) immediately before it sends the mail.
/// Another process takes the delivery over and sends the mail. The thawed sender checks its lease,
/// stops before DATA and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_frozen_past_its_lease_does_not_send_a_mail_that_another_has_sent() {
    let (mut system, id, email) = frozen_sender(&[SHORT_LEASE, ONE_SENDER, FREEZE_BEFORE_CHECK]).await;
    let _second = system.processes.spawn_another(EMAIL);
    system.stores.until_delivery_states(id, "pending sending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1, "mails of the second sender");

    system.processes.thaw(EMAIL);
    system.processes.until_logged(EMAIL, NOT_SENT).await;
    until_another_mail_is_sent(&system).await;
    assert_eq!(system.stores.delivery_states(id).await, "pending sending sending sent");
    assert_eq!(system.mail.to(&email).len(), 1, "mails: the first sender must stop before DATA");
    until_email_events(&system, id, &["email.sent"]).await;
}

/// T24, I6: as above, but the second sender has only claimed the delivery and not sent the mail
/// yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_frozen_past_its_lease_does_not_send_a_mail_that_another_has_claimed() {
    let (mut system, id, email) = frozen_sender(&[SHORT_LEASE, ONE_SENDER, FREEZE_BEFORE_CHECK]).await;
    let mut second = system.processes.spawn_another_with(EMAIL, &[LONG_LEASE, ONE_SENDER, FREEZE_BEFORE_CHECK]);
    second.until_frozen().await;

    system.processes.thaw(EMAIL);
    system.processes.until_logged(EMAIL, NOT_SENT).await;
    assert_eq!(system.stores.delivery_states(id).await, "pending sending sending");
    assert_eq!(system.mail.to(&email), [], "mails before the second sender has sent");
    second.thaw();
    system.stores.until_delivery_states(id, "pending sending sending sent").await;
    until_another_mail_is_sent(&system).await;
    assert_eq!(system.mail.to(&email).len(), 1, "mails");
}

/// T24, I6: a sender whose lease has ended may not send, even if no other sender has claimed the
/// delivery. It claims it again first.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_whose_lease_has_ended_claims_again_before_it_sends() {
    let (mut system, id, email) = frozen_sender(&[SHORT_LEASE, ONE_SENDER, FREEZE_BEFORE_CHECK]).await;
    let db = system.stores.database(EMAIL).await;
    let ended = "select count(*) from deliveries where status = 'sending' and due_at < now()";
    let ended = async || sqlx::query_scalar::<_, i64>(ended).fetch_one(&db).await.unwrap();
    eventually_eq("deliveries whose lease has ended", 1, ended).await;
    system.processes.thaw(EMAIL);
    system.stores.until_delivery_states(id, "pending sending pending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1, "mails");
}

/// T24, I6: a sender is frozen after the server's 250 and before it records it. Another sender
/// sends a copy with the same Message-ID. There is one event about the delivery.
#[tokio::test(flavor = "multi_thread")]
async fn two_senders_whose_mails_were_accepted_publish_one_event() {
    let (mut system, id, email) = frozen_sender(&[SHORT_LEASE, ONE_SENDER, FREEZE_AFTER_ANSWER]).await;
    let _second = system.processes.spawn_another(EMAIL);
    system.stores.until_delivery_states(id, "pending sending sending sent").await;
    system.processes.thaw(EMAIL);
    system.processes.until_logged(EMAIL, "mail accepted by the SMTP server").await;
    until_another_mail_is_sent(&system).await;
    system.until_drained().await;
    assert_eq!(email_events(&system, id).len(), 1, "events about the mail");
    let ids = system.mail.message_ids_to(&email);
    assert_eq!(ids.len(), 2, "copies of the mail");
    assert_eq!(ids[0], ids[1], "the copies must have the same Message-ID");
}

/// I5, I14: a user is erased between the claim and the mail. The check before DATA finds it.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_erased_between_the_claim_and_the_mail_gets_no_mail() {
    let (mut system, id, email) = frozen_sender(&[LONG_LEASE, ONE_SENDER, FREEZE_BEFORE_CHECK]).await;
    let erase = "update recipients set version = 2, email = null where user_id = $1";
    sqlx::query(erase).bind(id).execute(&system.stores.database(EMAIL).await).await.unwrap();
    system.processes.thaw(EMAIL);
    system.stores.until_delivery_states(id, "pending sending pending cancelled").await;
    until_another_mail_is_sent(&system).await;
    assert_eq!(system.mail.to(&email), []);
    let cancelled = async || system.processes.metric(EMAIL, "deliveries_ended_total", &["state=\"cancelled\""]).await;
    eventually_eq("deliveries counted as cancelled", Some(1.0), cancelled).await;
}
