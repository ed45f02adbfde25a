//! What operators do with running consumers: they pause and resume them, and close their breakers.

use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tests::http::send;
use tests::record::Draft;
use tests::services::{ANALYTICS_AUDIT, ANALYTICS_EMAILS, ANALYTICS_USERS, DEFAULT_CONSUMERS, USER_EVENTS};
use tests::{System, eventually_eq, throughout};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

use crate::dead_letters::{actions, summary};

/// Several turns of a consumer: enough time to do something wrong.
const OBSERVATION: Duration = Duration::from_secs(2);

async fn register(system: &System) {
    system.kafka.write(USER_EVENTS, &Draft::user_event("user.registered", Uuid::now_v7(), 1)).await;
}

async fn paused_consumers(system: &System) -> Option<f64> {
    system.processes.group_metric(ANALYTICS_USERS, "consumer_paused").await
}

/// T93, I9: paused consumers handle nothing and stay in their groups. `/status` and a metric say
/// so, and who paused them. They continue when they are resumed. A restart resumes them too.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_pauses_and_resumes_the_consumers_of_a_process() {
    let mut system = System::start_with(&[USER, EMAIL, ANALYTICS], &DEFAULT_CONSUMERS).await;
    let members = system.kafka.members(ANALYTICS_USERS);
    register(&system).await;
    system.users.until_counted(1, 0).await;

    system.processes.run(ANALYTICS, &["pause-consumers", "--reason", "maintenance of the database"]).await.unwrap();
    let groups = [ANALYTICS_AUDIT, ANALYTICS_EMAILS, ANALYTICS_USERS];
    let components = groups.map(|group| format!("{group} 0 paused"));
    system.processes.until_reported_by(ANALYTICS, "maintenance of the database", &components).await;
    eventually_eq("paused consumers", Some(1.0), async || paused_consumers(&system).await).await;
    register(&system).await;
    throughout(OBSERVATION, "a paused consumer handles nothing", async || system.users.funnel().await == (1, 0)).await;
    assert_eq!(system.kafka.members(ANALYTICS_USERS), members, "the paused consumer left its group");

    system.processes.run(ANALYTICS, &["resume-consumers"]).await.unwrap();
    system.users.until_counted(2, 0).await;
    system.processes.until_nothing_reported(ANALYTICS).await;
    eventually_eq("paused consumers", Some(0.0), async || paused_consumers(&system).await).await;

    system.processes.run(ANALYTICS, &["pause-consumers", "--reason", "again"]).await.unwrap();
    system.processes.until_reported(ANALYTICS, "again").await;
    register(&system).await;
    system.processes.stop(ANALYTICS).await;
    system.processes.start(&[ANALYTICS]).await;
    system.users.until_counted(3, 0).await;
    let found: Vec<_> = actions(&system, ANALYTICS).await.iter().map(summary).collect();
    let done = |action: &str| (action.to_owned(), "analytics".to_owned(), Some("done".to_owned()));
    assert_eq!(found, [done("pause-consumers"), done("resume-consumers"), done("pause-consumers")]);
}

/// T63: a token that the service does not know changes nothing and leaves no record. A malformed
/// request is refused with the name of the field.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_action_changes_nothing() {
    let mut system = System::start_only(&[USER, EMAIL]).await;
    let token = "on-call-0123456789abcdef0123456789";
    system.processes.start_with(ANALYTICS, &[("ADMIN_TOKENS", &format!("on-call:{token}"))]).await;
    let act = async |path: &str, token: &str, body: Value| {
        let url = system.processes.admin(ANALYTICS).url(path);
        let request = Client::new().post(url).json(&body).header("authorization", format!("Bearer {token}"));
        send(request).await.unwrap()
    };
    let record = format!("{}-0-0", system.kafka.prefixed(USER_EVENTS));
    let named = json!({ "coordinates": record, "reason": "a test" });
    for (path, body) in [
        ("/dead-letters", named.clone()),
        ("/dead-letters/show", named.clone()),
        ("/records/show", named.clone()),
        ("/dead-letters/discard", named.clone()),
        ("/dead-letters/redrive", json!({ "group": ANALYTICS_USERS })),
        ("/consumers/pause", json!({ "reason": "a test" })),
        ("/consumers/resume", json!({})),
        ("/consumers/close-breakers", json!({})),
    ] {
        let answer = act(path, "other-0123456789abcdef0123456789abc", body).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path}");
    }
    for (path, body, field) in [
        ("/consumers/pause", json!({}), "reason"),
        ("/consumers/pause", json!({ "reason": "two\nlines" }), "reason"),
        ("/dead-letters/discard", json!({ "coordinates": "nonsense", "reason": "a" }), "coordinates"),
        ("/dead-letters/discard", json!({ "coordinates": record }), "reason"),
        ("/dead-letters/show", json!({ "coordinates": record, "reason": "" }), "reason"),
        ("/records/show", json!({ "coordinates": record, "reason": "" }), "reason"),
        ("/records/show", json!({ "coordinates": "nonsense", "reason": "a" }), "coordinates"),
        ("/dead-letters/redrive", json!({ "group": "email.welcome" }), "group"),
        ("/dead-letters/redrive", json!({ "group": ANALYTICS_USERS, "rate": 0 }), "rate"),
        ("/dead-letters/redrive", json!({ "group": ANALYTICS_USERS, "coordinates": ["x"] }), "coordinates"),
        ("/dead-letters/redrive", json!({ "group": ANALYTICS_USERS, "filter": { "age": 1 } }), "filter"),
    ] {
        let answer = act(path, token, body.clone()).await;
        assert!(answer.status.is_client_error(), "{path} {body}: {answer:?}");
        assert!(answer.body["detail"].as_str().unwrap().contains(field), "{path} {body}: {answer:?}");
    }
    assert_eq!(paused_consumers(&system).await, Some(0.0));
    assert_eq!(actions(&system, ANALYTICS).await, Vec::<Value>::new());
    system.processes.until_nothing_reported(ANALYTICS).await;
}
