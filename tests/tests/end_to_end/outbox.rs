//! The outbox: every committed row is published, in order per key, whatever other rows it holds.

use std::ops::RangeInclusive;

use serde_json::json;
use shared::events::key_hash;
use sqlx::{PgConnection, PgPool};
use tests::services::USER_EVENTS;
use tests::stores::count;
use tests::{System, eventually, eventually_eq};
use topology::USER;
use uuid::Uuid;

use crate::relay_blocks::insert_keys;

/// Inserts an event into the outbox, as a command does.
pub async fn insert_event(db: &mut PgConnection, topic: &str, key: Uuid, version: i64) {
    let insert = "insert into outbox
                      (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, occurred_at)
                  values ($1, $2, 'user', $3, $4, $5, 'user.profile_changed', $6, now())";
    let payload = json!({ "user_id": key }).to_string().into_bytes();
    let row =
        sqlx::query(insert).bind(Uuid::now_v7()).bind(topic).bind(key).bind(key_hash(key)).bind(version).bind(payload);
    row.execute(db).await.unwrap();
}

/// T06, I3, I4: Postgres assigns ids before the commit. So a transaction with low ids may become
/// visible after higher ids were published. A relay with a cursor would never read its rows.
#[tokio::test(flavor = "multi_thread")]
async fn the_relay_publishes_rows_that_commit_after_higher_ids() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    let late = Uuid::now_v7();
    let early = Uuid::now_v7();
    let mut first = db.begin().await.unwrap();
    insert_event(&mut first, USER_EVENTS, late, 1).await;

    let mut second = db.begin().await.unwrap();
    for version in [1, 2] {
        insert_event(&mut second, USER_EVENTS, early, version).await;
    }
    second.commit().await.unwrap();
    eventually_eq("facts with the higher ids", 2, async || system.kafka.read(USER_EVENTS).len()).await;

    insert_event(&mut first, USER_EVENTS, late, 2).await;
    first.commit().await.unwrap();
    let mut third = db.acquire().await.unwrap();
    insert_event(&mut third, USER_EVENTS, late, 3).await;
    judge.check(&mut system).await;
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 5, "facts of both keys");
}

/// T06, I3, I4: the same within a backlog of several rounds, which the relay reads from the lowest
/// id that may still exist. A transaction that began before the backlog commits when the relay has
/// read two rounds. Its row has the lowest id of all, and is published before the next version of
/// its user.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_commits_late_within_a_backlog_is_published_before_its_next_version() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    system.processes.stop(USER).await;
    let late = Uuid::now_v7();
    let mut transaction = db.begin().await.unwrap();
    insert_event(&mut transaction, USER_EVENTS, late, 1).await;
    insert_keys(&db, USER_EVENTS, 40_000).await;

    let end_of_stall = system.processes.file("end-of-stall");
    let stall = ("FAULT_AT", "relay.after_read_ahead:3:stall");
    let until = ("FAULT_UNTIL", end_of_stall.to_str().unwrap());
    system.processes.spawn_with(USER, &[stall, until]);
    system.processes.until_logged(USER, "fault point reached").await;
    transaction.commit().await.unwrap();
    let mut next = db.acquire().await.unwrap();
    insert_event(&mut next, USER_EVENTS, late, 2).await;
    std::fs::write(end_of_stall, "").unwrap();

    system.stores.until_outbox_empty(USER).await;
    let versions: Vec<i64> = system.kafka.read_key(USER_EVENTS, late).iter().map(|record| record.version()).collect();
    assert_eq!(versions, [1, 2]);
    judge.check(&mut system).await;
}

