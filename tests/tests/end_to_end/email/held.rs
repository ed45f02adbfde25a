//! Mails whose cause is old: they come from a history read again, and wait for an operator's word.

use std::time::Duration;

use reqwest::StatusCode;
use tests::services::{EMAIL_RECIPIENTS, EMAIL_WELCOME};
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::{EMAIL, USER};
use uuid::Uuid;

use super::{write_fact, write_state};

/// From now on what happens to users happened four days ago, until `drop trigger`.
const FOUR_DAYS_AGO: &str = "
    create function four_days_ago() returns trigger language plpgsql as $$
    begin new.occurred_at = now() - interval '96 hours'; return new; end $$;
    create trigger four_days_ago before insert on outbox for each row execute function four_days_ago();";

async fn held(system: &System) -> Option<f64> {
    system.processes.metric(EMAIL, "deliveries_open", &["state=\"held\""]).await
}

async fn send_held(system: &System, arguments: &[&str]) -> String {
    system.processes.run(EMAIL, &[&["send-held"], arguments].concat()).await.unwrap()
}

/// T36, I5: the email service loses its database and its place in the topics, and reads all of history again. Nobody gets a second
/// welcome for that, while who registers now gets a first; what is held is seen, and goes out when an operator says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_is_read_again_is_mailed_only_on_an_operators_word() {
    let mut system = System::start_only(&[USER]).await;
    let users = system.stores.database(USER).await;
    sqlx::raw_sql(FOUR_DAYS_AGO).execute(&users).await.unwrap();
    // At the time they were news.
    system.processes.start_with(EMAIL, &[("MAX_AGE_HOURS", "100")]).await;
    let emails = [address(), address(), address()];
    let mut ids = vec![];
    for email in &emails {
        ids.push(system.users.register_as(email).await);
    }
    for id in &ids {
        system.users.until_mailed(*id).await;
    }
    let [first, second, erased] = ids[..] else { unreachable!() };

    system.processes.stop(EMAIL).await;
    let db = system.stores.database(EMAIL).await;
    sqlx::raw_sql("drop schema public cascade; create schema public").execute(&db).await.unwrap();
    for group in [EMAIL_WELCOME, EMAIL_RECIPIENTS] {
        system.kafka.reset_group(group).await;
    }
    system.processes.start(&[EMAIL]).await;
    for id in &ids {
        system.users.until_delivery_is(*id, "held").await;
    }
    eventually_eq("the held ones are counted", Some(3.0), async || held(&system).await).await;
    assert!(system.processes.log(EMAIL).contains("held back"));
    sqlx::raw_sql("drop trigger four_days_ago on outbox").execute(&users).await.unwrap();
    let young = system.users.register().await;
    system.users.until_mailed(young).await;
    assert_eq!(system.mail.all().len(), 4, "three of old and one of now");

    // Who is erased meanwhile is not among those who can be released.
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    system.users.until_delivery_is(erased, "cancelled").await;
    assert_eq!(send_held(&system, &["--younger-than-hours", "95"]).await, SAID_NOTHING);
    let one = send_held(&system, &["--user", &first.to_string()]).await;
    assert_eq!(one, "1 released, to be sent by the running service; 1 still held\n");
    system.users.until_mailed(first).await;
    assert_eq!(system.users.deliveries(second).await, ["held"]);
    let rest = send_held(&system, &["--younger-than-hours", "97"]).await;
    assert_eq!(rest, "1 released, to be sent by the running service; 0 still held\n");
    system.users.until_mailed(second).await;
    let copies = emails.each_ref().map(|email| system.mail.to(email).len());
    assert_eq!(copies, [2, 2, 1], "the second mails are the operator's, and nobody's who was erased");
    eventually_eq("none is held", Some(0.0), async || held(&system).await).await;
}

const SAID_NOTHING: &str = "0 released, to be sent by the running service; 2 still held\n";

/// Without a bound the word would be for everything that was ever read again; the refusal names what to give.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_has_to_say_which_mails() {
    let system = System::empty().await;
    let refused = system.processes.run(EMAIL, &["send-held"]).await.unwrap_err().to_string();
    assert!(refused.contains("--younger-than-hours") && refused.contains("--user"), "{refused}");
}

/// A released mail stays released when the server says "not now"; one that was not would be held again.
#[tokio::test(flavor = "multi_thread")]
async fn a_released_mail_that_is_put_off_is_not_held_again() {
    use testbed::smtp_sink::{Fault, Stage};
    let system = System::start_mailing(&[]).await;
    let old = Uuid::now_v7();
    let email = address();
    write_state(&system, old, 1, &email).await;
    write_fact(&system, "user.registered", old, 1, Duration::from_secs(96 * 3600)).await;
    system.stores.until_delivery_states(old, "pending held").await;
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    send_held(&system, &["--user", &old.to_string()]).await;
    let tried = "pending held pending sending pending sending";
    eventually("it is tried again and again", async || {
        system.stores.delivery_states(old).await.starts_with(tried).then_some(())
    })
    .await;
    system.mail.recover();
    system.users.until_mailed(old).await;
    assert_eq!(system.stores.delivery_states(old).await.matches("held").count(), 1);
    assert_eq!(system.mail.to(&email).len(), 1);
}
