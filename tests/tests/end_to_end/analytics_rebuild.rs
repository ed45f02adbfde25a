//! `analytics rebuild`: the read model is folded anew beside the live one and takes its place, while everything goes on, and
//! while the rebuild or the service is killed or frozen.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::{Client, StatusCode};
use sqlx::PgPool;
use testbed::process::Process;
use tests::checker::{Analytics, Fact};
use tests::http::send;
use tests::processes::is_frozen;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, EMAIL_EVENTS, USER_EVENTS};
use tests::{System, eventually, eventually_eq};
use tokio::task::JoinHandle;
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

/// Where a rebuild dies: after each of its effects.
const STEPS: [&str; 6] = [
    "rebuild.created",
    "replay.after_batch",
    "rebuild.caught_up",
    "rebuild.locked",
    "rebuild.before_commit",
    "rebuild.after_commit",
];

/// T35, I7: under load, killed at each step, then once to its end. Until the commit the live tables stay, after it they are
/// others; whoever asks meanwhile is answered, and no count goes back. In the end the tables are the fold of the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_may_die_at_any_step_and_ends_with_the_fold_of_the_log() {
    let mut system = System::start().await;
    let db = system.stores.database(ANALYTICS).await;
    let service = system.processes.pid(ANALYTICS);
    let queries = Queries::ask(&system);
    let judge = system.judge().await;
    let load = system.load(2);
    load.until_accepted(20).await;
    for step in STEPS {
        let before = identity(&db).await;
        let mut rebuild = spawn_rebuild(&system, &[], &format!("{step}:1:kill"));
        let status = rebuild.wait().await;
        assert_eq!(status.signal(), Some(9), "killed at {step}: {}", system.processes.printed("rebuild"));
        assert_eq!(identity(&db).await != before, step == "rebuild.after_commit", "swapped when killed at {step}");
    }
    let before = identity(&db).await;
    system.processes.run(ANALYTICS, &["rebuild"]).await.unwrap();
    assert_ne!(identity(&db).await, before, "swapped");
    load.until_accepted(10).await;
    let answers = load.end().await;
    judge.check_with(&mut system, &answers).await;
    assert!(queries.end().await > 50, "queries were asked all the time");
    assert_eq!(schemas(&db).await, Vec::<String>::new(), "nothing is left of the rebuilds that died");
    assert_eq!((system.processes.pid(ANALYTICS), system.processes.has_ended(ANALYTICS)), (service, false));
}

/// A release swaps only tables that it would have made itself: the running one goes on with what it finds.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_by_another_release_is_refused() {
    let (system, db) = analytics().await;
    register(&system, 0).await;
    system.users.until_counted(1, 0).await;
    let before = identity(&db).await;
    let other =
        "update _sqlx_migrations set checksum = '\\x00' where version = (select max(version) from _sqlx_migrations)";
    sqlx::query(other).execute(&db).await.unwrap();
    let refused = system.processes.run(ANALYTICS, &["rebuild"]).await.unwrap_err().to_string();
    assert!(refused.contains("other migrations than this release"), "{refused}");
    assert_eq!(identity(&db).await, before, "not swapped");
}

/// I7: a live model that is not the fold of its events is found out, and goes only on request.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_differs_is_swapped_on_request_only() {
    let (system, db) = analytics().await;
    let registered = register(&system, 0).await;
    system.users.until_counted(1, 0).await;
    sqlx::raw_sql("update registrations set registrations = 7; delete from funnel").execute(&db).await.unwrap();
    let refused = system.processes.run(ANALYTICS, &["rebuild"]).await.unwrap_err().to_string();
    assert!(refused.contains("registrations: 1 rows only in the live model: (\"20"), "{refused}");
    assert!(refused.contains("funnel: 1 rows only in the rebuilt model"), "{refused}");
    assert!(refused.contains("--accept-differences"), "{refused}");
    assert_eq!(system.users.registrations().await, Some(7), "the live model is as it was");
    system.processes.run(ANALYTICS, &["rebuild", "--accept-differences"]).await.unwrap();
    system.users.until_counted(1, 0).await;
    // It still knows what it has.
    system.kafka.write(USER_EVENTS, &registered).await;
    register(&system, 1).await;
    system.users.until_counted(2, 0).await;
    assert_model_is_the_fold(&system).await;
}

/// I7 I11: a fact that the live model had set aside is in the rebuilt one, whose projection takes it; its letter settles without
/// a second effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_takes_in_what_was_set_aside() {
    let (system, db) = analytics().await;
    let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
    let bug =
        format!("alter table funnel add check (user_id <> '{}')", String::from_utf8_lossy(fact.key.as_ref().unwrap()));
    sqlx::raw_sql(sqlx::AssertSqlSafe(bug)).execute(&db).await.unwrap();
    let at = system.kafka.write(USER_EVENTS, &fact).await;
    register(&system, 0).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[at]).await;
    system.users.until_counted(1, 0).await;
    let refused = system.processes.run(ANALYTICS, &["rebuild"]).await.unwrap_err().to_string();
    assert!(refused.contains("1 events are new"), "{refused}");
    system.processes.run(ANALYTICS, &["rebuild", "--accept-differences"]).await.unwrap();
    system.users.until_counted(2, 0).await;
    let redriven = system.processes.run(ANALYTICS, &["redrive"]).await.unwrap();
    assert!(redriven.contains(&format!("{ANALYTICS_USERS}: 1 settled")), "{redriven}");
    assert_model_is_the_fold(&system).await;
}

