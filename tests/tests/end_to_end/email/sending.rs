//! The welcome mail, against a mail server that fails in every way SMTP knows, and against the death and the freezing of the
//! sender itself.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::json;
use testbed::smtp_sink::{Fault, Stage};
use tests::http::send_with_retries;
use tests::services::{EMAIL_EVENTS, EMAIL_RECIPIENTS};
use tests::users::address;
use tests::{System, eventually, eventually_eq, eventually_reaches, throughout};
use topology::{EMAIL, USER};
use uuid::Uuid;

use super::{one_more_is_mailed, told, until_told, write_fact, write_state};

const HOUR: Duration = Duration::from_secs(3600);

/// T20, I6: what is refused for now, at any step, or refused because of us (greeting, MAIL: 5xx too), is tried again and arrives
/// once. A sender that took the first code for the last word would lose the mail.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_refused_for_now_is_sent_later_and_once() {
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
        system.mail.fail(fault.clone().times(1));
        let email = address();
        let id = system.users.register_as(&email).await;
        system.stores.until_delivery_states(id, "pending sending pending sending sent").await;
        assert_eq!(system.mail.to(&email).len(), 1, "{fault:?}");
        until_told(&system, id, &["email.sent"]).await;
    }
}

/// T20, I6, I14: 5xx at RCPT ends the delivery as `failed`. The event that tells of it carries the code and no address, though the
/// server's reply may quote one; and the mail is not tried again.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_refused_for_good_fails_and_tells_the_code_alone() {
    let system = System::start_mailing(&[]).await;
    for (stage, code) in [(Stage::Rcpt, 550), (Stage::Dot, 554)] {
        system.mail.fail(Fault::Reject { stage, code }.times(1));
        let email = address();
        let id = system.users.register_as(&email).await;
        system.stores.until_delivery_states(id, "pending sending failed").await;
        until_told(&system, id, &["email.failed"]).await;
        let (_, data) = told(&system, id).remove(0);
        let delivery = data["delivery_id"].clone();
        let expected = json!({ "delivery_id": delivery, "user_id": id, "template": "welcome", "smtp_code": code });
        assert_eq!(data, expected, "the event's data");
        let leaks = system.kafka.read(EMAIL_EVENTS).into_iter().filter(|event| event.text().contains(&email)).count();
        assert_eq!(leaks, 0, "an address in email.events.v1");
        assert!(!system.processes.log(EMAIL).contains(&email), "an address in the log");
        one_more_is_mailed(&system).await;
        assert_eq!(system.mail.to(&email), [], "a refused mail is not tried again");
    }
    let failed = async || system.processes.metric(EMAIL, "deliveries_settled_total", &["state=\"failed\""]).await;
    eventually_eq("failures are counted", Some(2.0), failed).await;
}

/// An address that is none is refused by the sender itself; no server is asked, again and again, to take it.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_to_what_is_no_address_fails() {
    let system = System::start_mailing(&[]).await;
    let id = Uuid::now_v7();
    write_state(&system, id, 1, "not an address").await;
    write_fact(&system, "user.registered", id, 1, Duration::ZERO).await;
    system.stores.until_delivery_states(id, "pending sending failed").await;
    until_told(&system, id, &["email.failed"]).await;
    assert_eq!(told(&system, id)[0].1["smtp_code"], 553);
}

/// T20: a server that says "not now" is not hammered: the wait doubles with each attempt, up to ten minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_refused_for_now_waits_longer_each_time() {
    let system = System::start_mailing(&[("BACKOFF_MS", "60000")]).await;
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    let id = system.users.register().await;
    let db = system.stores.database(EMAIL).await;
    let mut diary = "pending sending pending".to_owned();
    for (attempts, seconds) in [(1, 60), (2, 120), (3, 240), (20, 600)] {
        system.stores.until_delivery_states(id, &diary).await;
        let wait = "select attempt, extract(epoch from next_attempt_at - updated_at)::int from deliveries";
        let wait: (i32, i32) = sqlx::query_as(wait).fetch_one(&db).await.unwrap();
        assert_eq!(wait, (attempts, seconds), "the attempt, and the wait after it");
        let untouched = async || system.stores.delivery_states(id).await == diary;
        throughout(Duration::from_millis(500), "it waits for its turn", untouched).await;
        let next = if attempts == 3 { 19 } else { attempts };
        let due = "update deliveries set next_attempt_at = now(), attempt = $1";
        sqlx::query(due).bind(next).execute(&db).await.unwrap();
        diary += " sending pending";
    }
}

