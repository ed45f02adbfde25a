//! The user service's registrations: retries, races and crashes have no second effect.

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

const AT_ONCE: usize = 10;

async fn users(system: &System) -> i64 {
    system.stores.count(USER, "select count(*) from users").await
}

async fn idempotency_keys(system: &System) -> i64 {
    system.stores.count(USER, "select count(*) from idempotency_keys").await
}

/// One user, one fact and one state in the logs, and nothing else.
async fn assert_one_registration(system: &mut System, judge: &Judge) {
    judge.check(system).await;
    assert_eq!(users(system).await, 1, "one user");
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 1, "one fact");
    assert_eq!(system.kafka.read(USER_STATE).len(), 1, "one state");
}

async fn settled(system: &System, email: &str, key: &str) -> Answer {
    send_with_retries(|| system.users.registration(email, Some(key))).await
}

/// T02, I1, I2: clients that lost the answer, or never waited for it, all send the same request again.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_requests_with_one_key_are_one_registration_and_get_one_answer() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let email = address();
    let key = Uuid::now_v7().to_string();
    let answers = join_all((0..50).map(|_| settled(&system, &email, &key))).await;
    assert_eq!(answers[0].status, StatusCode::CREATED, "{:?}", answers[0]);
    for answer in &answers {
        assert_eq!(answer, &answers[0], "all get the first answer");
    }
    assert_one_registration(&mut system, &judge).await;
}

/// T02: the key stands for one request; another one under it is a mistake of the client, and has no effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_used_for_another_request_is_refused() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let key = Uuid::now_v7().to_string();
    let email = address();
    let first = settled(&system, &email, &key).await;
    assert_eq!(first.status, StatusCode::CREATED);
    let other = settled(&system, &address(), &key).await;
    assert_eq!(other.status, StatusCode::UNPROCESSABLE_ENTITY, "{other:?}");
    let body = json!({ "email": email, "display_name": "Countess" });
    let url = system.users.url(USER, "/users");
    let renamed = send_with_retries(|| Client::new().post(&url).header("idempotency-key", &key).json(&body)).await;
    assert_eq!(renamed.status, StatusCode::UNPROCESSABLE_ENTITY, "{renamed:?}");
    assert_one_registration(&mut system, &judge).await;
}

/// T03, I1, I2: one address belongs to one user, whoever is faster, and the losers leave nothing behind. Upper and lower case
/// are one address.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_registrations_of_an_address_wins_and_the_others_leave_nothing() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let email = address();
    let spellings = [email.clone(), email.to_uppercase().replace("EXAMPLE.COM", "example.com")];
    let keys: Vec<String> = (0..20).map(|_| Uuid::now_v7().to_string()).collect();
    let requests = keys.iter().enumerate().map(|(i, key)| settled(&system, &spellings[i % 2], key));
    let mut statuses: Vec<u16> = join_all(requests).await.iter().map(|answer| answer.status.as_u16()).collect();
    statuses.sort_unstable();
    assert_eq!(statuses[0], 201);
    assert_eq!(statuses[1..], [409; 19]);
    assert_eq!(idempotency_keys(&system).await, 1, "a refusal is not stored");
    assert_one_registration(&mut system, &judge).await;
}

/// T01: the service dies at `point` while it answers a registration; what its client then has, the key and the address.
async fn killed_while_registering(system: &mut System, point: &str) -> (String, String) {
    system.processes.start_with(USER, &[("FAULT_AT", &format!("{point}:1:kill"))]).await;
    let email = address();
    let key = Uuid::now_v7().to_string();
    let lost = eventually("the request is handled", async || {
        let answer = system.users.post(&email, Some(&key)).await;
        (!matches!(&answer, Ok(answer) if answer.status == 503)).then_some(answer)
    });
    let lost = lost.await;
    assert!(lost.is_err(), "the client has no answer: {lost:?}");
    system.processes.until_ended(USER).await;
    (email, key)
}

/// T01, I1, I2: nothing of a registration exists before its commit, so the retry makes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_before_the_commit_leaves_nothing_and_the_retry_registers() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let (email, key) = killed_while_registering(&mut system, "user.before_commit").await;
    system.processes.start(&[USER]).await;
    assert_eq!(users(&system).await, 0, "no user");
    assert_eq!(system.stores.outbox_record(USER).await, [], "no event");
    assert_eq!(idempotency_keys(&system).await, 0, "no claimed key");

    let retry = settled(&system, &email, &key).await;
    assert_eq!(retry.status, StatusCode::CREATED, "{retry:?}");
    assert_one_registration(&mut system, &judge).await;
}

/// T01, I1, I2: after the commit everything exists, so the retry gets the answer that was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_before_the_answer_leaves_everything_and_the_retry_gets_that_answer() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let (email, key) = killed_while_registering(&mut system, "user.after_commit").await;
    system.processes.start(&[USER]).await;
    let db = system.stores.database(USER).await;
    let committed: Uuid = sqlx::query_scalar("select id from users").fetch_one(&db).await.unwrap();

    let retry = settled(&system, &email, &key).await;
    assert_eq!(retry.status, StatusCode::CREATED, "{retry:?}");
    assert_eq!((retry.id(), retry.version()), (committed, 1), "the first answer");
    assert_eq!(system.users.post(&email, Some(&key)).await.unwrap(), retry, "and again");
    assert_one_registration(&mut system, &judge).await;
}

