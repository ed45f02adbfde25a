//! Mails are sent through a mail server that fails in every way that SMTP allows, by senders that
//! are killed or frozen.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::json;
use sqlx::PgPool;
use testbed::smtp_sink::{Fault, Stage};
use tests::http::send_with_retries;
use tests::services::{EMAIL_EVENTS, EMAIL_RECIPIENTS};
use tests::users::address;
use tests::{System, eventually, eventually_eq, eventually_reaches, throughout};
use topology::{EMAIL, USER};
use uuid::Uuid;

use super::{email_events, until_another_mail_is_sent, until_email_events, write_fact, write_state};

const HOUR: Duration = Duration::from_secs(3600);

/// Deliveries that ended in a state, by the metric.
async fn ended(system: &System, state: &str) -> Option<f64> {
    system.processes.metric(EMAIL, "deliveries_ended_total", &[&format!("state=\"{state}\"")]).await
}

/// Waits until the first attempt to mail this user has failed temporarily.
async fn until_deferred(system: &System, user: Uuid) {
    eventually("the first attempt has failed temporarily", async || {
        system.stores.delivery_states(user).await.starts_with("pending sending pending").then_some(())
    })
    .await;
}

/// T20, I6: a mail is retried if the server refuses it temporarily, at any step, and if the refusal
/// is about the sender (greeting and MAIL, even with 5xx). The server accepts it once. A sender
/// that treats every refusal as final would lose the mail.
#[tokio::test(flavor = "multi_thread")]
async fn a_temporarily_refused_mail_is_sent_later_and_once() {
    let system = System::start_mailing(&[]).await;
    let reject = |stage, code| Fault::Reject { stage, code };
    let faults = [
        Fault::Refuse,
        reject(Stage::Connect, 554),
        reject(Stage::Mail, 550),
        reject(Stage::Rcpt, 450),
        reject(Stage::Data, 451),
        reject(Stage::Dot, 452),
    ];
    for fault in faults {
        if matches!(fault, Fault::Refuse | Fault::Reject { stage: Stage::Connect, .. }) {
            // A sender that is still connected would not meet it.
            system.mail.until_disconnected().await;
        }
        system.mail.fail(fault.clone().times(1));
        let email = address();
        let id = system.users.register_as(&email).await;
        system.stores.until_delivery_states(id, "pending sending pending sending sent").await;
        assert_eq!(system.mail.to(&email).len(), 1, "mails after {fault:?}");
        until_email_events(&system, id, &["email.sent"]).await;
    }
}

/// T20, I6, I14: a 5xx about the recipient or the mail ends the delivery as `failed`, without a
/// retry. The event carries the code and no address, although the server's reply may quote one.
#[tokio::test(flavor = "multi_thread")]
async fn a_permanently_refused_mail_fails_and_its_event_carries_only_the_code() {
    let system = System::start_mailing(&[]).await;
    for (stage, code) in [(Stage::Rcpt, 550), (Stage::Dot, 554)] {
        system.mail.fail(Fault::Reject { stage, code }.times(1));
        let email = address();
        let id = system.users.register_as(&email).await;
        system.stores.until_delivery_states(id, "pending sending failed").await;
        until_email_events(&system, id, &["email.failed"]).await;
        let (_, data) = email_events(&system, id).remove(0);
        let delivery = data["delivery_id"].clone();
        let expected = json!({ "delivery_id": delivery, "user_id": id, "template": "welcome", "smtp_code": code });
        assert_eq!(data, expected, "the data of the event");
        let events = system.kafka.read(EMAIL_EVENTS);
        assert!(events.iter().all(|event| !event.text().contains(&email)), "the address is in email.events.v1");
        assert!(!system.processes.log(EMAIL).contains(&email), "the address is in the log");
        until_another_mail_is_sent(&system).await;
        assert_eq!(system.mail.to(&email), [], "a refused mail must not be retried");
    }
    eventually_eq("deliveries counted as failed", Some(2.0), async || ended(&system, "failed").await).await;
}

/// The sender itself refuses an invalid address. It does not send the mail to the server, and does
/// not retry.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_to_an_invalid_address_fails() {
    let system = System::start_mailing(&[]).await;
    let id = Uuid::now_v7();
    write_state(&system, id, 1, "not an address").await;
    write_fact(&system, "user.registered", id, 1, Duration::ZERO).await;
    system.stores.until_delivery_states(id, "pending sending failed").await;
    until_email_events(&system, id, &["email.failed"]).await;
    let (_, data) = email_events(&system, id).remove(0);
    assert_eq!(data["smtp_code"], 553);
}