/// T20, I6: a server that takes the connection and then says nothing, and one that falls silent after RCPT. Both cost one attempt
/// of 20 s, not the sender.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_server_that_falls_silent_is_given_up_and_tried_again() {
    let system = System::start_mailing(&[("SENDERS", "1")]).await;
    for stage in [Stage::Connect, Stage::Rcpt] {
        system.mail.fail(Fault::Slow { ms: 40_000, stage }.times(1));
        let id = system.users.register().await;
        system.stores.until_delivery_states(id, "pending sending pending sending sent").await;
    }
}

/// T23, I6: the server has the mail and the database is away. The sender keeps the answer in hand and records it as soon as it can;
/// to let the lease end instead would send the mail again.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_cannot_be_recorded_at_once_is_recorded_later() {
    let mut system = System::start_mailing(&[]).await;
    let (database, (name, url)) = system.proxied_database(EMAIL).await;
    let until = system.processes.file("cut");
    let stall = [("FAULT_AT", "email.after_answer:1:stall"), ("FAULT_UNTIL", until.to_str().unwrap())];
    system.processes.start_with(EMAIL, &[("SENDERS", "1"), (&name, &url), stall[0], stall[1]]).await;
    let email = address();
    let id = system.users.register_as(&email).await;
    eventually("it was answered", async || system.processes.log(EMAIL).contains("stalls").then_some(())).await;
    database.cut();
    std::fs::write(until, "").unwrap();
    let kept = async || system.stores.delivery_states(id).await == "pending sending";
    throughout(Duration::from_secs(2), "it is not recorded", kept).await;
    database.heal();
    system.stores.until_delivery_states(id, "pending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1);
}

/// STARTTLS is asked for where it is set: to a server that has none goes no mail.
#[tokio::test(flavor = "multi_thread")]
async fn where_tls_is_demanded_no_mail_goes_out_in_plain_text() {
    let system = System::start_mailing(&[("SMTP_TLS", "true")]).await;
    let email = address();
    let id = system.users.register_as(&email).await;
    eventually("it was tried", async || {
        system.stores.delivery_states(id).await.starts_with("pending sending pending").then_some(())
    })
    .await;
    assert_eq!(system.mail.to(&email), []);
}

/// T21, I6: the connection breaks inside the mail. Nobody can tell whether the server has it, so it is `unknown` and goes out
/// again; here the server had nothing, so there is one copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_cut_off_before_its_end_is_sent_again_and_arrives_once() {
    let system = System::start_mailing(&[]).await;
    system.mail.fail(Fault::ResetBeforeDot.times(1));
    let email = address();
    let id = system.users.register_as(&email).await;
    system.stores.until_delivery_states(id, "pending sending unknown sending sent").await;
    assert_eq!(system.mail.message_ids_to(&email).len(), 1);
    until_told(&system, id, &["email.sent"]).await;
}

