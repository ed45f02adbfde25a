//! `analytics rebuild` folds the log into new tables and swaps them with the live ones, while the
//! service keeps running. Here the rebuild or the service is killed or frozen at each step.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::{Client, StatusCode};
use sqlx::PgPool;
use testbed::process::Process;
use tests::checker::{Analytics, Audited, Fact};
use tests::http::send;
use tests::processes::is_frozen;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, EMAIL_EVENTS, USER_EVENTS};
use tests::{System, eventually, eventually_eq};
use tokio::task::JoinHandle;
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

/// The fault points of a rebuild, one after each of its effects.
const STEPS: [&str; 7] = [
    "rebuild.created",
    "replay.after_batch",
    "rebuild.caught_up",
    "rebuild.compared",
    "rebuild.locked",
    "rebuild.before_commit",
    "rebuild.after_commit",
];

/// T35, I7: Rebuilds run under load. One is killed at each step, and the last one runs to its end.
/// Before the commit the live tables stay; after it the rebuilt tables have replaced them.
/// During all of this every query is answered, and no count decreases. In the end the tables equal
/// the fold of the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_killed_at_any_step_leaves_a_complete_model() {
    let mut system = System::start().await;
    let db = system.stores.database(ANALYTICS).await;
    let pid = system.processes.pid(ANALYTICS);
    let query_client = QueryClient::start(&system);
    let judge = system.judge().await;
    let load = system.load(2);
    load.until_accepted(20).await;
    for step in STEPS {
        let before = table_id(&db).await;
        let mut rebuild = spawn_rebuild(&system, &format!("{step}:1:kill"));
        let status = rebuild.wait().await;
        let output = system.processes.printed("rebuild");
        assert_eq!(status.signal(), Some(9), "the rebuild was not killed at {step}: {output}");
        let swapped = table_id(&db).await != before;
        assert_eq!(
            swapped,
            step == "rebuild.after_commit",
            "whether a rebuild killed at {step} has swapped the tables"
        );
    }
    let before = table_id(&db).await;
    rebuild(&system, &[]).await.unwrap();
    assert_ne!(table_id(&db).await, before, "the rebuild did not swap the tables");
    load.until_accepted(10).await;
    let answered = load.end().await;
    judge.check_with(&mut system, &answered).await;
    assert!(query_client.stop().await > 50, "too few queries ran alongside the rebuilds");
    assert_eq!(rebuild_schemas(&db).await, Vec::<String>::new(), "schemas of killed rebuilds are left");
    assert_eq!(system.processes.pid(ANALYTICS), pid, "the service was restarted");
    assert!(!system.processes.has_ended(ANALYTICS), "the service has ended");
}

/// T35: the last statement of a rebuild that was killed may still run when the next rebuild drops
/// its tables. Postgres ends one of them because of the deadlock, and the rebuild tries again.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_drops_the_tables_of_a_killed_one_whose_statement_still_runs() {
    let (system, db) = analytics().await;
    let tables = "create schema rebuild_0; create table rebuild_0.a (number int);
                  create table rebuild_0.b (number int); create table rebuild_0.c (number int)";
    sqlx::raw_sql(tables).execute(&db).await.unwrap();
    let mut killed = db.begin().await.unwrap();
    sqlx::query("insert into rebuild_0.b values (1)").execute(&mut *killed).await.unwrap();
    let deadlock = async {
        let locked = "select relation::regclass::text from pg_locks
                      where mode = 'AccessExclusiveLock' and granted
                          and relation in ('rebuild_0.a'::regclass, 'rebuild_0.c'::regclass)
                          and pid in (select pid from pg_locks where not granted)";
        let locked = eventually("the rebuild waits for the second table", async || {
            sqlx::query_scalar::<_, String>(locked).fetch_optional(&db).await.unwrap()
        });
        let insert = format!("insert into {} values (1)", locked.await);
        // If this machine was slow, Postgres ends this statement and not that of the rebuild.
        let _ = sqlx::query(sqlx::AssertSqlSafe(insert)).execute(&mut *killed).await;
        killed.rollback().await.unwrap();
    };
    let (rebuilt, ()) = tokio::join!(rebuild(&system, &[]), deadlock);
    rebuilt.unwrap();
    assert_eq!(rebuild_schemas(&db).await, Vec::<String>::new());
}

