//! Mails whose event is old. They come from replayed events and are held until an operator releases
//! them.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;
use testbed::smtp_sink::{Fault, Stage};
use tests::services::{EMAIL_RECIPIENTS, EMAIL_WELCOME};
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::{EMAIL, USER};
use uuid::Uuid;

use super::{email_events, until_email_events, write_fact, write_state};

/// Until the trigger is dropped, the time of each new event is four days ago.
const FOUR_DAYS_AGO: &str = "
    create function four_days_ago() returns trigger language plpgsql as $$
    begin new.occurred_at = now() - interval '96 hours'; return new; end $$;
    create trigger four_days_ago before insert on outbox for each row execute function four_days_ago();";

/// The metric of held deliveries.
async fn held(system: &System) -> Option<f64> {
    system.processes.metric(EMAIL, "deliveries_open", &["state=\"held\""]).await
}

/// Runs `email send-held` and returns its output.
async fn send_held(system: &System, arguments: &[&str]) -> String {
    system.processes.run(EMAIL, &[&["send-held"], arguments].concat()).await.unwrap()
}

/// The output of `email send-held`.
fn printed(released: usize, still_held: usize) -> String {
    format!("{released} released, to be sent by the running service; {still_held} still held\n")
}

/// T36, I5: the email service loses its database and its offsets, so it reads all events again. No
/// user gets a second welcome mail, and a user who registers now gets the first one. A metric and
/// the log show the held mails, and an operator releases them.
#[tokio::test(flavor = "multi_thread")]
async fn replayed_events_send_no_mail_until_an_operator_releases_it() {
    let mut system = System::start_only(&[USER]).await;
    let users = system.stores.database(USER).await;
    sqlx::raw_sql(FOUR_DAYS_AGO).execute(&users).await.unwrap();
    // With this limit the events are not too old the first time.
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

    lose_database_and_offsets(&mut system).await;
    system.processes.start(&[EMAIL]).await;
    for id in &ids {
        system.users.until_delivery_is(*id, "held").await;
    }
    eventually_eq("held deliveries", Some(3.0), async || held(&system).await).await;
    assert!(system.processes.log(EMAIL).contains("deliveries are held"), "the log must report held deliveries");
    sqlx::raw_sql("drop trigger four_days_ago on outbox").execute(&users).await.unwrap();
    let new = system.users.register().await;
    system.users.until_mailed(new).await;
    assert_eq!(system.mail.all().len(), 4, "mails: three before the replay, and one to the new user");

    // An erased user's mail is cancelled and cannot be released.
    assert_eq!(system.users.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    system.users.until_delivery_is(erased, "cancelled").await;
    assert_eq!(send_held(&system, &["--younger-than-hours", "95"]).await, printed(0, 2));
    assert_eq!(send_held(&system, &["--user", &first.to_string()]).await, printed(1, 1));
    system.users.until_mailed(first).await;
    assert_eq!(system.users.deliveries(second).await, ["held"]);
    assert_eq!(send_held(&system, &["--younger-than-hours", "97"]).await, printed(1, 0));
    system.users.until_mailed(second).await;
    let copies = emails.each_ref().map(|email| system.mail.to(email).len());
    assert_eq!(copies, [2, 2, 1], "mails per user: one more to the two that the operator released");
    eventually_eq("held deliveries", Some(0.0), async || held(&system).await).await;
}

/// Stops the email service, empties its database and deletes its consumer groups.
async fn lose_database_and_offsets(system: &mut System) {
    system.processes.stop(EMAIL).await;
    let db = system.stores.database(EMAIL).await;
    sqlx::raw_sql("truncate deliveries, recipients, outbox").execute(&db).await.unwrap();
    for group in [EMAIL_WELCOME, EMAIL_RECIPIENTS] {
        system.kafka.reset_group(group).await;
    }
}

/// Without a bound the command would release every mail of a replayed history. The error names the
/// options.
#[tokio::test(flavor = "multi_thread")]
async fn send_held_requires_a_bound() {
    let system = System::empty().await;
    let refused = system.processes.run(EMAIL, &["send-held"]).await.unwrap_err().to_string();
    assert!(refused.contains("--younger-than-hours"), "{refused}");
    assert!(refused.contains("--user"), "{refused}");
}

/// A released mail stays released when the mail server defers it.
#[tokio::test(flavor = "multi_thread")]
async fn a_released_mail_that_is_deferred_is_not_held_again() {
    let system = System::start_mailing(&[]).await;
    let user = Uuid::now_v7();
    let email = address();
    write_state(&system, user, 1, &email).await;
    write_fact(&system, "user.registered", user, 1, Duration::from_secs(96 * 3600)).await;
    system.stores.until_delivery_states(user, "held").await;
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    send_held(&system, &["--user", &user.to_string()]).await;
    let deferred_twice = "held pending sending pending sending";
    eventually("the mail is deferred and tried again", async || {
        system.stores.delivery_states(user).await.starts_with(deferred_twice).then_some(())
    })
    .await;
    system.mail.recover();
    system.users.until_mailed(user).await;
    let states = system.stores.delivery_states(user).await;
    assert_eq!(states.matches("held").count(), 1, "{states}");
    assert_eq!(system.mail.to(&email).len(), 1, "mails");
}

/// I6, T20: a server that defers a mail each time is not asked indefinitely, also if an operator
/// has released the mail. Here the release was 73 hours ago, and MAX_AGE_HOURS is 72.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_deferred_until_it_is_too_old_fails() {
    let system = System::start_mailing(&[]).await;
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    let user = Uuid::now_v7();
    let insert = "with recipient as (
                      insert into recipients (user_id, version, email) values ($1, 1, $2) returning user_id)
                  insert into deliveries
                      (id, user_id, template, version, status, due_at, requested_at, released_at)
                  select gen_random_uuid(), user_id, 'welcome', 1, 'pending', now(), now() - interval '200 hours',
                      now() - interval '73 hours' from recipient";
    let db = system.stores.database(EMAIL).await;
    sqlx::query(insert).bind(user).bind(address()).execute(&db).await.unwrap();
    system.stores.until_delivery_states(user, "pending sending failed").await;
    until_email_events(&system, user, &["email.failed"]).await;
    let (_, data) = email_events(&system, user).remove(0);
    assert_eq!(data["smtp_code"], json!(450), "{data}");

    // An operator may release it again. Then the server has its 72 hours again.
    let released = "1 failed mails released, to be sent by the running service\n";
    assert_eq!(system.processes.run(EMAIL, &["retry-failed", "--code", "450"]).await.unwrap(), released);
    eventually("the mail is deferred", async || {
        let states = system.stores.delivery_states(user).await;
        states.starts_with("pending sending failed pending sending pending").then_some(())
    })
    .await;
    system.mail.recover();
    system.users.until_mailed(user).await;
}