/// T20: the wait before the next attempt doubles with each attempt, up to ten minutes, so a server
/// that defers mails is not flooded.
#[tokio::test(flavor = "multi_thread")]
async fn a_temporarily_refused_mail_waits_longer_after_each_attempt() {
    let system = System::start_mailing(&[("BACKOFF_MS", "60000")]).await;
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    let id = system.users.register().await;
    let db = system.stores.database(EMAIL).await;
    let mut states = "pending sending pending".to_owned();
    for (attempts, seconds) in [(1, 60), (2, 120), (3, 240), (20, 600)] {
        system.stores.until_delivery_states(id, &states).await;
        let wait = "select attempt, extract(epoch from due_at - updated_at)::int from deliveries";
        let wait: (i32, i32) = sqlx::query_as(wait).fetch_one(&db).await.unwrap();
        assert_eq!(wait, (attempts, seconds), "the number of attempts, and the wait after the last one");
        let unchanged = async || system.stores.delivery_states(id).await == states;
        throughout(Duration::from_millis(500), "the delivery waits until it is due", unchanged).await;
        // After the third attempt the test skips to the twentieth.
        let counted = if attempts == 3 { 19 } else { attempts };
        let make_due = "update deliveries set due_at = now(), attempt = $1";
        sqlx::query(make_due).bind(counted).execute(&db).await.unwrap();
        states += " sending pending";
    }
}

/// T47, I6: mail servers take their time, and RFC 5321 allows it: here 25 s before the greeting, 25
/// s before the answer to RCPT, and 25 s before the answer to the mail, which the server has
/// accepted. The sender renews its lease of 2 s meanwhile, so no other sender takes the mail over.
/// Each mail is sent once.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_mail_server_gets_each_mail_once() {
    const SLOW: u64 = 25_000;
    let systems = [Stage::Connect, Stage::Rcpt, Stage::Dot].map(async |stage| {
        let system = System::start_mailing(&[("SENDERS", "2"), ("LEASE_MS", "2000")]).await;
        system.mail.fail(Fault::Slow { ms: SLOW, stage }.times(1));
        let email = address();
        let id = system.users.register_as(&email).await;
        system.stores.until_delivery_states(id, "pending sending sent").await;
        assert_eq!(system.mail.to(&email).len(), 1, "copies of the mail when {stage:?} is slow");
    });
    futures::future::join_all(systems).await;
}

/// T23, I6: the server has accepted the mail and the database is down. The sender keeps the answer
/// and records it as soon as it can. If it let the lease end instead, the mail would be sent again.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_recorded_as_soon_as_the_database_is_back() {
    let mut system = System::start_mailing(&[]).await;
    let (database, (name, url)) = system.proxied_database(EMAIL).await;
    let end_of_stall = system.processes.file("end-of-stall");
    let stall = ("FAULT_AT", "email.after_answer:1:stall");
    let until = ("FAULT_UNTIL", end_of_stall.to_str().unwrap());
    system.processes.start_with(EMAIL, &[("SENDERS", "1"), (&name, &url), stall, until]).await;
    let email = address();
    let id = system.users.register_as(&email).await;
    system.processes.until_logged(EMAIL, "fault point reached").await;
    database.cut();
    std::fs::write(end_of_stall, "").unwrap();
    let unrecorded = async || system.stores.delivery_states(id).await == "pending sending";
    throughout(Duration::from_secs(2), "the answer is not recorded", unrecorded).await;
    database.heal();
    system.stores.until_delivery_states(id, "pending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1, "mails");
}

/// T21, I6: the connection breaks inside the mail. The server cannot have accepted it, because the
/// dot that ends a mail was not sent, or it can: the sender does not know how far its text got. The
/// mail is sent again, and here the server has accepted it once.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_cut_off_before_its_end_is_sent_again_and_accepted_once() {
    let system = System::start_mailing(&[]).await;
    system.mail.fail(Fault::ResetBeforeDot.times(1));
    let email = address();
    let id = system.users.register_as(&email).await;
    system.users.until_mailed(id).await;
    let states = system.stores.delivery_states(id).await;
    let retried = ["pending sending unknown sending sent", "pending sending pending sending sent"];
    assert!(retried.contains(&states.as_str()), "{states}");
    assert_eq!(system.mail.message_ids_to(&email).len(), 1, "mails");
    until_email_events(&system, id, &["email.sent"]).await;
}

