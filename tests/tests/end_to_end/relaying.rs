//! The outbox with more on it than a registration now and then: several relays, a busy key, dead rows.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::Client;
use serde_json::json;
use testbed::services::RunningService;
use tests::api::send;
use tests::load::Answered;
use tests::watch::Watch;
use tests::{Part, System, eventually};
use tokio::task::JoinSet;
use uuid::Uuid;

/// The pace of the writers: it leaves the two cores of a small machine to those who are tested.
const PAUSE: Duration = Duration::from_millis(10);

/// T07, I3 I4: of three relays one publishes. It is killed under load, and its successor too: each time one of those that are left
/// takes over, at once, since Postgres frees a dead session's lock. Nothing is lost, and no key's order changes.
#[tokio::test(flavor = "multi_thread")]
async fn of_several_relays_one_leads_and_another_takes_over_when_it_dies() {
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    let watch = system.watch().await;
    let mut copies: Vec<RunningService> = (0..3).map(|_| system.spawn_another(Part::User, &[])).collect();
    for copy in &mut copies {
        copy.until_ready().await.unwrap();
    }
    let mut users = vec![];
    for _ in 0..4 {
        users.push(system.register().await);
    }
    system.until_published(&watch).await;
    system.stop(Part::User).await;

    let writers = Writers::begin(&copies, &users);
    while let Some(leader) = the_one_that_publishes(&copies).await {
        copies.remove(leader).process.kill();
        if copies.len() == 1 {
            break;
        }
    }
    the_one_that_publishes(&copies).await;
    writers.end().await;
    system.check(&watch, &Answered::default()).await;
    assert!(watch.count("select count(*) from ledger").await > 20, "there was something to publish");
}

/// Postgres keeps what it should delete, as where maintenance has locked the table or a failover has made it read-only.
const KEEP_ROWS: &str = "
    create function keep_rows() returns trigger language plpgsql as $$ begin raise 'not now'; end $$;
    create trigger keep_rows before delete on outbox for each row execute function keep_rows();";

/// I3 I4: rows that cannot be deleted stay where they are. What Kafka has of them is not published again and again meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_postgres_will_not_delete_are_published_once() {
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    let watch = system.watch().await;
    sqlx::raw_sql(KEEP_ROWS).execute(&watch.user).await.unwrap();
    system.register().await;
    let failed = async || system.metric(Part::User, "relay_rounds_total", &["outcome=\"failed\""]).await;
    eventually("the relay has tried several times", async || failed().await.filter(|rounds| *rounds >= 4.0)).await;
    sqlx::raw_sql("drop trigger keep_rows on outbox").execute(&watch.user).await.unwrap();
    system.register().await;
    system.check(&watch, &Answered::default()).await;
    assert_eq!(system.read("user.events.v1").len(), 2, "facts of two registrations");
}

/// Waits until somebody publishes, and watches for a while that nobody else does.
async fn the_one_that_publishes(copies: &[RunningService]) -> Option<usize> {
    let published = async || {
        let mut rounds = vec![];
        for copy in copies {
            rounds.push(rounds_of(copy).await);
        }
        rounds
    };
    let before = published().await;
    let leader = eventually("a relay leads", async || {
        let now = published().await;
        (0..copies.len()).find(|copy| now[*copy] >= before[*copy] + 5.0)
    })
    .await;
    let others = async || {
        let mut rounds = published().await;
        rounds.remove(leader);
        rounds
    };
    let at_rest = others().await;
    assert!(
        at_rest.iter().all(|rounds| *rounds == 0.0),
        "only leaders have ever published, and they are dead: {at_rest:?}"
    );
    Some(leader)
}

async fn rounds_of(copy: &RunningService) -> f64 {
    let page =
        Client::new().get(format!("{}/metrics", copy.instance.admin_url())).send().await.unwrap().text().await.unwrap();
    let series = page.lines().find_map(|line| line.strip_prefix("relay_rounds_total{outcome=\"published\"} "));
    series.map_or(0.0, |rounds| rounds.parse().unwrap())
}

/// They rename users, through every copy in turn. What a dead one does not answer is of no interest.
struct Writers {
    tasks: JoinSet<()>,
    over: Arc<AtomicBool>,
}