/// A rebuild swaps only if the live tables have the migrations of its own release. The running
/// service uses the tables as they are after the swap, whatever its release.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_by_another_release_is_refused() {
    let (system, db) = analytics().await;
    write_registration(&system, 0).await;
    system.users.until_counted(1, 0).await;
    let before = table_id(&db).await;
    let other_migrations =
        "update _sqlx_migrations set checksum = '\\x00' where version = (select max(version) from _sqlx_migrations)";
    sqlx::query(other_migrations).execute(&db).await.unwrap();
    let error = rebuild(&system, &[]).await.unwrap_err().to_string();
    assert!(error.contains("other migrations than this release"), "{error}");
    assert_eq!(table_id(&db).await, before, "the refused rebuild has swapped the tables");
}

/// I7: The rebuild detects a live model that is not the fold of its events. It replaces such a
/// model only with `--accept-differences`.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_replaces_a_different_model_only_on_request() {
    let (system, db) = analytics().await;
    let registration = write_registration(&system, 0).await;
    system.users.until_counted(1, 0).await;
    sqlx::raw_sql("update registrations set registrations = 7; delete from funnel").execute(&db).await.unwrap();
    let error = rebuild(&system, &[]).await.unwrap_err().to_string();
    assert!(error.contains("registrations: 1 rows only in the live model: (\"20"), "{error}");
    assert!(error.contains("funnel: 1 rows only in the rebuilt model"), "{error}");
    assert!(error.contains("--accept-differences"), "{error}");
    assert_eq!(system.users.registrations().await, Some(7), "the refused rebuild has changed the live model");
    rebuild(&system, &["--accept-differences"]).await.unwrap();
    system.users.until_counted(1, 0).await;
    // The inbox was rebuilt as well, so a copy of an applied fact is a duplicate.
    system.kafka.write(USER_EVENTS, &registration).await;
    write_registration(&system, 1).await;
    system.users.until_counted(2, 0).await;
    assert_model_equals_log(&system).await;
}

/// I7 I11: The live model has dead-lettered a fact. The rebuilt model contains it, because the
/// rebuilt tables do not have the bug. A redrive settles the letter without a second effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_applies_a_fact_that_the_live_model_dead_lettered() {
    let (system, db) = analytics().await;
    let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
    let user = String::from_utf8_lossy(fact.key.as_ref().unwrap());
    let bug = format!("alter table funnel add check (user_id <> '{user}')");
    sqlx::raw_sql(sqlx::AssertSqlSafe(bug)).execute(&db).await.unwrap();
    let coordinates = system.kafka.write(USER_EVENTS, &fact).await;
    write_registration(&system, 0).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[coordinates]).await;
    system.users.until_counted(1, 0).await;
    let error = rebuild(&system, &[]).await.unwrap_err().to_string();
    assert!(error.contains("1 effects are new"), "{error}");
    rebuild(&system, &["--accept-differences"]).await.unwrap();
    system.users.until_counted(2, 0).await;
    let printed = system.processes.run(ANALYTICS, &["redrive"]).await.unwrap();
    assert!(printed.contains(&format!("{ANALYTICS_USERS}: 1 settled")), "{printed}");
    assert_model_equals_log(&system).await;
}

/// A topic without its first records gives an incomplete model, and so does an emptied topic. The
/// rebuild reports it. The operator may accept the loss.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_from_a_truncated_log_is_refused() {
    let (system, _) = analytics().await;
    write_registration(&system, 0).await;
    write_registration(&system, 0).await;
    system.users.until_counted(2, 0).await;
    system.kafka.delete_records(USER_EVENTS, 0, 1).await;
    let error = rebuild(&system, &["--accept-differences"]).await.unwrap_err().to_string();
    assert!(error.contains("deleted the first 1 offsets"), "{error}");
    assert!(error.contains("--accept-lost-history"), "{error}");
    let error = rebuild(&system, &["--accept-lost-history"]).await.unwrap_err().to_string();
    assert!(error.contains("2 effects of the live model are lost"), "{error}");
    assert!(error.contains("--accept-differences"), "{error}");
    system.users.until_counted(2, 0).await;
    rebuild(&system, &["--accept-lost-history", "--accept-differences"]).await.unwrap();
    write_registration(&system, 0).await;
    system.users.until_counted(2, 0).await;
    assert_model_equals_log(&system).await;
}

