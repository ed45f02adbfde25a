//! The walkthrough of `docs/operations.md`, from an alert to the settled record, on components that
//! ask for TLS and logins. And an action that cannot be recorded.

use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, OPERATOR_ACTIONS, USER_EVENTS};
use tests::{System, eventually_eq};
use topology::acls::{Naming, Operation, all_rules};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

use crate::dead_letters::{add_bug, remove_bug};
use crate::failing_records;

const TOKEN: &str = "on-call-0123456789abcdef0123456789";
const OTHER: &str = "other-0123456789abcdef0123456789ab";

/// Runs a subcommand of analytics with a token, and returns what it prints.
async fn run(system: &System, arguments: &[&str], token: &str) -> anyhow::Result<String> {
    system.processes.run_with(ANALYTICS, arguments, &[("ADMIN_TOKEN", token)]).await
}

fn lines(printed: &str) -> Vec<Value> {
    printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn until_open(system: &System, count: f64) {
    let open = async || system.processes.dead_letters_open(ANALYTICS_USERS).await;
    eventually_eq("dead_letters_open", Some(count), open).await;
}

/// T43, T63, T94: an operator finds the records behind an alert, sees why they failed, fixes the
/// cause, redrives one and discards the other, and sees who did what. Another token, or a service
/// that may not record actions, is refused, and nothing changes.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_gets_from_an_alert_to_the_settled_records() {
    let mut system = System::empty_on_secured_components(&[]).await;
    system.processes.set_own(ANALYTICS, &[("ADMIN_TOKENS", format!("on-call:{TOKEN}"))]);
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    let db = system.stores.database(ANALYTICS).await;
    let [rejected, imported] = [Uuid::now_v7(), Uuid::now_v7()];
    add_bug(&db, "funnel", &format!("new.user_id in ('{rejected}', '{imported}')")).await;
    let fact = |user| Draft::user_event("user.registered", user, 1).on(0);
    let written = system.kafka.write_all(USER_EVENTS, &[fact(rejected), fact(imported)]).await;

    // 1. The alert.
    until_open(&system, 2.0).await;
    // 2. Find the records.
    let letters = lines(&run(&system, &["dead-letters", "--json"], OTHER).await.unwrap());
    let [first, second] = &letters[..] else { panic!("not two letters: {letters:?}") };
    let coordinates = |letter: &Value| letter["coordinates"].as_str().unwrap().to_owned();
    let [redriven, discarded] = [coordinates(first), coordinates(second)];
    assert_eq!(redriven, system.kafka.letter_key(ANALYTICS_USERS, written[0]));
    assert_eq!((&first["reason"], &first["key"]), (&json!("SQLSTATE 23514"), &json!(rejected.to_string())));
    // 3. See why one failed.
    let show = ["show-dead-letter", &redriven, "--reason", "ticket 4711"];
    let refused = run(&system, &show, OTHER).await.unwrap_err().to_string();
    assert!(refused.contains(StatusCode::UNAUTHORIZED.as_str()), "{refused}");
    let shown: Value = serde_json::from_str(&run(&system, &show, TOKEN).await.unwrap()).unwrap();
    assert_eq!(shown["record"]["value"], json!({ "user_id": rejected }).to_string());
    // 4. Fix the cause.
    remove_bug(&db).await;
    // 5. Redrive one.
    let redrive = ["redrive", "--only", &redriven, "--reason", "trigger removed, ticket 4711"];
    assert!(run(&system, &redrive, OTHER).await.is_err());
    let printed = run(&system, &redrive, TOKEN).await.unwrap();
    assert!(printed.contains(&format!("{ANALYTICS_USERS}: 1 settled")), "{printed}");
    system.users.until_counted(1, 0).await;
    // 6. Discard the other.
    let discard = ["discard", &discarded, "--reason", "imported twice, ticket 4711"];
    assert!(run(&system, &discard, OTHER).await.is_err());
    assert_may_not_act_without_a_record(&system, &discard, &discarded).await;
    run(&system, &discard, TOKEN).await.unwrap();
    until_open(&system, 0.0).await;
    system.users.until_counted(1, 0).await;
    // 7. See who did what.
    let actions = lines(&run(&system, &["actions", "--json"], OTHER).await.unwrap());
    let done: Vec<_> =
        actions.iter().map(|action| (&action["action"], &action["operator"], &action["outcome"])).collect();
    let by_on_call = |action: &'static str| (json!(action), json!("on-call"), json!("done"));
    let expected = [by_on_call("discard"), by_on_call("redrive"), by_on_call("show")];
    let expected: Vec<_> = expected.iter().map(|(action, operator, outcome)| (action, operator, outcome)).collect();
    assert_eq!(done, expected, "{actions:?}");
}