/// A log that has lost its beginning gives no whole model, and neither does a topic that was emptied. The operator is told, and
/// may give the history up.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_from_a_truncated_log_is_refused() {
    let (system, _) = analytics().await;
    register(&system, 0).await;
    register(&system, 0).await;
    system.users.until_counted(2, 0).await;
    system.kafka.delete_records(USER_EVENTS, 0, 1).await;
    let refused = system.processes.run(ANALYTICS, &["rebuild", "--accept-differences"]).await.unwrap_err().to_string();
    assert!(refused.contains("deleted the first 1 offsets") && refused.contains("--accept-lost-history"), "{refused}");
    let refused = system.processes.run(ANALYTICS, &["rebuild", "--accept-lost-history"]).await.unwrap_err().to_string();
    assert!(refused.contains("the effects of 1 events of the live model are given up"), "{refused}");
    assert!(refused.contains("--accept-differences"), "{refused}");
    system.users.until_counted(2, 0).await;
    let both = ["rebuild", "--accept-lost-history", "--accept-differences"];
    system.processes.run(ANALYTICS, &both).await.unwrap();
    register(&system, 0).await;
    system.users.until_counted(2, 0).await;
    assert_model_is_the_fold(&system).await;
}

/// An event that only the live model has (here: one that was never in Kafka) is not lost by accident either.
#[tokio::test(flavor = "multi_thread")]
async fn a_rebuild_that_lacks_an_event_or_a_running_service_is_refused() {
    let (mut system, db) = analytics().await;
    register(&system, 0).await;
    system.users.until_counted(1, 0).await;
    sqlx::query("insert into inbox values ($1, gen_random_uuid())").bind(ANALYTICS_USERS).execute(&db).await.unwrap();
    let refused = system.processes.run(ANALYTICS, &["rebuild", "--accept-differences"]).await.unwrap_err().to_string();
    assert!(refused.contains("1 events of the live model could not be found in Kafka"), "{refused}");
    system.processes.stop(ANALYTICS).await;
    register(&system, 0).await;
    let refused = system.processes.run(ANALYTICS, &["rebuild", "--wait-seconds", "1"]).await.unwrap_err().to_string();
    assert!(refused.contains("is the service running?"), "{refused}");
}

/// T45: one rebuild at a time. One that is frozen in the middle of the swap lets the live model go after seconds, another rebuild
/// takes its place, and thawed it changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_rebuild_holds_nobody_up_and_swaps_nothing_later() {
    let (system, db) = analytics().await;
    register(&system, 0).await;
    system.users.until_counted(1, 0).await;
    let mut first = spawn_rebuild(&system, &[], "rebuild.created:1:stop");
    until_frozen(&first).await;
    let refused = system.processes.run(ANALYTICS, &["rebuild"]).await.unwrap_err().to_string();
    assert!(refused.contains("another rebuild is running"), "{refused}");
    first.thaw();
    assert!(first.wait().await.success(), "{}", system.processes.printed("rebuild"));

    let mut frozen = spawn_rebuild(&system, &[], "rebuild.before_commit:1:stop");
    until_frozen(&frozen).await;
    register(&system, 0).await;
    system.users.until_counted(2, 0).await;
    system.processes.run(ANALYTICS, &["rebuild"]).await.unwrap();
    let swapped = identity(&db).await;
    frozen.thaw();
    assert!(!frozen.wait().await.success(), "{}", system.processes.printed("rebuild"));
    assert_eq!(identity(&db).await, swapped, "the frozen one swapped nothing");
    register(&system, 0).await;
    system.users.until_counted(3, 0).await;
    assert_model_is_the_fold(&system).await;
}

/// I9: a service that was frozen during the swap, with an event yet to be read, writes it into the new tables, though all that it
/// has prepared was for the old ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_frozen_during_the_swap_goes_on_in_the_new_tables() {
    let (mut system, db) = analytics().await;
    register(&system, 0).await;
    system.users.until_counted(1, 0).await;
    let before = identity(&db).await;
    let mut rebuild = spawn_rebuild(&system, &[], "rebuild.caught_up:1:stop");
    until_frozen(&rebuild).await;
    system.processes.freeze(ANALYTICS);
    register(&system, 0).await;
    rebuild.thaw();
    assert!(rebuild.wait().await.success(), "{}", system.processes.printed("rebuild"));
    assert_ne!(identity(&db).await, before, "swapped");
    system.processes.thaw(ANALYTICS);
    system.users.until_counted(2, 0).await;
    assert_model_is_the_fold(&system).await;
}

