//! Consumers are killed wherever it could hurt, started in any order, started late: each effect is there once.

use tests::load::Answered;
use tests::log::{Draft, GROUPS};
use tests::{Part, System, eventually, eventually_eq};
use uuid::Uuid;

const CONSUMERS: [Part; 3] = [Part::Email, Part::Analytics, Part::Cache];

/// T16, I5 I7 I8 I9: killed with a batch in hand and nothing done. A consumer that committed before its effect would lose it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_consumers_die_with_a_batch_in_hand() {
    let point = "consumer.after_poll";
    killed_at([(Part::Email, point), (Part::Analytics, point), (Part::Cache, point)]).await;
}

/// T16, I5 I7 I8 I9: killed within the effect, just before it becomes durable.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_consumers_die_before_their_effect_is_durable() {
    let points = [
        (Part::Email, "email.before_commit"),
        (Part::Analytics, "inbox.before_commit"),
        (Part::Cache, "cache.before_script"),
    ];
    killed_at(points).await;
}

/// T16, I5 I7 I8: killed just after the effect became durable (the cache: after its first partition, the others undone). The
/// batch comes again.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_twice_when_consumers_die_after_their_effect_is_durable() {
    let points = [
        (Part::Email, "consumer.after_effect"),
        (Part::Analytics, "inbox.after_commit"),
        (Part::Cache, "cache.after_script"),
    ];
    killed_at(points).await;
}

/// T16, I5 I7 I8: killed between the effect and the offset.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_twice_when_consumers_die_before_they_store_the_offset() {
    let point = "consumer.after_effect";
    killed_at([(Part::Email, point), (Part::Analytics, point), (Part::Cache, point)]).await;
}

/// T16, I5 I7 I8: killed with the offset stored and not yet committed in Kafka.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_twice_when_consumers_die_before_the_offset_is_committed() {
    let point = "consumer.after_store";
    killed_at([(Part::Email, point), (Part::Analytics, point), (Part::Cache, point)]).await;
}

/// All three consumers die at their point, at the first records they get; work goes on meanwhile; then they are started again.
/// A killed member keeps its partitions until Kafka gives it up after ten seconds, so the three die together.
async fn killed_at(points: [(Part, &str); 3]) {
    let mut system = System::empty().await;
    // A sender may be killed in the middle of a mail: its lease must end within this test.
    system.set("LEASE_MS", "10000");
    system.start_all().await;
    let watch = system.watch().await;
    for part in CONSUMERS {
        system.stop(part).await;
    }
    let user = register(&system, 6).await[0];
    for (part, point) in points {
        system.spawn(part, &[("FAULT_AT", &format!("{point}:1:kill"))]);
    }
    for (part, _) in points {
        system.until_ended(part).await;
    }
    register(&system, 2).await;
    assert_eq!(system.rename(user, "Countess of Lovelace").await.unwrap().version(), 2);
    for part in CONSUMERS {
        system.spawn(part, &[]);
    }
    system.ready(&CONSUMERS).await;
    register(&system, 2).await;
    system.check(&watch, &Answered::default()).await;
}

/// All 24 orders of starting the services work, also on a broker and in databases where nothing is yet. This is one half of them.
#[tokio::test(flavor = "multi_thread")]
async fn services_may_be_started_in_any_order() {
    starting_from_each([Part::User, Part::Email, Part::Analytics, Part::Cache]).await;
    starting_from_each([Part::User, Part::Email, Part::Cache, Part::Analytics]).await;
    starting_from_each([Part::User, Part::Analytics, Part::Email, Part::Cache]).await;
}

/// The other half.
#[tokio::test(flavor = "multi_thread")]
async fn services_may_be_started_in_any_other_order() {
    starting_from_each([Part::User, Part::Analytics, Part::Cache, Part::Email]).await;
    starting_from_each([Part::User, Part::Cache, Part::Email, Part::Analytics]).await;
    starting_from_each([Part::User, Part::Cache, Part::Analytics, Part::Email]).await;
}

async fn starting_from_each(mut order: [Part; 4]) {
    for _ in 0..order.len() {
        let mut system = System::empty().await;
        for part in order {
            system.spawn(part, &[]);
            // Not ready, only up: what it needs may be missing still.
            eventually(&format!("{part:?} is up in {order:?}"), async || system.readiness(part).await).await;
        }
        system.ready(&Part::ALL).await;
        let users = register(&system, 1).await;
        everything_is_there_once(&system, &users).await;
        order.rotate_left(1);
    }
}

/// I1 I5 I7 I8: a service that dies takes no other with it, and finds everything when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_killed_alone_hinders_nobody_and_catches_up() {
    let mut system = System::start().await;
    let watch = system.watch().await;
    let mut users = register(&system, 1).await;
    for dead in Part::ALL {
        everything_is_there_once(&system, &users).await;
        system.kill(dead);
        users.extend(the_others_go_on(&system, dead, &users).await);
        system.restart(dead, &[]).await;
    }
    users.extend(register(&system, 1).await);
    everything_is_there_once(&system, &users).await;
    system.check(&watch, &Answered::default()).await;
}