/// A round has a limit of some MiB, so a backlog of the largest rows does not become a round that
/// exceeds every time-out.
#[tokio::test(flavor = "multi_thread")]
async fn the_relay_splits_a_backlog_of_large_rows_into_rounds() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    let insert = "insert into outbox
                      (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, occurred_at)
                  select gen_random_uuid(), 'user.events.v1', 'user', $1, $2, n, 'user.profile_changed',
                      case when n % 10 > 0 then convert_to(rpad('', 900000, 'x'), 'utf8') else '{}' end, now()
                  from generate_series(1, 40) n";
    let key = Uuid::now_v7();
    sqlx::query(insert).bind(key).bind(key_hash(key)).execute(&db).await.unwrap();
    system.stores.until_outbox_empty(USER).await;
    let rounds = system.processes.metric(USER, "relay_rounds_total", &["outcome=\"published\""]).await.unwrap();
    assert!(rounds >= 7.0, "only {rounds} rounds for 32 MB");
    judge.check(&mut system).await;
}

/// After a slow round rows gather, so that Kafka has fewer transactions.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_arrive_after_a_slow_round_are_published_together() {
    let mut system = System::empty().await;
    let end_of_stall = system.processes.file("end-of-stall");
    let stall = ("FAULT_AT", "relay.after_commit:1:stall");
    let until = ("FAULT_UNTIL", end_of_stall.to_str().unwrap());
    system.processes.start_with(USER, &[stall, until, ("OUTBOX_LINGER_MS", "1000")]).await;
    let judge = system.judge().await;
    system.users.register().await;
    system.processes.until_logged(USER, "fault point reached").await;
    // While the round is slow, and for some time afterwards.
    for number in 0..120 {
        if number == 100 {
            std::fs::write(&end_of_stall, "").unwrap();
        }
        system.users.register().await;
    }
    system.stores.until_outbox_empty(USER).await;
    let rounds = system.processes.metric(USER, "relay_rounds_total", &["outcome=\"published\""]).await.unwrap();
    assert_eq!(rounds, 2.0, "the slow round, and one with all rows after it");
    judge.check(&mut system).await;
}

/// Postgres refuses to delete outbox rows, as when maintenance has locked the table or the database
/// is read-only after a failover.
const KEEP_ROWS: &str = "
    create function keep_rows() returns trigger language plpgsql as $$ begin raise 'rows are kept'; end $$;
    create trigger keep_rows before delete on outbox for each row execute function keep_rows();";

/// I3, I4: the relay does not publish rows again and again while Postgres refuses to delete them.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_postgres_does_not_delete_are_published_once() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    sqlx::raw_sql(KEEP_ROWS).execute(&db).await.unwrap();
    system.users.register().await;
    let failed = async || system.processes.metric(USER, "relay_rounds_total", &["outcome=\"failed\""]).await;
    eventually("the relay has failed four times", async || failed().await.filter(|rounds| *rounds >= 4.0)).await;
    sqlx::raw_sql("drop trigger keep_rows on outbox").execute(&db).await.unwrap();
    system.users.register().await;
    judge.check(&mut system).await;
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 2, "facts of two registrations");
}

/// Inserts events of a key, each of almost the largest size. Five of them fill a round.
pub async fn insert_large_versions(db: &PgPool, key: Uuid, versions: RangeInclusive<i64>) {
    let insert = "insert into outbox
                      (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, occurred_at)
                  select gen_random_uuid(), 'user.events.v1', 'user', $1, $4, version, 'user.profile_changed',
                      convert_to(rpad('', 900000, 'x'), 'utf8'), now()
                  from generate_series($2::bigint, $3) version order by version";
    let insert = sqlx::query(insert).bind(key).bind(versions.start()).bind(versions.end()).bind(key_hash(key));
    insert.execute(db).await.unwrap();
}