/// T45, I1, I2: a service that is frozen inside the transaction holds the address, the key and the relay's lock. Postgres ends
/// its sessions, so a second process goes on under the same key; what the first does when it wakes up has no effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_frozen_inside_a_registration_holds_its_successor_up_only_for_seconds() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    system.processes.start_with(USER, &[("FAULT_AT", "user.before_commit:1:stop")]).await;
    let mut successor = system.processes.spawn_another(USER);
    successor.until_ready().await;
    let email = address();
    let key = Uuid::now_v7().to_string();
    let frozen = tokio::spawn(send(system.users.registration(&email, Some(&key))));
    system.processes.until_frozen(USER).await;

    // Postgres ends the frozen transaction after 5 s. Until then it holds the key, and the answer is to try again.
    let registered = within(Duration::from_secs(15), "the successor registers the user", async || {
        let answer = system.users.at(&successor).post(&email, Some(&key)).await.unwrap();
        assert!([201, 409, 503].contains(&answer.status.as_u16()), "{answer:?}");
        (answer.status == 201).then_some(answer)
    });
    let registered = registered.await;
    // The lock of the relay is free after 15 s.
    system.stores.until_outbox_empty(USER).await;

    system.processes.thaw(USER);
    assert_eq!(
        frozen.await.unwrap().unwrap().status,
        StatusCode::SERVICE_UNAVAILABLE,
        "the frozen one could not commit"
    );
    let again = system.users.post(&email, Some(&key)).await.unwrap();
    assert_eq!(again, registered, "the first process works again, and knows the answer of the second");
    assert_one_registration(&mut system, &judge).await;
}

/// `PATCH /users/{id}` with an `If-Match`.
async fn rename_if(system: &System, id: Uuid, etag: &str, display_name: &str) -> Answer {
    send(system.users.renaming(id, display_name).header("if-match", etag)).await.unwrap()
}

/// I4: commands that come at once, and have read nothing, are ordered by the lock on the user's row: each has a version of its own,
/// and its event has the same.
#[tokio::test(flavor = "multi_thread")]
async fn changes_of_one_user_at_once_have_one_version_each() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let id = system.users.register().await;
    let rename = async |name: usize| {
        let renaming = || system.users.renaming(id, &format!("Ada {name}"));
        send_with_retries(renaming).await.version()
    };
    let mut versions = join_all((0..AT_ONCE).map(rename)).await;
    versions.sort_unstable();
    assert_eq!(versions, (2..).take(AT_ONCE).collect::<Vec<_>>());
    judge.check(&mut system).await;
}

/// T39: an answer is kept for a day, by the clock of the database. After that its key is free, and what it stood for is removed.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_stands_for_its_request_for_a_day() {
    let mut system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    let [young, old, late] = ["young", "old", "late"];
    let age = async |hours: i32| {
        let age = "update idempotency_keys set created_at = created_at - make_interval(hours => $1)";
        sqlx::query(age).bind(hours).execute(&db).await.unwrap();
    };
    let email = address();
    let other = address();
    let first = settled(&system, &email, old).await;
    age(2).await;
    let second = settled(&system, &other, young).await;
    age(23).await;
    assert_eq!(settled(&system, &other, young).await, second, "after 23 hours");
    let anew = settled(&system, &address(), old).await;
    assert_eq!(anew.status, StatusCode::CREATED, "after 25 hours the key is free: {anew:?}");
    assert_ne!(anew.id(), first.id());
    assert_eq!(
        settled(&system, &email, old).await.status,
        StatusCode::UNPROCESSABLE_ENTITY,
        "it stands for the new one"
    );

    settled(&system, &address(), late).await;
    age(1).await; // young is 24 hours old now
    system.processes.start(&[USER]).await;
    eventually_eq("kept", 2, async || idempotency_keys(&system).await).await;
    assert_eq!(users(&system).await, 4);
}

/// Two people who have read the same version cannot both write: the second would undo what it has never seen.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_of_the_version_that_both_have_read_one_wins_and_the_other_is_told() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let id = system.users.register().await;
    for version in 1..=10 {
        let read = system.users.get(USER, &format!("/users/{id}")).await.unwrap();
        let etag = read.etag.unwrap();
        assert_eq!(etag, format!("\"{version}\""));
        let names = [format!("left {version}"), format!("right {version}")];
        let answers = join_all(names.iter().map(|name| rename_if(&system, id, &etag, name))).await;
        let statuses: BTreeSet<u16> = answers.iter().map(|answer| answer.status.as_u16()).collect();
        assert_eq!(statuses, BTreeSet::from([200, 412]), "{answers:?}");
        let winner = answers.iter().position(|answer| answer.status == 200).unwrap();
        let now = system.users.get(USER, &format!("/users/{id}")).await.unwrap();
        assert_eq!((now.version(), &now.body["display_name"]), (version + 1, &json!(names[winner])));
    }
    // What was refused has told nobody.
    judge.check(&mut system).await;
    eventually_eq("one event a version", 11, async || system.kafka.read(USER_EVENTS).len()).await;
}
