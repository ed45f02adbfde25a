//! I11: delivered = applied + duplicate + stale + skipped + dead-lettered, also where a batch does not go through at once.

use sqlx::PgPool;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, CACHE_PROFILES, USER_EVENTS, USER_STATE, dead_letters_of};
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, USER};
use uuid::Uuid;

use crate::dead_letters::{add_bug, analytics, attempts, redrive, remove_bug};

/// I11: a batch holds records that can never work, one that has to wait, and one behind it. However often it is tried, each bad
/// record is set aside once, so that what a redrive wrote about it meanwhile stands; and each record is counted once.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_put_off_is_set_aside_and_counted_once() {
    let (mut system, db) = analytics().await;
    // All are there when the consumer comes, so they are one batch.
    system.processes.stop(ANALYTICS).await;
    let [rejected, waiting, behind] = [(); 3].map(|()| Uuid::now_v7());
    add_bug(&db, "funnel", &format!("new.user_id = '{rejected}'")).await;
    take_away(&db, waiting).await;
    let registered = |id| Draft::user_event("user.registered", id, 1).on(0);
    let undecodable = registered(Uuid::now_v7()).with_value(b"?");
    let batch = [undecodable, registered(rejected), registered(waiting), registered(behind)];
    let at = system.kafka.write_all(USER_EVENTS, &batch).await;
    system.processes.spawn(ANALYTICS);
    until_tried_again(&system).await;
    until_tried_again(&system).await;
    assert_eq!(letters_written(&system), 2, "the undecodable one and the rejected one");

    let keys = [at[0], at[1]].map(|at| system.kafka.letter_key(ANALYTICS_USERS, at));
    let failed = "0 settled, 0 superseded, 2 failed again, 0 parked";
    let again = redrive(&system, ANALYTICS_USERS, &["--only", &keys[0], &keys[1]]).await;
    assert_eq!(again, failed);
    until_tried_again(&system).await;
    assert_eq!([attempts(&system, ANALYTICS_USERS, &keys[0]), attempts(&system, ANALYTICS_USERS, &keys[1])], [2, 2]);
    assert_eq!(letters_written(&system), 4, "the two, and the redrive's");

    bring_back(&db).await;
    system.processes.until_ready(&[ANALYTICS]).await;
    system.users.until_counted(2, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    eventually_eq("applied", 2.0, async || system.processes.counted(ANALYTICS_USERS, "applied").await).await;
    assert_eq!(
        (
            system.processes.counted(ANALYTICS_USERS, "dead_lettered").await,
            system.processes.counted_in_all(ANALYTICS_USERS).await
        ),
        (2.0, 4.0)
    );
    remove_bug(&db).await;
}

/// I11: the cache finds its position gone in the middle of a batch. What had its effect before that is counted, and what is read
/// again is counted again.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_dropped_in_the_middle_is_counted() {
    let mut system = System::start_only(&[USER, CACHE]).await;
    let state = |partition| Draft::user_state(Uuid::now_v7(), 1, Some("somebody@example.com")).on(partition);
    let one_each = || -> Vec<Draft> { (0..6).map(state).collect() };
    system.kafka.write_all(USER_STATE, &one_each()).await;
    eventually_eq("the first are there", 6.0, async || system.processes.counted(CACHE_PROFILES, "applied").await).await;
    system.processes.stop(CACHE).await;
    system.kafka.write_all(USER_STATE, &one_each()).await;
    // Frozen with the batch in hand.
    system.processes.spawn_with(CACHE, &[("FAULT_AT", "consumer.after_poll:1:stop")]);
    system.processes.until_frozen(CACHE).await;
    assert!(system.stores.delete_cache_position(USER_STATE, 5).await, "the cache stores no position under this name");
    system.processes.thaw(CACHE);
    // The first of partition 5 comes again, because the cache does not know any more that it has it.
    eventually_eq("6 records and 1 again", 7.0, async || system.processes.counted_in_all(CACHE_PROFILES).await).await;
    system.kafka.until_caught_up(CACHE_PROFILES).await;
    assert_eq!(system.processes.counted_in_all(CACHE_PROFILES).await, 7.0);
}

/// The dependency is away for this user's record.
async fn take_away(db: &PgPool, user: Uuid) {
    let sql = format!(
        "create function away() returns trigger language plpgsql as
             $$ begin if new.user_id = '{user}' then raise lock_not_available; end if; return new; end $$;
         create trigger later before insert or update on funnel for each row execute function away()"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.as_str())).execute(db).await.unwrap();
}

async fn bring_back(db: &PgPool) {
    sqlx::raw_sql("drop function away() cascade").execute(db).await.unwrap();
}

/// Waits for two more tries: the second began after this was called.
async fn until_tried_again(system: &System) {
    let before = system.processes.retries(ANALYTICS_USERS).await;
    eventually("it is tried again", async || {
        (system.processes.retries(ANALYTICS_USERS).await >= before + 2.0).then_some(())
    })
    .await;
}

/// How often anybody wrote a letter; the settled and the replaced ones count too.
fn letters_written(system: &System) -> usize {
    system.kafka.read(&dead_letters_of(ANALYTICS_USERS)).len()
}
