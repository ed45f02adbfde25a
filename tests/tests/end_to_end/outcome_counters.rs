//! I11: delivered = applied + duplicate + stale + skipped + dead-lettered, even if a batch is
//! retried or dropped.

use sqlx::PgPool;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, CACHE_PROFILES, USER_EVENTS, USER_STATE, dead_letters_of};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, USER};
use uuid::Uuid;

use crate::dead_letters::{add_bug, analytics, attempts, redrive, remove_bug};

/// I11: a batch holds two records that can never succeed, one that must wait, and one after it.
/// However often the batch is retried, each bad record is dead-lettered once, so a retry does not
/// overwrite the letter that a redrive wrote in between. Each record is counted once.
#[tokio::test(flavor = "multi_thread")]
async fn records_of_a_retried_batch_are_counted_and_dead_lettered_once() {
    let (mut system, db) = analytics().await;
    // All records are in the topic before the consumer starts, so they are one batch.
    system.processes.stop(ANALYTICS).await;
    let [rejected, waiting, last] = [(); 3].map(|()| Uuid::now_v7());
    add_bug(&db, "funnel", &format!("new.user_id = '{rejected}'")).await;
    add_transient_failure(&db, waiting).await;
    let registered = |id| Draft::user_event("user.registered", id, 1).on(0);
    let undecodable = registered(Uuid::now_v7()).with_value(b"?");
    let batch = [undecodable, registered(rejected), registered(waiting), registered(last)];
    let written = system.kafka.write_all(USER_EVENTS, &batch).await;
    system.processes.spawn(ANALYTICS);
    until_retried(&system).await;
    until_retried(&system).await;
    assert_eq!(letters_written(&system), 2, "letters of the undecodable and the rejected record");

    let keys = [written[0], written[1]].map(|record| system.kafka.letter_key(ANALYTICS_USERS, record));
    let redriven = redrive(&system, ANALYTICS_USERS, &["--only", &keys[0], &keys[1]]).await;
    assert_eq!(redriven, "0 settled, 0 superseded, 2 failed again, 0 parked");
    until_retried(&system).await;
    for key in &keys {
        assert_eq!(attempts(&system, ANALYTICS_USERS, key), 2, "attempts of the letter {key}");
    }
    assert_eq!(letters_written(&system), 4, "two letters of the consumer and two of the redrive");

    remove_transient_failure(&db).await;
    system.processes.until_ready(&[ANALYTICS]).await;
    system.users.until_counted(2, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    let applied = async || system.processes.counted(ANALYTICS_USERS, "applied").await;
    eventually_eq("records counted as applied", 2.0, applied).await;
    let dead_lettered = system.processes.counted(ANALYTICS_USERS, "dead_lettered").await;
    assert_eq!(dead_lettered, 2.0, "records counted as dead-lettered");
    assert_eq!(system.processes.counted_in_all(ANALYTICS_USERS).await, 4.0, "records counted under any outcome");
    remove_bug(&db).await;
}

/// I11: the position that the cache stores disappears while a batch is handled, so the consumer
/// drops the batch and reads it again from an earlier offset. Records that took effect before are
/// counted, and records that are read again are counted again.
#[tokio::test(flavor = "multi_thread")]
async fn records_of_a_dropped_batch_are_counted() {
    let mut system = System::start_only(&[USER, CACHE]).await;
    let state = |partition| Draft::user_state(Uuid::now_v7(), 1, Some("somebody@example.com")).on(partition);
    let one_per_partition = || -> Vec<Draft> { (0..6).map(state).collect() };
    system.kafka.write_all(USER_STATE, &one_per_partition()).await;
    let applied = async || system.processes.counted(CACHE_PROFILES, "applied").await;
    eventually_eq("records counted as applied", 6.0, applied).await;
    system.processes.stop(CACHE).await;
    system.kafka.write_all(USER_STATE, &one_per_partition()).await;
    // The process freezes with a batch that is polled and not yet handled.
    system.processes.spawn_with(CACHE, &[("FAULT_AT", "consumer.after_poll:1:stop")]);
    system.processes.until_frozen(CACHE).await;
    assert!(system.stores.delete_cache_position(USER_STATE, 5).await, "the cache must store a position with this key");
    system.processes.thaw(CACHE);
    // Without a position the cache reads partition 5 from its beginning, so its first record comes
    // again.
    let counted = async || system.processes.counted_in_all(CACHE_PROFILES).await;
    eventually_eq("counted records: 6 new ones, and one again", 7.0, counted).await;
    system.kafka.until_caught_up(CACHE_PROFILES).await;
    assert_eq!(system.processes.counted_in_all(CACHE_PROFILES).await, 7.0, "counted records");
}

/// The database refuses this user's row with an error that is retried, as when a lock is not free.
async fn add_transient_failure(db: &PgPool, user: Uuid) {
    let sql = format!(
        "create function fail_transiently() returns trigger language plpgsql as
             $$ begin if new.user_id = '{user}' then raise lock_not_available; end if; return new; end $$;
         create trigger later before insert or update on funnel for each row execute function fail_transiently()"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.as_str())).execute(db).await.unwrap();
}

async fn remove_transient_failure(db: &PgPool) {
    sqlx::raw_sql("drop function fail_transiently() cascade").execute(db).await.unwrap();
}

/// Waits for two more retries of the consumer. The second one began after this call.
async fn until_retried(system: &System) {
    let before = system.processes.retries(ANALYTICS_USERS).await;
    eventually("the consumer retries the batch twice", async || {
        (system.processes.retries(ANALYTICS_USERS).await >= before + 2.0).then_some(())
    })
    .await;
}

/// How many letters were ever written, including replaced ones and tombstones.
fn letters_written(system: &System) -> usize {
    system.kafka.read(&dead_letters_of(ANALYTICS_USERS)).len()
}
