//! What a mail server's refusal means: for the recipient, for this mail, or for us.

use testbed::smtp_sink::{Behaviour, Fault, Stage};
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::EMAIL;
use uuid::Uuid;

use super::{email_events, until_another_mail_is_sent, until_email_events};

fn reply(stage: Stage, text: &str) -> Fault {
    Fault::Reply { stage, text: text.to_owned() }
}

async fn paused(system: &System) -> Option<f64> {
    system.processes.metric(EMAIL, "mail_sending_paused", &[]).await
}

/// What `/status` says about the mail server.
async fn reason(system: &System) -> String {
    let (_, body) = system.processes.status(EMAIL).await.unwrap();
    body["waiting_for"]["mail"].as_str().unwrap_or_default().to_owned()
}

/// T47, I5, I6: the server refuses every mail for a reason that is about us or about itself,
/// permanently or temporarily: a wrong setting, a block list, a full disk. No delivery fails.
/// Sending pauses, `/status` and a metric say why, and it continues by itself when the server
/// accepts mails again.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_that_are_about_the_sender_pause_sending_and_fail_no_mail() {
    let system = System::start_mailing(&[]).await;
    for (stage, refusal, shown) in [
        (Stage::Rcpt, "554 5.7.1 Relay access denied", "554 5.7.1"),
        (Stage::Rcpt, "530 5.7.0 Authentication required", "530 5.7.0"),
        (Stage::Rcpt, "504 5.5.2 Helo command rejected", "504 5.5.2"),
        // Postfix refuses relaying temporarily by default.
        (Stage::Rcpt, "454 4.7.1 Relay access denied", "454 4.7.1"),
        (Stage::Rcpt, "450 4.1.8 Sender address rejected: Domain not found", "450 4.1.8"),
        (Stage::Data, "452 4.3.1 Insufficient system storage", "452 4.3.1"),
        (Stage::Dot, "451 4.3.0 queue file write error", "451 4.3.0"),
    ] {
        system.mail.fail(reply(stage, refusal));
        let mut users = vec![];
        for _ in 0..8 {
            users.push(system.users.register().await);
        }
        eventually_eq("sending is paused", Some(1.0), async || paused(&system).await).await;
        assert!(reason(&system).await.contains(shown), "{}", reason(&system).await);
        for user in &users {
            assert!(!system.stores.delivery_states(*user).await.contains("failed"), "{refusal} failed a mail");
        }
        system.mail.recover();
        for user in &users {
            system.users.until_mailed(*user).await;
        }
        assert_eq!((paused(&system).await, reason(&system).await), (Some(0.0), String::new()));
    }
    assert!(system.processes.log(EMAIL).contains("sending pauses"), "the log must say that sending pauses");
}

/// T47, I6: the server refuses us before it has heard of a recipient: our address is on a block
/// list, or it does not know our sender. However few mails wait, none fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_us_before_any_recipient_fails_no_mail() {
    let system = System::start_mailing(&[("BACKOFF_MS", "10")]).await;
    for (stage, code) in [(Stage::Connect, 554), (Stage::Mail, 550)] {
        system.mail.fail(Fault::Reject { stage, code });
        let user = system.users.register().await;
        eventually("eight attempts", async || {
            let states = system.stores.delivery_states(user).await;
            assert!(!states.contains("failed"), "{code} at {stage:?} failed the mail: {states}");
            (states.matches("sending").count() >= 8).then_some(())
        })
        .await;
        system.mail.recover();
        system.users.until_mailed(user).await;
    }
}

/// T47, I6: the server refuses us with a code that does not say so, as Exim does. The first
/// refusals look like missing mailboxes, and these mails fail. When several recipients in a row are
/// refused, the cause is us: sending pauses, and no further mail fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_us_without_an_enhanced_code_fails_two_mails_at_most() {
    let system = System::start_mailing(&[]).await;
    system.mail.fail(reply(Stage::Rcpt, "550 relay not permitted"));
    let users = system.users.register_many(8).await;
    eventually_eq("sending is paused", Some(1.0), async || paused(&system).await).await;
    assert!(reason(&system).await.contains("reply 550 to RCPT"), "{}", reason(&system).await);
    system.mail.recover();
    let ended = "select count(*) from deliveries where status in ('sent', 'failed')";
    eventually_eq("deliveries that ended", 8, async || system.stores.count(EMAIL, ended).await).await;
    let failed = system.stores.count(EMAIL, "select count(*) from deliveries where status = 'failed'").await;
    assert!((1..=2).contains(&failed), "{failed} failed mails");
    let retried = system.processes.run(EMAIL, &["retry-failed", "--code", "550"]).await.unwrap();
    assert_eq!(retried, released(failed));
    for user in users {
        system.users.until_mailed(user).await;
    }
}