impl Writers {
    fn begin(copies: &[RunningService], users: &[Uuid]) -> Self {
        let urls: Vec<String> = copies.iter().map(|copy| copy.instance.url()).collect();
        let mut writers = Self { tasks: JoinSet::new(), over: Arc::default() };
        for &id in users {
            let (urls, over) = (urls.clone(), writers.over.clone());
            writers.tasks.spawn(async move {
                let client = Client::new();
                for (turn, url) in urls.iter().cycle().enumerate() {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    let name = json!({ "display_name": format!("Name {turn}") });
                    let _ = send(client.patch(format!("{url}/users/{id}")).json(&name)).await;
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        writers
    }

    async fn end(mut self) {
        self.over.store(true, Ordering::Relaxed);
        while let Some(writer) = self.tasks.join_next().await {
            writer.unwrap();
        }
    }
}

/// Events of a key from one version to another, in the outbox at once, as many commands would leave them.
const EVENTS: &str = "
    insert into outbox (event_id, topic, aggregatetype, aggregateid, version, type, payload, occurred_at)
    select gen_random_uuid(), 'user.events.v1', 'user', $1, version, 'user.profile_changed',
           convert_to(json_build_object('user_id', $1)::text, 'utf8'), now()
    from generate_series($2::bigint, $3) version order by version";

async fn put(watch: &Watch, key: Uuid, versions: RangeInclusive<i64>) {
    let put = sqlx::query(EVENTS).bind(key).bind(versions.start()).bind(versions.end());
    put.execute(&watch.user).await.unwrap();
}

/// T11, I3 I4: 10,000 commands of one user stand in the outbox. Whoever comes later waits for what stood there before and for
/// nothing that comes after. The producer's queue never holds more than a round of 500, so it is not made smaller here.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_key_keeps_its_order_and_starves_no_other() {
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    let watch = system.watch().await;
    let hot = Uuid::now_v7();
    let others: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    put(&watch, hot, 1..=4_000).await;
    for (other, first) in others.iter().zip([4_001, 6_001, 8_001]) {
        put(&watch, *other, 1..=1).await;
        put(&watch, hot, first..=first + 1_999).await;
    }
    for other in &others {
        eventually("it is published", async || published(&watch, *other).await.then_some(())).await;
    }
    let behind = "select count(*) from outbox";
    assert!(watch.count(behind).await <= 2_000, "whoever stood before the last of them is published");
    system.check(&watch, &Answered::default()).await;
    assert_eq!(system.read("user.events.v1").len(), 10_003);
}

async fn published(watch: &Watch, key: Uuid) -> bool {
    let left: i64 = sqlx::query_scalar("select count(*) from outbox where aggregateid = $1")
        .bind(key)
        .fetch_one(&watch.user)
        .await
        .unwrap();
    left == 0
}

/// T15, I3: a snapshot held open keeps every published row as a dead one, which the relay's read has to pass over. The metric to
/// alert on says how many; publishing goes on; and when the snapshot is let go they can be cleared away.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_held_open_is_told_by_a_metric_and_stops_no_event() {
    const ROWS: i64 = 5_000;
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    let watch = system.watch().await;
    let mut holder = watch.user.begin_with("begin isolation level repeatable read").await.unwrap();
    sqlx::query("select count(*) from outbox").execute(&mut *holder).await.unwrap();
    let key = Uuid::now_v7();
    put(&watch, key, 1..=ROWS).await;
    system.until_published(&watch).await;
    let dead = async || system.metric(Part::User, "outbox_dead_rows", &[]).await.unwrap_or(0.0) as i64;
    let vacuum = async || sqlx::query("vacuum (analyze) outbox").execute(&watch.user).await.unwrap();
    vacuum().await;
    eventually("the metric tells of the dead rows", async || (dead().await >= ROWS).then_some(())).await;
    system.register().await;
    system.until_published(&watch).await;

    holder.rollback().await.unwrap();
    vacuum().await;
    eventually("the metric falls", async || (dead().await < ROWS / 10).then_some(())).await;
    system.check(&watch, &Answered::default()).await;
}
