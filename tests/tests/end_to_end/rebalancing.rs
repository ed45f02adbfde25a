//! Partitions move between consumers: in a rolling restart, during an outage, or because a consumer
//! hangs. The new owner continues after the last record that took effect.

use std::cell::Cell;
use std::time::Duration;

use testbed::smtp_sink::Fault;
use tests::kafka::GroupLeader;
use tests::processes::ServiceProcess;
use tests::proxy::KafkaRequest;
use tests::record::Draft;
use tests::services::{
    ANALYTICS_AUDIT, ANALYTICS_EMAILS, ANALYTICS_USERS, CONSUMERS, DEFAULT_CONSUMERS, EMAIL_WELCOME, USER_EVENTS,
    groups,
};
use tests::{System, eventually, eventually_eq, throughout};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

/// Much longer than a consumer needs to read its committed offsets.
const LATE: Duration = Duration::from_secs(1);

/// Processes of each consuming service, including the first one.
const COPIES: usize = 3;

/// T17, I5, I7, I8, I9, I12: every consuming service has three copies, and under load they are
/// restarted one after another. A restart follows as soon as the previous one is complete and not
/// every ten seconds, so that more restarts happen during a rebalance.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_and_duplicates_nothing() {
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
        assert!(other.exit_status().unwrap().success(), "{} must exit with status 0", other.service.name);
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
    let unique = recipients.windows(2).all(|pair| pair[0] != pair[1]);
    assert!(unique, "two mails to one address: a sender must finish its mail before it stops");
}

/// T19, I7, I9, I12: while a copy of analytics waits for its database, another copy joins, gets
/// half of the partitions and leaves. The partitions return to the copy that is paused. When its
/// database is back, every partition continues after its last record that took effect.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_move_during_a_pause_are_neither_lost_nor_left_paused() {
    let mut system = System::empty().await;
    system.processes.set_all(&DEFAULT_CONSUMERS);
    let (database, (name, url)) = system.proxied_database(ANALYTICS).await;
    system.processes.spawn(USER);
    system.processes.spawn(EMAIL);
    system.processes.spawn_with(ANALYTICS, &[(&name, &url)]);
    system.processes.until_ready(&[USER, EMAIL, ANALYTICS]).await;
    let mut registered = register(&system, 2).await;
    until_registered(&system, registered).await;

    database.cut();
    registered += register_on_each_partition(&system).await;
    let retries = async || system.processes.retries(ANALYTICS_USERS).await;
    eventually("analytics is paused", async || (retries().await > 0.0).then_some(())).await;
    let mut other = system.processes.spawn_another(ANALYTICS);
    let members = async || system.kafka.members(ANALYTICS_USERS).len();
    eventually_eq("members after the other copy has joined", 2, members).await;
    other.until_ready().await;
    registered += register(&system, 4).await;
    other.stop().await;
    eventually_eq("members after the other copy has left", 1, members).await;
    registered += register(&system, 4).await;
    let (ready, _) = system.processes.status(ANALYTICS).await.unwrap();
    assert!(!ready, "analytics must not be ready without its database");

    database.heal();
    system.processes.until_ready(&[ANALYTICS]).await;
    until_registered(&system, registered).await;
    registered += register_on_each_partition(&system).await;
    until_registered(&system, registered).await;
    for group in [ANALYTICS_USERS, ANALYTICS_EMAILS] {
        system.kafka.until_caught_up(group).await;
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
    }
    assert!(!system.processes.has_ended(ANALYTICS), "analytics must keep running");
}

/// T76, I12: the leader of a group distributes no partition, as a broker that does not know a new
/// topic yet makes it do. The group is complete, so Kafka starts no rebalance. The consumer finds
/// the partitions without an owner, joins again, and gets them.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_no_member_of_the_group_has_is_found_and_read() {
    let mut system = System::start_with(&[USER, EMAIL, ANALYTICS], &DEFAULT_CONSUMERS).await;
    system.processes.stop(ANALYTICS).await;
    let group = system.kafka.prefixed(ANALYTICS_USERS);
    let mut leader = GroupLeader::join(&system.kafka.address, group).await;

    system.processes.spawn(ANALYTICS);
    assert_eq!(leader.rebalance().await, 2, "members of the group");
    let registered = register_on_each_partition(&system).await;
    leader.until_rebalance().await;
    leader.leave().await;
    until_registered(&system, registered).await;
    system.processes.until_ready(&[ANALYTICS]).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
}

