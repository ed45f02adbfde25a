//! A record fails each time although the database works, for a reason that does not show that the
//! record is bad. It blocks its own partition and no other, until its cause is fixed or an operator
//! dead-letters it.

use sqlx::PgPool;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, CACHE_PROFILES, DEFAULT_CONSUMERS, USER_EVENTS, USER_STATE};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, USER};
use uuid::Uuid;

use crate::dead_letters::{analytics, analytics_with, redrive, remove_bug};

/// The partition with the failing record, and another one.
const BLOCKED: i32 = 0;
const OTHER: i32 = 4;
const REASON: &str = "failing_record";

fn registration(user: Uuid, partition: i32) -> Draft {
    Draft::user_event("user.registered", user, 1).on(partition)
}

/// Gives the handler a bug: the database raises this error for one user.
pub async fn add_bug(db: &PgPool, user: Uuid, error: &str) {
    let sql = format!(
        "create function bug() returns trigger language plpgsql as
             $$ begin if new.user_id = '{user}' then {error}; end if; return new; end $$;
         create trigger bug before insert or update on funnel for each row execute function bug()"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.as_str())).execute(db).await.unwrap();
}

/// The lag of a partition, by the log: what is committed, and the end.
fn lag(system: &System, partition: i32) -> Option<String> {
    let start = format!("{ANALYTICS_USERS} {partition}: ");
    system.kafka.lag(ANALYTICS_USERS).into_iter().find(|line| line.starts_with(&start))
}

/// T54, I9, I11, I12: one record of a batch fails with an error of the database that names no class
/// of data. What precedes it in its partition is kept, the other partitions continue, and it gets
/// no dead letter. When the bug is fixed, its partition continues in order.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_fails_blocks_only_its_partition_until_the_cause_is_fixed() {
    for error in ["raise exception 'ada@secret.example is not welcome'", "raise program_limit_exceeded"] {
        let (mut system, db) = analytics_with(&DEFAULT_CONSUMERS).await;
        system.processes.stop(ANALYTICS).await;
        let failing = Uuid::now_v7();
        add_bug(&db, failing, error).await;
        let before =
            [(Uuid::now_v7(), BLOCKED), (failing, BLOCKED), (Uuid::now_v7(), BLOCKED), (Uuid::now_v7(), OTHER)];
        let facts = before.map(|(user, partition)| registration(user, partition));
        let (_, offset) = system.kafka.write_all(USER_EVENTS, &facts).await[1];
        // Another release knows this type. It is skipped, before the failing record and after it.
        system.kafka.write(USER_EVENTS, &Draft::user_event("user.promoted", failing, 2).on(BLOCKED)).await;
        // Not `start`, which waits until `/status` reports nothing.
        system.processes.spawn(ANALYTICS);

        let coordinates = format!("{}-{BLOCKED}-{offset}", system.kafka.prefixed(USER_EVENTS));
        let reported = system.processes.until_reported(ANALYTICS, &coordinates).await;
        assert_eq!(reported, [format!("{ANALYTICS_USERS} 0 partition {BLOCKED} {REASON}")]);
        system.users.until_counted(2, 0).await;
        system.kafka.write(USER_EVENTS, &registration(Uuid::now_v7(), OTHER)).await;
        system.kafka.write(USER_EVENTS, &registration(Uuid::now_v7(), BLOCKED)).await;
        system.users.until_counted(3, 0).await;
        eventually_eq("waiting partitions", 1, async || {
            system.processes.waiting_partitions(ANALYTICS_USERS, REASON).await
        })
        .await;
        let committed = Some(format!("{ANALYTICS_USERS} {BLOCKED}: {offset} of 5"));
        eventually_eq("the committed offset", committed, async || lag(&system, BLOCKED)).await;
        let labels = [&*format!("group=\"{ANALYTICS_USERS}\""), &*format!("partition=\"{BLOCKED}\"")];
        let lag = async || system.processes.metric(ANALYTICS, "consumer_lag", &labels).await;
        eventually_eq("the metric of the lag", Some(4.0), lag).await;
        assert_eq!(system.processes.admin(ANALYTICS).is_ready().await, Some(true), "/readyz");
        assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0, "no operator has decided");

        remove_bug(&db).await;
        system.users.until_counted(6, 0).await;
        system.processes.until_nothing_reported(ANALYTICS).await;
        system.kafka.until_caught_up(ANALYTICS_USERS).await;
        assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
        eventually_eq("counted records", 7.0, async || system.processes.counted_in_all(ANALYTICS_USERS).await).await;
        assert!(!system.processes.log(ANALYTICS).contains("ada@secret.example"), "the log quotes the database");
    }
}