/// Registers somebody, if the service that does so lives; whoever else lives has seen it.
async fn the_others_go_on(system: &System, dead: Part, users: &[Uuid]) -> Vec<Uuid> {
    let fresh = if dead == Part::User { vec![] } else { register(system, 1).await };
    let known = users.len() + fresh.len();
    for id in users.iter().chain(&fresh) {
        if dead != Part::Cache {
            system.until_cached(*id, 1).await;
        }
        if dead != Part::Email {
            system.until_mailed(*id).await;
        }
    }
    if dead != Part::Analytics {
        eventually_eq("registered", known as i64, async || system.funnel().await.0).await;
    }
    fresh
}

/// I5 I7 I8: consumer groups that come later read the history from its beginning, and the producer does not notice.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_added_later_reads_history_from_the_beginning() {
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    let producer = system.pid(Part::User);
    let mut users = register(&system, 8).await;
    for version in 2..=3 {
        assert_eq!(system.rename(users[0], &format!("Name {version}")).await.unwrap().version(), version);
    }
    // Published, not only accepted: what comes now was in the log before its readers were there.
    eventually_eq("the facts in the log", 10, async || system.read("user.events.v1").len()).await;
    for part in CONSUMERS {
        system.restart(part, &[]).await;
    }
    users.extend(register(&system, 1).await);
    everything_is_there_once(&system, &users).await;
    assert_eq!(system.until_cached(users[0], 3).await.body["display_name"], "Name 3");
    assert_eq!(system.pid(Part::User), producer);
    assert!(!system.has_ended(Part::User));
}

/// One after another: many at once need many connections at once, which a busy machine may not give in time.
async fn register(system: &System, users: usize) -> Vec<Uuid> {
    let mut registered = vec![];
    for _ in 0..users {
        registered.push(system.register().await);
    }
    registered
}

/// The effects of these registrations and of no others, each once, in every service; and nothing under way any more.
async fn everything_is_there_once(system: &System, users: &[Uuid]) {
    let count = users.len() as i64;
    for id in users {
        system.until_mailed(*id).await;
        system.until_cached(*id, 1).await;
    }
    system.until_counted(count, count).await;
    system.until_drained().await;
    // What was counted may not be counted once more by what came last.
    system.until_counted(count, count).await;
    for id in users {
        one_mail(system, *id).await;
    }
    for (group, _) in GROUPS {
        assert_eq!(system.dead_letters(group).len(), 0, "dead letters of {group}");
    }
}

/// One intent; and one copy of its mail, except where a sender was killed with the mail in hand: then all copies are one to a
/// mailbox (I6).
async fn one_mail(system: &System, id: Uuid) {
    let deliveries: Vec<(Uuid, i32)> = sqlx::query_as("select id, attempt from deliveries where user_id = $1")
        .bind(id)
        .fetch_all(&system.database(Part::Email).await)
        .await
        .unwrap();
    let [(delivery, attempts)] = deliveries[..] else { panic!("not one delivery: {deliveries:?}") };
    let address = system.recipient(id).await.unwrap().1.unwrap();
    let mails = system.sink.mails();
    let copies: Vec<_> = mails.iter().filter(|mail| mail.to.contains(&address)).collect();
    assert!((1..=attempts as usize).contains(&copies.len()), "{} copies after {attempts} attempts", copies.len());
    for mail in copies {
        assert!(
            mail.message_id.as_ref().unwrap().contains(&delivery.to_string()),
            "{:?} of {delivery}",
            mail.message_id
        );
    }
}

/// I7 I8: a process may have several consumers of each group. They share the partitions, as processes would.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_of_one_process_share_its_partitions() {
    let mut system = System::empty().await;
    system.set("CONSUMERS", "3");
    system.start_all().await;
    let watch = system.watch().await;
    for (group, _) in GROUPS {
        eventually_eq(&format!("members of {group}"), 3, async || system.members(group).len()).await;
    }
    register(&system, 12).await;
    system.check(&watch, &Answered::default()).await;
}

/// I2: what a relay has sent in a round that it did not commit was never published: nobody reads it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_and_not_committed_is_not_read() {
    let system = System::start().await;
    let fact = || Draft::user_event("user.registered", Uuid::now_v7(), 1).on(0);
    system.write_and_abort("user.events.v1", &fact()).await;
    system.write("user.events.v1", &fact()).await;
    system.until_counted(1, 0).await;
    for group in ["analytics.users", "email.welcome"] {
        system.until_read(group, "user.events.v1").await;
        eventually_eq("records that were read", 1.0, async || system.counted_in_all(group).await).await;
    }
}
