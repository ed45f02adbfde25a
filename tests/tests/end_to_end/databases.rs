//! Databases that fail over while a service starts, that have other defaults, or whose sessions are
//! all in use.

use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use testbed::testing;
use tests::http::send;
use tests::proxy::Proxy;
use tests::users::address;
use tests::{System, eventually, throughout};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use topology::USER;
use uuid::Uuid;

/// More callers than the service has database sessions.
const CALLERS: usize = 60;
/// Longer than a request waits for a session.
const BUSY: Duration = Duration::from_secs(8);
/// The pause of a caller after each answer. It leaves processor time to the service.
const PAUSE: Duration = Duration::from_millis(50);

/// The text of `/status` about the database. Empty if there is none.
async fn database_reason(system: &System) -> String {
    let status = system.processes.status(USER).await;
    let reason = status.and_then(|(_, body)| body["waiting_for"]["database"].as_str().map(str::to_owned));
    reason.unwrap_or_default()
}

async fn until_database_waits_for(system: &System, text: &str) {
    let what = format!("/status says of the database: {text}");
    eventually(&what, async || database_reason(system).await.contains(text).then_some(())).await;
}

/// A server that closes each connection before it answers, as a proxy without a server behind it.
async fn closing_server() -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut task = JoinSet::new();
    task.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // The request for TLS. Without reading it, the close would be a reset.
            let _ = stream.read(&mut [0; 8]).await;
        }
    });
    (address, task)
}

/// `host:port` of a URL with a user.
fn server_of(url: &str) -> String {
    url.split('@').nth(1).unwrap().split('/').next().unwrap().to_owned()
}

async fn as_superuser(statement: String) {
    let mut superuser = PgConnection::connect(&testing::stack().postgres).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut superuser).await.unwrap();
}

fn name_of(url: &str) -> String {
    url.rsplit('/').next().unwrap().to_owned()
}

/// T65, I12: during a failover a proxy accepts connections and closes them without an answer. A
/// service that starts waits, and so does `migrate`.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_starts_waits_for_a_database_that_closes_connections() {
    let mut system = System::empty().await;
    let server = server_of(system.stores.owner_url(USER));
    let (closing, _task) = closing_server().await;
    let proxy = Proxy::before(&closing).await;
    let setting = USER.database_url_setting();
    let url = system.processes.setting(&setting).replace(&server, &proxy.address());
    let owner_url = system.stores.owner_url(USER).replace(&server, &proxy.address());
    system.processes.spawn_with(USER, &[(setting.as_str(), url.as_str())]);
    let migration = system.processes.spawn_subcommand(USER, "migrate", &[], &[(setting.as_str(), owner_url.as_str())]);
    until_database_waits_for(&system, "cannot connect").await;
    assert!(!system.processes.has_ended(USER), "an outage must not end the process");
    eventually("the migration waits", async || {
        system.processes.printed("migrate").contains("will retry").then_some(())
    })
    .await;
    proxy.redirect(server);
    system.processes.until_ready(&[USER]).await;
    let has_migrated = async || system.processes.printed("migrate").contains("has all migrations").then_some(());
    eventually("the migration has ended", has_migrated).await;
    drop(migration);
    system.users.register().await;
}

/// T65, I12: a server that is frozen accepts connections and answers nothing. The connection stays
/// silent after the failover.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_starts_gives_up_a_connection_that_is_not_answered() {
    let mut system = System::empty().await;
    let (proxy, (setting, url)) = system.proxied_database(USER).await;
    proxy.silence();
    system.processes.spawn_with(USER, &[(setting.as_str(), url.as_str())]);
    until_database_waits_for(&system, "no answer within").await;
    proxy.heal();
    system.processes.until_ready(&[USER]).await;
    system.users.register().await;
}

