//! The outbox: every committed row is published, in order per key, whatever other rows it holds.

use std::ops::RangeInclusive;

use serde_json::json;
use sqlx::{PgConnection, PgPool};
use tests::services::USER_EVENTS;
use tests::stores::count;
use tests::{System, eventually, eventually_eq};
use topology::USER;
use uuid::Uuid;

/// Inserts an event into the outbox, as a command does.
async fn insert_event(db: &mut PgConnection, topic: &str, key: Uuid, version: i64) {
    let insert = "insert into outbox (event_id, topic, aggregatetype, aggregateid, version, type, payload, occurred_at)
                  values ($1, $2, 'user', $3, $4, 'user.profile_changed', $5, now())";
    let payload = json!({ "user_id": key }).to_string().into_bytes();
    let row = sqlx::query(insert).bind(Uuid::now_v7()).bind(topic).bind(key).bind(version).bind(payload);
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

/// A round has a limit of some MiB, so a backlog of the largest rows does not become a round that
/// exceeds every time-out.
#[tokio::test(flavor = "multi_thread")]
async fn the_relay_splits_a_backlog_of_large_rows_into_rounds() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    let insert = "insert into outbox (event_id, topic, aggregatetype, aggregateid, version, type, payload, occurred_at)
                  select gen_random_uuid(), 'user.events.v1', 'user', $1, n, 'user.profile_changed',
                      case when n % 10 > 0 then convert_to(rpad('', 900000, 'x'), 'utf8') else '{}' end, now()
                  from generate_series(1, 40) n";
    sqlx::query(insert).bind(Uuid::now_v7()).execute(&db).await.unwrap();
    system.stores.until_outbox_empty(USER).await;
    let rounds = system.processes.metric(USER, "relay_rounds_total", &["outcome=\"published\""]).await.unwrap();
    assert!(rounds >= 7.0, "only {rounds} rounds for 32 MB");
    judge.check(&mut system).await;
}

/// T10, I4: Kafka refuses a row permanently. Later rows of the same key wait, a metric and the log
/// report it, and other keys are published.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_kafka_refuses_blocks_only_its_key() {
    let system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    let blocked = Uuid::now_v7();
    let other = Uuid::now_v7();
    let mut tx = db.begin().await.unwrap();
    insert_event(&mut tx, "no.such.topic", blocked, 1).await;
    insert_event(&mut tx, USER_EVENTS, blocked, 2).await;
    insert_event(&mut tx, USER_EVENTS, other, 1).await;
    tx.commit().await.unwrap();

    eventually_eq("facts of the other key", 1, async || system.kafka.read_key(USER_EVENTS, other).len()).await;
    let registered = system.users.register().await;
    eventually_eq("facts of a new user", 1, async || system.kafka.read_key(USER_EVENTS, registered).len()).await;
    let blocked_keys = async || system.processes.metric(USER, "outbox_blocked_keys", &[]).await;
    eventually_eq("the metric outbox_blocked_keys", Some(1.0), blocked_keys).await;
    assert!(system.kafka.read_key(USER_EVENTS, blocked).is_empty(), "version 2 must not overtake version 1");
    let rows = async || count(&db, "select count(*) from outbox").await;
    eventually_eq("outbox rows of the blocked key", 2, rows).await;

    let second = Uuid::now_v7();
    let mut tx = db.begin().await.unwrap();
    insert_event(&mut tx, "another.missing.topic", second, 1).await;
    tx.commit().await.unwrap();
    eventually_eq("the metric outbox_blocked_keys", Some(2.0), blocked_keys).await;
    let refusals = system.processes.log(USER).matches("Kafka rejects outbox rows").count();
    assert!(refusals <= 4, "{refusals} refusals: if the two keys are refused in turn, no other key is published");
    let registered = system.users.register().await;
    eventually_eq("facts of a new user", 1, async || system.kafka.read_key(USER_EVENTS, registered).len()).await;

    // The relay tries blocked keys again after half a minute.
    for topic in ["no.such.topic", "another.missing.topic"] {
        system.kafka.create_topic(topic, 1, &[]).await;
    }
    eventually_eq("outbox rows", 0, rows).await;
    eventually_eq("the metric outbox_blocked_keys", Some(0.0), blocked_keys).await;
    assert_eq!(system.kafka.read_key(USER_EVENTS, blocked).len(), 1, "facts with version 2, after version 1");
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

/// Inserts events of a key from one version to another at once, as many commands would.
const INSERT_VERSIONS: &str = "
    insert into outbox (event_id, topic, aggregatetype, aggregateid, version, type, payload, occurred_at)
    select gen_random_uuid(), 'user.events.v1', 'user', $1, version, 'user.profile_changed',
           convert_to(json_build_object('user_id', $1)::text, 'utf8'), now()
    from generate_series($2::bigint, $3) version order by version";

async fn insert_versions(db: &PgPool, key: Uuid, versions: RangeInclusive<i64>) {
    let insert = sqlx::query(INSERT_VERSIONS).bind(key).bind(versions.start()).bind(versions.end());
    insert.execute(db).await.unwrap();
}

/// T11, I3, I4: the outbox holds 10,000 commands of one user, and among them one of each of three
/// other users. A row waits for earlier rows and for no later one. The producer's queue never holds
/// more than a round of 500 rows, so the test does not make it smaller.
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
