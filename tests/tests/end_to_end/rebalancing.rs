//! Partitions change hands: in a rolling restart, during an outage, because a consumer hangs. Whoever has them goes on where the
//! effects end.

use std::time::Duration;

use testbed::services::RunningService;
use tests::log::Draft;
use tests::proxy::Request;
use tests::{Part, System, eventually, eventually_eq, throughout};
use uuid::Uuid;

const CONSUMERS: [Part; 3] = [Part::Email, Part::Analytics, Part::Cache];
/// Much longer than a consumer needs to learn its committed offsets.
const LATE: Duration = Duration::from_secs(1);
/// Of each consumer; the first is the system's own.
const COPIES: usize = 3;

/// T17, I5 I7 I8 I9 I12: three copies of every consumer, of which one after another is restarted under load. Each restart
/// follows as soon as the last is over instead of every ten seconds, so that more of them happen within a rebalance.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_and_doubles_nothing() {
    let mut system = System::start().await;
    let watch = system.watch().await;
    let mut others: Vec<RunningService> = vec![];
    for part in CONSUMERS {
        others.extend((1..COPIES).map(|_| system.spawn_another(part, &[])));
    }
    for other in &mut others {
        other.until_ready().await.unwrap();
    }
    let load = system.load(2);
    for part in CONSUMERS {
        system.stop(part).await;
        system.restart(part, &[]).await;
    }
    for other in &mut others {
        other.stop().await;
        assert!(other.process.ended().unwrap().success(), "{} ends as it is asked to", other.instance.service.name);
    }
    let parts = CONSUMERS.into_iter().flat_map(|part| [part; COPIES - 1]);
    others = parts.map(|part| system.spawn_another(part, &[])).collect();
    for other in &mut others {
        other.until_ready().await.unwrap();
    }
    load.until_accepted(5).await;
    let answered = load.end().await;
    assert!(answered.refused().is_empty(), "{:?}", answered.refused());
    system.check(&watch, &answered).await;
    let mails = system.sink.mails();
    let mut recipients: Vec<_> = mails.iter().flat_map(|mail| &mail.to).collect();
    recipients.sort();
    assert!(recipients.windows(2).all(|pair| pair[0] != pair[1]), "a sender that is asked to end finishes its mail");
}

/// T19, I7 I9 I12: while a copy of analytics waits for its database, another comes, takes half of its partitions and leaves again.
/// They come back into the pause. When the database is back every partition goes on, each from where its effects end.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_move_during_a_pause_are_not_lost_and_not_left_paused() {
    let mut system = System::empty().await;
    let (database, (name, url)) = system.proxied_database(Part::Analytics).await;
    system.spawn(Part::User, &[]);
    system.spawn(Part::Email, &[]);
    system.spawn(Part::Analytics, &[(&name, &url)]);
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    let mut registered = register(&system, 2).await;
    until_registered(&system, registered).await;

    database.cut();
    registered += one_on_each_partition(&system).await;
    eventually("analytics waits", async || (system.retries("analytics.users").await > 0.0).then_some(())).await;
    let mut other = system.spawn_another(Part::Analytics, &[]);
    eventually_eq("members", 2, async || system.members("analytics.users").len()).await;
    other.until_ready().await.unwrap();
    registered += register(&system, 4).await;
    other.stop().await;
    eventually_eq("members", 1, async || system.members("analytics.users").len()).await;
    registered += register(&system, 4).await;
    assert!(!system.readiness(Part::Analytics).await.unwrap().0, "still without its database");

    database.heal();
    system.ready(&[Part::Analytics]).await;
    until_registered(&system, registered).await;
    registered += one_on_each_partition(&system).await;
    until_registered(&system, registered).await;
    for (group, topic) in [("analytics.users", "user.events.v1"), ("analytics.emails", "email.events.v1")] {
        system.until_read(group, topic).await;
        assert_eq!(system.dead_letters(group).len(), 0, "dead letters of {group}");
    }
    assert!(!system.has_ended(Part::Analytics));
}

/// Kafka takes its time to say where the log begins, which a client may well ask on the way to its start. An answer that comes late
/// moves nobody: what was handled before is not read again.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_answer_about_the_log_does_not_make_a_group_start_over() {
    let mut system = System::empty().await;
    let (_kafka, proxy) = system.own_kafka().await;
    for part in [Part::User, Part::Email, Part::Analytics] {
        system.spawn(part, &[]);
    }
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    let registered = register(&system, 6).await;
    until_registered(&system, registered).await;
    system.stop(Part::Analytics).await;

    proxy.slow_requests(Request::ListOffsets, LATE);
    system.restart(Part::Analytics, &[("KAFKA_BROKERS", &proxy.address())]).await;
    let registered = registered + register(&system, 1).await;
    until_registered(&system, registered).await;
    throughout(4 * LATE, "nothing comes twice", async || system.counted("analytics.users", "duplicate").await == 0.0)
        .await;
}