/// I9: a batch holds records of several partitions, and the partitions are of different length.
/// Each partition gets its own next offset. The consumer stalls after it stored the offsets, and
/// the Kafka client commits them. If it continued, it would soon store the end of each partition.
#[tokio::test(flavor = "multi_thread")]
async fn each_partition_of_a_batch_gets_its_own_next_offset() {
    let mut system = System::start_with(&[USER, EMAIL, ANALYTICS], &DEFAULT_CONSUMERS).await;
    let mut registered = register_on_each_partition(&system).await;
    until_registered(&system, registered).await;
    // Without further mails only the groups of `user.events.v1` get a batch.
    system.processes.stop(EMAIL).await;
    for group in [ANALYTICS_USERS, ANALYTICS_AUDIT, ANALYTICS_EMAILS] {
        system.kafka.until_caught_up(group).await;
    }
    system.processes.stop(ANALYTICS).await;
    let before = system.kafka.committed(ANALYTICS_USERS);
    registered += register_on_each_partition(&system).await;
    for _ in 0..3 {
        let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
        system.kafka.write(USER_EVENTS, &fact).await;
        registered += 1;
    }

    let end_of_stall = system.processes.file("end-of-stall");
    let until = ("FAULT_UNTIL", end_of_stall.to_str().unwrap());
    system.processes.spawn_with(ANALYTICS, &[("FAULT_AT", "consumer.after_store:1:stall"), until]);
    // The consumer of one of the groups stalls. The other one continues.
    for group in [ANALYTICS_USERS, ANALYTICS_AUDIT] {
        let committed = eventually(&format!("the offsets of the batch of {group} are committed"), async || {
            let committed = system.kafka.committed(group);
            (committed != before).then_some(committed)
        })
        .await;
        for (partition, end) in system.kafka.ends(group) {
            let offset = committed[&partition];
            assert!(offset <= end, "{group} {partition}: offset {offset} is committed, and the end is {end}");
        }
    }

    std::fs::write(end_of_stall, "").unwrap();
    until_registered(&system, registered).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
}

/// T17, I9, I11: partitions move to another copy and back while facts are written. Offsets are
/// committed by the clock once a minute only, so the new owner knows what was handled because the
/// old one committed it when it lost the partition. A batch is never in progress then, so no record
/// is handled twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_loses_a_partition_commits_what_it_has_handled() {
    let mut system = System::empty().await;
    system.processes.set("OFFSET_COMMIT_MS", "60000");
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    let mut registered = 0;
    for _ in 0..10 {
        registered += register_on_each_partition(&system).await;
    }
    until_registered(&system, registered).await;

    let mut other = system.processes.spawn_another(ANALYTICS);
    while system.kafka.members(ANALYTICS_USERS).len() < 2 {
        registered += register_on_each_partition(&system).await;
    }
    other.until_ready().await;
    for _ in 0..10 {
        registered += register_on_each_partition(&system).await;
    }
    until_registered(&system, registered).await;
    let labels = [&*format!("group=\"{ANALYTICS_USERS}\""), "outcome=\"duplicate\""];
    let at_other = other.admin().metric("events_consumed_total", &labels).await;
    other.stop().await;
    registered += register_on_each_partition(&system).await;
    until_registered(&system, registered).await;
    let at_first = system.processes.counted(ANALYTICS_USERS, "duplicate").await;
    assert_eq!((at_first, at_other.unwrap_or(0.0)), (0.0, 0.0), "records that were handled twice");
}

