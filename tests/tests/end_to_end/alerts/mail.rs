//! Mails that are not sent.

use std::time::Duration;

use testbed::smtp_sink::{Behaviour, Fault};
use tests::System;
use tests::alerts::SCRAPES;
use tests::users::address;
use topology::{EMAIL, USER};
use uuid::Uuid;

use super::{record, until, until_at_least};
use crate::email::{write_fact, write_state};

/// Registrations, by the age of their event: too old, older than the threshold of the alert, and
/// new.
const DAYS: Duration = Duration::from_secs(96 * 3600);
const MINUTES: Duration = Duration::from_secs(11 * 60);
const NEW: Duration = Duration::ZERO;

/// I12: the mail server loses its answers to one mail, and then answers nothing. Some mails are
/// old, one is too old, one has no address, and many have an address that no server accepts.
#[tokio::test(flavor = "multi_thread")]
async fn mails_that_are_not_sent() {
    let system = System::start_mailing(&[]).await;
    let user = system.users.register().await;
    system.users.until_mailed(user).await;
    system.until_drained().await;
    let Some(mut recording) = record(&system, &[USER, EMAIL]).await else { return };
    recording.scrapes(SCRAPES).await;
    recording.fault_begins();

    let unknown = address();
    system.mail.fail(Behaviour { recipient: Some(unknown.clone()), ..Fault::DropAfterDot.into() });
    let lost = system.users.register_as(&unknown).await;
    system.stores.until_delivery_states(lost, "pending sending unknown sending unknown sending unknown").await;
    for _ in 0..12 {
        register(&system, "not an address", NEW).await;
    }
    until(&system, EMAIL, "deliveries_ended_total", &["failed"], 12.0).await;
    system.mail.fail(Fault::Refuse);
    for _ in 0..4 {
        register(&system, &address(), MINUTES).await;
    }
    let held = register(&system, &address(), DAYS).await;
    let unaddressed = Uuid::now_v7();
    write_fact(&system, "user.registered", unaddressed, 1, NEW).await;

    for state in ["unknown", "held", "unaddressed"] {
        until(&system, EMAIL, "deliveries_open", &[state], 1.0).await;
    }
    until_at_least(&system, EMAIL, "deliveries_oldest_age_seconds", &[], 600.0).await;
    until(&system, EMAIL, "mail_sending_paused", &[], 1.0).await;
    recording.fault_shows();
    recording.scrapes(SCRAPES).await;
    recording.fault_ends();

    system.mail.recover();
    write_state(&system, unaddressed, 1, &address()).await;
    for command in [&["send-held", "--user", &held.to_string()][..], &["retry-unknown"]] {
        system.processes.run(EMAIL, command).await.unwrap();
    }
    system.until_drained().await;
    until(&system, EMAIL, "deliveries_open", &[], 0.0).await;
    until(&system, EMAIL, "deliveries_oldest_age_seconds", &[], 0.0).await;
    until(&system, EMAIL, "mail_sending_paused", &[], 0.0).await;
    recording.scrapes(SCRAPES).await;
    recording.check(&[
        "MailAnswersLost",
        "MailSendingPaused",
        "MailsFail",
        "MailsHeld",
        "MailsUnaddressed",
        "MailsWait",
    ]);
}

/// A registration of a user with this address, this long ago.
async fn register(system: &System, email: &str, age: Duration) -> Uuid {
    let user = Uuid::now_v7();
    write_state(system, user, 1, email).await;
    write_fact(system, "user.registered", user, 1, age).await;
    user
}
