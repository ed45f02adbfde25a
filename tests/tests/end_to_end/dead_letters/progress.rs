//! A redrive reports its progress, keeps to its rate, and continues without its client.

use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, USER_EVENTS};
use tests::{System, eventually, eventually_eq};
use topology::ANALYTICS;
use uuid::Uuid;

use super::{actions, add_bug, analytics_with, remove_bug, summary};

const LETTERS: usize = 30;

/// Letters of registrations that were rejected because of a bug, which is fixed now.
async fn fixed_letters() -> System {
    let (system, db) = analytics_with(&[("BREAKER_SHARE", "1")]).await;
    add_bug(&db, "registrations", "true").await;
    let facts: Vec<Draft> = (0..LETTERS).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1)).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;
    let open = async || system.processes.dead_letters_open(ANALYTICS_USERS).await;
    eventually_eq("open dead letters", Some(LETTERS as f64), open).await;
    remove_bug(&db).await;
    system
}

/// T34: the answer to a redrive has a line each second, and the rate is kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_keeps_to_its_rate_and_reports_its_progress() {
    let system = fixed_letters().await;
    let started = Instant::now();
    let url = system.processes.admin(ANALYTICS).url("/dead-letters/redrive");
    let body = json!({ "group": ANALYTICS_USERS, "rate": 10 });
    let answer = Client::new().post(url).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let text = answer.text().await.unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(started.elapsed() >= Duration::from_secs(2), "30 letters at 10 per second: {text}");
    assert!(lines.len() >= 3, "{text}");
    let settled: Vec<i64> = lines.iter().map(|line| line["settled"].as_i64().unwrap()).collect();
    assert!(settled.is_sorted() && settled.last() == Some(&(LETTERS as i64)), "{text}");
    assert!(settled[0] < LETTERS as i64, "the first line is a progress: {text}");
    let last = lines.last().unwrap();
    assert_eq!(last["ended"], true);
    assert!(last["read"] == last["of"] && last["of"].as_i64() >= Some(LETTERS as i64), "{text}");
    let actions = actions(&system, ANALYTICS).await;
    let done = ("redrive".to_owned(), ANALYTICS_USERS.to_owned(), Some("done".to_owned()));
    assert_eq!(actions.iter().map(summary).collect::<Vec<_>>(), [done]);
    assert!(actions[0]["detail"].as_str().unwrap().contains("30 settled"), "{actions:?}");
    system.users.until_counted(LETTERS as i64, 0).await;
}

/// T34: the client disconnects. The redrive continues, and its outcome is in the list of actions.
/// One more redrive of the group may wait meanwhile; a third is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_continues_without_its_client() {
    let system = fixed_letters().await;
    let mut client = system.processes.spawn_subcommand(ANALYTICS, "redrive", &["--rate", "5"], &[]);
    system.users.until_counted(5, 0).await;
    client.kill();
    let further = async || system.processes.run(ANALYTICS, &["redrive", "--group", ANALYTICS_USERS]).await;
    let (one, other) = tokio::join!(further(), further());
    let refused: Vec<String> = [one, other].into_iter().filter_map(|ended| Some(ended.err()?.to_string())).collect();
    assert!(refused.len() == 1 && refused[0].contains("/problems/redrive-running"), "{refused:?}");
    system.users.until_counted(LETTERS as i64, 0).await;
    eventually("the outcome of the redrive is recorded", async || {
        let actions = actions(&system, ANALYTICS).await;
        let detail = |action: &Value| action["detail"].as_str().unwrap_or_default().contains("30 settled");
        actions.iter().any(|action| action["outcome"] == "done" && detail(action)).then_some(())
    })
    .await;
}
