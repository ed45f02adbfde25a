//! The store of the cache comes back with old data, or stops being the master. The cache never
//! answers with what it knows only from before.

use std::time::Duration;

use reqwest::StatusCode;
use testbed::kafka::Kafka;
use testbed::redis::Redis;
use testbed::testing::free_port;
use tests::proxy::Proxy;
use tests::system::Own;
use tests::{System, eventually, eventually_eq, throughout};
use topology::{CACHE, USER};
use uuid::Uuid;

/// How long Kafka is down: longer than several checks of the consumer.
const OUTAGE: Duration = Duration::from_secs(5);

/// T50, I8: Valkey comes back from a snapshot that is older than a change and an erasure. Kafka is
/// down, so the cache cannot know what has changed. It answers 503 until it does.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_does_not_answer_from_a_restored_snapshot() {
    let (mut system, mut kafka) = with_own_kafka().await;
    let mut valkey = system.own_valkey().await;
    let [renamed, erased, unchanged] = cached_users(&mut system).await;
    valkey.component.save().await.unwrap();
    change(&system, renamed, erased).await;

    kafka.component.process.freeze();
    valkey.component.restore().await.unwrap();
    assert_unavailable(&system, [renamed, erased, unchanged]).await;
    kafka.component.process.thaw();
    assert_refilled(&system, renamed, erased, unchanged).await;

    // A snapshot that is up to date is complete as soon as the ends of the topic are reached.
    valkey.component.save().await.unwrap();
    valkey.component.restore().await.unwrap();
    assert_refilled(&system, renamed, erased, unchanged).await;
}

/// T50, I8: Valkey restarts and loads its snapshot for some seconds. It accepts connections and
/// refuses commands meanwhile (LOADING). The cache answers 503 until the data is there.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_waits_for_a_store_that_loads_its_data() {
    const FILLERS: u32 = 30;
    let mut system = System::empty().await;
    let mut valkey = system.own_valkey().await;
    let users = cached_users(&mut system).await;
    // Redis looks for new commands once it has loaded 2 MB more. Text that can be compressed would
    // be smaller.
    let filler: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(1_000_000).collect();
    let mut connection = system.stores.valkey().await;
    for number in 0..FILLERS {
        let mut set = redis::cmd("SET");
        let () = set.arg(format!("filler:{number}")).arg(&filler).query_async(&mut connection).await.unwrap();
    }
    valkey.component.save().await.unwrap();

    valkey.component.restore_slowly(Duration::from_millis(200)).await.unwrap();
    let mut refused = 0;
    while valkey.component.is_loading().await {
        for id in users {
            let answer = system.users.cached_version(id).await;
            if valkey.component.is_loading().await {
                assert_eq!(answer, Err(StatusCode::SERVICE_UNAVAILABLE), "an answer while the store loads");
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "the store has loaded its data before a request");
    for id in users {
        eventually_eq("the version after the store has loaded", Ok(1), async || system.users.cached_version(id).await)
            .await;
    }
}

/// T50, I8: a replica that lags is promoted.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_does_not_answer_from_a_replica_that_lagged_when_it_was_promoted() {
    let (mut system, mut kafka) = with_own_kafka().await;
    let mut master = system.own_valkey().await;
    let replica = System::another_valkey().await;
    let front = Proxy::before(&address(&master)).await;
    let link = Proxy::before(&address(&master)).await;
    system.processes.set("VALKEY_URL", &format!("redis://{}", front.address()));
    let [renamed, erased, unchanged] = cached_users(&mut system).await;
    replica.component.replicate(Some(link.port())).await.unwrap();
    until_replicated(&system, &replica).await;
    link.silence();
    change(&system, renamed, erased).await;

    kafka.component.process.freeze();
    master.component.process.kill();
    replica.component.replicate(None).await.unwrap();
    front.redirect(address(&replica));
    assert_unavailable(&system, [renamed, erased, unchanged]).await;
    kafka.component.process.thaw();
    assert_refilled(&system, renamed, erased, unchanged).await;
}

/// T50, I8: a master fails over to a replica that lags, and back. It has the data of the replica
/// then, and the same process and the same connections as before.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_does_not_answer_from_a_master_that_was_a_replica_in_between() {
    let (mut system, mut kafka) = with_own_kafka().await;
    let master = system.own_valkey().await;
    let replica = System::another_valkey().await;
    let link = Proxy::before(&address(&master)).await;
    replica.component.replicate(Some(link.port())).await.unwrap();
    let [renamed, erased, unchanged] = cached_users(&mut system).await;
    until_replicated(&system, &replica).await;
    link.silence();
    change(&system, renamed, erased).await;

    kafka.component.process.freeze();
    replica.component.replicate(None).await.unwrap();
    master.component.replicate(Some(replica.component.port())).await.unwrap();
    let mut connection = system.stores.valkey().await;
    eventually("the master has the data of the replica", async || {
        let info: String = redis::cmd("INFO").arg("replication").query_async(&mut connection).await.unwrap();
        info.contains("master_link_status:up").then_some(())
    })
    .await;
    master.component.replicate(None).await.unwrap();
    assert_unavailable(&system, [renamed, erased, unchanged]).await;
    kafka.component.process.thaw();
    assert_refilled(&system, renamed, erased, unchanged).await;
}