/// T36, I5: deliveries that became too old while they waited are held, and do not use up the probes
/// of the mail server. One process, with one sender, finds 40 of them before it finds a mail.
#[tokio::test(flavor = "multi_thread")]
async fn deliveries_that_are_too_old_do_not_use_up_the_probes() {
    let system = System::start_mailing(&[("SENDERS", "1"), ("MAX_AGE_HOURS", "1")]).await;
    system.mail.fail(Fault::Refuse);
    let users = system.users.register_many(3).await;
    eventually_eq("sending is paused", Some(1.0), async || paused(&system).await).await;
    let old = "with users as (
                   insert into recipients (user_id, version, email)
                   select gen_random_uuid(), 1, 'ada@example.com' from generate_series(1, 40) returning user_id)
               insert into deliveries (id, user_id, template, version, status, due_at, requested_at)
               select gen_random_uuid(), user_id, 'welcome', 1, 'pending', now() - interval '1 hour',
                   now() - interval '2 hours' from users";
    sqlx::query(old).execute(&system.stores.database(EMAIL).await).await.unwrap();
    system.mail.recover();
    for user in users {
        system.users.until_mailed(user).await;
    }
    let held = "select count(*) from deliveries where status = 'held'";
    assert_eq!(system.stores.count(EMAIL, held).await, 40, "held deliveries");
    let logged = "deliveries are held: their events are older than MAX_AGE_HOURS";
    assert!(system.processes.log(EMAIL).contains(logged), "the log must report held deliveries");
}

/// I5: while the server is down, only probes are sent. A backlog is not tried again and again.
#[tokio::test(flavor = "multi_thread")]
async fn while_the_mail_server_is_down_only_probes_are_sent() {
    let system = System::start_mailing(&[("SENDERS", "1")]).await;
    system.mail.fail(Fault::Refuse);
    let mut users = vec![];
    for _ in 0..20 {
        users.push(system.users.register().await);
    }
    eventually_eq("sending is paused", Some(1.0), async || paused(&system).await).await;
    let attempts = system.stores.count(EMAIL, "select sum(attempt) from deliveries").await;
    assert!((3..=6).contains(&attempts), "{attempts} attempts: three that opened the breaker, and the first probes");
    system.mail.recover();
    for user in users {
        system.users.until_mailed(user).await;
    }
}

/// I6: one recipient's server does not want our mails. That delivery fails after several attempts,
/// and no other mail is delayed.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_who_alone_is_refused_ends_as_failed_and_stops_no_other_mail() {
    let system = System::start_mailing(&[]).await;
    let email = address();
    let refused = reply(Stage::Rcpt, "550 5.7.1 blocked by the policy of this recipient");
    system.mail.fail(Behaviour { recipient: Some(email.clone()), ..refused.into() });
    let id = system.users.register_as(&email).await;
    let attempts = "pending sending ".repeat(6);
    for _ in 0..3 {
        until_another_mail_is_sent(&system).await;
        assert_eq!(paused(&system).await, Some(0.0));
    }
    system.stores.until_delivery_states(id, &format!("{attempts}failed")).await;
    until_email_events(&system, id, &["email.failed"]).await;

    // Later the operator has talked to them.
    system.mail.recover();
    let dry_run = ["retry-failed", "--code", "550", "--dry-run"];
    assert_eq!(system.processes.run(EMAIL, &dry_run).await.unwrap(), "1 failed mails would be sent again\n");
    assert_eq!(system.processes.run(EMAIL, &["retry-failed", "--code", "551"]).await.unwrap(), released(0));
    let later = ["retry-failed", "--since", "2100-01-01T00:00:00Z"];
    assert_eq!(system.processes.run(EMAIL, &later).await.unwrap(), released(0));
    assert_eq!(system.processes.run(EMAIL, &["retry-failed", "--code", "550"]).await.unwrap(), released(1));
    system.users.until_mailed(id).await;
    until_email_events(&system, id, &["email.failed", "email.sent"]).await;
    assert_eq!(system.mail.to(&email).len(), 1, "mails");
}