/// An event that only the live model contains is not lost by accident. Here the event was never in
/// Kafka. A rebuild does not wait indefinitely for a service that is down.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_is_refused_if_kafka_lacks_an_event_or_the_service_is_down() {
    let (mut system, db) = analytics().await;
    write_registration(&system, 0).await;
    system.users.until_counted(1, 0).await;
    sqlx::query("insert into inbox values ($1, gen_random_uuid())").bind(ANALYTICS_USERS).execute(&db).await.unwrap();
    let error = rebuild(&system, &["--accept-differences"]).await.unwrap_err().to_string();
    assert!(error.contains("1 effects of the live model come from events that are not in Kafka"), "{error}");
    system.processes.stop(ANALYTICS).await;
    write_registration(&system, 0).await;
    let error = rebuild(&system, &["--wait-seconds", "1"]).await.unwrap_err().to_string();
    assert!(error.contains("is the service running?"), "{error}");
}

/// Everything is compared before the lock that stops the consumers, and not again under it. Events
/// that arrive after the comparison are in the new tables.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_continue_after_the_comparison_and_the_swap_looks_only_at_what_came_since() {
    let (system, db) = analytics().await;
    write_registration(&system, 0).await;
    system.users.until_counted(1, 0).await;
    let before = table_id(&db).await;
    let mut rebuild = spawn_rebuild(&system, "rebuild.compared:1:stop");
    until_frozen(&rebuild).await;
    for partition in 0..3 {
        write_registration(&system, partition).await;
    }
    system.users.until_counted(4, 0).await;
    // A second comparison of the tables would find this.
    sqlx::query("update registrations set registrations = 7").execute(&db).await.unwrap();
    rebuild.thaw();
    assert!(rebuild.wait().await.success(), "{}", system.processes.printed("rebuild"));
    assert_ne!(table_id(&db).await, before, "the rebuild did not swap the tables");
    system.users.until_counted(4, 0).await;
    write_registration(&system, 0).await;
    system.users.until_counted(5, 0).await;
    assert_model_equals_log(&system).await;
}

/// An event that the live model got after the comparison, and that Kafka does not have, is not lost
/// by accident.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_only_the_live_model_got_after_the_comparison_prevents_the_swap() {
    assert_prevents_the_swap("insert into inbox values ('analytics.users', gen_random_uuid())").await;
}

/// The same for a row of the audit, which is its own inbox.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_only_the_live_audit_got_after_the_comparison_prevents_the_swap() {
    let insert = "insert into audit (event_id, user_id, version, type, occurred_at)
                  values (gen_random_uuid(), gen_random_uuid(), 1, 'user.registered', now())";
    assert_prevents_the_swap(insert).await;
}

async fn assert_prevents_the_swap(insert: &'static str) {
    let (system, db) = analytics().await;
    write_registration(&system, 0).await;
    system.users.until_counted(1, 0).await;
    let mut rebuild = spawn_rebuild(&system, "rebuild.compared:1:stop");
    until_frozen(&rebuild).await;
    // With the rights of the service.
    let service = PgPool::connect(system.processes.setting("ANALYTICS_DATABASE_URL")).await.unwrap();
    sqlx::query(insert).execute(&service).await.unwrap();
    rebuild.thaw();
    assert!(!rebuild.wait().await.success(), "{}", system.processes.printed("rebuild"));
    let printed = system.processes.printed("rebuild");
    assert!(printed.contains("1 effects of the live model come from events that are not in Kafka"), "{printed}");
    let triggers = "select count(*) from pg_trigger where tgrelid in ('inbox'::regclass, 'audit'::regclass)";
    assert_eq!(tests::stores::count(&db, triggers).await, 0, "triggers on the live tables");
}