/// T43, T63, T94: with TLS, logins and rights, an operator pauses and resumes consumers, sees the
/// record of a topic, and dead-letters a record that blocks its partition. Another token is refused.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_acts_on_consumers_and_records_of_a_secured_system() {
    let mut system = System::empty_on_secured_components(&[]).await;
    system.processes.set_own(ANALYTICS, &[("ADMIN_TOKENS", format!("on-call:{TOKEN}"))]);
    system.processes.start(&[ANALYTICS]).await;
    let act = async |arguments: &[&str]| {
        let refused = run(&system, arguments, OTHER).await.unwrap_err().to_string();
        assert!(refused.contains(StatusCode::UNAUTHORIZED.as_str()), "{refused}");
        run(&system, arguments, TOKEN).await.unwrap()
    };

    act(&["pause-consumers", "--reason", "maintenance of the database"]).await;
    system.processes.until_reported(ANALYTICS, "maintenance of the database").await;
    act(&["resume-consumers"]).await;
    system.processes.until_nothing_reported(ANALYTICS).await;

    let db = system.stores.database(ANALYTICS).await;
    let failing = Uuid::now_v7();
    failing_records::add_bug(&db, failing, "raise exception 'no'").await;
    let written = system.kafka.write(USER_EVENTS, &Draft::user_event("user.registered", failing, 1).on(0)).await;
    let record = format!("{}-{}-{}", system.kafka.prefixed(USER_EVENTS), written.0, written.1);
    system.processes.until_reported(ANALYTICS, &record).await;
    let shown: Value = serde_json::from_str(&act(&["show-record", &record, "--reason", "ticket 4712"]).await).unwrap();
    assert_eq!(shown["key"], json!(failing.to_string()));
    act(&["dead-letter", &record, "--reason", "ticket 4712"]).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[written]).await;

    let actions = lines(&run(&system, &["actions", "--json"], OTHER).await.unwrap());
    let done: Vec<_> = actions.iter().map(|action| (action["action"].as_str(), action["outcome"].as_str())).collect();
    let names = ["dead-letter", "show-record", "resume-consumers", "pause-consumers"];
    assert_eq!(done, names.map(|name| (Some(name), Some("done"))), "{actions:?}");
}

/// Without the right to write the topic of actions, the service does nothing that would have to be
/// recorded there.
async fn assert_may_not_act_without_a_record(system: &System, discard: &[&str], letter: &str) {
    let rules = all_rules(Naming::default());
    let principal = format!("User:{}", ANALYTICS.kafka_user());
    let mut fewer = rules.clone();
    fewer.retain(|rule| {
        !(rule.principal == principal && rule.name == OPERATOR_ACTIONS && rule.operation == Operation::Write)
    });
    system.grant(&fewer).await;
    let refused = run(system, discard, TOKEN).await.unwrap_err().to_string();
    assert!(refused.contains("/problems/action-not-recorded"), "{refused}");
    assert!(system.kafka.dead_letters(ANALYTICS_USERS).contains_key(letter), "discarded without a record");
    system.grant(&rules).await;
}