/// T17, I9, I11: with a backlog a consumer has polled the next batch while its handler works on the
/// present one. Partitions move in the meantime: what is handled is committed, and the records that
/// were only polled go to the new owner. No record is handled twice.
///
/// A batch takes more records than a partition has, so it has records of several partitions. The
/// first consumer keeps one partition and loses the others, so what it has polled includes records
/// of a partition that it loses. It may have polled nothing ahead, because a report of the client's
/// statistics ends its poll early. So another process joins more than once.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_were_polled_ahead_go_to_the_new_owner() {
    const JOINS: usize = 4;
    const PARTITIONS: i32 = 6;
    const BATCH: &str = "60";
    /// Records of all partitions that are written together. There are always this many to handle,
    /// and at most twice as many.
    const WRITTEN: i32 = 150;
    /// A batch takes less than a tenth of a second, much less than the time between two reports.
    const SLOWER: &str = "
        create function be_slower() returns trigger language plpgsql as $$ begin perform pg_sleep(0.0005); return new; end $$;
        create trigger be_slower before insert on funnel for each row execute function be_slower();";
    let mut system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    system.processes.stop(ANALYTICS).await;
    // Without mails no other group uses an inbox.
    system.processes.stop(EMAIL).await;
    sqlx::raw_sql(SLOWER).execute(&system.stores.database(ANALYTICS).await).await.unwrap();
    let settings = [("BATCH_RECORDS", BATCH), ("OFFSET_COMMIT_MS", "5000")];
    system.processes.spawn_with(ANALYTICS, &[settings[0], settings[1], ("CONSUMERS", "1")]);
    system.processes.until_ready(&[ANALYTICS]).await;

    let is_over = Cell::new(false);
    let backlog = async {
        let mut written = 0;
        while !is_over.get() {
            if written - system.users.funnel().await.0 <= i64::from(WRITTEN) {
                let fact = |number| Draft::user_event("user.registered", Uuid::now_v7(), 1).on(number % PARTITIONS);
                let facts: Vec<Draft> = (0..WRITTEN).map(fact).collect();
                written += system.kafka.write_all(USER_EVENTS, &facts).await.len() as i64;
            }
        }
        written
    };
    let counted = async |process: &ServiceProcess, outcome: &str| {
        let labels = [&*format!("group=\"{ANALYTICS_USERS}\""), &*format!("outcome=\"{outcome}\"")];
        process.admin().metric("events_consumed_total", &labels).await.unwrap_or(0.0)
    };
    let members = async |number: usize| {
        let is_distributed = async || system.kafka.has_distributed(ANALYTICS_USERS, number).then_some(());
        eventually(&format!("{number} consumers share the partitions"), is_distributed).await;
    };
    let joins = async {
        let consumers = ("CONSUMERS", &*(PARTITIONS - 1).to_string());
        for _ in 0..JOINS {
            let handled = system.users.funnel().await.0;
            eventually("the first process handles records", async || {
                (system.users.funnel().await.0 > handled + i64::from(WRITTEN)).then_some(())
            })
            .await;
            let mut other = system.processes.spawn_another_with(ANALYTICS, &[settings[0], settings[1], consumers]);
            members(PARTITIONS as usize).await;
            eventually("the other process has handled its part of the backlog, and later records", async || {
                (counted(&other, "applied").await > f64::from(2 * WRITTEN)).then_some(())
            })
            .await;
            assert_eq!(counted(&other, "duplicate").await, 0.0, "records that were handled twice");
            other.stop().await;
            members(1).await;
        }
        is_over.set(true);
    };
    let (written, ()) = tokio::join!(backlog, joins);
    until_registered(&system, written).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert_eq!(system.processes.counted(ANALYTICS_USERS, "duplicate").await, 0.0, "records that were handled twice");
}

/// I9: the consumer has polled the last records of a partition, and its end, while the handler
/// still works on the records before them. It stores no offset after records that are not handled.
/// The handler is slow, so that the client has fetched everything before the third of four batches.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_partition_is_not_stored_before_its_last_records_are_handled() {
    let mut system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    system.processes.stop(ANALYTICS).await;
    sqlx::raw_sql(SLOW).execute(&system.stores.database(ANALYTICS).await).await.unwrap();
    let first = system.kafka.committed(ANALYTICS_USERS).get(&0).copied().unwrap_or(0);
    let fact = || Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
    let facts: Vec<Draft> = (0..14).map(|_| fact()).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;

    let end_of_stall = system.processes.file("end-of-stall");
    let stall = ("FAULT_AT", "inbox.before_commit:4:stall");
    let until = ("FAULT_UNTIL", end_of_stall.to_str().unwrap());
    let settings = [("BATCH_RECORDS", "4"), ("OFFSET_COMMIT_MS", "100"), stall, until];
    system.processes.spawn_with(ANALYTICS, &settings);
    system.processes.until_logged(ANALYTICS, "fault point reached").await;
    let committed = async || system.kafka.committed(ANALYTICS_USERS).get(&0).copied();
    eventually_eq("the committed offset", Some(first + 12), committed).await;
    throughout(LATE, "no later offset is committed", async || committed().await == Some(first + 12)).await;

    std::fs::write(end_of_stall, "").unwrap();
    until_registered(&system, 14).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
}

/// A client may request the first and last offsets of a partition while it looks for its start, and
/// Kafka answers late. The late answer does not change the start: no handled record is read again.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_answer_to_list_offsets_does_not_restart_a_group() {
    let mut system = System::empty().await;
    let (_kafka, proxy) = system.own_kafka().await;
    system.processes.start(&[USER, EMAIL, ANALYTICS]).await;
    let registered = register(&system, 6).await;
    until_registered(&system, registered).await;
    system.processes.stop(ANALYTICS).await;

    proxy.slow_requests(KafkaRequest::ListOffsets, LATE);
    system.processes.start_with(ANALYTICS, &[("KAFKA_BROKERS", &proxy.address())]).await;
    let registered = registered + register(&system, 1).await;
    until_registered(&system, registered).await;
    throughout(4 * LATE, "analytics reads no record again", async || {
        system.processes.counted(ANALYTICS_USERS, "duplicate").await == 0.0
    })
    .await;
}

