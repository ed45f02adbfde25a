//! The welcome mail, against a mail server that fails in every way SMTP knows, and against the death and the freezing of the
//! sender itself.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use testbed::smtp_sink::{Fault, Stage};
use tests::{Part, System, api, counted_up_to, eventually, eventually_eq, throughout};
use uuid::Uuid;

const HOUR: Duration = Duration::from_secs(3600);

/// What `email.events.v1` says about a user's mails. A process that is killed may leave a copy of an event, with the same id.
pub fn told(system: &System, user: Uuid) -> Vec<(String, Value)> {
    let mut seen = BTreeSet::new();
    let events = system.read("email.events.v1").into_iter();
    let events = events.filter(|event| seen.insert(event.header("ce_id").unwrap().to_owned()));
    let events = events.map(|event| {
        let data: Value = serde_json::from_slice(event.value.as_deref().unwrap()).unwrap();
        (event.header("ce_type").unwrap().to_owned(), data)
    });
    events.filter(|(_, data)| data["user_id"] == user.to_string()).collect()
}

/// Waits until exactly these types of event were published about the user's mails.
pub async fn until_told(system: &System, user: Uuid, kinds: &[&str]) {
    let kinds: Vec<String> = kinds.iter().map(|kind| (*kind).to_owned()).collect();
    let found = async || told(system, user).into_iter().map(|(kind, _)| kind).collect();
    eventually_eq("what is told of the mail", kinds, found).await;
}

pub fn message_ids(system: &System, email: &str) -> Vec<String> {
    system.mails_to(email).into_iter().map(|mail| mail.message_id.expect("a mail has a Message-ID")).collect()
}

/// Somebody else's mail goes through: what was not sent by then will not be sent.
pub async fn one_more_is_mailed(system: &System) {
    let id = system.register().await;
    system.until_mailed(id).await;
}

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
        system.sink.set(fault.clone().times(1));
        let email = api::address();
        let id = system.register_as(&email).await;
        system.until_diary(id, "pending sending pending sending sent").await;
        assert_eq!(system.mails_to(&email).len(), 1, "{fault:?}");
        until_told(&system, id, &["email.sent"]).await;
    }
}

/// T20, I6, I14: 5xx at RCPT ends the delivery as `failed`. The event that tells of it carries the code and no address, though the
/// server's reply may quote one; and the mail is not tried again.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_refused_for_good_fails_and_tells_the_code_alone() {
    let system = System::start_mailing(&[]).await;
    for (stage, code) in [(Stage::Rcpt, 550), (Stage::Dot, 554)] {
        system.sink.set(Fault::Reject { stage, code }.times(1));
        let email = api::address();
        let id = system.register_as(&email).await;
        system.until_diary(id, "pending sending failed").await;
        until_told(&system, id, &["email.failed"]).await;
        let (_, data) = told(&system, id).remove(0);
        let delivery = data["delivery_id"].clone();
        let expected = json!({ "delivery_id": delivery, "user_id": id, "template": "welcome", "smtp_code": code });
        assert_eq!(data, expected, "the event's data");
        let leaks = system.read("email.events.v1").into_iter().filter(|event| event.text().contains(&email)).count();
        assert_eq!(leaks, 0, "an address in email.events.v1");
        assert!(!system.log_of(Part::Email).contains(&email), "an address in the log");
        one_more_is_mailed(&system).await;
        assert_eq!(system.mails_to(&email), [], "a refused mail is not tried again");
    }
    let failed = async || system.metric(Part::Email, "deliveries_settled_total", &["state=\"failed\""]).await;
    eventually_eq("failures are counted", Some(2.0), failed).await;
}