/// T45 I9: a service that is frozen in the transaction of an effect keeps the swap waiting, for seconds: Postgres ends the
/// transaction, and the effect comes again, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_frozen_within_its_effect_delays_the_swap_and_loses_nothing() {
    let (mut system, db) = analytics().await;
    register(&system, 0).await;
    system.users.until_counted(1, 0).await;
    system.processes.stop(ANALYTICS).await;
    system.processes.start_with(ANALYTICS, &[("FAULT_AT", "inbox.before_commit:1:stop")]).await;
    let before = identity(&db).await;
    let mut rebuild = spawn_rebuild(&system, &[], "rebuild.caught_up:1:stop");
    until_frozen(&rebuild).await;
    register(&system, 0).await;
    system.processes.until_frozen(ANALYTICS).await;
    rebuild.thaw();
    eventually("the swap has to wait", async || {
        system.processes.printed("rebuild").contains("trying again").then_some(())
    })
    .await;
    assert_eq!(identity(&db).await, before, "not swapped while somebody writes");
    let open =
        "select count(*) from pg_stat_activity where state = 'idle in transaction' and datname = current_database()";
    eventually_eq("Postgres ends the transaction", 0_i64, async || {
        sqlx::query_scalar(open).fetch_one(&db).await.unwrap()
    })
    .await;
    system.processes.thaw(ANALYTICS);
    assert!(rebuild.wait().await.success(), "{}", system.processes.printed("rebuild"));
    assert_ne!(identity(&db).await, before, "swapped");
    system.users.until_counted(2, 0).await;
    assert_model_is_the_fold(&system).await;
}

/// The user and email services, for their topics, and analytics; and analytics' database.
async fn analytics() -> (System, PgPool) {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let db = system.stores.database(ANALYTICS).await;
    (system, db)
}

/// The fact of a registration, which is written to a partition.
async fn register(system: &System, partition: i32) -> Draft {
    let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition);
    system.kafka.write(USER_EVENTS, &fact).await;
    fact
}

fn spawn_rebuild(system: &System, arguments: &[&str], fault: &str) -> Process {
    system.processes.spawn_subcommand(ANALYTICS, "rebuild", arguments, &[("FAULT_AT", fault)])
}

async fn until_frozen(process: &Process) {
    eventually("the rebuild is frozen", async || is_frozen(process).then_some(())).await;
}

/// Changes with every swap.
async fn identity(db: &PgPool) -> i64 {
    let identity = "select 'funnel'::regclass::oid::bigint";
    sqlx::query_scalar(identity).fetch_one(db).await.unwrap()
}

/// What rebuilds have left.
async fn schemas(db: &PgPool) -> Vec<String> {
    let left = r"select nspname::text from pg_namespace where nspname like 'rebuild\_%'";
    sqlx::query_scalar(left).fetch_all(db).await.unwrap()
}

/// Asks the service's queries all the time.
struct Queries {
    over: Arc<AtomicBool>,
    answers: JoinHandle<usize>,
}

impl Queries {
    fn ask(system: &System) -> Self {
        let urls = ["/funnel", "/registrations?bucket=hour"].map(|path| system.users.url(ANALYTICS, path));
        let over = Arc::new(AtomicBool::new(false));
        let answers = tokio::spawn(ask(urls, over.clone()));
        Self { over, answers }
    }

    /// How many answers came, all of them good.
    async fn end(self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        self.answers.await.unwrap()
    }
}

async fn ask([funnel, registrations]: [String; 2], over: Arc<AtomicBool>) -> usize {
    let client = Client::new();
    let mut answers = 0;
    let mut counted = [0; 3];
    while !over.load(Ordering::Relaxed) {
        let funnel = send(client.get(&funnel)).await.unwrap();
        let registrations = send(client.get(&registrations)).await.unwrap();
        assert_eq!(
            (funnel.status, registrations.status),
            (StatusCode::OK, StatusCode::OK),
            "{funnel:?} {registrations:?}"
        );
        let hours = registrations.body.as_array().unwrap().iter();
        let registrations: i64 = hours.map(|hour| hour["registrations"].as_i64().unwrap()).sum();
        let count = |name: &str| funnel.body[name].as_i64().unwrap();
        let now = [count("registered"), count("mailed"), registrations];
        assert!(now.iter().zip(&counted).all(|(now, before)| now >= before), "{now:?} after {counted:?}");
        answers += 1;
        counted = now;
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    answers
}

async fn assert_model_is_the_fold(system: &System) {
    let users = system.kafka.read(USER_EVENTS);
    let emails = system.kafka.read(EMAIL_EVENTS);
    let model = system.stores.analytics().await;
    let folded = Analytics::fold(&Fact::distinct(&users), &Fact::distinct(&emails));
    assert_eq!((model.registrations, model.funnel), folded, "I7: the tables, and the fold of the log");
}
