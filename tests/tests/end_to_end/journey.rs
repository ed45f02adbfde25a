//! One registration, from the request to every effect, and its erasure from everywhere.

use reqwest::{Client, StatusCode};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tests::http::{send, send_with_retries};
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, CACHE_PROFILES, EMAIL_RECIPIENTS, USER_EVENTS, USER_STATE, groups, service_of};
use tests::users::address;
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, Service, USER};
use uuid::Uuid;

/// Somebody, before and after a change of address and name. No other text of a system is like these.
struct Person {
    id: Uuid,
    addresses: [String; 2],
    names: [String; 2],
}

impl Person {
    fn new() -> Self {
        let name = || format!("Ada {}", Uuid::now_v7().simple());
        Self { id: Uuid::nil(), addresses: [address(), address()], names: [name(), name()] }
    }

    fn personal_data(&self) -> [&str; 4] {
        [&self.addresses[0], &self.addresses[1], &self.names[0], &self.names[1]]
    }
}

/// I1, I5, I8, I13, I14: the whole path, station by station; every metric that the services promise moves on the way; and after
/// the erasure nothing of the person is left in any table, topic, cache key, dead letter, log line or metric.
#[tokio::test(flavor = "multi_thread")]
async fn a_registration_reaches_everybody_and_its_erasure_too() {
    let mut system = System::empty().await;
    let user_relay = Held::relay(&system, USER).await;
    let email_relay = Held::relay(&system, EMAIL).await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    let mut person = Person::new();

    register(&system, &mut person).await;
    waits_in_the_outbox(&system, USER, 2.0).await;
    let funnel = Held::table(&system, ANALYTICS, "funnel").await;
    user_relay.release().await;
    is_mailed(&system, &person).await;
    waits_in_the_outbox(&system, EMAIL, 1.0).await;
    is_tried_again(&system, ANALYTICS_USERS).await;
    funnel.release().await;
    email_relay.release().await;
    eventually_eq("the registration and its mail are counted", (1, 1), async || system.users.funnel().await).await;

    change(&system, &person).await;
    leave_a_dead_letter(&system, &person).await;
    // What is searched for can be found: where it belongs, and nowhere else.
    let holders = ["cache", "email public.recipients", "topic user.state.v1", "user public.users"];
    assert_eq!(judge.places_of(&system, &person.personal_data()).await, holders, "who holds personal data");

    erase(&system, &person).await;
    system.kafka.force_compaction().await;
    let places = async || {
        system.kafka.roll_states().await;
        judge.places_of(&system, &person.personal_data()).await
    };
    eventually_eq("nothing of the person is left", Vec::<String>::new(), places).await;
    settle_the_dead_letters(&system).await;
    every_metric_has_moved(&system).await;
}

/// 201 with id and version alone. The address is also the idempotency key, since callers put anything into it; and the second
/// registration of the address is refused, so that refusals are searched too.
async fn register(system: &System, person: &mut Person) {
    let body = json!({ "email": person.addresses[0], "display_name": person.names[0] });
    let post = || Client::new().post(system.users.url(USER, "/users")).json(&body);
    let answer = send_with_retries(|| post().header("idempotency-key", &person.addresses[0])).await;
    assert_eq!((answer.status, answer.etag.as_deref()), (StatusCode::CREATED, Some("\"1\"")));
    person.id = answer.id();
    assert_eq!(answer.body, json!({ "id": person.id, "version": 1 }));
    let again = send(post()).await.unwrap();
    assert_eq!(again.status, StatusCode::CONFLICT, "{again:?}");
}

/// With the relay held, the outbox shows what it has and how long it has had it.
async fn waits_in_the_outbox(system: &System, service: Service, rows: f64) {
    eventually(&format!("{} shows what waits in its outbox", service.name), async || {
        let age = system.processes.metric(service, "outbox_oldest_age_seconds", &[]).await?;
        (system.processes.metric(service, "outbox_rows", &[]).await? == rows && age >= 1.0).then_some(())
    })
    .await;
}

async fn is_mailed(system: &System, person: &Person) {
    system.users.until_mailed(person.id).await;
    let mails = system.mail.all();
    assert_eq!(mails.len(), 1);
    assert_eq!(mails[0].to, [person.addresses[0].clone()]);
    assert!(mails[0].text.as_ref().unwrap().contains(&person.names[0]));
}

/// With its table held, the handler's statement times out: the batch is put off, not lost.
async fn is_tried_again(system: &System, group: &str) {
    let label = format!("group=\"{group}\"");
    eventually("the batch was put off", async || {
        system.processes.metric(ANALYTICS, "consumer_retries_total", &[&label]).await.filter(|retries| *retries >= 1.0)
    })
    .await;
}

/// Another name, another address; the readers have them as soon as they ask for that version.
async fn change(system: &System, person: &Person) {
    assert_eq!(system.users.until_cached(person.id, 1).await.body["email"], person.addresses[0]);
    assert_eq!(system.users.rename(person.id, &person.names[1]).await.unwrap().version(), 2);
    assert_eq!(system.users.until_cached(person.id, 2).await.body["display_name"], person.names[1]);
    assert_eq!(system.users.change_email(person.id, &person.addresses[1]).await.unwrap().version(), 3);
    assert_eq!(system.users.until_cached(person.id, 3).await.body["email"], person.addresses[1]);
    system.until_drained().await;
}