/// T18, I7, I12: the thread of a consumer hangs before its batch takes effect. Kafka assigns its
/// partitions to the other copy, here after 10 s instead of the usual five minutes. When the thread
/// continues, it no longer owns the batch, and it rejoins the group.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_hangs_is_replaced_and_rejoins() {
    let mut system = System::empty().await;
    system.processes.set_all(&DEFAULT_CONSUMERS);
    // Without mails the group of the registrations is the only one that reaches the fault point.
    system.mail.fail(Fault::Refuse);
    let handle_timeout = ("HANDLE_TIMEOUT_MS", "2000");
    system.processes.spawn(USER);
    system.processes.spawn(EMAIL);
    let end_of_stall = system.processes.file("end-of-stall");
    let stall = ("FAULT_AT", "inbox.before_commit:1:stall");
    let until = ("FAULT_UNTIL", end_of_stall.to_str().unwrap());
    system.processes.spawn_with(ANALYTICS, &[handle_timeout, stall, until]);
    system.processes.until_ready(&[USER, EMAIL, ANALYTICS]).await;
    let mut registered = register(&system, 1).await;
    system.processes.until_logged(ANALYTICS, "fault point reached").await;
    let mut other = system.processes.spawn_another_with(ANALYTICS, &[handle_timeout]);
    registered += register(&system, 6).await;
    other.until_ready().await;
    let members = async || system.kafka.members(ANALYTICS_USERS).len();
    eventually_eq("members without the copy that hangs", 1, members).await;
    let at_other = system.users.at(&other);
    eventually_eq("users that the other copy has counted", registered, async || at_other.funnel().await.0).await;

    std::fs::write(end_of_stall, "").unwrap();
    eventually_eq("members after the first copy has rejoined", 2, members).await;
    other.stop().await;
    registered += register(&system, 2).await;
    until_registered(&system, registered).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert!(!system.processes.has_ended(ANALYTICS), "analytics must keep running");
}

/// T18, I5, I7, I11: a handler panics once. The consumer keeps running and handles every record of
/// the batch. The log does not quote the panic message, because it may contain data.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_once_loses_no_record() {
    let mut system = System::empty().await;
    system.processes.spawn(USER);
    system.processes.spawn_with(EMAIL, &[("FAULT_AT", "email.before_commit:1:panic")]);
    system.processes.spawn_with(ANALYTICS, &[("FAULT_AT", "inbox.before_commit:1:panic")]);
    system.processes.until_ready(&[USER, EMAIL, ANALYTICS]).await;
    let registered = register(&system, 3).await;
    system.users.until_counted(registered, registered).await;
    for service in [EMAIL, ANALYTICS] {
        let log = system.processes.log(service);
        assert!(log.contains("panicked"), "{} must reach its fault point", service.name);
        assert!(!log.contains("fault point"), "the log of {} must not quote the panic message", service.name);
        assert!(!system.processes.has_ended(service), "{} must keep running", service.name);
    }
    for group in [EMAIL_WELCOME, ANALYTICS_USERS, ANALYTICS_EMAILS] {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}, whose records can be handled");
    }
}

/// Makes each row of the funnel take 0.2 s, so a batch of [`SLOW_BATCH`] records takes longer than
/// the time-out of a statement (5 s).
pub const SLOW: &str = "
    create function be_slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.2); return new; end $$;
    create trigger be_slow before insert on funnel for each row execute function be_slow();";

pub const SLOW_BATCH: i64 = 30;

/// T18, I7, I12: a batch that exceeds the time-outs is not retried as a whole indefinitely.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_takes_too_long_is_handled_record_by_record() {
    let mut system = System::start_with(&[USER, EMAIL, ANALYTICS], &DEFAULT_CONSUMERS).await;
    system.processes.stop(ANALYTICS).await;
    sqlx::raw_sql(SLOW).execute(&system.stores.database(ANALYTICS).await).await.unwrap();
    for _ in 0..SLOW_BATCH {
        let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
        system.kafka.write(USER_EVENTS, &fact).await;
    }
    system.processes.start(&[ANALYTICS]).await;
    until_registered(&system, SLOW_BATCH).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    assert!(system.processes.retries(ANALYTICS_USERS).await > 0.0, "the whole batch must exceed the time-out first");
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0, "dead letters of records that are only slow");
}

/// I7, I8: a process may run several consumers of each group. They share the partitions as
/// consumers of several processes do.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_of_one_process_share_the_partitions() {
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
async fn register_on_each_partition(system: &System) -> i64 {
    let fact = |partition| Draft::user_event("user.registered", Uuid::now_v7(), 1).on(partition);
    let facts: Vec<Draft> = (0..6).map(fact).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await.len() as i64
}

/// Waits until the funnel has exactly that many users and as many registrations are counted.
async fn until_registered(system: &System, users: i64) {
    eventually_eq("users in the funnel, and counted registrations", (users, Some(users)), async || {
        (system.users.funnel().await.0, system.users.registrations().await)
    })
    .await;
}