/// T22, I6: the server accepts the mail and the connection breaks before its 250. A second copy
/// cannot be avoided. It carries the same Message-ID, and the delivery counts once.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_whose_answer_is_lost_is_sent_twice_and_counted_once() {
    let system = System::start_mailing(&[]).await;
    system.mail.fail(Fault::DropAfterDot.times(1));
    let email = address();
    let id = system.users.register_as(&email).await;
    system.stores.until_delivery_states(id, "pending sending unknown sending sent").await;
    let ids = system.mail.message_ids_to(&email);
    assert_eq!(ids.len(), 2, "copies: one without an answer and one with it");
    assert_eq!(ids[0], ids[1], "the copies must have the same Message-ID");
    until_email_events(&system, id, &["email.sent"]).await;
    let other = system.users.register().await;
    until_email_events(&system, other, &["email.sent"]).await;
    assert_eq!(email_events(&system, id).len(), 1, "events about two copies of one mail");
    eventually_eq("deliveries counted as sent", Some(2.0), async || ended(&system, "sent").await).await;
}

/// T23, I6: a sender is killed between the server's 250 and its record. This is the one window that
/// cannot be closed. Only the mail in progress is sent twice, with the same Message-ID. The lease
/// is 10 s instead of three minutes, so that the next sender waits less.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_killed_before_it_records_the_answer_duplicates_only_that_mail() {
    let settings = [("LEASE_MS", "10000"), ("SENDERS", "1")];
    let fault = [&settings[..], &[("FAULT_AT", "email.after_answer:2:kill")]].concat();
    let mut system = System::start_mailing(&fault).await;
    let emails = [address(), address(), address()];
    let mut ids = vec![];
    for email in &emails {
        ids.push(system.users.register_as(email).await);
    }
    system.processes.until_ended(EMAIL).await;
    system.processes.start_with(EMAIL, &settings).await;
    for id in &ids {
        system.users.until_mailed(*id).await;
        until_email_events(&system, *id, &["email.sent"]).await;
    }
    let copies = emails.iter().map(|email| system.mail.message_ids_to(email));
    let mut copies: Vec<Vec<String>> = copies.collect();
    copies.sort_by_key(Vec::len);
    let counts: Vec<usize> = copies.iter().map(Vec::len).collect();
    assert_eq!(counts, [1, 1, 2], "copies per mail: only the mail in progress may have two");
    assert_eq!(copies[2][0], copies[2][1], "both copies must have the same Message-ID");
}

/// T23, I6: the senders of a process record their mails and claim the next ones in one transaction.
/// The process is killed before its commit, and after it. Each sender has one mail whose answer is
/// not recorded, so no more mails than that are sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn senders_killed_at_the_commit_that_they_share_duplicate_at_most_one_mail_each() {
    const SENDERS: usize = 4;
    const MAILS: usize = 40;
    let points = ["email.before_record:2:kill", "email.after_claim:9:kill"];
    let systems = points.map(async |point| {
        let settings = [("LEASE_MS", "10000"), ("SENDERS", "4")];
        let mut system = System::start_mailing(&[]).await;
        system.processes.stop(EMAIL).await;
        let db = system.stores.database(EMAIL).await;
        insert_deliveries(&db, MAILS).await;
        system.processes.spawn_with(EMAIL, &[&settings[..], &[("FAULT_AT", point)]].concat());
        system.processes.until_ended(EMAIL).await;
        system.processes.start_with(EMAIL, &settings).await;
        let sent = "select count(*) from deliveries where status = 'sent'";
        eventually_eq("sent mails", MAILS as i64, async || sqlx::query_scalar(sent).fetch_one(&db).await.unwrap())
            .await;
        let recorded = "select count(*) from delivery_diary where status = 'sent'";
        let recorded: i64 = sqlx::query_scalar(recorded).fetch_one(&db).await.unwrap();
        assert_eq!(recorded, MAILS as i64, "mails that were recorded as sent, after {point}");
        let mut copies: BTreeMap<Option<String>, usize> = BTreeMap::new();
        for mail in system.mail.all() {
            *copies.entry(mail.message_id).or_default() += 1;
        }
        assert_eq!(copies.len(), MAILS, "different mails, after {point}");
        let twice = copies.values().filter(|copies| **copies == 2).count();
        assert_eq!(copies.values().sum::<usize>(), MAILS + twice, "copies: no mail may be sent three times");
        assert!(twice <= SENDERS, "{twice} mails were sent twice, after {point}");
        assert!(twice > 0 || point.contains("after_claim"), "no mail was sent twice, so the test proves nothing");
    });
    futures::future::join_all(systems).await;
}