/// An address that is none is refused by the sender itself; no server is asked, again and again, to take it.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_to_what_is_no_address_fails() {
    let system = System::start_mailing(&[]).await;
    let id = Uuid::now_v7();
    system.write_state(id, 1, "not an address").await;
    system.write_fact("user.registered", id, 1, Duration::ZERO).await;
    system.until_diary(id, "pending sending failed").await;
    until_told(&system, id, &["email.failed"]).await;
    assert_eq!(told(&system, id)[0].1["smtp_code"], 553);
}

/// T20: a server that says "not now" is not hammered: the wait doubles with each attempt, up to ten minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_refused_for_now_waits_longer_each_time() {
    let system = System::start_mailing(&[("BACKOFF_MS", "60000")]).await;
    system.sink.set(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    let id = system.register().await;
    let db = system.database(Part::Email).await;
    let mut diary = "pending sending pending".to_owned();
    for (attempts, seconds) in [(1, 60), (2, 120), (3, 240), (20, 600)] {
        system.until_diary(id, &diary).await;
        let wait = "select attempt, extract(epoch from next_attempt_at - updated_at)::int from deliveries";
        let wait: (i32, i32) = sqlx::query_as(wait).fetch_one(&db).await.unwrap();
        assert_eq!(wait, (attempts, seconds), "the attempt, and the wait after it");
        let untouched = async || system.diary(id).await == diary;
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
        system.sink.set(Fault::Slow { ms: 40_000, stage }.times(1));
        let id = system.register().await;
        system.until_diary(id, "pending sending pending sending sent").await;
    }
}

/// T23, I6: the server has the mail and the database is away. The sender keeps the answer in hand and records it as soon as it can;
/// to let the lease end instead would send the mail again.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_cannot_be_recorded_at_once_is_recorded_later() {
    let mut system = System::start_mailing(&[]).await;
    let (database, (name, url)) = system.proxied_database(Part::Email).await;
    let until = system.evidence("cut");
    let stall = [("FAULT_AT", "email.after_answer:1:stall"), ("FAULT_UNTIL", until.to_str().unwrap())];
    system.restart(Part::Email, &[("SENDERS", "1"), (&name, &url), stall[0], stall[1]]).await;
    let email = api::address();
    let id = system.register_as(&email).await;
    eventually("it was answered", async || system.log_of(Part::Email).contains("stalls").then_some(())).await;
    database.cut();
    std::fs::write(until, "").unwrap();
    let kept = async || system.diary(id).await == "pending sending";
    throughout(Duration::from_secs(2), "it is not recorded", kept).await;
    database.heal();
    system.until_diary(id, "pending sending sent").await;
    assert_eq!(system.mails_to(&email).len(), 1);
}

/// STARTTLS is asked for where it is set: to a server that has none goes no mail.
#[tokio::test(flavor = "multi_thread")]
async fn where_tls_is_demanded_no_mail_goes_out_in_plain_text() {
    let system = System::start_mailing(&[("SMTP_TLS", "true")]).await;
    let email = api::address();
    let id = system.register_as(&email).await;
    eventually("it was tried", async || system.diary(id).await.starts_with("pending sending pending").then_some(()))
        .await;
    assert_eq!(system.mails_to(&email), []);
}

/// T21, I6: the connection breaks inside the mail. Nobody can tell whether the server has it, so it is `unknown` and goes out
/// again; here the server had nothing, so there is one copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_cut_off_before_its_end_is_sent_again_and_arrives_once() {
    let system = System::start_mailing(&[]).await;
    system.sink.set(Fault::ResetBeforeDot.times(1));
    let email = api::address();
    let id = system.register_as(&email).await;
    system.until_diary(id, "pending sending unknown sending sent").await;
    assert_eq!(message_ids(&system, &email).len(), 1);
    until_told(&system, id, &["email.sent"]).await;
}