/// T67, I8: Valkey is set to evict keys and loses a profile. The cache answers 503 and says why.
/// When Valkey evicts no more, the cache fills the view from the beginning of the topic.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_does_not_answer_from_a_store_that_evicts_keys() {
    let mut system = System::empty().await;
    let _valkey = system.own_valkey().await;
    let [renamed, erased, unchanged] = cached_users(&mut system).await;
    change(&system, renamed, erased).await;
    let mut connection = system.stores.valkey().await;
    let mut set_policy = async |policy: &str| {
        let mut set = redis::cmd("CONFIG");
        let () = set.arg("SET").arg("maxmemory-policy").arg(policy).query_async(&mut connection).await.unwrap();
    };
    set_policy("allkeys-lru").await;
    eventually("/status names the policy", async || {
        let (_, body) = system.processes.status(CACHE).await?;
        body["waiting_for"]["view"].as_str()?.contains("maxmemory-policy noeviction").then_some(())
    })
    .await;
    assert_eq!(system.stores.delete_cached_profile(unchanged).await, 1, "profiles that were evicted");
    assert_unavailable(&system, [renamed, erased, unchanged]).await;
    set_policy("noeviction").await;
    assert_refilled(&system, renamed, erased, unchanged).await;
}

/// T51, I8: the connection stays on a node that became a replica. New connections lead to the new
/// master.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_leaves_a_node_that_was_demoted() {
    let mut system = System::empty().await;
    let master = system.own_valkey().await;
    let replica = System::another_valkey().await;
    let front = Proxy::before(&address(&master)).await;
    system.processes.set("VALKEY_URL", &format!("redis://{}", front.address()));
    let [renamed, erased, unchanged] = cached_users(&mut system).await;
    replica.component.replicate(Some(master.component.port())).await.unwrap();
    until_replicated(&system, &replica).await;

    replica.component.replicate(None).await.unwrap();
    front.redirect(address(&replica));
    // It answers reads, and never catches up.
    master.component.replicate(Some(1)).await.unwrap();
    change(&system, renamed, erased).await;
    assert_refilled(&system, renamed, erased, unchanged).await;

    // As before, but the demoted node answers nothing (MASTERDOWN).
    let mut demoted = redis::Client::open(replica.component.url()).unwrap().get_connection().unwrap();
    let mut refuse = redis::cmd("CONFIG");
    let () = refuse.arg("SET").arg("replica-serve-stale-data").arg("no").query(&mut demoted).unwrap();
    master.component.replicate(None).await.unwrap();
    front.redirect(address(&master));
    replica.component.replicate(Some(1)).await.unwrap();
    system.users.rename(renamed, "Three").await.unwrap();
    eventually_eq("the renamed user", Ok(3), async || system.users.cached_version(renamed).await).await;
}

/// A Kafka that keeps its broker while it is frozen. With the short session of other tests the
/// controller fences the broker when it resumes, and unfences it at once. In one of many runs Kafka
/// answered no request of a consumer group any more after that.
async fn with_own_kafka() -> (System, Own<Kafka>) {
    let mut system = System::empty().await;
    let kafka = system.own_kafka_on(free_port(), "broker.session.timeout.ms=60000").await;
    system.processes.set("KAFKA_BROKERS", &kafka.component.address());
    (system, kafka)
}

fn address(valkey: &Own<Redis>) -> String {
    format!("127.0.0.1:{}", valkey.component.port())
}

/// Starts the user service and the cache. Returns users that a complete view has.
async fn cached_users(system: &mut System) -> [Uuid; 3] {
    system.processes.start(&[USER, CACHE]).await;
    let users = system.users.register_many(3).await;
    for id in &users {
        eventually_eq("the version in a complete view", Ok(1), async || system.users.cached_version(*id).await).await;
    }
    users.try_into().unwrap()
}

async fn until_replicated(system: &System, replica: &Own<Redis>) {
    let size = async |url: &str| -> i64 {
        let mut connection = redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap();
        redis::cmd("DBSIZE").query_async(&mut connection).await.unwrap()
    };
    let master = async || {
        let mut connection = system.stores.valkey().await;
        redis::cmd("DBSIZE").query_async::<i64>(&mut connection).await.unwrap()
    };
    eventually("the replica has all keys", async || {
        (size(&replica.component.url()).await == master().await).then_some(())
    })
    .await;
}

/// Renames one user and erases another, and waits until the cache says so.
async fn change(system: &System, renamed: Uuid, erased: Uuid) {
    system.users.rename(renamed, "Two").await.unwrap();
    system.users.erase(erased).await.unwrap();
    eventually_eq("the renamed user", Ok(2), async || system.users.cached_version(renamed).await).await;
    eventually_eq("the erased user", Err(StatusCode::NOT_FOUND), async || system.users.cached_version(erased).await)
        .await;
}

async fn assert_unavailable(system: &System, users: [Uuid; 3]) {
    throughout(OUTAGE, "the cache answers 503", async || {
        for id in users {
            let answer = system.users.cached_version(id).await;
            assert_eq!(answer, Err(StatusCode::SERVICE_UNAVAILABLE), "an answer from old data");
        }
        true
    })
    .await;
}

/// Waits until the cache answers again. Its first answer that is not 503 must be right.
async fn assert_refilled(system: &System, renamed: Uuid, erased: Uuid, unchanged: Uuid) {
    for (id, expected) in [(renamed, Ok(2)), (erased, Err(StatusCode::NOT_FOUND)), (unchanged, Ok(1))] {
        let first = eventually("the cache answers", async || {
            let answer = system.users.cached_version(id).await;
            (answer != Err(StatusCode::SERVICE_UNAVAILABLE)).then_some(answer)
        })
        .await;
        assert_eq!(first, expected, "the first answer");
    }
}
