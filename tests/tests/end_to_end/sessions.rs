//! Database sessions that stay open and cannot work any more.

use std::time::Duration;

use reqwest::StatusCode;
use shared::platform::database;
use sqlx::{Connection, PgConnection};
use testbed::testing;
use tests::http::send;
use tests::users::address;
use tests::{System, eventually, within};
use topology::USER;

/// Requests at the same time: more than the pool has sessions.
const CONCURRENT: usize = 20;
/// Longer than the interval at which sessions are replaced.
const SOON: Duration = Duration::from_secs(10);

/// I12: sessions became read-only, as after a failover, and stay so. New sessions are writable. The
/// service replaces its sessions.
#[tokio::test(flavor = "multi_thread")]
async fn requests_succeed_again_when_new_sessions_are_writable() {
    let mut system = System::empty().await;
    let postgres = system.own_postgres().await;
    system.processes.start(&[USER]).await;
    let judge = system.judge().await;
    register_at_once(&system, None).await;
    let mut superuser = PgConnection::connect(&postgres.component.url()).await.unwrap();
    // A setting of the database applies to sessions that begin later, and is stronger than one of
    // the server, which applies to all others.
    for statement in [
        "alter database waybill_user set default_transaction_read_only = off",
        "alter system set default_transaction_read_only = on",
        "select pg_reload_conf()",
    ] {
        sqlx::raw_sql(statement).execute(&mut superuser).await.unwrap();
    }
    // Postgres signals all sessions at once.
    eventually("the open sessions are read-only", async || {
        let read_only: String =
            sqlx::query_scalar("show default_transaction_read_only").fetch_one(&mut superuser).await.unwrap();
        (read_only == "on").then_some(())
    })
    .await;
    within(SOON, "a registration succeeds", async || register(&system).await).await;
    let statuses = register_at_once(&system, None).await;
    assert_eq!(statuses, [StatusCode::CREATED; CONCURRENT], "after the first success");
    judge.check(&mut system).await;
}

/// I12: the prepared statements of a session are lost, as behind a pooler that exchanges the
/// server.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_lost_its_prepared_statements_is_replaced() {
    let system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    register_at_once(&system, None).await;
    let lose = "create function lose() returns trigger language plpgsql as $$ begin
                    if new.display_name like 'lose%' then execute 'deallocate all'; end if;
                    return null;
                end $$;
                create trigger lose after update on users for each row execute function lose();";
    sqlx::raw_sql(lose).execute(&db).await.unwrap();
    let user = system.users.register().await;
    for turn in 0..CONCURRENT {
        let _ = system.users.rename(user, &format!("lose {turn}")).await;
    }
    within(SOON, "a registration succeeds", async || register(&system).await).await;
    for _ in 0..CONCURRENT {
        assert!(register(&system).await.is_some(), "a registration failed after the first success");
    }
}

/// I12: the result of a statement has other columns than when the session prepared it, as after a
/// migration.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_plans_are_invalid_is_replaced() {
    let url = testing::empty_database(USER).await.owner_url;
    let db = database::pool(database::options(&url).unwrap());
    sqlx::raw_sql("create table changed (one int)").execute(&db).await.unwrap();
    // On the same session each time: the pool would open a second one while the first is returned.
    let read = async || {
        eventually("the session is idle", async || (db.num_idle() == 1).then_some(())).await;
        database::bounded(sqlx::query("select * from changed").execute(&db)).await
    };
    read().await.unwrap();
    let mut owner = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("alter table changed add two int").execute(&mut owner).await.unwrap();
    let error = read().await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("0A000"), "{error}");
    read().await.unwrap();
}

/// `None` if the service answers with another status than 201.
async fn register(system: &System) -> Option<()> {
    let answer = system.users.post(&address(), None).await.unwrap();
    (answer.status == StatusCode::CREATED).then_some(())
}

/// The statuses of registrations that are sent at the same time.
async fn register_at_once(system: &System, key: Option<&str>) -> Vec<StatusCode> {
    let requests = (0..CONCURRENT).map(|_| tokio::spawn(send(system.users.registration(&address(), key))));
    let mut statuses = vec![];
    for request in requests.collect::<Vec<_>>() {
        statuses.push(request.await.unwrap().unwrap().status);
    }
    statuses
}