/// T65, I12: the database lacks migrations and its sessions are read-only, as on a standby.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_starts_waits_for_a_writable_database() {
    let mut system = System::empty().await;
    let database = testing::empty_database(USER).await;
    let name = name_of(&database.owner_url);
    as_superuser(format!("alter database {name} set default_transaction_read_only = on")).await;
    system.processes.set(&USER.database_url_setting(), &database.owner_url);
    system.processes.spawn(USER);
    until_database_waits_for(&system, "read-only transaction").await;
    assert!(!system.processes.has_ended(USER), "an outage must not end the process");
    as_superuser(format!("alter database {name} reset default_transaction_read_only")).await;
    system.processes.until_ready(&[USER]).await;
    system.users.register().await;
}

/// I1, I3: an operator has switched off durable commits for the database. The sessions of the
/// service switch them on. A value that is stronger than the default stays.
#[tokio::test(flavor = "multi_thread")]
async fn commits_are_durable_whatever_the_default_of_the_database_is() {
    let mut system = System::empty().await;
    let db = system.stores.database(USER).await;
    let record = "create table commits (value text not null);
                  create function record_commit() returns trigger language plpgsql as $$ begin
                      insert into commits values (current_setting('synchronous_commit'));
                      return null;
                  end $$;
                  create trigger record_commit after insert or delete on outbox
                      for each statement execute function record_commit();";
    sqlx::raw_sql(record).execute(&db).await.unwrap();
    let name = name_of(system.stores.owner_url(USER));
    for (default, expected) in [("off", "on"), ("remote_apply", "remote_apply")] {
        as_superuser(format!("alter database {name} set synchronous_commit = {default}")).await;
        system.processes.start(&[USER]).await;
        sqlx::raw_sql("truncate commits").execute(&db).await.unwrap();
        system.users.register().await;
        // Inserted by a request, deleted by the relay.
        system.stores.until_outbox_empty(USER).await;
        let values = sqlx::query_scalar("select distinct value from commits").fetch_all(&db).await;
        assert_eq!(values.unwrap() as Vec<String>, [expected], "the default is {default}");
        system.processes.stop(USER).await;
    }
}

/// The encoding of the database cannot store every name, so a request would fail at random.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_another_encoding_is_refused_at_start() {
    let mut system = System::empty().await;
    let name = format!("test_latin_{}", Uuid::now_v7().simple());
    let owner = USER.owner();
    as_superuser(format!("create database {name} owner {owner} encoding 'LATIN1' locale 'C' template template0")).await;
    let owner_url = system.stores.owner_url(USER).to_owned();
    let url = owner_url.replace(&name_of(&owner_url), &name);
    system.processes.set(&USER.database_url_setting(), &url);
    let error = system.processes.run(USER, &["migrate"]).await.unwrap_err().to_string();
    assert!(error.contains("the encoding of the database is LATIN1") && error.contains("encoding 'UTF8'"), "{error}");
    system.processes.spawn(USER);
    system.processes.until_ended(USER).await;
    let log = system.processes.log(USER);
    assert!(log.contains("the encoding of the database is LATIN1"), "{log}");
}

/// The database refuses a value that the service had accepted: a retry would fail again, so the
/// answer does not ask for one.
#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_the_database_refuses_is_a_bug_and_not_an_outage() {
    let system = System::start_only(&[USER]).await;
    let user = system.users.register().await;
    let refuse = "create function refuse() returns trigger language plpgsql as $$ begin
                      raise exception 'refused' using errcode = new.display_name;
                  end $$;
                  create trigger refuse before update on users for each row execute function refuse();";
    sqlx::raw_sql(refuse).execute(&system.stores.database(USER).await).await.unwrap();
    for (code, status) in [("22P05", 500), ("23514", 500), ("53100", 503)] {
        let answer = send(system.users.renaming(user, code)).await.unwrap();
        assert_eq!(answer.status.as_u16(), status, "{code}: {answer:?}");
    }
}

