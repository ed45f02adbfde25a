//! A process that stops while a mail server takes its time.

use testbed::smtp_sink::{Fault, Stage};
use tests::users::address;
use tests::{System, eventually_eq};
use topology::EMAIL;

/// Longer than any process may take to stop.
const SLOW: u64 = 60_000;

/// I6: the sender is stopped while it waits for the answer to a mail. It waits as long as the
/// process may take to stop, then records that the answer is unknown. The next process sends the
/// mail again.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_sender_records_that_the_answer_to_a_mail_is_unknown() {
    let mut system = System::start_mailing(&[]).await;
    system.mail.fail(Fault::Slow { ms: SLOW, stage: Stage::Dot }.times(1));
    let email = address();
    let id = system.users.register_as(&email).await;
    eventually_eq("mails at the server", 1, async || system.mail.to(&email).len()).await;
    system.processes.stop(EMAIL).await;
    assert_eq!(system.stores.delivery_states(id).await, "pending sending unknown");
    system.processes.start(&[EMAIL]).await;
    system.users.until_mailed(id).await;
    assert_eq!(system.mail.to(&email).len(), 2, "copies of the mail");
}

/// I6: the sender is stopped before it has sent the mail. It gives the delivery back at once, and
/// the next process does not wait for a lease.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_sender_starts_no_mail() {
    let mut system = System::start_mailing(&[("LEASE_MS", "600000")]).await;
    system.mail.fail(Fault::Slow { ms: SLOW, stage: Stage::Rcpt }.times(1));
    let email = address();
    let id = system.users.register_as(&email).await;
    system.stores.until_delivery_states(id, "pending sending").await;
    // The sink counts a fault when it begins.
    eventually_eq("the server's faults to come", Fault::None, async || system.mail.behaviour().fault).await;
    system.processes.stop(EMAIL).await;
    assert_eq!(system.stores.delivery_states(id).await, "pending sending pending");
    system.processes.start(&[EMAIL]).await;
    system.users.until_mailed(id).await;
    assert_eq!(system.mail.to(&email).len(), 1, "copies of the mail");
}