/// T22, I6: the server takes the mail and the connection breaks before its 250. The second copy cannot be avoided; it must be
/// recognisable (one Message-ID) and must count once.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_whose_answer_was_lost_has_two_copies_with_one_id_and_counts_once() {
    let system = System::start_mailing(&[]).await;
    system.mail.fail(Fault::DropAfterDot.times(1));
    let email = address();
    let id = system.users.register_as(&email).await;
    system.stores.until_delivery_states(id, "pending sending unknown sending sent").await;
    let ids = system.mail.message_ids_to(&email);
    assert_eq!(ids.len(), 2, "the copy that was dropped and the one that was answered");
    assert_eq!(ids[0], ids[1], "both copies have one Message-ID");
    until_told(&system, id, &["email.sent"]).await;
    let other = system.users.register().await;
    until_told(&system, other, &["email.sent"]).await;
    assert_eq!(told(&system, id).len(), 1, "one event for two copies");
    let sent = async || system.processes.metric(EMAIL, "deliveries_settled_total", &["state=\"sent\""]).await;
    eventually_eq("two users' mails, not three", Some(2.0), sent).await;
}

/// T23, I6: kill -9 between the server's 250 and its record, the one window that cannot be closed. Only the mail in hand is
/// doubled, with the same Message-ID. The lease is 10 s instead of three minutes, so that the successor waits less.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_killed_before_it_could_record_the_answer_doubles_that_mail_alone() {
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
        until_told(&system, *id, &["email.sent"]).await;
    }
    let copies = emails.iter().map(|email| system.mail.message_ids_to(email));
    let mut copies: Vec<Vec<String>> = copies.collect();
    copies.sort_by_key(Vec::len);
    let counts: Vec<usize> = copies.iter().map(Vec::len).collect();
    assert_eq!(counts, [1, 1, 2], "only the mail in hand is doubled");
    assert_eq!(copies[2][0], copies[2][1], "both copies have one Message-ID");
}

/// T25, I5 I6: 50 senders in two processes at 1,000 intents, instead of 10,000. None is claimed while another has it, and each is
/// one mail.
#[tokio::test(flavor = "multi_thread")]
async fn many_senders_send_each_mail_once() {
    const INTENTS: &str = "
        insert into recipients (user_id, version, email, display_name)
            select gen_random_uuid(), 1, 'user-' || n || '@example.com', 'Ada Lovelace' from generate_series(1, 1000) n;
        insert into deliveries (id, user_id, template, version, requested_at)
            select gen_random_uuid(), user_id, 'welcome', 1, now() from recipients;";
    let mut system = System::start_mailing(&[]).await;
    system.processes.stop(EMAIL).await;
    let db = system.stores.database(EMAIL).await;
    sqlx::raw_sql(INTENTS).execute(&db).await.unwrap();
    let senders = [("SENDERS", "25")];
    let mut second = system.processes.spawn_another_with(EMAIL, &senders);
    system.processes.start_with(EMAIL, &senders).await;
    second.until_ready().await;
    let sent = "select count(*) from deliveries where status = 'sent'";
    eventually_reaches("mails are sent", 1000, async || sqlx::query_scalar(sent).fetch_one(&db).await.unwrap()).await;
    // Put off and tried again is another thing: a busy database may not have said in time that the mail was still the sender's.
    let again = "select count(*) from (
            select status, lag(status) over (partition by delivery_id order by number) as before from delivery_diary) diary
        where status = 'sending' and before = 'sending'";
    assert_eq!(
        sqlx::query_scalar::<_, i64>(again).fetch_one(&db).await.unwrap(),
        0,
        "deliveries that were claimed twice"
    );
    let mails = system.mail.all();
    let recipients: BTreeSet<&String> = mails.iter().flat_map(|mail| &mail.to).collect();
    assert_eq!((mails.len(), recipients.len()), (1000, 1000), "mails, and who got them");
}

/// I5: a user who is erased before the mail could go out gets none, and the delivery ends as `cancelled`: here the server had said
/// "not now" before.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_user_whose_mail_was_put_off_gets_none() {
    let system = System::start_mailing(&[]).await;
    system.mail.fail(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    let email = address();
    let id = system.users.register_as(&email).await;
    eventually("it was tried", async || {
        system.stores.delivery_states(id).await.starts_with("pending sending pending").then_some(())
    })
    .await;
    assert_eq!(system.users.erase(id).await.unwrap().status, StatusCode::NO_CONTENT);
    let last = async || system.users.deliveries(id).await;
    eventually_eq("the delivery is cancelled", vec!["cancelled".to_owned()], last).await;
    system.mail.recover();
    one_more_is_mailed(&system).await;
    assert_eq!(system.mail.to(&email), []);
    assert_eq!(told(&system, id), []);
}

