//! I11: delivered = applied + duplicate + stale + skipped + dead-lettered, also where a batch does not go through at once.

use sqlx::PgPool;
use tests::log::Draft;
use tests::{Part, System, eventually, eventually_eq};
use uuid::Uuid;

use crate::dead_letters::{analytics, attempts, break_for, mend, redriven};

const USERS: &str = "analytics.users";
const PROFILES: &str = "cache.profiles";
const TOPIC: &str = "user.events.v1";

/// I11: a batch holds records that can never work, one that has to wait, and one behind it. However often it is tried, each bad
/// record is set aside once, so that what a redrive wrote about it meanwhile stands; and each record is counted once.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_put_off_is_set_aside_and_counted_once() {
    let (mut system, db) = analytics().await;
    // All are there when the consumer comes, so they are one batch.
    system.stop(Part::Analytics).await;
    let [rejected, waiting, behind] = [(); 3].map(|()| Uuid::now_v7());
    break_for(&db, "funnel", &format!("new.user_id = '{rejected}'")).await;
    take_away(&db, waiting).await;
    let registered = |id| Draft::user_event("user.registered", id, 1).on(0);
    let undecodable = registered(Uuid::now_v7()).valued(b"?");
    let batch = [undecodable, registered(rejected), registered(waiting), registered(behind)];
    let at = system.write_all(TOPIC, &batch).await;
    system.spawn(Part::Analytics, &[]);
    until_tried_again(&system).await;
    until_tried_again(&system).await;
    assert_eq!(letters_written(&system), 2, "the undecodable one and the rejected one");

    let keys = [at[0], at[1]].map(|at| system.letter_key(USERS, at));
    let failed = "0 settled, 0 superseded, 2 failed again, 0 parked";
    let again = redriven(&system, Part::Analytics, USERS, &["--only", &keys[0], &keys[1]]).await;
    assert_eq!(again, failed);
    until_tried_again(&system).await;
    assert_eq!([attempts(&system, USERS, &keys[0]), attempts(&system, USERS, &keys[1])], [2, 2]);
    assert_eq!(letters_written(&system), 4, "the two, and the redrive's");

    bring_back(&db).await;
    system.ready(&[Part::Analytics]).await;
    system.until_counted(2, 0).await;
    eventually_eq("the group has caught up", vec![], async || system.lag_of(USERS, TOPIC)).await;
    eventually_eq("applied", 2.0, async || system.counted(USERS, "applied").await).await;
    assert_eq!((system.counted(USERS, "dead_lettered").await, system.counted_in_all(USERS).await), (2.0, 4.0));
    mend(&db).await;
}

/// I11: the cache finds its position gone in the middle of a batch. What had its effect before that is counted, and what is read
/// again is counted again.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_dropped_in_the_middle_is_counted() {
    let mut system = System::empty().await;
    for part in [Part::User, Part::Cache] {
        system.spawn(part, &[]);
    }
    system.ready(&[Part::User, Part::Cache]).await;
    let state = |partition| Draft::user_state(Uuid::now_v7(), 1, Some("somebody@example.com")).on(partition);
    let one_each = || -> Vec<Draft> { (0..6).map(state).collect() };
    system.write_all("user.state.v1", &one_each()).await;
    eventually_eq("the first are there", 6.0, async || system.counted(PROFILES, "applied").await).await;
    system.stop(Part::Cache).await;
    system.write_all("user.state.v1", &one_each()).await;
    // Frozen with the batch in hand.
    system.spawn(Part::Cache, &[("FAULT_AT", "consumer.after_poll:1:stop")]);
    eventually("it has its batch", async || system.is_frozen(Part::Cache).then_some(())).await;
    let position = format!("{}position:user.state.v1:5", system.prefix);
    let gone: i64 = redis::cmd("DEL").arg(position).query_async(&mut system.valkey().await).await.unwrap();
    assert_eq!(gone, 1, "the cache keeps no position under this name");
    system.thaw(Part::Cache);
    // The first of partition 5 comes again, because the cache does not know any more that it has it.
    eventually_eq("6 records and 1 again", 7.0, async || system.counted_in_all(PROFILES).await).await;
    eventually_eq("caught up", vec![], async || system.lag_of(PROFILES, "user.state.v1")).await;
    assert_eq!(system.counted_in_all(PROFILES).await, 7.0);
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
    let before = system.retries(USERS).await;
    eventually("it is tried again", async || (system.retries(USERS).await >= before + 2.0).then_some(())).await;
}

/// How often anybody wrote a letter; the settled and the replaced ones count too.
fn letters_written(system: &System) -> usize {
    system.read(&format!("{USERS}.dlq")).len()
}
