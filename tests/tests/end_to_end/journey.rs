//! One registration, from the request to every effect, and its erasure from every place.

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

/// A user, before and after a change of address and name. These texts occur nowhere else in the
/// system, so a search for them finds only this user.
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

/// I1, I5, I8, I13, I14: The whole path, step by step. The services' metrics move on the way. After
/// the erasure no table, topic, cache key, dead letter, log line or metric contains personal data
/// of the user.
#[tokio::test(flavor = "multi_thread")]
async fn a_registration_and_its_erasure_reach_every_service() {
    let mut system = System::empty().await;
    let user_relay = HeldLock::of_relay(&system, USER).await;
    let email_relay = HeldLock::of_relay(&system, EMAIL).await;
    system.processes.start_all().await;
    let judge = system.judge().await;
    let mut person = Person::new();

    register(&system, &mut person).await;
    until_outbox_shows(&system, USER, 2.0).await;
    let funnel = HeldLock::of_table(&system, ANALYTICS, "funnel").await;
    user_relay.release().await;
    until_mailed(&system, &person).await;
    until_outbox_shows(&system, EMAIL, 1.0).await;
    until_retried(&system, ANALYTICS_USERS).await;
    funnel.release().await;
    email_relay.release().await;
    eventually_eq("the funnel", (1, 1), async || system.users.funnel().await).await;

    change(&system, &person).await;
    cause_dead_letters(&system, &person).await;
    // The search finds the data before the erasure, in the places where it belongs and in no other.
    let holders = ["cache", "email public.recipients", "topic user.state.v1", "user public.users"];
    assert_eq!(judge.places_of(&system, &person.personal_data()).await, holders);

    erase(&system, &person).await;
    system.kafka.force_compaction().await;
    eventually_eq("places with personal data after the erasure", Vec::<String>::new(), async || {
        system.kafka.roll_states().await;
        judge.places_of(&system, &person.personal_data()).await
    })
    .await;
    redrive_dead_letters(&system).await;
    assert_metrics_moved(&system).await;
    until_gauges_are_zero(&system).await;
}

/// The answer is 201 with id and version alone. The address is also the idempotency key, because
/// callers put anything into it. A second registration of the address is refused, so that the
/// search covers refusals too.
async fn register(system: &System, person: &mut Person) {
    let body = json!({ "email": person.addresses[0], "display_name": person.names[0] });
    let post = || Client::new().post(system.users.url(USER, "/users")).json(&body);
    let answer = send_with_retries(|| post().header("idempotency-key", &person.addresses[0])).await;
    assert_eq!(answer.status, StatusCode::CREATED);
    assert_eq!(answer.etag.as_deref(), Some("\"1\""));
    person.id = answer.id();
    assert_eq!(answer.body, json!({ "id": person.id, "version": 1 }));
    let second = send(post()).await.unwrap();
    assert_eq!(second.status, StatusCode::CONFLICT, "{second:?}");
}

/// Waits until the metrics show that this many rows are in the outbox, and that one is a second
/// old. The relay is held, so they stay there.
async fn until_outbox_shows(system: &System, service: Service, rows: f64) {
    eventually(&format!("the metrics of {} show {rows} old outbox rows", service.name), async || {
        let age = system.processes.metric(service, "outbox_oldest_age_seconds", &[]).await?;
        let measured_rows = system.processes.metric(service, "outbox_rows", &[]).await?;
        (measured_rows == rows && age >= 1.0).then_some(())
    })
    .await;
}

async fn until_mailed(system: &System, person: &Person) {
    system.users.until_mailed(person.id).await;
    let mails = system.mail.all();
    assert_eq!(mails.len(), 1);
    assert_eq!(mails[0].to, [person.addresses[0].clone()]);
    assert!(!mails[0].raw.contains(&person.names[0]), "a mail contains no text that a caller chose");
}

/// The table is locked, so the handler's statement times out. The batch is retried later, not lost.
async fn until_retried(system: &System, group: &str) {
    eventually("the metric of retries moves", async || (system.processes.retries(group).await >= 1.0).then_some(()))
        .await;
}

/// Changes name and address. Readers that ask for the new version get it.
async fn change(system: &System, person: &Person) {
    assert_eq!(system.users.until_cached(person.id, 1).await.body["email"], person.addresses[0]);
    assert_eq!(system.users.rename(person.id, &person.names[1]).await.unwrap().version(), 2);
    assert_eq!(system.users.until_cached(person.id, 2).await.body["display_name"], person.names[1]);
    assert_eq!(system.users.change_email(person.id, &person.addresses[1]).await.unwrap().version(), 3);
    assert_eq!(system.users.until_cached(person.id, 3).await.body["email"], person.addresses[1]);
    system.until_drained().await;
}