/// T45: Only one rebuild runs at a time. If a rebuild freezes during the swap, Postgres closes its
/// session after seconds. Then the live model is unlocked, and another rebuild can run. The frozen
/// one changes nothing when it resumes.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_rebuild_is_replaced_and_swaps_nothing_when_it_resumes() {
    let (system, db) = analytics().await;
    write_registration(&system, 0).await;
    system.users.until_counted(1, 0).await;
    let mut first = spawn_rebuild(&system, "rebuild.created:1:stop");
    until_frozen(&first).await;
    let error = rebuild(&system, &[]).await.unwrap_err().to_string();
    assert!(error.contains("another rebuild is running"), "{error}");
    first.thaw();
    assert!(first.wait().await.success(), "{}", system.processes.printed("rebuild"));

    let mut frozen = spawn_rebuild(&system, "rebuild.before_commit:1:stop");
    until_frozen(&frozen).await;
    write_registration(&system, 0).await;
    system.users.until_counted(2, 0).await;
    rebuild(&system, &[]).await.unwrap();
    let swapped_in = table_id(&db).await;
    frozen.thaw();
    assert!(!frozen.wait().await.success(), "{}", system.processes.printed("rebuild"));
    assert_eq!(table_id(&db).await, swapped_in, "the resumed rebuild has swapped the tables");
    write_registration(&system, 0).await;
    system.users.until_counted(3, 0).await;
    assert_model_equals_log(&system).await;
}

/// I9: The service is frozen during the swap, before it reads the last event. When it resumes, it
/// applies the event to the new tables, although its statements were prepared for the old ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_frozen_during_the_swap_resumes_in_the_new_tables() {
    let (mut system, db) = analytics().await;
    write_registration(&system, 0).await;
    system.users.until_counted(1, 0).await;
    let before = table_id(&db).await;
    let mut rebuild = spawn_rebuild(&system, "rebuild.caught_up:1:stop");
    until_frozen(&rebuild).await;
    system.processes.freeze(ANALYTICS);
    write_registration(&system, 0).await;
    rebuild.thaw();
    assert!(rebuild.wait().await.success(), "{}", system.processes.printed("rebuild"));
    assert_ne!(table_id(&db).await, before, "the rebuild did not swap the tables");
    system.processes.thaw(ANALYTICS);
    system.users.until_counted(2, 0).await;
    assert_model_equals_log(&system).await;
}

/// T45 I9: The service is frozen inside the transaction of an effect. The swap waits for seconds,
/// until Postgres ends that transaction. Afterwards the event comes again and takes effect once.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_frozen_inside_a_transaction_delays_the_swap_and_loses_nothing() {
    let (mut system, db) = analytics().await;
    write_registration(&system, 0).await;
    system.users.until_counted(1, 0).await;
    system.processes.stop(ANALYTICS).await;
    system.processes.start_with(ANALYTICS, &[("FAULT_AT", "inbox.before_commit:1:stop")]).await;
    let before = table_id(&db).await;
    let mut rebuild = spawn_rebuild(&system, "rebuild.caught_up:1:stop");
    until_frozen(&rebuild).await;
    write_registration(&system, 0).await;
    system.processes.until_frozen(ANALYTICS).await;
    rebuild.thaw();
    eventually("the rebuild retries the swap", async || {
        system.processes.printed("rebuild").contains("will retry the swap").then_some(())
    })
    .await;
    assert_eq!(table_id(&db).await, before, "the rebuild has swapped during a transaction of the service");
    let open_transactions =
        "select count(*) from pg_stat_activity where state = 'idle in transaction' and datname = current_database()";
    eventually_eq("transactions that Postgres has not ended", 0_i64, async || {
        sqlx::query_scalar(open_transactions).fetch_one(&db).await.unwrap()
    })
    .await;
    system.processes.thaw(ANALYTICS);
    assert!(rebuild.wait().await.success(), "{}", system.processes.printed("rebuild"));
    assert_ne!(table_id(&db).await, before, "the rebuild did not swap the tables");
    system.users.until_counted(2, 0).await;
    assert_model_equals_log(&system).await;
}

/// The analytics service, the two services that create its topics, and its database.
async fn analytics() -> (System, PgPool) {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let db = system.stores.database(ANALYTICS).await;
    (system, db)
}

