//! Registrations at the user service: retries, concurrent requests and crashes have no second
//! effect.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use reqwest::{Client, StatusCode};
use serde_json::json;
use tests::http::{Answer, send, send_with_retries};
use tests::judge::Judge;
use tests::services::{USER_EVENTS, USER_STATE};
use tests::users::address;
use tests::{System, eventually, eventually_eq, within};
use topology::USER;
use uuid::Uuid;

const CONCURRENT_RENAMES: usize = 10;

async fn users(system: &System) -> i64 {
    system.stores.count(USER, "select count(*) from users").await
}

async fn idempotency_keys(system: &System) -> i64 {
    system.stores.count(USER, "select count(*) from idempotency_keys").await
}

/// Checks that there is one user with one fact and one state, and nothing else.
async fn assert_one_registration(system: &mut System, judge: &Judge) {
    judge.check(system).await;
    assert_eq!(users(system).await, 1, "users");
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 1, "facts");
    assert_eq!(system.kafka.read(USER_STATE).len(), 1, "states");
}

/// Sends a registration, and sends it again while the service asks for a retry.
async fn register_until_answered(system: &System, email: &str, key: &str) -> Answer {
    send_with_retries(|| system.users.registration(email, Some(key))).await
}

/// T02, I1, I2: clients that lost the answer, or did not wait for it, send the same request again.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_requests_with_one_key_register_one_user_and_get_one_answer() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let email = address();
    let key = Uuid::now_v7().to_string();
    let answers = join_all((0..50).map(|_| register_until_answered(&system, &email, &key))).await;
    assert_eq!(answers[0].status, StatusCode::CREATED, "{:?}", answers[0]);
    for answer in &answers {
        assert_eq!(answer, &answers[0], "all requests must get the same answer");
    }
    assert_one_registration(&mut system, &judge).await;
}

/// T02: a key identifies one request. A client that uses it for another request has a bug; that
/// request has no effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_reused_for_another_request_is_refused() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let key = Uuid::now_v7().to_string();
    let email = address();
    let first = register_until_answered(&system, &email, &key).await;
    assert_eq!(first.status, StatusCode::CREATED);
    let other_address = register_until_answered(&system, &address(), &key).await;
    assert_eq!(other_address.status, StatusCode::UNPROCESSABLE_ENTITY, "{other_address:?}");
    let body = json!({ "email": email, "display_name": "Countess" });
    let url = system.users.url(USER, "/users");
    let other_name = send_with_retries(|| Client::new().post(&url).header("idempotency-key", &key).json(&body)).await;
    assert_eq!(other_name.status, StatusCode::UNPROCESSABLE_ENTITY, "{other_name:?}");
    assert_one_registration(&mut system, &judge).await;
}

/// T03, I1, I2: an address belongs to one user, and upper and lower case are the same address. A
/// registration that is refused leaves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_concurrent_registrations_of_an_address_succeeds_and_the_others_leave_nothing() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let email = address();
    let spellings = [email.clone(), email.to_uppercase().replace("EXAMPLE.COM", "example.com")];
    let keys: Vec<String> = (0..20).map(|_| Uuid::now_v7().to_string()).collect();
    let requests =
        keys.iter().zip(spellings.iter().cycle()).map(|(key, email)| register_until_answered(&system, email, key));
    let mut statuses: Vec<u16> = join_all(requests).await.iter().map(|answer| answer.status.as_u16()).collect();
    statuses.sort_unstable();
    assert_eq!(statuses[0], 201);
    assert_eq!(statuses[1..], [409; 19]);
    assert_eq!(idempotency_keys(&system).await, 1, "keys: a refusal must not be stored");
    assert_one_registration(&mut system, &judge).await;
}

/// T01: the service is killed at `point` while it handles a registration. Returns the address and
/// the key of the request, which gets no answer.
async fn killed_while_registering(system: &mut System, point: &str) -> (String, String) {
    system.processes.start_with(USER, &[("FAULT_AT", &format!("{point}:1:kill"))]).await;
    let email = address();
    let key = Uuid::now_v7().to_string();
    let answer = eventually("the service handles the request", async || {
        let answer = system.users.post(&email, Some(&key)).await;
        (!matches!(&answer, Ok(answer) if answer.status == 503)).then_some(answer)
    })
    .await;
    assert!(answer.is_err(), "the client must get no answer: {answer:?}");
    system.processes.until_ended(USER).await;
    (email, key)
}

/// T01, I1, I2: before the commit nothing of the registration exists, so the retry registers the
/// user.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_before_the_commit_leaves_nothing_and_the_retry_registers() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let (email, key) = killed_while_registering(&mut system, "user.before_commit").await;
    system.processes.start(&[USER]).await;
    assert_eq!(users(&system).await, 0, "users");
    assert_eq!(system.stores.outbox_record(USER).await, [], "events");
    assert_eq!(idempotency_keys(&system).await, 0, "claimed keys");

    let retry = register_until_answered(&system, &email, &key).await;
    assert_eq!(retry.status, StatusCode::CREATED, "{retry:?}");
    assert_one_registration(&mut system, &judge).await;
}

/// T01, I1, I2: after the commit everything exists, so the retry gets the answer that was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_after_the_commit_leaves_everything_and_the_retry_gets_the_lost_answer() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let (email, key) = killed_while_registering(&mut system, "user.after_commit").await;
    system.processes.start(&[USER]).await;
    let db = system.stores.database(USER).await;
    let committed: Uuid = sqlx::query_scalar("select id from users").fetch_one(&db).await.unwrap();

    let retry = register_until_answered(&system, &email, &key).await;
    assert_eq!(retry.status, StatusCode::CREATED, "{retry:?}");
    assert_eq!((retry.id(), retry.version()), (committed, 1), "id and version in the answer");
    let second_retry = system.users.post(&email, Some(&key)).await.unwrap();
    assert_eq!(second_retry, retry, "every retry must get the same answer");
    assert_one_registration(&mut system, &judge).await;
}

