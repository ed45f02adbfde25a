//! An operator looks at the record of a dead letter. Who has seen it is recorded.

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tests::System;
use tests::http::send;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, EMAIL_RECIPIENTS, OPERATOR_ACTIONS, USER_EVENTS, USER_STATE, service_of};
use tests::users::address;
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

use super::{actions, add_bug, analytics, malformed_facts, summary};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

async fn show(system: &System, group: &str, key: &str) -> Value {
    let arguments = ["show-dead-letter", key, "--group", group, "--reason", "ticket 4711"];
    let printed = system.processes.run_with(service_of(group), &arguments, &[("ADMIN_TOKEN", TOKEN)]).await.unwrap();
    serde_json::from_str(&printed).unwrap()
}

/// I14: the copy of a fact is shown with its headers and its value, and each look leaves an action
/// of the operator. Without the right token nothing is shown and nothing recorded.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sees_a_record_and_leaves_an_action() {
    let (mut system, _) = analytics().await;
    system.processes.start_with(ANALYTICS, &[("ADMIN_TOKENS", &format!("on-call:{TOKEN}"))]).await;
    let key = malformed_facts(&system, 1).await.remove(0);
    let url = system.processes.admin(ANALYTICS).url("/dead-letters/show");
    let body = json!({ "coordinates": key, "reason": "curious" });
    for token in ["", "wrong-0123456789abcdef0123456789abcdef"] {
        let request = Client::new().post(&url).json(&body).header("authorization", format!("Bearer {token}"));
        let answer = send(request).await.unwrap();
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        assert!(answer.body.get("record").is_none(), "{answer:?}");
    }
    assert_eq!(system.kafka.read(OPERATOR_ACTIONS), [], "a refused action was recorded");

    let shown = show(&system, ANALYTICS_USERS, &key).await;
    assert_eq!((&shown["from"], &shown["record"]["value"]), (&json!("copy"), &json!("?")));
    let original = system.kafka.read(USER_EVENTS).remove(0);
    assert_eq!(shown["record"]["key"], original.key_text());
    let headers = shown["record"]["headers"].as_array().unwrap();
    assert_eq!(headers.len(), original.headers.len(), "{headers:?}");
    assert!(headers.contains(&json!({ "name": "ce_type", "value": "user.registered" })), "{headers:?}");

    let records = system.kafka.read(OPERATOR_ACTIONS);
    let types: Vec<_> = records.iter().map(|record| record.header("ce_type").unwrap()).collect();
    assert_eq!(types, ["operator.action_begun", "operator.action_ended"]);
    assert!(records.iter().all(|record| record.key_text() == key), "{records:?}");
    let actions = actions(&system, ANALYTICS).await;
    let [action] = &actions[..] else { panic!("not one action: {actions:?}") };
    assert_eq!(summary(action), ("show".to_owned(), key.clone(), Some("done".to_owned())));
    assert_eq!((&action["operator"], &action["reason"]), (&json!("on-call"), &json!("ticket 4711")));
    let not_open = system.kafka.letter_key(ANALYTICS_USERS, (5, 99));
    let arguments = ["show-dead-letter", &not_open, "--reason", "why"];
    let error = system.processes.run_with(ANALYTICS, &arguments, &[("ADMIN_TOKEN", TOKEN)]).await.unwrap_err();
    assert!(error.to_string().contains("/problems/letter-not-open"), "{error}");
}

/// I14: a record that is no letter is shown in the same way, by a service that reads its topic.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sees_a_state_and_leaves_an_action() {
    let mut system = System::start_only(&[USER, EMAIL]).await;
    system.processes.start_with(EMAIL, &[("ADMIN_TOKENS", &format!("on-call:{TOKEN}"))]).await;
    let email = address();
    let state = Draft::user_state(Uuid::now_v7(), 1, Some(&email));
    let (partition, offset) = system.kafka.write(USER_STATE, &state).await;
    let topic = system.kafka.prefixed(USER_STATE);
    let show = async |coordinates: &str| {
        let arguments = ["show-record", coordinates, "--reason", "ticket 4711"];
        system.processes.run_with(EMAIL, &arguments, &[("ADMIN_TOKEN", TOKEN)]).await
    };
    let key = format!("{topic}-{partition}-{offset}");
    let shown: Value = serde_json::from_str(&show(&key).await.unwrap()).unwrap();
    assert!(shown["value"].as_str().unwrap().contains(&email), "{shown}");
    let done = actions(&system, EMAIL).await;
    assert_eq!(summary(&done[0]), ("show-record".to_owned(), key, Some("done".to_owned())));
    assert_eq!((&done[0]["operator"], &done[0]["reason"]), (&json!("on-call"), &json!("ticket 4711")));
    assert!(!system.processes.log(EMAIL).contains(&email), "the record is in the log");

    let beyond = show(&format!("{topic}-{partition}-{}", offset + 1_000)).await.unwrap_err();
    assert!(beyond.to_string().contains("/problems/record-not-found"), "{beyond}");
    let other = show(&format!("{topic}.other-0-0")).await.unwrap_err();
    assert!(other.to_string().contains("/problems/topic-not-consumed"), "{other}");
}

/// I13: a letter about a state has no data, so the original record is read and shown.
#[tokio::test(flavor = "multi_thread")]
async fn a_pointer_is_resolved() {
    let mut system = System::start_only(&[USER, EMAIL]).await;
    system.processes.start_with(EMAIL, &[("ADMIN_TOKENS", &format!("on-call:{TOKEN}"))]).await;
    add_bug(&system.stores.database(EMAIL).await, "recipients", "new.version = 1").await;
    let email = address();
    let state = Draft::user_state(Uuid::now_v7(), 1, Some(&email));
    let written = system.kafka.write(USER_STATE, &state).await;
    system.kafka.until_dead_letters(EMAIL_RECIPIENTS, &[written]).await;
    let key = system.kafka.letter_key(EMAIL_RECIPIENTS, written);
    let letter = system.kafka.dead_letters(EMAIL_RECIPIENTS).remove(&key).unwrap();
    assert_eq!(letter.value, Some(vec![]), "a letter without a value is a tombstone for compaction");
    let shown = show(&system, EMAIL_RECIPIENTS, &key).await;
    assert_eq!(shown["from"], "original");
    assert!(shown["record"]["value"].as_str().unwrap().contains(&email), "{shown}");
    assert!(!system.processes.log(EMAIL).contains(&email), "the record is in the log");
}