fn released(mails: i64) -> String {
    format!("{mails} failed mails released, to be sent by the running service\n")
}

/// T47, I6: a reply is bytes, and only its digits decide: text in any character set, or no text.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_digits_of_a_reply_decide() {
    let system = System::start_mailing(&[]).await;
    for (stage, text) in [
        (Stage::Dot, "250 2.0.0 Message accept\u{e9}"),
        (Stage::Dot, "250"),
        (Stage::Rcpt, "250"),
        (Stage::Data, "354"),
        (Stage::Mail, "250-\u{d3}\u{c3}\r\n250 \u{bb}\u{a7}"),
        (Stage::Connect, "220-\u{b2}\u{bb}\r\n220"),
    ] {
        if stage == Stage::Connect {
            // A sender that is still connected would not meet it.
            system.mail.until_disconnected().await;
        }
        system.mail.fail(reply(stage, text).times(1));
        let email = address();
        let id = system.users.register_as(&email).await;
        system.stores.until_delivery_states(id, "pending sending sent").await;
        assert_eq!(system.mail.to(&email).len(), 1, "mails after {text:?} at {stage:?}");
    }
    for text in ["550 5.1.1 Bo\u{ee}te inconnue", "550 \u{d3}\u{c3}\u{bb}\u{a7}", "550"] {
        system.mail.fail(reply(Stage::Rcpt, text).times(1));
        let id = system.users.register().await;
        system.stores.until_delivery_states(id, "pending sending failed").await;
    }
}

/// I6, T21: the answers to a mail are lost, each time. After three attempts the delivery waits for
/// an operator, because each attempt may have delivered a copy. Other mails are sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_whose_answers_are_lost_is_sent_at_most_three_times_without_an_operator() {
    let system = System::start_mailing(&[]).await;
    let email = address();
    system.mail.fail(Behaviour { recipient: Some(email.clone()), ..Fault::DropAfterDot.into() });
    let id = system.users.register_as(&email).await;
    let unknown = "pending sending unknown sending unknown sending unknown";
    system.stores.until_delivery_states(id, unknown).await;
    until_another_mail_is_sent(&system).await;
    let logged = "no answer after the mail was sent, several times";
    assert!(system.processes.log(EMAIL).contains(logged), "the log must say that an operator is needed");
    let open = async || system.processes.metric(EMAIL, "deliveries_open", &["state=\"unknown\""]).await;
    eventually_eq("deliveries that wait for an operator", Some(1.0), open).await;
    assert_eq!(system.stores.delivery_states(id).await, unknown);
    assert_eq!(system.mail.to(&email).len(), 3, "copies");

    system.mail.recover();
    let run = async |arguments: &[&str]| system.processes.run(EMAIL, arguments).await.unwrap();
    let dry_run = run(&["retry-unknown", "--dry-run"]).await;
    assert_eq!(dry_run, "1 mails with a lost answer would be sent again\n");
    let released = run(&["retry-unknown"]).await;
    assert_eq!(released, "1 mails with a lost answer released, to be sent by the running service\n");
    system.users.until_mailed(id).await;
    let ids = system.mail.message_ids_to(&email);
    assert!(ids.len() == 4 && ids.iter().all(|id| *id == ids[0]), "copies with one Message-ID: {ids:?}");
    until_email_events(&system, id, &["email.sent"]).await;
}

/// A newer release has stored a delivery with a template that this release does not have. The
/// delivery is left for that release and delays no other mail.
#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_with_the_template_of_a_newer_release_is_left_alone() {
    let system = System::start_mailing(&[]).await;
    let user = system.users.register().await;
    system.users.until_mailed(user).await;
    let newer = "insert into deliveries (id, user_id, template, version, status, due_at, requested_at)
                 values ($1, $2, 'farewell', 7, 'pending', now() - interval '1 hour', now())";
    let id = Uuid::now_v7();
    sqlx::query(newer).bind(id).bind(user).execute(&system.stores.database(EMAIL).await).await.unwrap();
    until_another_mail_is_sent(&system).await;
    eventually("both deliveries of the user", async || {
        (system.users.deliveries(user).await == ["sent", "pending"]).then_some(())
    })
    .await;
    assert_eq!(email_events(&system, user).len(), 1, "events about the user's mails");
}
