//! A delivery is its sender's for as long as its lease. What a sender may do that was asleep for longer, and what it finds when it
//! wakes up.

use tests::users::address;
use tests::{System, eventually_eq};
use topology::EMAIL;
use uuid::Uuid;

use super::{one_more_is_mailed, told, until_told};

const SHORT: (&str, &str) = ("LEASE_MS", "2000");
const LONG: (&str, &str) = ("LEASE_MS", "60000");
const ONE: (&str, &str) = ("SENDERS", "1");
/// Just before the mail itself.
const BEFORE_CHECK: (&str, &str) = ("FAULT_AT", "email.before_check:1:stop");

/// A system whose one sender has frozen with a registration's mail in hand; the user's id and address.
async fn frozen(settings: &[(&str, &str)]) -> (System, Uuid, String) {
    let mut system = System::start_mailing(settings).await;
    let email = address();
    let id = system.users.register_as(&email).await;
    system.processes.until_frozen(EMAIL).await;
    (system, id, email)
}

/// T24, I6: a sender frozen past its lease (2 s here) just before the mail itself. Another process takes the delivery over and
/// sends; the thawed one asks whether the mail is still its own, is told no, stops before DATA, and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_frozen_past_its_lease_does_not_send_what_another_has_sent() {
    let (mut system, id, email) = frozen(&[SHORT, ONE, BEFORE_CHECK]).await;
    let _second = system.processes.spawn_another(EMAIL);
    system.stores.until_delivery_states(id, "pending sending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1, "the second has sent");

    system.processes.thaw(EMAIL);
    system.processes.until_logged(EMAIL, "no longer ours").await;
    one_more_is_mailed(&system).await;
    assert_eq!(system.stores.delivery_states(id).await, "pending sending sending sent");
    assert_eq!(system.mail.to(&email).len(), 1, "the first stops before DATA");
    until_told(&system, id, &["email.sent"]).await;
}

/// T24, I6: the same while the other is still at it, and has sent nothing yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_frozen_past_its_lease_leaves_the_mail_to_the_one_who_has_it_now() {
    let (mut system, id, email) = frozen(&[SHORT, ONE, BEFORE_CHECK]).await;
    let mut second = system.processes.spawn_another_with(EMAIL, &[LONG, ONE, BEFORE_CHECK]);
    second.until_frozen().await;

    system.processes.thaw(EMAIL);
    system.processes.until_logged(EMAIL, "no longer ours").await;
    assert_eq!(
        (system.stores.delivery_states(id).await.as_str(), system.mail.to(&email).len()),
        ("pending sending sending", 0)
    );
    second.thaw();
    system.stores.until_delivery_states(id, "pending sending sending sent").await;
    one_more_is_mailed(&system).await;
    assert_eq!(system.mail.to(&email).len(), 1);
}

/// T24, I6: a lease that has ended is nobody's, also where nobody else has come: the delivery is claimed anew before it is sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_whose_lease_has_ended_claims_again_before_it_sends() {
    let (mut system, id, email) = frozen(&[SHORT, ONE, BEFORE_CHECK]).await;
    let db = system.stores.database(EMAIL).await;
    let over = "select count(*) from deliveries where lease_until < now()";
    eventually_eq("the lease is over", 1_i64, async || sqlx::query_scalar(over).fetch_one(&db).await.unwrap()).await;
    system.processes.thaw(EMAIL);
    system.stores.until_delivery_states(id, "pending sending pending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1);
}

/// T24, I6: a sender frozen between the server's 250 and its record. The other sends a copy, under the same Message-ID; what became
/// of the delivery is told once.
#[tokio::test(flavor = "multi_thread")]
async fn two_senders_that_both_were_answered_tell_it_once() {
    let (mut system, id, email) = frozen(&[SHORT, ONE, ("FAULT_AT", "email.after_answer:1:stop")]).await;
    let _second = system.processes.spawn_another(EMAIL);
    system.stores.until_delivery_states(id, "pending sending sending sent").await;
    system.processes.thaw(EMAIL);
    system.processes.until_logged(EMAIL, "\"message\":\"sent\"").await;
    one_more_is_mailed(&system).await;
    system.until_drained().await;
    assert_eq!(told(&system, id).len(), 1, "events about the mail");
    let ids = system.mail.message_ids_to(&email);
    assert_eq!((ids.len(), &ids[0]), (2, &ids[1]), "copies, and their Message-IDs");
}

/// I5 I14: somebody is erased between the claim and the mail. The last question before DATA is told so.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_erased_between_the_claim_and_the_mail_gets_none() {
    let (mut system, id, email) = frozen(&[LONG, ONE, BEFORE_CHECK]).await;
    let erase = "update recipients set version = 2, email = null, display_name = null where user_id = $1";
    sqlx::query(erase).bind(id).execute(&system.stores.database(EMAIL).await).await.unwrap();
    system.processes.thaw(EMAIL);
    system.stores.until_delivery_states(id, "pending sending pending cancelled").await;
    one_more_is_mailed(&system).await;
    assert_eq!(system.mail.to(&email), []);
    let cancelled = async || system.processes.metric(EMAIL, "deliveries_settled_total", &["state=\"cancelled\""]).await;
    eventually_eq("it is counted", Some(1.0), cancelled).await;
}