/// T54, I9, I11: an operator dead-letters the record by its coordinates, and its partition
/// continues. Only a record that blocks a partition can be dead-lettered. The letter can be
/// redriven when the bug is fixed.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_dead_letters_a_record_that_blocks_its_partition() {
    let (mut system, db) = analytics().await;
    let token = "0123456789abcdef0123456789abcdef";
    system.processes.set("ADMIN_TOKEN", token);
    system.processes.start_with(ANALYTICS, &[("ADMIN_TOKENS", &format!("on-call:{token}"))]).await;
    let failing = Uuid::now_v7();
    add_bug(&db, failing, "raise exception 'no'").await;
    let facts = [(failing, BLOCKED), (Uuid::now_v7(), BLOCKED)].map(|(user, partition)| registration(user, partition));
    let written = system.kafka.write_all(USER_EVENTS, &facts).await;
    let coordinates =
        |(partition, offset): (i32, i64)| format!("{}-{partition}-{offset}", system.kafka.prefixed(USER_EVENTS));
    let [record, next] = [coordinates(written[0]), coordinates(written[1])];
    system.processes.until_reported(ANALYTICS, &record).await;
    let dead_letter = async |coordinates: &str, reason: &str| {
        system.processes.run(ANALYTICS, &["dead-letter", coordinates, "--reason", reason]).await
    };

    let refused = dead_letter(&next, "why not").await.unwrap_err().to_string();
    assert!(refused.contains("404") && refused.contains(&next), "{refused}");
    assert!(dead_letter(&record, "").await.is_err());
    assert!(dead_letter("user.events.v1", "why").await.is_err());
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
    let done = dead_letter(&record, "user 17 of the import of May").await.unwrap();
    assert!(done.contains(&record), "{done}");
    eventually("the decision is logged with the operator and the record", async || {
        let log = system.processes.log(ANALYTICS);
        let mut decided = log.lines().filter(|line| line.contains("\"an operator acts\""));
        decided.any(|line| line.contains("\"on-call\"") && line.contains(&record)).then_some(())
    })
    .await;

    system.users.until_counted(1, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    system.processes.until_nothing_reported(ANALYTICS).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &written[..1]).await;
    let letters = system.kafka.dead_letters(ANALYTICS_USERS);
    let reason = letters.values().next().unwrap().header("dlq-reason").map(str::to_owned);
    assert_eq!(reason.as_deref(), Some("user 17 of the import of May"));
    assert_eq!(system.processes.counted(ANALYTICS_USERS, "dead_lettered").await, 1.0);
    let refused = dead_letter(&record, "again").await.unwrap_err().to_string();
    assert!(refused.contains("404"), "{refused}");

    remove_bug(&db).await;
    let settled = "1 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, settled);
    system.users.until_counted(2, 0).await;
}

/// T54, I12: one record takes all the time that its consumer has for trying records one by one. It
/// blocks its own partition, and the others continue.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_hangs_blocks_only_its_partition() {
    let (mut system, db) = analytics_with(&[("OFFSET_COMMIT_MS", "200"), ("HANDLE_TIMEOUT_MS", "2000")]).await;
    system.processes.stop(ANALYTICS).await;
    let hanging = Uuid::now_v7();
    add_bug(&db, hanging, "perform pg_sleep(60)").await;
    let mut facts = vec![registration(hanging, BLOCKED)];
    facts.extend((1..6).map(|partition| registration(Uuid::now_v7(), partition)));
    let (_, offset) = system.kafka.write_all(USER_EVENTS, &facts).await[0];
    system.processes.spawn(ANALYTICS);
    let coordinates = format!("{}-{BLOCKED}-{offset}", system.kafka.prefixed(USER_EVENTS));
    let reported = system.processes.until_reported(ANALYTICS, &coordinates).await;
    assert_eq!(reported, [format!("{ANALYTICS_USERS} 0 partition {BLOCKED} {REASON}")]);
    system.users.until_counted(5, 0).await;

    remove_bug(&db).await;
    system.users.until_counted(6, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
}