/// A broken record with the person's data in it: what is kept of it must not outlive the erasure.
async fn leave_a_dead_letter(system: &System, person: &Person) {
    let value = json!({ "email": person.addresses[1], "display_name": person.names[1] }).to_string();
    let whole = Draft { value: Some(value.into_bytes()), ..Draft::envelope("user.state", person.id, 4) };
    system.kafka.write(USER_STATE, &whole.without_header("ce_id")).await;
    until_dead_letters(system, 1.0).await;
}

async fn until_dead_letters(system: &System, open: f64) {
    for group in [EMAIL_RECIPIENTS, CACHE_PROFILES] {
        let count = async || system.processes.dead_letters_open(group).await;
        eventually_eq(&format!("open dead letters of {group}"), Some(open), count).await;
    }
}

async fn erase(system: &System, person: &Person) {
    assert_eq!(system.users.erase(person.id).await.unwrap().status, StatusCode::NO_CONTENT);
    let status = async || system.users.profile(person.id, Some(4)).await.unwrap().status.as_u16();
    eventually_eq("the cache has forgotten", 404, status).await;
    assert_eq!(system.users.get(USER, &format!("/users/{}", person.id)).await.unwrap().status, StatusCode::NOT_FOUND);
    let again = [
        system.users.erase(person.id).await,
        system.users.rename(person.id, &person.names[0]).await,
        system.users.change_email(person.id, &person.addresses[0]).await,
    ];
    for answer in again {
        assert_eq!(answer.unwrap().status, StatusCode::NOT_FOUND, "of somebody who is not there any more");
    }
    system.until_drained().await;
    let facts = system.kafka.read(USER_EVENTS).into_iter();
    let facts: Vec<_> = facts.map(|fact| (fact.version(), fact.header("ce_type").unwrap().to_owned())).collect();
    let expected = ["user.registered", "user.profile_changed", "user.email_changed", "user.deleted"];
    assert_eq!(facts, (1..).zip(expected.map(str::to_owned)).collect::<Vec<_>>());
}

/// The letters point to a record that the compaction took.
async fn settle_the_dead_letters(system: &System) {
    for service in [EMAIL, CACHE] {
        let printed = system.processes.run(service, &["redrive"]).await.unwrap();
        assert!(printed.contains("0 settled, 1 superseded, 0 failed"), "{printed}");
    }
    until_dead_letters(system, 0.0).await;
}

/// Every metric that the issue names: it is there, on the services that have it, and it is not where it began, or it went up and
/// came back, as seen above.
async fn every_metric_has_moved(system: &System) {
    let requests = [
        (USER, "route=\"/users\",status=\"201\""),
        (USER, "route=\"/users\",status=\"409\""),
        (EMAIL, "route=\"/users/{id}/emails\",status=\"200\""),
        (ANALYTICS, "route=\"/funnel\",status=\"200\""),
        (CACHE, "route=\"/profiles/{id}\",status=\"200\""),
    ];
    let mut moved = vec![];
    for (service, label) in requests {
        moved.push((service, "http_request_duration_seconds_count", label.to_owned()));
    }
    for service in [USER, EMAIL] {
        moved.push((service, "relay_rounds_total", "outcome=\"published\"".to_owned()));
    }
    moved.push((EMAIL, "deliveries_settled_total", "state=\"sent\"".to_owned()));
    for group in groups() {
        let label = format!("group=\"{group}\"");
        moved.push((service_of(group), "event_age_seconds_count", label.clone()));
        moved.push((service_of(group), "events_consumed_total", format!("{label},outcome=\"applied\"")));
    }
    for group in [EMAIL_RECIPIENTS, CACHE_PROFILES] {
        let label = format!("group=\"{group}\",outcome=\"dead_lettered\"");
        moved.push((service_of(group), "events_consumed_total", label));
    }
    for (service, name, label) in moved {
        let value = system.processes.metric(service, name, &[&label]).await;
        assert!(value.is_some_and(|value| value >= 1.0), "{} {name} {label}: {value:?}", service.name);
    }
    every_gauge_is_back_at_zero(system).await;
}

async fn every_gauge_is_back_at_zero(system: &System) {
    let mut gauges = vec![];
    for service in [USER, EMAIL] {
        gauges.extend([(service, "outbox_rows", String::new()), (service, "outbox_oldest_age_seconds", String::new())]);
    }
    for state in ["pending", "sending", "unknown", "unaddressed"] {
        gauges.push((EMAIL, "deliveries_open", format!("state=\"{state}\"")));
    }
    for group in groups() {
        let label = format!("group=\"{group}\"");
        gauges.push((service_of(group), "consumer_lag", label.clone()));
        gauges.push((service_of(group), "dead_letters_open", label));
    }
    for (service, name, label) in gauges {
        let value = async || system.processes.metric(service, name, &[&label]).await;
        eventually_eq(&format!("{} {name} {label}", service.name), Some(0.0), value).await;
    }
}

/// Something that a service needs and does not get, so that it can be seen waiting.
struct Held(PgConnection);

impl Held {
    /// The lock that the leading relay of an outbox holds.
    async fn relay(system: &System, service: Service) -> Self {
        Self::by(system, service, "select pg_advisory_lock(x'6f7574626f78'::bigint)").await
    }

    async fn table(system: &System, service: Service, table: &str) -> Self {
        Self::by(system, service, &format!("begin; lock table {table}")).await
    }

    async fn by(system: &System, service: Service, statement: &str) -> Self {
        let mut connection = system.stores.database(service).await.acquire().await.unwrap().detach();
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut connection).await.unwrap();
        Self(connection)
    }

    async fn release(self) {
        self.0.close().await.unwrap();
    }
}