/// Inserts deliveries that are due.
async fn insert_deliveries(db: &PgPool, count: usize) {
    let users = "insert into recipients (user_id, version, email)
                 select gen_random_uuid(), 1, 'user-' || n || '@example.com' from generate_series(1, $1) n";
    sqlx::query(users).bind(count as i64).execute(db).await.unwrap();
    let deliveries = "insert into deliveries (id, user_id, template, version, status, due_at, requested_at)
                      select gen_random_uuid(), user_id, 'welcome', 1, 'pending', now(), now() from recipients";
    sqlx::query(deliveries).execute(db).await.unwrap();
}

/// T25, I5, I6: 50 senders in two processes share 1,000 deliveries. No delivery is claimed while
/// another sender has it, and each results in one mail.
#[tokio::test(flavor = "multi_thread")]
async fn many_senders_send_each_mail_once() {
    let mut system = System::start_mailing(&[]).await;
    system.processes.stop(EMAIL).await;
    let db = system.stores.database(EMAIL).await;
    insert_deliveries(&db, 1000).await;
    let senders = [("SENDERS", "25")];
    let mut second = system.processes.spawn_another_with(EMAIL, &senders);
    system.processes.start_with(EMAIL, &senders).await;
    second.until_ready().await;
    let sent = "select count(*) from deliveries where status = 'sent'";
    eventually_reaches("sent mails", 1000, async || sqlx::query_scalar(sent).fetch_one(&db).await.unwrap()).await;
    // A delivery that became pending in between may be claimed again: a busy database may not
    // answer the sender's check of its lease in time.
    let claimed_twice = "select count(*) from (
            select status, lag(status) over (partition by delivery_id order by number) as before from delivery_diary) diary
        where status = 'sending' and before = 'sending'";
    let claimed_twice: i64 = sqlx::query_scalar(claimed_twice).fetch_one(&db).await.unwrap();
    assert_eq!(claimed_twice, 0, "deliveries that were claimed while another sender had them");
    let mails = system.mail.all();
    let recipients: BTreeSet<&String> = mails.iter().flat_map(|mail| &mail.to).collect();
    assert_eq!((mails.len(), recipients.len()), (1000, 1000), "mails and recipients");
}

/// I5: a user who is erased before the mail was sent gets none, and the delivery ends as
/// `cancelled`. Here the server has deferred the mail before.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_user_whose_mail_was_deferred_gets_no_mail() {
    let system = System::start_mailing(&[]).await;
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    let email = address();
    let id = system.users.register_as(&email).await;
    until_deferred(&system, id).await;
    assert_eq!(system.users.erase(id).await.unwrap().status, StatusCode::NO_CONTENT);
    system.users.until_delivery_is(id, "cancelled").await;
    system.mail.recover();
    until_another_mail_is_sent(&system).await;
    assert_eq!(system.mail.to(&email), []);
    assert_eq!(email_events(&system, id), []);
}

/// I5, T29: the fact `user.deleted` cancels the delivery before the address is known. An address
/// that arrives later does not revive it.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_user_whose_address_arrives_late_gets_no_mail() {
    let system = System::start_mailing(&[]).await;
    let id = Uuid::now_v7();
    let email = address();
    write_fact(&system, "user.registered", id, 1, Duration::ZERO).await;
    system.users.until_delivery_is(id, "unaddressed").await;
    write_fact(&system, "user.deleted", id, 2, Duration::ZERO).await;
    system.stores.until_delivery_states(id, "cancelled").await;
    write_state(&system, id, 1, &email).await;
    system.kafka.until_caught_up(EMAIL_RECIPIENTS).await;
    until_another_mail_is_sent(&system).await;
    assert_eq!(system.mail.to(&email), []);
    assert_eq!(system.stores.delivery_states(id).await, "cancelled");
}

