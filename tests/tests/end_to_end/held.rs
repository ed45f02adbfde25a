//! Mails whose cause is old: they come from a history read again, and wait for an operator's word.

use std::time::Duration;

use reqwest::StatusCode;
use tests::{Part, System, api, eventually, eventually_eq};
use uuid::Uuid;

/// From now on what happens to users happened four days ago, until `drop trigger`.
const FOUR_DAYS_AGO: &str = "
    create function four_days_ago() returns trigger language plpgsql as $$
    begin new.occurred_at = now() - interval '96 hours'; return new; end $$;
    create trigger four_days_ago before insert on outbox for each row execute function four_days_ago();";

async fn held(system: &System) -> Option<f64> {
    system.metric(Part::Email, "deliveries_open", &["state=\"held\""]).await
}

/// Waits until the user's one delivery is in this state.
async fn until(system: &System, user: Uuid, state: &str) {
    eventually_eq("the delivery", vec![state.to_owned()], async || system.deliveries(user).await).await;
}

async fn send_held(system: &System, arguments: &[&str]) -> String {
    system.run(Part::Email, &[&["send-held"], arguments].concat()).await.unwrap()
}

/// T36, I5: the email service loses its database and its place in the topics, and reads all of history again. Nobody gets a second
/// welcome for that, while who registers now gets a first; what is held is seen, and goes out when an operator says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_history_that_is_read_again_is_mailed_only_on_an_operators_word() {
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    let users = system.database(Part::User).await;
    sqlx::raw_sql(FOUR_DAYS_AGO).execute(&users).await.unwrap();
    // At the time they were news.
    system.restart(Part::Email, &[("MAX_AGE_HOURS", "100")]).await;
    let emails = [api::address(), api::address(), api::address()];
    let mut ids = vec![];
    for email in &emails {
        ids.push(system.register_as(email).await);
    }
    for id in &ids {
        system.until_mailed(*id).await;
    }
    let [first, second, erased] = ids[..] else { unreachable!() };

    system.stop(Part::Email).await;
    let db = system.database(Part::Email).await;
    sqlx::raw_sql("drop schema public cascade; create schema public").execute(&db).await.unwrap();
    for group in ["email.welcome", "email.recipients"] {
        system.reset_group(group).await;
    }
    system.restart(Part::Email, &[]).await;
    for id in &ids {
        until(&system, *id, "held").await;
    }
    eventually_eq("the held ones are counted", Some(3.0), async || held(&system).await).await;
    assert!(system.log_of(Part::Email).contains("held back"));
    sqlx::raw_sql("drop trigger four_days_ago on outbox").execute(&users).await.unwrap();
    let young = system.register().await;
    system.until_mailed(young).await;
    assert_eq!(system.sink.mails().len(), 4, "three of old and one of now");

    // Who is erased meanwhile is not among those who can be released.
    assert_eq!(system.erase(erased).await.unwrap().status, StatusCode::NO_CONTENT);
    until(&system, erased, "cancelled").await;
    assert_eq!(send_held(&system, &["--younger-than-hours", "95"]).await, SAID_NOTHING);
    let one = send_held(&system, &["--user", &first.to_string()]).await;
    assert_eq!(one, "1 released, to be sent by the running service; 1 still held\n");
    system.until_mailed(first).await;
    assert_eq!(system.deliveries(second).await, ["held"]);
    let rest = send_held(&system, &["--younger-than-hours", "97"]).await;
    assert_eq!(rest, "1 released, to be sent by the running service; 0 still held\n");
    system.until_mailed(second).await;
    let copies = emails.each_ref().map(|email| system.mails_to(email).len());
    assert_eq!(copies, [2, 2, 1], "the second mails are the operator's, and nobody's who was erased");
    eventually_eq("none is held", Some(0.0), async || held(&system).await).await;
}

const SAID_NOTHING: &str = "0 released, to be sent by the running service; 2 still held\n";

/// Without a bound the word would be for everything that was ever read again; the refusal names what to give.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_has_to_say_which_mails() {
    let system = System::empty().await;
    let refused = system.run(Part::Email, &["send-held"]).await.unwrap_err().to_string();
    assert!(refused.contains("--younger-than-hours") && refused.contains("--user"), "{refused}");
}

/// A released mail stays released when the server says "not now"; one that was not would be held again.
#[tokio::test(flavor = "multi_thread")]
async fn a_released_mail_that_is_put_off_is_not_held_again() {
    use testbed::smtp_sink::{Fault, Stage};
    let system = System::start_mailing(&[]).await;
    let (old, email) = (Uuid::now_v7(), api::address());
    system.write_state(old, 1, &email).await;
    system.write_fact("user.registered", old, 1, Duration::from_secs(96 * 3600)).await;
    system.until_diary(old, "pending held").await;
    system.sink.set(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    send_held(&system, &["--user", &old.to_string()]).await;
    let tried = "pending held pending sending pending sending";
    eventually("it is tried again and again", async || system.diary(old).await.starts_with(tried).then_some(())).await;
    system.sink.set(Fault::None);
    system.until_mailed(old).await;
    assert_eq!(system.diary(old).await.matches("held").count(), 1);
    assert_eq!(system.mails_to(&email).len(), 1);
}