/// T22, I6: the server takes the mail and the connection breaks before its 250. The second copy cannot be avoided; it must be
/// recognisable (one Message-ID) and must count once.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_whose_answer_was_lost_has_two_copies_with_one_id_and_counts_once() {
    let system = System::start_mailing(&[]).await;
    system.sink.set(Fault::DropAfterDot.times(1));
    let email = api::address();
    let id = system.register_as(&email).await;
    system.until_diary(id, "pending sending unknown sending sent").await;
    let ids = message_ids(&system, &email);
    assert_eq!(ids.len(), 2, "the copy that was dropped and the one that was answered");
    assert_eq!(ids[0], ids[1], "both copies have one Message-ID");
    until_told(&system, id, &["email.sent"]).await;
    let other = system.register().await;
    until_told(&system, other, &["email.sent"]).await;
    assert_eq!(told(&system, id).len(), 1, "one event for two copies");
    let sent = async || system.metric(Part::Email, "deliveries_settled_total", &["state=\"sent\""]).await;
    eventually_eq("two users' mails, not three", Some(2.0), sent).await;
}

/// T23, I6: kill -9 between the server's 250 and its record, the one window that cannot be closed. Only the mail in hand is
/// doubled, with the same Message-ID. The lease is 10 s instead of three minutes, so that the successor waits less.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_killed_before_it_could_record_the_answer_doubles_that_mail_alone() {
    let settings = [("LEASE_MS", "10000"), ("SENDERS", "1")];
    let fault = [&settings[..], &[("FAULT_AT", "email.after_answer:2:kill")]].concat();
    let mut system = System::start_mailing(&fault).await;
    let emails = [api::address(), api::address(), api::address()];
    let mut ids = vec![];
    for email in &emails {
        ids.push(system.register_as(email).await);
    }
    system.until_ended(Part::Email).await;
    system.restart(Part::Email, &settings).await;
    for id in &ids {
        system.until_mailed(*id).await;
        until_told(&system, *id, &["email.sent"]).await;
    }
    let copies = emails.iter().map(|email| message_ids(&system, email));
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
    system.stop(Part::Email).await;
    let db = system.database(Part::Email).await;
    sqlx::raw_sql(INTENTS).execute(&db).await.unwrap();
    let senders = [("SENDERS", "25")];
    let mut second = system.spawn_another(Part::Email, &senders);
    system.restart(Part::Email, &senders).await;
    second.until_ready().await.unwrap();
    let sent = "select count(*) from deliveries where status = 'sent'";
    counted_up_to("mails are sent", 1000, async || sqlx::query_scalar(sent).fetch_one(&db).await.unwrap()).await;
    // Put off and tried again is another thing: a busy database may not have said in time that the mail was still the sender's.
    let again = "select count(*) from (
            select status, lag(status) over (partition by delivery_id order by number) as before from delivery_diary) diary
        where status = 'sending' and before = 'sending'";
    assert_eq!(
        sqlx::query_scalar::<_, i64>(again).fetch_one(&db).await.unwrap(),
        0,
        "deliveries that were claimed twice"
    );
    let mails = system.sink.mails();
    let recipients: BTreeSet<&String> = mails.iter().flat_map(|mail| &mail.to).collect();
    assert_eq!((mails.len(), recipients.len()), (1000, 1000), "mails, and who got them");
}

/// I5: a user who is erased before the mail could go out gets none, and the delivery ends as `cancelled`: here the server had said
/// "not now" before.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_user_whose_mail_was_put_off_gets_none() {
    let system = System::start_mailing(&[]).await;
    system.sink.set(Fault::Reject { stage: Stage::Rcpt, code: 450 });
    let email = api::address();
    let id = system.register_as(&email).await;
    eventually("it was tried", async || system.diary(id).await.starts_with("pending sending pending").then_some(()))
        .await;
    assert_eq!(system.erase(id).await.unwrap().status, StatusCode::NO_CONTENT);
    let last = async || system.deliveries(id).await;
    eventually_eq("the delivery is cancelled", vec!["cancelled".to_owned()], last).await;
    system.sink.set(Fault::None);
    one_more_is_mailed(&system).await;
    assert_eq!(system.mails_to(&email), []);
    assert_eq!(told(&system, id), []);
}