/// The two topics are not ordered relative to each other. A delivery waits for its recipient, shown
/// as `unaddressed`, and a recipient waits for its delivery.
#[tokio::test(flavor = "multi_thread")]
async fn the_mail_is_sent_whether_the_fact_or_the_address_arrives_first() {
    let system = System::start_mailing(&[]).await;
    let fact_first = Uuid::now_v7();
    let email = address();
    write_fact(&system, "user.registered", fact_first, 1, Duration::ZERO).await;
    let unaddressed = async || system.processes.metric(EMAIL, "deliveries_open", &["state=\"unaddressed\""]).await;
    eventually_eq("deliveries without an address", Some(1.0), unaddressed).await;
    assert_eq!(system.users.deliveries(fact_first).await, ["unaddressed"]);
    write_state(&system, fact_first, 1, &email).await;
    system.stores.until_delivery_states(fact_first, "pending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1, "mails");

    let address_first = Uuid::now_v7();
    let email = address();
    write_state(&system, address_first, 1, &email).await;
    system.kafka.until_caught_up(EMAIL_RECIPIENTS).await;
    assert_eq!(system.stores.delivery_states(address_first).await, "");
    write_fact(&system, "user.registered", address_first, 1, Duration::ZERO).await;
    system.stores.until_delivery_states(address_first, "pending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1, "mails");
}

/// T36: an event older than the limit (72 h by default) comes from replayed events and not from a
/// user who waits. Its mail is held and not dropped. `held.rs` tests the release.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_for_an_old_event_is_held() {
    let system = System::start_mailing(&[]).await;
    let old = Uuid::now_v7();
    let old_email = address();
    let young = Uuid::now_v7();
    let young_email = address();
    write_state(&system, old, 1, &old_email).await;
    write_state(&system, young, 1, &young_email).await;
    system.kafka.until_caught_up(EMAIL_RECIPIENTS).await;
    write_fact(&system, "user.registered", old, 1, 73 * HOUR).await;
    system.stores.until_delivery_states(old, "held").await;
    // Deliveries are claimed in the order of arrival. When this one is sent, the sender has passed
    // over the old one.
    write_fact(&system, "user.registered", young, 1, 71 * HOUR).await;
    system.stores.until_delivery_states(young, "pending sending sent").await;
    assert_eq!(system.stores.delivery_states(old).await, "held");
    assert_eq!(system.mail.to(&old_email), []);
    assert_eq!(system.mail.to(&young_email).len(), 1, "mails to the young user");
}

/// The snapshots show the mail. They also show that it contains nothing that the caller of the
/// registration chose, except the address.
#[tokio::test(flavor = "multi_thread")]
async fn the_welcome_mail_matches_its_snapshots() {
    let system = System::start_mailing(&[]).await;
    let email = address();
    let body = json!({ "email": email, "display_name": "Cheap watches at https://shop.example" });
    let answer = send_with_retries(|| Client::new().post(system.users.url(USER, "/users")).json(&body)).await;
    system.users.until_mailed(answer.id()).await;
    let mail = system.mail.to(&email).remove(0);
    let sent = system.users.get(EMAIL, &format!("/users/{}/emails", answer.id())).await.unwrap();
    let delivery = sent.body[0]["delivery_id"].as_str().unwrap();
    let (headers, _) = mail.raw.split_once("\r\n\r\n").unwrap();
    let headers = redacted(headers).replace(delivery, "{delivery}").replace(&email, "{address}");
    insta::assert_snapshot!("welcome_headers", headers);
    insta::assert_snapshot!("welcome_text", mail.text.unwrap().replace('\r', ""));
    insta::assert_snapshot!("welcome_html", mail.html.unwrap().replace('\r', ""));
}

/// One header per line, with placeholders for values that are new in every mail.
fn redacted(headers: &str) -> String {
    let lines = headers.replace("\r\n ", " ").replace("\r\n\t", " ");
    let lines = lines.lines().map(|line| match line.split_once(' ') {
        Some(("Date:", _)) => "Date: {date}".to_owned(),
        Some(("Content-Type:", _)) => {
            let before_boundary = line.split("boundary=").next().unwrap();
            format!("{before_boundary}boundary={{boundary}}")
        }
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}
