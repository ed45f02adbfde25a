//! The outbox: its rows are published once committed, in order per key, whatever else is in it.

use std::ops::RangeInclusive;

use serde_json::json;
use sqlx::{PgConnection, PgPool};
use tests::services::USER_EVENTS;
use tests::stores::count;
use tests::{System, eventually, eventually_eq};
use topology::USER;
use uuid::Uuid;

/// Puts an event into the outbox, as a command would.
async fn put(db: &mut PgConnection, topic: &str, key: Uuid, version: i64) {
    let insert = "insert into outbox (event_id, topic, aggregatetype, aggregateid, version, type, payload, occurred_at)
                  values ($1, $2, 'user', $3, $4, 'user.profile_changed', $5, now())";
    let payload = json!({ "user_id": key }).to_string().into_bytes();
    let row = sqlx::query(insert).bind(Uuid::now_v7()).bind(topic).bind(key).bind(version).bind(payload);
    row.execute(db).await.unwrap();
}

/// T06, I3, I4: ids are given out before the commit, so a transaction with low ids may become visible after one with high ids
/// was published. A relay that remembers how far it has read would never see it.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_commits_after_later_ids_were_published_is_not_lost() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    let late = Uuid::now_v7();
    let early = Uuid::now_v7();
    let mut first = db.begin().await.unwrap();
    put(&mut first, USER_EVENTS, late, 1).await;

    let mut second = db.begin().await.unwrap();
    for version in [1, 2] {
        put(&mut second, USER_EVENTS, early, version).await;
    }
    second.commit().await.unwrap();
    eventually_eq("the later ids are published", 2, async || system.kafka.read(USER_EVENTS).len()).await;

    put(&mut first, USER_EVENTS, late, 2).await;
    first.commit().await.unwrap();
    let mut third = db.acquire().await.unwrap();
    put(&mut third, USER_EVENTS, late, 3).await;
    judge.check(&mut system).await;
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 5, "all of them");
}

/// A backlog of the largest rows does not become a round that no time-out allows: it goes out in rounds of some MiB.
#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_large_rows_goes_out_in_rounds_that_can_succeed() {
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
    assert!(rounds >= 7.0, "{rounds} rounds for 32 MB");
    judge.check(&mut system).await;
}

/// T10, I4: a row that Kafka will never take blocks what comes after it under the same key, says so, and blocks nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_kafka_refuses_blocks_its_key_and_no_other() {
    let system = System::start_only(&[USER]).await;
    let db = system.stores.database(USER).await;
    let poisoned = Uuid::now_v7();
    let other = Uuid::now_v7();
    let mut tx = db.begin().await.unwrap();
    put(&mut tx, "no.such.topic", poisoned, 1).await;
    put(&mut tx, USER_EVENTS, poisoned, 2).await;
    put(&mut tx, USER_EVENTS, other, 1).await;
    tx.commit().await.unwrap();

    eventually_eq("the other key flows", 1, async || system.kafka.read_key(USER_EVENTS, other).len()).await;
    let registered = system.users.register().await;
    eventually_eq("and new ones", 1, async || system.kafka.read_key(USER_EVENTS, registered).len()).await;
    eventually_eq("the blocked key is told", Some(1.0), async || {
        system.processes.metric(USER, "outbox_blocked_keys", &[]).await
    })
    .await;
    assert!(system.kafka.read_key(USER_EVENTS, poisoned).is_empty(), "version 2 must not overtake version 1");
    let waiting = "select count(*) from outbox";
    eventually_eq("its rows stay", 2, async || count(&db, waiting).await).await;

    let second = Uuid::now_v7();
    let mut tx = db.begin().await.unwrap();
    put(&mut tx, "none.either", second, 1).await;
    tx.commit().await.unwrap();
    let blocked = async || system.processes.metric(USER, "outbox_blocked_keys", &[]).await;
    eventually_eq("a second key is blocked beside the first", Some(2.0), blocked).await;
    let refusals = system.processes.log(USER).matches("their keys are set aside").count();
    assert!(refusals <= 4, "{refusals} refusals: each comes once, and not both in turn, which would stop everybody");
    let registered = system.users.register().await;
    eventually_eq("new ones flow", 1, async || system.kafka.read_key(USER_EVENTS, registered).len()).await;

    // Both are asked again, half a minute after they were refused.
    for topic in ["no.such.topic", "none.either"] {
        system.kafka.create_topic(topic, 1, &[]).await;
    }
    eventually_eq("rows in the outbox", 0, async || count(&db, waiting).await).await;
    eventually_eq("nobody is blocked any more", Some(0.0), blocked).await;
    assert_eq!(system.kafka.read_key(USER_EVENTS, poisoned).len(), 1, "version 2, after version 1");
}