/// I3, I4: Postgres refuses to delete rows while a backlog waits. The relay publishes no further
/// round than the one that was in flight. A crash then publishes these two rounds again, and no
/// others.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_publishes_at_most_two_rounds_again() {
    const ROWS: i64 = 30;
    const TWO_ROUNDS: usize = 10;
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    sqlx::raw_sql(KEEP_ROWS).execute(&db).await.unwrap();
    insert_large_versions(&db, Uuid::now_v7(), 1..=ROWS).await;
    eventually_eq("facts of two rounds", TWO_ROUNDS, async || system.kafka.read(USER_EVENTS).len()).await;
    let failed = async || system.processes.metric(USER, "relay_rounds_total", &["outcome=\"failed\""]).await;
    eventually("the relay has failed four times", async || failed().await.filter(|rounds| *rounds >= 4.0)).await;
    assert_eq!(
        system.kafka.read(USER_EVENTS).len(),
        TWO_ROUNDS,
        "a third round is published before the first one is deleted"
    );

    system.processes.kill(USER);
    sqlx::raw_sql("drop trigger keep_rows on outbox").execute(&db).await.unwrap();
    system.processes.start(&[USER]).await;
    judge.check(&mut system).await;
    assert_eq!(system.kafka.read(USER_EVENTS).len(), ROWS as usize + TWO_ROUNDS, "facts with the copies of two rounds");
}

/// Inserts events of a key from one version to another at once, as many commands would.
const INSERT_VERSIONS: &str = "
    insert into outbox (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, occurred_at)
    select gen_random_uuid(), 'user.events.v1', 'user', $1, $4, version, 'user.profile_changed',
           convert_to(json_build_object('user_id', $1)::text, 'utf8'), now()
    from generate_series($2::bigint, $3) version order by version";

async fn insert_versions(db: &PgPool, key: Uuid, versions: RangeInclusive<i64>) {
    let insert = sqlx::query(INSERT_VERSIONS).bind(key).bind(versions.start()).bind(versions.end()).bind(key_hash(key));
    insert.execute(db).await.unwrap();
}

/// T11, I3, I4: the outbox holds 10,000 commands of one user, and among them one of each of three
/// other users. A row waits for earlier rows and for no later one. The producer's queue never holds
/// more than one round, so the test does not make it smaller.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_key_stays_in_order_and_does_not_delay_others() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    let busy = Uuid::now_v7();
    let others: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    insert_versions(&db, busy, 1..=4_000).await;
    for (other, first) in others.iter().zip([4_001, 6_001, 8_001]) {
        insert_versions(&db, *other, 1..=1).await;
        insert_versions(&db, busy, first..=first + 1_999).await;
    }
    for other in &others {
        eventually("the other key is published", async || is_published(&db, *other).await.then_some(())).await;
    }
    let rows = count(&db, "select count(*) from outbox").await;
    assert!(rows <= 2_000, "{rows} rows: only the rows after the last other key may be left");
    judge.check(&mut system).await;
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 10_003);
}

async fn is_published(db: &PgPool, key: Uuid) -> bool {
    let rows = sqlx::query_scalar::<_, i64>("select count(*) from outbox where aggregateid = $1").bind(key);
    rows.fetch_one(db).await.unwrap() == 0
}

/// T15, I3: while a session holds a snapshot open, every published row stays as a dead row, and the
/// relay's read scans over it. A metric for alerts shows their number, and publishing continues.
/// After the snapshot has ended they can be vacuumed.
#[tokio::test(flavor = "multi_thread")]
async fn an_open_snapshot_shows_in_a_metric_and_stops_no_event() {
    const ROWS: i64 = 5_000;
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    let mut snapshot = db.begin_with("begin isolation level repeatable read").await.unwrap();
    sqlx::query("select count(*) from outbox").execute(&mut *snapshot).await.unwrap();
    let key = Uuid::now_v7();
    insert_versions(&db, key, 1..=ROWS).await;
    system.stores.until_outbox_empty(USER).await;
    let dead_rows = async || system.processes.metric(USER, "outbox_dead_rows", &[]).await.unwrap_or(0.0) as i64;
    let vacuum = async || sqlx::query("vacuum (analyze) outbox").execute(&db).await.unwrap();
    vacuum().await;
    eventually("outbox_dead_rows counts the published rows", async || (dead_rows().await >= ROWS).then_some(())).await;
    system.users.register().await;
    system.stores.until_outbox_empty(USER).await;

    snapshot.rollback().await.unwrap();
    vacuum().await;
    eventually("outbox_dead_rows falls", async || (dead_rows().await < ROWS / 10).then_some(())).await;
    judge.check(&mut system).await;
}
