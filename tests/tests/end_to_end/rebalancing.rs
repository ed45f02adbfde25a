//! Partitions move between consumers: in a rolling restart, during an outage, because a consumer hangs. The new owner continues where
//! the effects end.

use std::time::Duration;

use tests::processes::ServiceProcess;
use tests::proxy::Request;
use tests::record::Draft;
use tests::services::{ANALYTICS_EMAILS, ANALYTICS_USERS, CONSUMERS, EMAIL_WELCOME, USER_EVENTS, groups};
use tests::{System, eventually, eventually_eq, throughout};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

/// Much longer than a consumer needs to learn its committed offsets.
const LATE: Duration = Duration::from_secs(1);

/// Of each consumer; the first is the system's own.
const COPIES: usize = 3;

/// T17, I5 I7 I8 I9 I12: three copies of every consumer, of which one after another is restarted under load. Each restart
/// follows as soon as the last is over instead of every ten seconds, so that more of them happen within a rebalance.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_and_doubles_nothing() {
    let mut system = System::start().await;
    let judge = system.judge().await;
    let mut others: Vec<ServiceProcess> = vec![];
    for service in CONSUMERS {
        others.extend((1..COPIES).map(|_| system.processes.spawn_another(service)));
    }
    for other in &mut others {
        other.until_ready().await;
    }
    let load = system.load(2);
    for service in CONSUMERS {
        system.processes.stop(service).await;
        system.processes.start(&[service]).await;
    }
    for other in &mut others {
        other.stop().await;
        assert!(other.exit_status().unwrap().success(), "{} ends as it is asked to", other.service.name);
    }
    let services = CONSUMERS.into_iter().flat_map(|service| [service; COPIES - 1]);
    others = services.map(|service| system.processes.spawn_another(service)).collect();
    for other in &mut others {
        other.until_ready().await;
    }
    load.until_accepted(5).await;
    let answers = load.end().await;
    assert!(answers.refused().is_empty(), "{:?}", answers.refused());
    judge.check_with(&mut system, &answers).await;
    let mails = system.mail.all();
    let mut recipients: Vec<_> = mails.iter().flat_map(|mail| &mail.to).collect();
    recipients.sort();
    assert!(recipients.windows(2).all(|pair| pair[0] != pair[1]), "a sender that is asked to end finishes its mail");
}

/// T19, I7 I9 I12: while a copy of analytics waits for its database, another comes, takes half of its partitions and leaves again.
/// They come back into the pause. When the database is back every partition goes on, each from where its effects end.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_move_during_a_pause_are_not_lost_and_not_left_paused() {
    let mut system = System::empty().await;
    let (database, (name, url)) = system.proxied_database(ANALYTICS).await;
    system.processes.spawn(USER);
    system.processes.spawn(EMAIL);
    system.processes.spawn_with(ANALYTICS, &[(&name, &url)]);
    system.processes.until_ready(&[USER, EMAIL, ANALYTICS]).await;
    let mut registered = register(&system, 2).await;
    until_registered(&system, registered).await;

    database.cut();
    registered += one_on_each_partition(&system).await;
    eventually("analytics waits", async || (system.processes.retries(ANALYTICS_USERS).await > 0.0).then_some(())).await;
    let mut other = system.processes.spawn_another(ANALYTICS);
    eventually_eq("members", 2, async || system.kafka.members(ANALYTICS_USERS).len()).await;
    other.until_ready().await;
    registered += register(&system, 4).await;
    other.stop().await;
    eventually_eq("members", 1, async || system.kafka.members(ANALYTICS_USERS).len()).await;
    registered += register(&system, 4).await;
    assert!(!system.processes.readiness(ANALYTICS).await.unwrap().0, "still without its database");

    database.heal();
    system.processes.until_ready(&[ANALYTICS]).await;
    until_registered(&system, registered).await;
    registered += one_on_each_partition(&system).await;
    until_registered(&system, registered).await;
    for group in [ANALYTICS_USERS, ANALYTICS_EMAILS] {
        system.kafka.until_caught_up(group).await;
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
    }
    assert!(!system.processes.has_ended(ANALYTICS));
}

/// Kafka takes its time to say where the log begins, which a client may well ask on the way to its start. An answer that comes late
/// moves nobody: what was handled before is not read again.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_answer_about_the_log_does_not_make_a_group_start_over() {
    let mut system = System::empty().await;
    let (_kafka, proxy) = system.own_kafka().await;
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    let registered = register(&system, 6).await;
    until_registered(&system, registered).await;
    system.processes.stop(ANALYTICS).await;

    proxy.slow_requests(Request::ListOffsets, LATE);
    system.processes.start_with(ANALYTICS, &[("KAFKA_BROKERS", &proxy.address())]).await;
    let registered = registered + register(&system, 1).await;
    until_registered(&system, registered).await;
    throughout(4 * LATE, "nothing comes twice", async || {
        system.processes.counted(ANALYTICS_USERS, "duplicate").await == 0.0
    })
    .await;
}