/// T45, I1, I2: a service that is frozen inside the transaction holds the address, the key and the
/// relay's lock. Postgres ends its sessions, so a second process can handle the same request. The
/// first process changes nothing when it is thawed.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_frozen_inside_a_registration_delays_its_successor_by_seconds() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    system.processes.start_with(USER, &[("FAULT_AT", "user.before_commit:1:stop")]).await;
    let mut successor = system.processes.spawn_another(USER);
    successor.until_ready().await;
    let email = address();
    let key = Uuid::now_v7().to_string();
    let frozen = tokio::spawn(send(system.users.registration(&email, Some(&key))));
    system.processes.until_frozen(USER).await;

    // Postgres ends the frozen transaction after 5 s. Until then it holds the key, and the
    // successor asks the client to retry.
    let registered = within(Duration::from_secs(15), "the successor registers the user", async || {
        let answer = system.users.at(&successor).post(&email, Some(&key)).await.unwrap();
        assert!([201, 409, 503].contains(&answer.status.as_u16()), "{answer:?}");
        (answer.status == 201).then_some(answer)
    })
    .await;
    // Postgres ends the frozen relay's session after 15 s, which frees its lock.
    system.stores.until_outbox_empty(USER).await;

    system.processes.thaw(USER);
    let answer = frozen.await.unwrap().unwrap();
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "the frozen transaction must not commit");
    let retry = system.users.post(&email, Some(&key)).await.unwrap();
    assert_eq!(retry, registered, "the thawed process must return the answer that its successor stored");
    assert_one_registration(&mut system, &judge).await;
}

/// Sends `PATCH /users/{id}` with an `If-Match`.
async fn rename_if_match(system: &System, id: Uuid, etag: &str, display_name: &str) -> Answer {
    send(system.users.renaming(id, display_name).header("if-match", etag)).await.unwrap()
}

/// I4: the lock on the user's row orders concurrent commands without `If-Match`. Each gets its own
/// version, and its event carries the same version.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_changes_of_one_user_get_one_version_each() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let id = system.users.register().await;
    let rename = async |number: usize| {
        let renaming = || system.users.renaming(id, &format!("Ada {number}"));
        send_with_retries(renaming).await.version()
    };
    let mut versions = join_all((0..CONCURRENT_RENAMES).map(rename)).await;
    versions.sort_unstable();
    assert_eq!(versions, (2..).take(CONCURRENT_RENAMES).collect::<Vec<_>>());
    judge.check(&mut system).await;
}

/// T39: an answer is kept for a day by the clock of the database. Then its key is free, and the
/// stored answer is removed.
#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_is_valid_for_a_day() {
    let mut system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    let age_stored_answers = async |hours: i32| {
        let age = "update idempotency_keys set created_at = created_at - make_interval(hours => $1)";
        sqlx::query(age).bind(hours).execute(&db).await.unwrap();
    };
    let first_email = address();
    let first = register_until_answered(&system, &first_email, "first key").await;
    age_stored_answers(2).await;
    let second_email = address();
    let second = register_until_answered(&system, &second_email, "second key").await;
    age_stored_answers(23).await;

    let retry = register_until_answered(&system, &second_email, "second key").await;
    assert_eq!(retry, second, "a key must be valid after 23 hours");
    let third = register_until_answered(&system, &address(), "first key").await;
    assert_eq!(third.status, StatusCode::CREATED, "a key must be free after 25 hours: {third:?}");
    assert_ne!(third.id(), first.id());
    let late = register_until_answered(&system, &first_email, "first key").await;
    assert_eq!(late.status, StatusCode::UNPROCESSABLE_ENTITY, "the key belongs to the third request: {late:?}");

    register_until_answered(&system, &address(), "fourth key").await;
    age_stored_answers(1).await; // the second key is 24 hours old now
    system.processes.start(&[USER]).await;
    eventually_eq("stored answers", 2, async || idempotency_keys(&system).await).await;
    assert_eq!(users(&system).await, 4);
}

/// Two clients have read the same version and send a change with `If-Match`. Only one succeeds,
/// because the other would overwrite a change that it has not read.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_of_the_same_version_one_succeeds_and_the_other_gets_412() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let id = system.users.register().await;
    for version in 1..=10 {
        let read = system.users.get(USER, &format!("/users/{id}")).await.unwrap();
        let etag = read.etag.unwrap();
        assert_eq!(etag, format!("\"{version}\""));
        let names = [format!("left {version}"), format!("right {version}")];
        let answers = join_all(names.iter().map(|name| rename_if_match(&system, id, &etag, name))).await;
        let statuses: BTreeSet<u16> = answers.iter().map(|answer| answer.status.as_u16()).collect();
        assert_eq!(statuses, BTreeSet::from([200, 412]), "{answers:?}");
        let winner = answers.iter().position(|answer| answer.status == 200).unwrap();
        let now = system.users.get(USER, &format!("/users/{id}")).await.unwrap();
        assert_eq!(now.version(), version + 1);
        assert_eq!(now.body["display_name"], names[winner]);
    }
    // A refused change writes no event.
    judge.check(&mut system).await;
    eventually_eq("facts: one per version", 11, async || system.kafka.read(USER_EVENTS).len()).await;
}
