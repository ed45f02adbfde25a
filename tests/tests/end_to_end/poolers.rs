//! Limits of sessions, and poolers of sessions between a service and Postgres.

use std::collections::BTreeSet;

use tests::pooler::Pooler;
use tests::services::USER_EVENTS;
use tests::{System, eventually, eventually_eq};
use topology::USER;

/// Records which settings the sessions of the service have that write: those of the pool insert
/// users, and that of the relay deletes rows of the outbox.
const RECORD: &str = "
    create table seen (session text, name text, value text, source text, unique (session, name, value, source));
    create function see() returns trigger language plpgsql as $$ begin
        insert into seen select current_setting('application_name'), name, setting, source from pg_settings
            where name like '%_timeout' and source <> 'default' or source = 'client'
            on conflict do nothing;
        return null;
    end $$;
    create trigger see after insert on users for each statement execute function see();
    create trigger see after delete on outbox for each statement execute function see();";

/// The limits of the pool, and those of the relay.
const LIMITS: [(&str, &str, &str); 6] = [
    ("", "statement_timeout", "5000"),
    ("", "lock_timeout", "2000"),
    ("", "idle_in_transaction_session_timeout", "5000"),
    ("relay", "idle_session_timeout", "15000"),
    ("relay", "statement_timeout", "5000"),
    ("relay", "idle_in_transaction_session_timeout", "10000"),
];

/// Registers a user and waits until the relay has published the event.
async fn register(system: &System) {
    let user = system.users.register().await;
    let published = async || system.kafka.read_key(USER_EVENTS, user).len();
    eventually_eq("facts about the user", 1, published).await;
    system.stores.until_outbox_empty(USER).await;
}

/// Every session has its limits, and got them by a statement.
async fn assert_limits(system: &System) {
    register(system).await;
    let db = system.stores.database(USER).await;
    let set = "select session, name, value from seen where source = 'session' and name like '%_timeout'";
    let set: BTreeSet<(String, String, String)> =
        sqlx::query_as::<_, (String, String, String)>(set).fetch_all(&db).await.unwrap().into_iter().collect();
    let expected = LIMITS.map(|(session, name, value)| (session.to_owned(), name.to_owned(), value.to_owned()));
    assert_eq!(set, expected.into());
    let startup = "select distinct name from seen where source = 'client' order by name";
    let startup: Vec<String> = sqlx::query_scalar(startup).fetch_all(&db).await.unwrap();
    // PgBouncer accepts these, and no others.
    let accepted = ["DateStyle", "TimeZone", "application_name", "client_encoding"];
    let other: Vec<_> = startup.iter().filter(|name| !accepted.contains(&name.as_str())).collect();
    assert!(other.is_empty(), "startup options that a pooler refuses: {other:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_session_gets_its_limits_after_connecting() {
    let system = System::start_only(&[USER]).await;
    sqlx::raw_sql(RECORD).execute(&system.stores.database(USER).await).await.unwrap();
    assert_limits(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_works_behind_a_pooler_in_session_mode() {
    let mut system = System::empty().await;
    let Some(pooler) = Pooler::start(system.stores.urls(USER), "session").await else { return };
    sqlx::raw_sql(RECORD).execute(&system.stores.database(USER).await).await.unwrap();
    let url = pooler.url();
    let settings = [("USER_DATABASE_URL", &*url)];
    system.processes.start_with(USER, &settings).await;
    assert_limits(&system).await;
    system.processes.run_with(USER, &["republish"], &settings).await.unwrap();
}

/// T62: the service does not use a pooler in transaction mode, and `/status` says what to do. It
/// continues when the pooler is switched to session mode.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_refuses_a_pooler_in_transaction_mode() {
    let mut system = System::empty().await;
    let Some(mut pooler) = Pooler::start(system.stores.urls(USER), "transaction").await else { return };
    let url = pooler.url();
    let settings = [("USER_DATABASE_URL", &*url)];
    system.processes.spawn_with(USER, &settings);
    until_refused(&system, "database").await;
    let error = system.processes.run_with(USER, &["republish"], &settings).await.unwrap_err().to_string();
    assert!(error.contains("pool_mode = session"), "{error}");
    assert!(!system.processes.has_ended(USER), "the pooler must not end the process");

    pooler.set_mode("session");
    system.processes.until_ready(&[USER]).await;
    register(&system).await;
}

/// T62: a relay asks again in each term whether its session is its own, because the pooler may be
/// switched while the service runs. The advisory lock would exclude no other relay.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_does_not_lead_behind_a_pooler_that_was_switched_to_transaction_mode() {
    let mut system = System::empty().await;
    let Some(mut pooler) = Pooler::start(system.stores.urls(USER), "session").await else { return };
    system.processes.start_with(USER, &[("USER_DATABASE_URL", &pooler.url())]).await;
    register(&system).await;
    pooler.set_mode("transaction");
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity
               where application_name = 'relay' and datname = current_database()";
    eventually("the relay lost its session and refuses the pooler", async || {
        sqlx::raw_sql(end).execute(&system.stores.database(USER).await).await.unwrap();
        is_refused(&system, "outbox relay").await.then_some(())
    })
    .await;
}

async fn until_refused(system: &System, component: &str) {
    let what = format!("/status says what to do about {component}");
    eventually(&what, async || is_refused(system, component).await.then_some(())).await;
}

async fn is_refused(system: &System, component: &str) -> bool {
    let Some((_, body)) = system.processes.status(USER).await else { return false };
    body["waiting_for"][component].as_str().is_some_and(|reason| reason.contains("set `pool_mode = session`"))
}