/// Writes the fact of a new user's registration to a partition, and returns it.
async fn write_registration(system: &System, partition: i32) -> Draft {
    let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition);
    system.kafka.write(USER_EVENTS, &fact).await;
    fact
}

/// Runs a rebuild to its end, as the role that owns the tables.
pub(super) async fn rebuild(system: &System, options: &[&str]) -> anyhow::Result<String> {
    let arguments = [&["rebuild"], options].concat();
    let url = ("ANALYTICS_DATABASE_URL", system.stores.owner_url(ANALYTICS));
    system.processes.run_with(ANALYTICS, &arguments, &[url]).await
}

fn spawn_rebuild(system: &System, fault: &str) -> Process {
    let url = ("ANALYTICS_DATABASE_URL", system.stores.owner_url(ANALYTICS));
    system.processes.spawn_subcommand(ANALYTICS, "rebuild", &[], &[("FAULT_AT", fault), url])
}

async fn until_frozen(process: &Process) {
    eventually("the rebuild is frozen", async || is_frozen(process).then_some(())).await;
}

/// The object id of a live table. Each swap changes it.
async fn table_id(db: &PgPool) -> i64 {
    sqlx::query_scalar("select 'funnel'::regclass::oid::bigint").fetch_one(db).await.unwrap()
}

/// The schemas of rebuilds that have not swapped.
async fn rebuild_schemas(db: &PgPool) -> Vec<String> {
    let schemas = r"select nspname::text from pg_namespace where nspname like 'rebuild\_%'";
    sqlx::query_scalar(schemas).fetch_all(db).await.unwrap()
}

/// A client that sends the service's queries, one after another, until it is stopped.
struct QueryClient {
    stop: Arc<AtomicBool>,
    answers: JoinHandle<usize>,
}

impl QueryClient {
    fn start(system: &System) -> Self {
        let urls = ["/funnel", "/registrations?bucket=hour"].map(|path| system.users.url(ANALYTICS, path));
        let stop = Arc::new(AtomicBool::new(false));
        let answers = tokio::spawn(send_queries(urls, stop.clone()));
        Self { stop, answers }
    }

    /// Returns how often both queries were answered.
    ///
    /// # Panics
    /// A query failed, or a count decreased.
    async fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.answers.await.unwrap()
    }
}

async fn send_queries([funnel_url, registrations_url]: [String; 2], stop: Arc<AtomicBool>) -> usize {
    let client = Client::new();
    let mut answers = 0;
    let mut previous = [0; 3];
    while !stop.load(Ordering::Relaxed) {
        let funnel = send(client.get(&funnel_url)).await.unwrap();
        let registrations = send(client.get(&registrations_url)).await.unwrap();
        assert_eq!(funnel.status, StatusCode::OK, "{funnel:?}");
        assert_eq!(registrations.status, StatusCode::OK, "{registrations:?}");
        let hours = registrations.body.as_array().unwrap().iter();
        let registrations: i64 = hours.map(|hour| hour["registrations"].as_i64().unwrap()).sum();
        let in_funnel = |name: &str| funnel.body[name].as_i64().unwrap();
        let counts = [in_funnel("registered"), in_funnel("mailed"), registrations];
        let decreased = counts.iter().zip(&previous).any(|(count, before)| count < before);
        assert!(!decreased, "a count decreased: {counts:?} after {previous:?}");
        answers += 1;
        previous = counts;
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    answers
}

async fn assert_model_equals_log(system: &System) {
    let users = system.kafka.read(USER_EVENTS);
    let emails = system.kafka.read(EMAIL_EVENTS);
    let model = system.stores.analytics().await;
    let folded = Analytics::fold(&Fact::distinct(&users), &Fact::distinct(&emails));
    assert_eq!((model.registrations, model.funnel), folded, "I7: the tables differ from the fold of the log");
    let mut audit = model.audit;
    audit.sort();
    let facts: Vec<Audited> = Fact::distinct(&users).iter().map(Audited::from).collect();
    assert_eq!(audit, facts, "I7: the audit has one row for each fact");
}