/// T18, I7 I12: a consumer's thread hangs with a batch in hand. Kafka gives its partitions to the other copy after 10 s instead of
/// the five minutes that are usual; when the thread comes back, its batch is not its own any more, and it joins again.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_hangs_is_replaced_and_comes_back() {
    let mut system = System::empty().await;
    let settings = [("HANDLE_TIMEOUT_MS", "2000")];
    system.spawn(Part::User, &[]);
    system.spawn(Part::Email, &[]);
    let until = system.evidence("stalled-enough");
    let stall = [("FAULT_AT", "inbox.before_commit:1:stall"), ("FAULT_UNTIL", until.to_str().unwrap())];
    system.spawn(Part::Analytics, &[settings[0], stall[0], stall[1]]);
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    let mut registered = register(&system, 1).await;
    eventually("the first hangs", async || system.log_of(Part::Analytics).contains("stalls").then_some(())).await;
    let mut other = system.spawn_another(Part::Analytics, &settings);
    registered += register(&system, 6).await;
    other.until_ready().await.unwrap();
    eventually_eq("the first is given up", 1, async || system.members("analytics.users").len()).await;
    until_registered_at(&other, registered).await;

    std::fs::write(until, "").unwrap();
    eventually_eq("both are members again", 2, async || system.members("analytics.users").len()).await;
    other.stop().await;
    registered += register(&system, 2).await;
    until_registered(&system, registered).await;
    system.until_read("analytics.users", "user.events.v1").await;
    assert!(!system.has_ended(Part::Analytics));
}

/// T18, I5 I7 I11: a handler that panics takes neither its consumer nor its batch with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_once_loses_nothing() {
    let mut system = System::empty().await;
    system.spawn(Part::User, &[]);
    system.spawn(Part::Email, &[("FAULT_AT", "email.before_commit:1:panic")]);
    system.spawn(Part::Analytics, &[("FAULT_AT", "inbox.before_commit:1:panic")]);
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    let registered = register(&system, 3).await;
    system.until_counted(registered, registered).await;
    for part in [Part::Email, Part::Analytics] {
        let log = system.log_of(part);
        assert!(
            log.contains("panicked") && !log.contains("the fault at"),
            "{part:?} met its fault, and does not quote it"
        );
        assert!(!system.has_ended(part));
    }
    for group in ["email.welcome", "analytics.users", "analytics.emails"] {
        assert_eq!(system.dead_letters(group).len(), 0, "dead letters of {group}: alone each record works");
    }
}

/// Each row of the funnel takes this long, so a batch of 30 takes longer than a statement may (5 s).
pub const SLOW: &str = "
    create function be_slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.2); return new; end $$;
    create trigger be_slow before insert on funnel for each row execute function be_slow();";
pub const SLOW_BATCH: i64 = 30;

/// T18, I7 I12: a batch that cannot be done within the time-outs is not tried as a whole for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_takes_too_long_is_done_record_by_record() {
    let mut system = System::empty().await;
    for part in [Part::User, Part::Email, Part::Analytics] {
        system.spawn(part, &[]);
    }
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    system.stop(Part::Analytics).await;
    sqlx::raw_sql(SLOW).execute(&system.database(Part::Analytics).await).await.unwrap();
    for _ in 0..SLOW_BATCH {
        let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
        system.write("user.events.v1", &fact).await;
    }
    system.restart(Part::Analytics, &[]).await;
    until_registered(&system, SLOW_BATCH).await;
    system.until_read("analytics.users", "user.events.v1").await;
    assert!(system.retries("analytics.users").await > 0.0, "as a whole it took too long");
    assert_eq!(system.dead_letters("analytics.users").len(), 0, "slow is not wrong");
}

/// Registers so many, and says how many.
async fn register(system: &System, users: i64) -> i64 {
    for _ in 0..users {
        system.register().await;
    }
    users
}

/// The same, written by hand: all partitions have something to read.
async fn one_on_each_partition(system: &System) -> i64 {
    let fact = |partition| Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition);
    system.write_all("user.events.v1", &(0..6).map(fact).collect::<Vec<_>>()).await.len() as i64
}

async fn until_registered(system: &System, users: i64) {
    eventually_eq("registered in the funnel, and counted", (users, Some(users)), async || {
        (system.funnel().await.0, system.registrations().await)
    })
    .await;
}

/// The same, as a further copy tells it.
async fn until_registered_at(copy: &RunningService, users: i64) {
    eventually_eq("registered, says the other copy", Some(users), async || {
        let answer = tests::api::send(reqwest::Client::new().get(format!("{}/funnel", copy.instance.url()))).await;
        answer.ok()?.body["registered"].as_i64()
    })
    .await;
}
