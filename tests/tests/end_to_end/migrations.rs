//! Migrations: applied by the role that owns the tables, while other releases and other sessions
//! use the database.

use std::borrow::Cow;
use std::time::Duration;

use reqwest::StatusCode;
use shared::platform::database;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{Connection, PgConnection, PgPool, SqlSafeStr};
use testbed::testing::{database, empty_database};
use tests::proxy::Proxy;
use tests::users::address;
use tests::{System, eventually, eventually_eq, throughout};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use topology::{SERVICES, USER, with_database};

/// A rolling deploy: a newer release has migrated the databases, and a process of the older release
/// restarts. It starts, and works.
#[tokio::test(flavor = "multi_thread")]
async fn services_start_on_a_database_that_a_newer_release_has_migrated() {
    let mut system = System::empty().await;
    for service in with_database() {
        let newer = "insert into _sqlx_migrations values (9999, 'of a newer release', now(), true, '', 1)";
        sqlx::query(newer).execute(&system.stores.database(service).await).await.unwrap();
    }
    system.processes.start_all().await;
    let user = system.users.register().await;
    system.until_applied(&[user]).await;
    // The subcommand of the older release has nothing to do.
    for service in with_database() {
        let owner = (&*service.database_url_setting(), system.stores.owner_url(service));
        system.processes.run_with(service, &["migrate"], &[owner]).await.unwrap();
    }
}

/// The role of a running service may not create tables. The service waits, and says for what. It
/// continues by itself when the owner's role has migrated the database.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_waits_until_the_owner_of_the_tables_has_migrated_the_database() {
    let mut system = System::empty().await;
    for service in with_database() {
        let empty = empty_database(service).await;
        system.processes.set(&service.database_url_setting(), &empty.url);
        system.stores.set_database(service, empty);
    }
    for service in SERVICES {
        system.processes.spawn(service);
    }
    for service in with_database() {
        eventually(&format!("{} says what it waits for", service.name), async || {
            let (ready, reasons) = system.processes.status(service).await?;
            (!ready && reasons.to_string().contains("run the subcommand `migrate`")).then_some(())
        })
        .await;
        let owner = (&*service.database_url_setting(), system.stores.owner_url(service));
        let printed = system.processes.run_with(service, &["migrate"], &[owner]).await.unwrap();
        assert!(printed.contains("all migrations"), "{printed}");
    }
    system.processes.until_ready(&SERVICES).await;
    let user = system.users.register().await;
    system.until_applied(&[user]).await;
    for service in with_database() {
        let owned = "select count(*) from pg_class where relowner = (select oid from pg_roles where rolname = $1)";
        let db = system.stores.database(service).await;
        let owned: i64 = sqlx::query_scalar(owned).bind(service.database()).fetch_one(&db).await.unwrap();
        assert_eq!(owned, 0, "tables that the role of {} owns", service.name);
    }
}

/// A migration needs a lock that a long transaction holds. It waits without delaying requests, and
/// is applied after the end of that transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_waits_for_a_lock_delays_no_request() {
    let system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    let mut long = db.begin().await.unwrap();
    sqlx::query("select count(*) from users").execute(&mut *long).await.unwrap();
    let migration = spawn(system.stores.owner_url(USER), "alter table users add more int");
    let attempts = "select count(*) from pg_locks
                    where relation = 'users'::regclass and mode = 'AccessExclusiveLock' and not granted";
    eventually("the migration waits for its lock", async || {
        (tests::stores::count(&db, attempts).await > 0).then_some(())
    })
    .await;
    throughout(Duration::from_secs(8), "a registration succeeds", async || {
        system.users.post(&address(), None).await.unwrap().status == StatusCode::CREATED
    })
    .await;
    assert!(!migration.is_finished());
    long.rollback().await.unwrap();
    migration.await.unwrap().unwrap();
    sqlx::query("select more from users").execute(&db).await.unwrap();
}

/// T45: a process is frozen inside a migration. Postgres ends its session, and another process
/// applies the migration.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_migration_is_replaced() {
    const SLOW: &str = "create table slow (number int); select pg_sleep(1)";
    let url = database(USER).await.owner_url;
    let db = PgPool::connect(&url).await.unwrap();
    let (proxy, through) = Proxy::before_url(&url).await;
    let frozen = spawn(&through, SLOW);
    let sleeping = "select count(*) from pg_stat_activity where application_name = 'migrator' and state = 'active'
                        and datname = current_database() and query like '%pg_sleep%'";
    eventually("the migration runs", async || (tests::stores::count(&db, sleeping).await > 0).then_some(())).await;
    proxy.silence();
    let idle =
        "select count(*) from pg_stat_activity where state = 'idle in transaction' and datname = current_database()";
    eventually_eq("the session of the frozen process, which keeps its locks", 1, async || {
        tests::stores::count(&db, idle).await
    })
    .await;
    let replaced = tokio::time::timeout(tests::DEADLINE, spawn(&url, SLOW)).await;
    replaced.expect("the frozen process keeps its locks").unwrap().unwrap();
    sqlx::query("select number from slow").execute(&db).await.unwrap();
    // The first process finds its session closed, and then nothing to do.
    proxy.heal();
    proxy.reset();
    frozen.await.unwrap().unwrap();
}

/// Only one process applies a migration when several start at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_applied_once_when_several_processes_migrate() {
    let url = database(USER).await.owner_url;
    let migrations = (0..4).map(|_| spawn(&url, "create table once (number int)"));
    for migration in migrations.collect::<Vec<_>>() {
        migration.await.unwrap().unwrap();
    }
    let mut db = PgConnection::connect(&url).await.unwrap();
    sqlx::query("select number from once").execute(&mut db).await.unwrap();
}

/// Migrates as the subcommand does, with one more migration than the release has. On a thread of
/// its own, because the futures of a migrator cannot move between threads.
fn spawn(url: &str, sql: &'static str) -> JoinHandle<anyhow::Result<()>> {
    let url = url.to_owned();
    let kind = MigrationType::Simple;
    let migration = Migration::new(9999, Cow::Borrowed("of this test"), kind, sql.into_sql_str(), false);
    let migrator = Migrator::with_migrations(vec![migration]);
    tokio::task::spawn_blocking(move || Handle::current().block_on(database::migrate(&url, &migrator)))
}