/// T18, I7 I12: a consumer's thread hangs with a batch in hand. Kafka gives its partitions to the other copy after 10 s instead of
/// the five minutes that are usual; when the thread comes back, its batch is not its own any more, and it joins again.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_hangs_is_replaced_and_comes_back() {
    let mut system = System::empty().await;
    let settings = [("HANDLE_TIMEOUT_MS", "2000")];
    system.processes.spawn(USER);
    system.processes.spawn(EMAIL);
    let until = system.processes.file("stalled-enough");
    let stall = [("FAULT_AT", "inbox.before_commit:1:stall"), ("FAULT_UNTIL", until.to_str().unwrap())];
    system.processes.spawn_with(ANALYTICS, &[settings[0], stall[0], stall[1]]);
    system.processes.until_ready(&[USER, EMAIL, ANALYTICS]).await;
    let mut registered = register(&system, 1).await;
    eventually("the first hangs", async || system.processes.log(ANALYTICS).contains("stalls").then_some(())).await;
    let mut other = system.processes.spawn_another_with(ANALYTICS, &settings);
    registered += register(&system, 6).await;
    other.until_ready().await;
    eventually_eq("the first is given up", 1, async || system.kafka.members(ANALYTICS_USERS).len()).await;
    let at_other = system.users.at(&other);
    eventually_eq("registered, says the other copy", registered, async || at_other.funnel().await.0).await;

    std::fs::write(until, "").unwrap();
    eventually_eq("both are members again", 2, async || system.kafka.members(ANALYTICS_USERS).len()).await;
    other.stop().await;
    registered += register(&system, 2).await;
    until_registered(&system, registered).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert!(!system.processes.has_ended(ANALYTICS));
}

/// T18, I5 I7 I11: a handler that panics takes neither its consumer nor its batch with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_once_loses_nothing() {
    let mut system = System::empty().await;
    system.processes.spawn(USER);
    system.processes.spawn_with(EMAIL, &[("FAULT_AT", "email.before_commit:1:panic")]);
    system.processes.spawn_with(ANALYTICS, &[("FAULT_AT", "inbox.before_commit:1:panic")]);
    system.processes.until_ready(&[USER, EMAIL, ANALYTICS]).await;
    let registered = register(&system, 3).await;
    system.users.until_counted(registered, registered).await;
    for service in [EMAIL, ANALYTICS] {
        let log = system.processes.log(service);
        assert!(
            log.contains("panicked") && !log.contains("the fault at"),
            "{} met its fault, and does not quote it",
            service.name
        );
        assert!(!system.processes.has_ended(service));
    }
    for group in [EMAIL_WELCOME, ANALYTICS_USERS, ANALYTICS_EMAILS] {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}: alone each record works");
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
    let mut system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    system.processes.stop(ANALYTICS).await;
    sqlx::raw_sql(SLOW).execute(&system.stores.database(ANALYTICS).await).await.unwrap();
    for _ in 0..SLOW_BATCH {
        let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
        system.kafka.write(USER_EVENTS, &fact).await;
    }
    system.processes.start(&[ANALYTICS]).await;
    until_registered(&system, SLOW_BATCH).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert!(system.processes.retries(ANALYTICS_USERS).await > 0.0, "as a whole it took too long");
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0, "slow is not wrong");
}

/// I7 I8: a process may have several consumers of each group. They share the partitions, as processes would.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_of_one_process_share_its_partitions() {
    let mut system = System::empty().await;
    system.processes.set("CONSUMERS", "3");
    system.processes.start_all().await;
    let judge = system.judge().await;
    for group in groups() {
        eventually_eq(&format!("members of {group}"), 3, async || system.kafka.members(group).len()).await;
    }
    system.users.register_many(12).await;
    judge.check(&mut system).await;
}

/// Registers that many users, and returns how many.
async fn register(system: &System, users: u32) -> i64 {
    system.users.register_many(users as usize).await;
    users.into()
}

/// Writes a registration to each partition, and returns how many.
async fn one_on_each_partition(system: &System) -> i64 {
    let fact = |partition| Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition);
    system.kafka.write_all(USER_EVENTS, &(0..6).map(fact).collect::<Vec<_>>()).await.len() as i64
}

async fn until_registered(system: &System, users: i64) {
    eventually_eq("registered in the funnel, and counted", (users, Some(users)), async || {
        (system.users.funnel().await.0, system.users.registrations().await)
    })
    .await;
}