/// Repeats a request from many callers until it is dropped.
fn call_repeatedly(request: impl Fn() -> reqwest::RequestBuilder + Send + Sync + 'static) -> JoinSet<()> {
    let request = Arc::new(request);
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let request = Arc::clone(&request);
        callers.spawn(async move {
            loop {
                let _ = send(request()).await;
                tokio::time::sleep(PAUSE).await;
            }
        });
    }
    callers
}

async fn until_sessions_wait_for_a_lock(system: &System, sessions: i64) {
    let waiting =
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()";
    eventually("sessions wait for the lock", async || {
        (system.stores.count(USER, waiting).await >= sessions).then_some(())
    })
    .await;
}

/// T66: a transaction holds the row of one user, and many callers change this user. Other users are
/// read and changed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_user_does_not_delay_other_users() {
    let system = System::start_only(&[USER]).await;
    let [locked, other] = [system.users.register().await, system.users.register().await];
    let db = system.stores.database(USER).await;
    let mut lock = db.begin().await.unwrap();
    sqlx::query("select from users where id = $1 for update").bind(locked).execute(&mut *lock).await.unwrap();
    let users = system.users.clone();
    let callers = call_repeatedly(move || users.renaming(locked, "Locked"));
    until_sessions_wait_for_a_lock(&system, 2).await;
    throughout(BUSY, "other users are read and changed", async || {
        let read = system.users.get(USER, &format!("/users/{other}")).await.unwrap();
        assert_eq!(read.status, StatusCode::OK, "{read:?}");
        let changed = send(system.users.renaming(other, "Free")).await.unwrap();
        assert_eq!(changed.status, StatusCode::OK, "{changed:?}");
        assert_eq!(system.processes.admin(USER).is_ready().await, Some(true));
        let refused = send(system.users.renaming(locked, "Locked")).await.unwrap();
        assert_eq!(refused.status, StatusCode::CONFLICT, "{refused:?}");
        assert_eq!(refused.body["type"], "/problems/busy");
        true
    })
    .await;
    drop(callers);
    lock.rollback().await.unwrap();
    eventually("the user can be changed", async || {
        let changed = send(system.users.renaming(locked, "Unlocked")).await.unwrap();
        (changed.status == StatusCode::OK).then_some(())
    })
    .await;
}

/// T66: all rows are locked, and many callers change and register different users. Users are read
/// meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn commands_that_wait_leave_sessions_to_reads() {
    let system = System::start_only(&[USER]).await;
    let user = system.users.register().await;
    let db = system.stores.database(USER).await;
    let mut lock = db.begin().await.unwrap();
    sqlx::query("lock table users in exclusive mode").execute(&mut *lock).await.unwrap();
    let users = system.users.clone();
    let _callers = call_repeatedly(move || users.registration(&address(), None));
    until_sessions_wait_for_a_lock(&system, 5).await;
    throughout(BUSY, "the user is read", async || {
        let read = system.users.get(USER, &format!("/users/{user}")).await.unwrap();
        assert_eq!(read.status, StatusCode::OK, "{read:?}");
        system.processes.admin(USER).is_ready().await == Some(true)
    })
    .await;
}

/// T66: every statement waits for a lock, so all sessions are in use. The database answers, so the
/// process stays ready, and `/status` says what it waits for.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_whose_sessions_are_all_in_use_is_ready_and_says_so() {
    let system = System::start_only(&[USER]).await;
    let user = system.users.register().await;
    let db = system.stores.database(USER).await;
    let mut lock = db.begin().await.unwrap();
    sqlx::query("lock table users in access exclusive mode").execute(&mut *lock).await.unwrap();
    let url = system.users.url(USER, &format!("/users/{user}"));
    let callers = call_repeatedly(move || reqwest::Client::new().get(&url));
    until_database_waits_for(&system, "a free session").await;
    throughout(BUSY, "the process is ready", async || system.processes.admin(USER).is_ready().await == Some(true))
        .await;
    drop(callers);
    lock.rollback().await.unwrap();
    eventually("the database is not in /status", async || database_reason(&system).await.is_empty().then_some(()))
        .await;
}