/// I5, T29: the fact alone cancels too, before the address was ever known; an address that comes afterwards, late, revives nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_user_whose_address_comes_late_gets_no_mail() {
    let system = System::start_mailing(&[]).await;
    let id = Uuid::now_v7();
    let email = address();
    write_fact(&system, "user.registered", id, 1, Duration::ZERO).await;
    system.stores.until_delivery_states(id, "pending").await;
    write_fact(&system, "user.deleted", id, 2, Duration::ZERO).await;
    system.stores.until_delivery_states(id, "pending cancelled").await;
    write_state(&system, id, 1, &email).await;
    system.kafka.until_caught_up(EMAIL_RECIPIENTS).await;
    one_more_is_mailed(&system).await;
    assert_eq!(system.mail.to(&email), []);
    assert_eq!(system.stores.delivery_states(id).await, "pending cancelled");
}

/// The two topics have no order between them: an intent waits for its recipient, shown as `unaddressed`, and a recipient for its
/// intent.
#[tokio::test(flavor = "multi_thread")]
async fn the_mail_goes_out_whichever_of_fact_and_address_comes_first() {
    let system = System::start_mailing(&[]).await;
    let id = Uuid::now_v7();
    let email = address();
    write_fact(&system, "user.registered", id, 1, Duration::ZERO).await;
    let waiting = async || system.processes.metric(EMAIL, "deliveries_open", &["state=\"unaddressed\""]).await;
    eventually_eq("the intent waits for an address", Some(1.0), waiting).await;
    assert_eq!(system.stores.delivery_states(id).await, "pending");
    write_state(&system, id, 1, &email).await;
    system.stores.until_delivery_states(id, "pending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1);

    let id = Uuid::now_v7();
    let email = address();
    write_state(&system, id, 1, &email).await;
    system.kafka.until_caught_up(EMAIL_RECIPIENTS).await;
    assert_eq!(system.stores.delivery_states(id).await, "");
    write_fact(&system, "user.registered", id, 1, Duration::ZERO).await;
    system.stores.until_delivery_states(id, "pending sending sent").await;
    assert_eq!(system.mail.to(&email).len(), 1);
}

/// T36: an intent older than the set age (72 h unless told otherwise) comes from a history read again, not from a user who waits.
/// It is held, not dropped. The operator's word is in `held.rs`.
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
    system.stores.until_delivery_states(old, "pending held").await;
    // Claimed in the order of arrival: when this one is sent, the older one has been passed over.
    write_fact(&system, "user.registered", young, 1, 71 * HOUR).await;
    system.stores.until_delivery_states(young, "pending sending sent").await;
    assert_eq!(system.stores.delivery_states(old).await, "pending held");
    assert_eq!((system.mail.to(&old_email), system.mail.to(&young_email).len()), (vec![], 1));
}

/// The mail itself, and that a display name is text in it, never HTML.
#[tokio::test(flavor = "multi_thread")]
async fn the_welcome_mail_reads_as_designed() {
    let system = System::start_mailing(&[]).await;
    let email = address();
    let body = json!({ "email": email, "display_name": "Ada <b>\"Bold\"</b> & Lovelace" });
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

/// One header a line, without what is new in every mail.
fn redacted(headers: &str) -> String {
    let lines = headers.replace("\r\n ", " ").replace("\r\n\t", " ");
    let lines = lines.lines().map(|line| match line.split_once(' ') {
        Some(("Date:", _)) => "Date: {date}".to_owned(),
        Some(("Content-Type:", _)) => format!("{}boundary={{boundary}}", line.split("boundary=").next().unwrap()),
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}