/// I5, T29: the fact alone cancels too, before the address was ever known; an address that comes afterwards, late, revives nothing.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_user_whose_address_comes_late_gets_no_mail() {
    let system = System::start_mailing(&[]).await;
    let (id, email) = (Uuid::now_v7(), api::address());
    system.write_fact("user.registered", id, 1, Duration::ZERO).await;
    system.until_diary(id, "pending").await;
    system.write_fact("user.deleted", id, 2, Duration::ZERO).await;
    system.until_diary(id, "pending cancelled").await;
    system.write_state(id, 1, &email).await;
    system.until_read("email.recipients", "user.state.v1").await;
    one_more_is_mailed(&system).await;
    assert_eq!(system.mails_to(&email), []);
    assert_eq!(system.diary(id).await, "pending cancelled");
}

/// The two topics have no order between them: an intent waits for its recipient, shown as `unaddressed`, and a recipient for its
/// intent.
#[tokio::test(flavor = "multi_thread")]
async fn the_mail_goes_out_whichever_of_fact_and_address_comes_first() {
    let system = System::start_mailing(&[]).await;
    let (id, email) = (Uuid::now_v7(), api::address());
    system.write_fact("user.registered", id, 1, Duration::ZERO).await;
    let waiting = async || system.metric(Part::Email, "deliveries_open", &["state=\"unaddressed\""]).await;
    eventually_eq("the intent waits for an address", Some(1.0), waiting).await;
    assert_eq!(system.diary(id).await, "pending");
    system.write_state(id, 1, &email).await;
    system.until_diary(id, "pending sending sent").await;
    assert_eq!(system.mails_to(&email).len(), 1);

    let (id, email) = (Uuid::now_v7(), api::address());
    system.write_state(id, 1, &email).await;
    system.until_read("email.recipients", "user.state.v1").await;
    assert_eq!(system.diary(id).await, "");
    system.write_fact("user.registered", id, 1, Duration::ZERO).await;
    system.until_diary(id, "pending sending sent").await;
    assert_eq!(system.mails_to(&email).len(), 1);
}

/// T36: an intent older than the set age (72 h unless told otherwise) comes from a history read again, not from a user who waits.
/// It is held, not dropped. The operator's word is in `held.rs`.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_for_an_old_event_is_held() {
    let system = System::start_mailing(&[]).await;
    let (old, old_email, young, young_email) = (Uuid::now_v7(), api::address(), Uuid::now_v7(), api::address());
    system.write_state(old, 1, &old_email).await;
    system.write_state(young, 1, &young_email).await;
    system.until_read("email.recipients", "user.state.v1").await;
    system.write_fact("user.registered", old, 1, 73 * HOUR).await;
    system.until_diary(old, "pending held").await;
    // Claimed in the order of arrival: when this one is sent, the older one has been passed over.
    system.write_fact("user.registered", young, 1, 71 * HOUR).await;
    system.until_diary(young, "pending sending sent").await;
    assert_eq!(system.diary(old).await, "pending held");
    assert_eq!((system.mails_to(&old_email), system.mails_to(&young_email).len()), (vec![], 1));
}

/// The mail itself, and that a display name is text in it, never HTML.
#[tokio::test(flavor = "multi_thread")]
async fn the_welcome_mail_reads_as_designed() {
    let system = System::start_mailing(&[]).await;
    let email = api::address();
    let body = json!({ "email": email, "display_name": "Ada <b>\"Bold\"</b> & Lovelace" });
    let answer = api::answered(|| Client::new().post(system.url(Part::User, "/users")).json(&body)).await;
    system.until_mailed(answer.id()).await;
    let mail = system.mails_to(&email).remove(0);
    let sent = system.get(Part::Email, &format!("/users/{}/emails", answer.id())).await.unwrap();
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