/// T34 T54, I11: ten records were dead-lettered, and one of them fails with an error of the
/// database that names no class of data, or always takes too long. A redrive settles the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_settles_all_letters_but_the_one_that_fails() {
    for error in ["raise exception 'no'", "perform pg_sleep(60)"] {
        redrive_with_one_failure(error).await;
    }
}

async fn redrive_with_one_failure(error: &str) {
    let (system, db) = analytics().await;
    let users: Vec<Uuid> = (0..10).map(|_| Uuid::now_v7()).collect();
    crate::dead_letters::add_bug(&db, "registrations", "true").await;
    let facts: Vec<Draft> = users.iter().map(|user| registration(*user, OTHER)).collect();
    let written = system.kafka.write_all(USER_EVENTS, &facts).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &written).await;
    remove_bug(&db).await;
    add_bug(&db, users[4], error).await;
    let all_but_one = "9 settled, 0 superseded, 1 failed again, 0 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, all_but_one);
    system.users.until_counted(9, 0).await;
}

/// T54 T19, I9: a blocked partition moves to another process and back. Nothing past its record is
/// committed, and each process reports it while it has the partition.
#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_partition_stays_blocked_when_it_moves() {
    let (system, db) = analytics_with(&DEFAULT_CONSUMERS).await;
    let failing: Vec<Uuid> = (0..6).map(|_| Uuid::now_v7()).collect();
    let users = failing.iter().map(|user| format!("'{user}'")).collect::<Vec<_>>().join(", ");
    let sql = format!(
        "create function bug() returns trigger language plpgsql as
             $$ begin if new.user_id in ({users}) then raise exception 'no'; end if; return new; end $$;
         create trigger bug before insert or update on funnel for each row execute function bug()"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.as_str())).execute(&db).await.unwrap();
    let facts: Vec<Draft> = (0..6).zip(&failing).map(|(partition, user)| registration(*user, partition)).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;
    let waiting = async || system.processes.waiting_partitions(ANALYTICS_USERS, REASON).await;
    eventually_eq("waiting partitions", 6, waiting).await;

    let mut copy = system.processes.spawn_another(ANALYTICS);
    eventually_eq("waiting partitions after another process has joined", 3, waiting).await;
    let admin = copy.admin();
    eventually("the other process reports its partitions", async || {
        let (_, body) = admin.status().await?;
        let reported = body["waiting_for"].as_object()?.clone();
        let blocked = reported.keys().filter(|component| component.ends_with(REASON)).count();
        (blocked == 3).then_some(())
    })
    .await;
    copy.stop().await;
    eventually_eq("waiting partitions after the other process has left", 6, waiting).await;
    assert!(system.kafka.lag(ANALYTICS_USERS).len() == 6, "{:?}", system.kafka.lag(ANALYTICS_USERS));
    assert_eq!(system.users.funnel().await, (0, 0));

    remove_bug(&db).await;
    system.users.until_counted(6, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
}

/// T54, I8, I9: the cache stores its own position. A script that fails in the middle does not move
/// the position past the record.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_the_store_refuses_blocks_only_its_partition() {
    let system = System::start_with(&[USER, CACHE], &DEFAULT_CONSUMERS).await;
    let users: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    let key = system.kafka.prefixed(&format!("profile:{}", users[0]));
    let mut valkey = system.stores.valkey().await;
    let () = redis::cmd("SET").arg(&key).arg("not a hash").query_async(&mut valkey).await.unwrap();
    let state = |user: &Uuid, partition| Draft::user_state(*user, 1, Some("ada@example.com")).on(partition);
    let states = [state(&users[0], BLOCKED), state(&users[1], BLOCKED), state(&users[2], OTHER)];
    let (_, offset) = system.kafka.write_all(USER_STATE, &states).await[0];
    let coordinates = format!("{}-{BLOCKED}-{offset}", system.kafka.prefixed(USER_STATE));
    let reported = system.processes.until_reported(CACHE, &coordinates).await;
    assert_eq!(reported, [format!("{CACHE_PROFILES} 0 partition {BLOCKED} {REASON}")]);
    system.users.until_cached(users[2], 1).await;

    let () = redis::cmd("DEL").arg(&key).query_async(&mut valkey).await.unwrap();
    for user in &users {
        system.users.until_cached(*user, 1).await;
    }
    system.processes.until_nothing_reported(CACHE).await;
    system.kafka.until_caught_up(CACHE_PROFILES).await;
}