/// Postgres keeps what it should delete, as where maintenance has locked the table or a failover has made it read-only.
const KEEP_ROWS: &str = "
    create function keep_rows() returns trigger language plpgsql as $$ begin raise 'not now'; end $$;
    create trigger keep_rows before delete on outbox for each row execute function keep_rows();";

/// I3 I4: rows that cannot be deleted stay where they are. What Kafka has of them is not published again and again meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_postgres_will_not_delete_are_published_once() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    sqlx::raw_sql(KEEP_ROWS).execute(&db).await.unwrap();
    system.users.register().await;
    let failed = async || system.processes.metric(USER, "relay_rounds_total", &["outcome=\"failed\""]).await;
    eventually("the relay has tried several times", async || failed().await.filter(|rounds| *rounds >= 4.0)).await;
    sqlx::raw_sql("drop trigger keep_rows on outbox").execute(&db).await.unwrap();
    system.users.register().await;
    judge.check(&mut system).await;
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 2, "facts of two registrations");
}

/// Events of a key from one version to another, in the outbox at once, as many commands would leave them.
const EVENTS: &str = "
    insert into outbox (event_id, topic, aggregatetype, aggregateid, version, type, payload, occurred_at)
    select gen_random_uuid(), 'user.events.v1', 'user', $1, version, 'user.profile_changed',
           convert_to(json_build_object('user_id', $1)::text, 'utf8'), now()
    from generate_series($2::bigint, $3) version order by version";

async fn put_versions(db: &PgPool, key: Uuid, versions: RangeInclusive<i64>) {
    let put = sqlx::query(EVENTS).bind(key).bind(versions.start()).bind(versions.end());
    put.execute(db).await.unwrap();
}

/// T11, I3 I4: 10,000 commands of one user stand in the outbox. Whoever comes later waits for what stood there before and for
/// nothing that comes after. The producer's queue never holds more than a round of 500, so it is not made smaller here.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_key_keeps_its_order_and_starves_no_other() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    let hot = Uuid::now_v7();
    let others: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    put_versions(&db, hot, 1..=4_000).await;
    for (other, first) in others.iter().zip([4_001, 6_001, 8_001]) {
        put_versions(&db, *other, 1..=1).await;
        put_versions(&db, hot, first..=first + 1_999).await;
    }
    for other in &others {
        eventually("it is published", async || published(&db, *other).await.then_some(())).await;
    }
    let behind = "select count(*) from outbox";
    assert!(count(&db, behind).await <= 2_000, "whoever stood before the last of them is published");
    judge.check(&mut system).await;
    assert_eq!(system.kafka.read(USER_EVENTS).len(), 10_003);
}

async fn published(db: &PgPool, key: Uuid) -> bool {
    let left: i64 =
        sqlx::query_scalar("select count(*) from outbox where aggregateid = $1").bind(key).fetch_one(db).await.unwrap();
    left == 0
}

/// T15, I3: a snapshot held open keeps every published row as a dead one, which the relay's read has to pass over. The metric to
/// alert on says how many; publishing goes on; and when the snapshot is let go they can be cleared away.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_held_open_is_told_by_a_metric_and_stops_no_event() {
    const ROWS: i64 = 5_000;
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let db = system.stores.database(USER).await;
    let mut holder = db.begin_with("begin isolation level repeatable read").await.unwrap();
    sqlx::query("select count(*) from outbox").execute(&mut *holder).await.unwrap();
    let key = Uuid::now_v7();
    put_versions(&db, key, 1..=ROWS).await;
    system.stores.until_outbox_empty(USER).await;
    let dead = async || system.processes.metric(USER, "outbox_dead_rows", &[]).await.unwrap_or(0.0) as i64;
    let vacuum = async || sqlx::query("vacuum (analyze) outbox").execute(&db).await.unwrap();
    vacuum().await;
    eventually("the metric tells of the dead rows", async || (dead().await >= ROWS).then_some(())).await;
    system.users.register().await;
    system.stores.until_outbox_empty(USER).await;

    holder.rollback().await.unwrap();
    vacuum().await;
    eventually("the metric falls", async || (dead().await < ROWS / 10).then_some(())).await;
    judge.check(&mut system).await;
}