/// Writes a malformed record with personal data, which becomes a dead letter in two groups. The
/// letters must not keep the data after the erasure.
async fn cause_dead_letters(system: &System, person: &Person) {
    let value = json!({ "email": person.addresses[1], "display_name": person.names[1] }).to_string();
    let state = Draft::envelope("user.state", person.id, 4).with_value(value.as_bytes());
    system.kafka.write(USER_STATE, &state.without_header("ce_id")).await;
    until_open_dead_letters(system, 1.0).await;
}

async fn until_open_dead_letters(system: &System, count: f64) {
    for group in [EMAIL_RECIPIENTS, CACHE_PROFILES] {
        let open = async || system.processes.dead_letters_open(group).await;
        eventually_eq(&format!("open dead letters of {group}"), Some(count), open).await;
    }
}

async fn erase(system: &System, person: &Person) {
    assert_eq!(system.users.erase(person.id).await.unwrap().status, StatusCode::NO_CONTENT);
    let status = async || system.users.profile(person.id, Some(4)).await.unwrap().status.as_u16();
    eventually_eq("the status that the cache answers", 404, status).await;
    assert_eq!(system.users.get(USER, &format!("/users/{}", person.id)).await.unwrap().status, StatusCode::NOT_FOUND);
    let later_commands = [
        system.users.erase(person.id).await,
        system.users.rename(person.id, &person.names[0]).await,
        system.users.change_email(person.id, &person.addresses[0]).await,
    ];
    for answer in later_commands {
        assert_eq!(answer.unwrap().status, StatusCode::NOT_FOUND, "a command on an erased user");
    }
    system.until_drained().await;
    let facts = system.kafka.read(USER_EVENTS).into_iter();
    let facts: Vec<_> = facts.map(|fact| (fact.version(), fact.header("ce_type").unwrap().to_owned())).collect();
    let kinds = ["user.registered", "user.profile_changed", "user.email_changed", "user.deleted"];
    let expected: Vec<_> = (1..).zip(kinds.map(str::to_owned)).collect();
    assert_eq!(facts, expected);
}

/// The letters are pointers to a record that was compacted away, so they are superseded.
async fn redrive_dead_letters(system: &System) {
    for service in [EMAIL, CACHE] {
        let printed = system.processes.run(service, &["redrive"]).await.unwrap();
        assert!(printed.contains("0 settled, 1 superseded, 0 failed"), "{printed}");
    }
    until_open_dead_letters(system, 0.0).await;
}

/// Checks that each counter and histogram has counted something, in every service that has it. The
/// gauges have moved in the steps above.
async fn assert_metrics_moved(system: &System) {
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
    moved.push((EMAIL, "deliveries_ended_total", "state=\"sent\"".to_owned()));
    moved.push((EMAIL, "mail_age_seconds_count", String::new()));
    for group in groups() {
        let label = format!("group=\"{group}\"");
        for name in
            ["event_age_seconds_count", "consumer_batch_records_count", "consumer_handler_duration_seconds_count"]
        {
            moved.push((service_of(group), name, label.clone()));
        }
        moved.push((service_of(group), "consumer_rebalances_total", format!("{label},action=\"assigned\"")));
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
}

/// Waits until every gauge is 0 again, because no work is left.
async fn until_gauges_are_zero(system: &System) {
    let mut gauges = vec![];
    for service in [USER, EMAIL] {
        gauges.push((service, "outbox_rows", String::new()));
        gauges.push((service, "outbox_oldest_age_seconds", String::new()));
    }
    for state in ["pending", "sending", "unknown", "unaddressed"] {
        gauges.push((EMAIL, "deliveries_open", format!("state=\"{state}\"")));
    }
    for group in groups() {
        let label = format!("group=\"{group}\"");
        gauges.push((service_of(group), "consumer_lag", label.clone()));
        gauges.push((service_of(group), "consumer_lag_seconds", label.clone()));
        gauges.push((service_of(group), "dead_letters_open", label));
    }
    for (service, name, label) in gauges {
        let value = async || system.processes.metric(service, name, &[&label]).await;
        eventually_eq(&format!("{} {name} {label}", service.name), Some(0.0), value).await;
    }
}

/// A lock in a service's database. While the test holds it, the service waits.
struct HeldLock(PgConnection);

impl HeldLock {
    /// The lock that the leading relay of a service holds.
    async fn of_relay(system: &System, service: Service) -> Self {
        Self::take(
            system,
            service,
            "select pg_advisory_lock(('x' || substr(md5(current_schema() || '/'), 1, 16))::bit(64)::bigint)",
        )
        .await
    }

    async fn of_table(system: &System, service: Service, table: &str) -> Self {
        Self::take(system, service, &format!("begin; lock table {table}")).await
    }

    async fn take(system: &System, service: Service, statement: &str) -> Self {
        let mut connection = system.stores.database(service).await.acquire().await.unwrap().detach();
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut connection).await.unwrap();
        Self(connection)
    }

    async fn release(self) {
        self.0.close().await.unwrap();
    }
}
