//! `GET /audit` of analytics: who did what to a user, when, and because of what.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::http::Answer;
use tests::identity::Identities;
use tests::record::Draft;
use tests::services::{ANALYTICS_AUDIT, EMAIL_EVENTS, USER_EVENTS};
use tests::users::{Users, address};
use tests::{System, eventually_eq};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

async fn audit(users: &Users, user: Uuid, further: &str) -> Answer {
    users.get(ANALYTICS, &format!("/audit?user_id={user}{further}")).await.unwrap()
}

/// Waits until the audit of a user has this many entries, and returns them.
async fn until_audited(users: &Users, user: Uuid, count: usize) -> Vec<Value> {
    let entries = async || audit(users, user, "").await.body["entries"].as_array().cloned().unwrap_or_default();
    eventually_eq("entries of the audit", count, async || entries().await.len()).await;
    entries().await
}

fn column<'a>(entries: &'a [Value], name: &str) -> Vec<&'a Value> {
    entries.iter().map(|entry| &entry[name]).collect()
}

/// I7, I14, I15: each change has one entry with its actor, its command and the time of the event.
/// The audit stays when the user is erased, for the owner and for administrators.
#[tokio::test(flavor = "multi_thread")]
async fn each_change_of_a_user_has_an_entry_with_its_actor_and_its_cause() {
    let mut system = System::empty().await;
    let identities = Identities::required_by(&mut system.processes);
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    let judge = system.judge().await;
    let owner = system.users.bearing(&identities.token_of("owner"));
    let stranger = system.users.bearing(&identities.token_of("stranger"));
    let admin = system.users.bearing(&identities.admin());
    let user = owner.register().await;
    owner.rename(user, "Countess").await.unwrap();
    admin.change_email(user, &address()).await.unwrap();
    owner.erase(user).await.unwrap();
    let entries = until_audited(&owner, user, 4).await;
    let types = ["user.registered", "user.profile_changed", "user.email_changed", "user.deleted"];
    assert_eq!(column(&entries, "type"), types);
    assert_eq!(column(&entries, "version"), [1, 2, 3, 4]);
    let actors = column(&entries, "actor");
    assert_eq!((actors[0], actors[0]), (actors[1], actors[3]));
    assert_ne!(actors[0], actors[2], "the administrator has changed the address");
    let facts = system.kafka.read_key(USER_EVENTS, user);
    for (entry, fact) in entries.iter().zip(&facts) {
        let header = |name| fact.header(name).map_or(Value::Null, |value| json!(value));
        for (field, name) in [
            ("event_id", "ce_id"),
            ("actor", "ce_actor"),
            ("causation_id", "ce_causationid"),
            ("correlation_id", "ce_correlationid"),
        ] {
            assert_eq!(entry[field], header(name), "{field} of {entry}");
        }
        // The database keeps microseconds.
        let [at, time] = [entry["occurred_at"].as_str().unwrap(), fact.header("ce_time").unwrap()];
        assert_eq!(at[..19], time[..19]);
    }
    assert_eq!(audit(&admin, user, "").await.body["entries"], json!(entries));
    assert_eq!(audit(&stranger, user, "").await.status, StatusCode::FORBIDDEN);
    assert_eq!(audit(&stranger, user, "&limit=1&after=9.00000000-0000-0000-0000-000000000000").await.status, 403);
    assert_eq!(audit(&stranger, Uuid::now_v7(), "").await.body, json!({ "entries": [] }), "nothing is known");
    // The mails follow from the registration, by the correlation id.
    admin.until_delivery_ended(user).await;
    for mail in system.kafka.read(EMAIL_EVENTS) {
        assert_eq!(entries[0]["correlation_id"], mail.header("ce_correlationid").unwrap());
    }
    judge.check(&mut system).await;
}

/// The pages of a long audit have each entry once, in order. What is no page is refused.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_is_read_page_by_page() {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let user = system.users.register().await;
    for number in 0..6 {
        system.users.rename(user, &format!("Countess {number}")).await.unwrap();
    }
    let all = until_audited(&system.users, user, 7).await;
    let mut read = vec![];
    let mut after = String::new();
    let mut pages = 0;
    loop {
        let page = audit(&system.users, user, &format!("&limit=3{after}")).await;
        assert_eq!(page.status, StatusCode::OK, "{page:?}");
        read.extend(page.body["entries"].as_array().unwrap().iter().cloned());
        pages += 1;
        let Some(next) = page.body["next"].as_str() else { break };
        after = format!("&after={next}");
    }
    assert_eq!((read, pages), (all, 3));
    for malformed in [
        "/audit",
        "/audit?user_id=ada",
        &format!("/audit?user_id={user}&limit=0"),
        &format!("/audit?user_id={user}&limit=501"),
        &format!("/audit?user_id={user}&after=1"),
        &format!("/audit?user_id={user}&after=x.y"),
        &format!("/audit?user_id={user}&from=2026"),
    ] {
        let answer = system.users.request(Method::GET, ANALYTICS, malformed).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{malformed}");
        assert_eq!(answer.json::<Value>().await.unwrap()["type"], "/problems/invalid-query", "{malformed}");
    }
}

/// I7: a fact that Kafka delivers again has one entry. So has a fact whose service did not say who
/// and why: an older release, or another program.
#[tokio::test(flavor = "multi_thread")]
async fn a_fact_that_comes_again_has_one_entry() {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let user = Uuid::now_v7();
    let without_cause = Draft::user_event("user.registered", user, 1);
    let without_cause = ["ce_causationid", "ce_correlationid", "ce_actor"]
        .into_iter()
        .fold(without_cause, |draft, header| draft.without_header(header));
    system.kafka.write_all(USER_EVENTS, &[without_cause.clone(), without_cause.clone()]).await;
    system.kafka.until_caught_up(ANALYTICS_AUDIT).await;
    system.kafka.write(USER_EVENTS, &without_cause).await;
    system.kafka.until_caught_up(ANALYTICS_AUDIT).await;
    let entries = until_audited(&system.users, user, 1).await;
    let unknown = json!([null, null, null]);
    assert_eq!(json!([entries[0]["actor"], entries[0]["causation_id"], entries[0]["correlation_id"]]), unknown);
    assert_eq!(system.stores.count(ANALYTICS, "select count(*) from audit").await, 1);
}
