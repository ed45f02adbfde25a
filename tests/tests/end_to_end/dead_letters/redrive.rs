//! Redrive: the handler of a dead letter handles it again. A redrive may be repeated, killed and run twice at the same time.

use sqlx::PgPool;
use tests::record::{Draft, Record};
use tests::services::{
    ANALYTICS_USERS, CACHE_PROFILES, EMAIL_RECIPIENTS, EMAIL_WELCOME, USER_EVENTS, USER_STATE, dead_letters_of,
};
use tests::users::address;
use tests::{System, eventually, eventually_eq, eventually_reaches};
use topology::{ANALYTICS, CACHE, EMAIL, USER};
use uuid::Uuid;

use super::{add_bug, analytics, analytics_with, attempts, listed, redrive, remove_bug};
use crate::rebalancing::{SLOW, SLOW_BATCH};

const MANY: usize = 2_000;
/// The number of letters that a redrive tries at once.
const CHUNK: usize = 100;

/// T34, I7 I11: a bug meets one user's fact. While it is there the letter fails again; once it is gone the letter settles, and
/// the counts are exact, however often the redrive is run and the fact comes again.
#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_letter_has_its_effect_once() {
    let (system, db) = analytics().await;
    let (fact, at) = refused_fact(&system, &db).await;
    let key = system.kafka.letter_key(ANALYTICS_USERS, at);
    // The others of its batch and the partition went on.
    system.users.until_counted(2, 0).await;
    eventually_eq("letters open", Some(1.0), async || system.processes.dead_letters_open(ANALYTICS_USERS).await).await;

    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, "0 settled, 0 superseded, 1 failed again, 0 parked");
    assert_eq!(attempts(&system, ANALYTICS_USERS, &key), 2);
    system.users.until_counted(2, 0).await;

    remove_bug(&db).await;
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, "1 settled, 0 superseded, 0 failed again, 0 parked");
    system.users.until_counted(3, 0).await;
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, "0 settled, 0 superseded, 0 failed again, 0 parked");
    eventually_eq("letters open", Some(0.0), async || system.processes.dead_letters_open(ANALYTICS_USERS).await).await;

    system.kafka.write(USER_EVENTS, &fact).await;
    let duplicates = async || system.processes.counted(ANALYTICS_USERS, "duplicate").await;
    eventually_eq("the fact that came again is known", 1.0, duplicates).await;
    system.users.until_counted(3, 0).await;
}

/// T34: two redrives at the same time, and one that dies between the effect and the letter's tombstone: still one effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_that_dies_or_has_company_does_nothing_twice() {
    let (mut system, db) = analytics().await;
    refused_fact(&system, &db).await;
    remove_bug(&db).await;
    system.processes.set("FAULT_AT", "redrive.after_effect:1:kill");
    system.processes.run(ANALYTICS, &["redrive"]).await.unwrap_err();
    system.processes.set("FAULT_AT", "none:1:kill");
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 1, "killed before the tombstone");
    system.users.until_counted(3, 0).await;
    let both =
        tokio::join!(system.processes.run(ANALYTICS, &["redrive"]), system.processes.run(ANALYTICS, &["redrive"]));
    both.0.unwrap();
    both.1.unwrap();
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
    system.users.until_counted(3, 0).await;
}

/// T34: after five attempts a letter is parked. It is kept and counted, and tried only when it is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_fails_five_times_is_parked_until_it_is_named() {
    let (system, db) = analytics().await;
    let (_, at) = refused_fact(&system, &db).await;
    let key = system.kafka.letter_key(ANALYTICS_USERS, at);
    for attempt in 2..=5 {
        redrive(&system, ANALYTICS_USERS, &[]).await;
        assert_eq!(attempts(&system, ANALYTICS_USERS, &key), attempt);
    }
    let parked = "0 settled, 0 superseded, 0 failed again, 1 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, parked);
    assert_eq!(attempts(&system, ANALYTICS_USERS, &key), 5, "a parked letter is left alone");
    let named = redrive(&system, ANALYTICS_USERS, &["--only", &key]).await;
    assert_eq!(named, "0 settled, 0 superseded, 1 failed again, 0 parked");
    assert_eq!(attempts(&system, ANALYTICS_USERS, &key), 6);
    eventually_eq("letters open", Some(1.0), async || system.processes.dead_letters_open(ANALYTICS_USERS).await).await;

    remove_bug(&db).await;
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, parked);
    let other = redrive(&system, ANALYTICS_USERS, &["--only", "another-0-0"]).await;
    assert_eq!(other, "0 settled, 0 superseded, 0 failed again, 0 parked");
    system.users.until_counted(2, 0).await;
    let named = redrive(&system, ANALYTICS_USERS, &["--only", &key]).await;
    assert_eq!(named, "1 settled, 0 superseded, 0 failed again, 0 parked");
    system.users.until_counted(3, 0).await;
}

/// T34, I7 I11: a bad deploy with the breaker switched off makes thousands of letters. The redrive is looked at first, killed in
/// the middle, and run again: every registration counts once.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_letters_are_redriven_with_exact_counts() {
    let (mut system, db) = analytics_with(&[("BREAKER_SHARE", "1")]).await;
    add_bug(&db, "registrations", "true").await;
    let registrations: Vec<Draft> =
        (0..MANY).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1)).collect();
    system.kafka.write_all(USER_EVENTS, &registrations).await;
    eventually_reaches("letters open", MANY as i64, async || {
        system.processes.dead_letters_open(ANALYTICS_USERS).await.unwrap_or(0.0) as i64
    })
    .await;
    eventually_eq("dead-lettered", MANY as f64, async || {
        system.processes.counted(ANALYTICS_USERS, "dead_lettered").await
    })
    .await;
    assert_eq!(system.processes.counted_in_all(ANALYTICS_USERS).await, MANY as f64);
    assert_eq!(listed(&system, ANALYTICS).await.len(), MANY);

    let looked_at = redrive(&system, ANALYTICS_USERS, &["--dry-run"]).await;
    assert_eq!(looked_at, format!("{MANY} would be tried, 0 parked"));
    let untouched = listed(&system, ANALYTICS).await;
    assert!(untouched.len() == MANY && untouched.iter().all(|letter| letter["attempts"] == 1), "{untouched:?}");

    remove_bug(&db).await;
    system.users.until_counted(0, 0).await;
    system.processes.set("FAULT_AT", "redrive.after_effect:3:kill");
    system.processes.run(ANALYTICS, &["redrive"]).await.unwrap_err();
    system.processes.set("FAULT_AT", "none:1:kill");
    system.users.until_counted(3 * CHUNK as i64, 0).await;
    let left = MANY - 2 * CHUNK;
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), left, "killed before the tombstones of the third");
    let settled = format!("{left} settled, 0 superseded, 0 failed again, 0 parked");
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, settled);
    system.users.until_counted(MANY as i64, 0).await;
    eventually_eq("letters open", Some(0.0), async || system.processes.dead_letters_open(ANALYTICS_USERS).await).await;
    let nothing = "0 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, nothing);
    system.users.until_counted(MANY as i64, 0).await;
}

/// One bad letter among many that work again: the others settle, it alone fails again.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_fails_again_hinders_no_other() {
    let (system, db) = analytics().await;
    let users: Vec<Uuid> = (0..10).map(|_| Uuid::now_v7()).collect();
    add_bug(&db, "registrations", "true").await;
    let facts: Vec<Draft> = users.iter().map(|id| Draft::user_event("user.registered", *id, 1).on(0)).collect();
    let at = system.kafka.write_all(USER_EVENTS, &facts).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &at).await;
    remove_bug(&db).await;
    add_bug(&db, "funnel", &format!("new.user_id = '{}'", users[4])).await;
    let some = "9 settled, 0 superseded, 1 failed again, 0 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, some);
    system.users.until_counted(9, 0).await;
    let [letter] = &listed(&system, ANALYTICS).await[..] else { panic!("not one letter") };
    assert_eq!((&letter["key"], &letter["attempts"]), (&users[4].to_string().into(), &2.into()));
}

/// T34 T18: letters that take too long together are tried one by one.
#[tokio::test(flavor = "multi_thread")]
async fn letters_that_are_slow_together_are_redriven_one_by_one() {
    let (system, db) = analytics_with(&[("BREAKER_SHARE", "1")]).await;
    add_bug(&db, "registrations", "true").await;
    let facts: Vec<Draft> = (0..SLOW_BATCH).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1)).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;
    eventually_eq("letters open", Some(SLOW_BATCH as f64), async || {
        system.processes.dead_letters_open(ANALYTICS_USERS).await
    })
    .await;
    remove_bug(&db).await;
    sqlx::raw_sql(SLOW).execute(&db).await.unwrap();
    let settled = format!("{SLOW_BATCH} settled, 0 superseded, 0 failed again, 0 parked");
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, settled);
    system.users.until_counted(SLOW_BATCH, 0).await;
}

/// T34, I5 I6: the fact of a registration was refused and is redriven. Its mail is sent once, however often; and not at all to
/// somebody who was erased meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_registration_is_mailed_once_and_not_after_an_erasure() {
    let system = System::start_only(&[USER, EMAIL]).await;
    let db = system.stores.database(EMAIL).await;
    add_bug(&db, "deliveries", "true").await;
    let address = address();
    let stays = system.users.register_as(&address).await;
    let erased = system.users.register().await;
    eventually_eq("letters", 2, async || system.kafka.dead_letters(EMAIL_WELCOME).len()).await;
    system.users.erase(erased).await.unwrap();
    eventually_eq("the erasure has come", Some(None), async || {
        system.stores.recipient(erased).await.map(|(_, email)| email)
    })
    .await;
    remove_bug(&db).await;
    let settled = "2 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, EMAIL_WELCOME, &[]).await, settled);
    system.users.until_mailed(stays).await;
    eventually_eq("not sent", vec!["cancelled".to_owned()], async || system.users.deliveries(erased).await).await;
    // The facts once more, as another redrive of the same letters would hand them out.
    let facts: Vec<Draft> = system.kafka.read(USER_EVENTS).iter().map(tests::record::Record::to_draft).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;
    system.kafka.until_caught_up(EMAIL_WELCOME).await;
    system.users.until_mailed(stays).await;
    let mails = system.mail.all();
    assert_eq!(mails.iter().map(|mail| &mail.to).collect::<Vec<_>>(), [&[address][..]]);
}

/// T34, I8 I10 I13: letters of a compacted topic are pointers. Each is resolved by reading its source: it has its effect where
/// nothing newer is there, takes nothing back where there is, and does not bring back the address of somebody who was erased,
/// though the source still has it.
#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_pointer_takes_nothing_back() {
    let (system, db) = state_readers().await;
    let [fresh, newer, erased] = [(); 3].map(|()| Uuid::now_v7());
    let mut pointers = vec![];
    for id in [fresh, newer, erased] {
        pointers.push(system.kafka.write(USER_STATE, &Draft::user_state(id, 1, Some("first@example.com"))).await);
    }
    system.kafka.until_dead_letters(EMAIL_RECIPIENTS, &pointers).await;
    remove_bug(&db).await;
    system.kafka.write(USER_STATE, &Draft::user_state(newer, 2, Some("second@example.com"))).await;
    system.kafka.write(USER_STATE, &Draft::user_state(erased, 2, None)).await;
    eventually_eq("the tombstone has come", Some((2, None)), async || system.stores.recipient(erased).await).await;
    eventually("the newer one has come", async || system.stores.recipient(newer).await).await;
    // The cache rejects nothing that it can read, so its letters are written by hand, as an older release may have left them.
    for (pointer, id) in pointers.iter().zip([fresh, newer, erased]) {
        point(&system, CACHE_PROFILES, *pointer, id).await;
    }
    system.users.until_cached(newer, 2).await;

    let settled = "3 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, EMAIL_RECIPIENTS, &[]).await, settled);
    assert_eq!(redrive(&system, CACHE_PROFILES, &[]).await, settled);
    let known = |version, email: Option<&str>| Some((version, email.map(str::to_owned)));
    assert_eq!(system.stores.recipient(fresh).await, known(1, Some("first@example.com")));
    assert_eq!(system.stores.recipient(newer).await, known(2, Some("second@example.com")));
    assert_eq!(system.stores.recipient(erased).await, known(2, None));
    assert_eq!(system.users.until_cached(newer, 1).await.body["email"], "second@example.com");
    eventually_eq("erased", 404, async || system.users.profile(erased, None).await.unwrap().status.as_u16()).await;
    assert_eq!(
        (system.kafka.dead_letters(EMAIL_RECIPIENTS).len(), system.kafka.dead_letters(CACHE_PROFILES).len()),
        (0, 0)
    );
}

/// T34, I13: where compaction took the source, something newer has taken its place: the letter is settled as superseded.
#[tokio::test(flavor = "multi_thread")]
async fn a_pointer_whose_source_was_compacted_away_is_superseded() {
    let (system, db) = state_readers().await;
    let id = Uuid::now_v7();
    let pointer = system.kafka.write(USER_STATE, &Draft::user_state(id, 1, Some("first@example.com"))).await;
    system.kafka.until_dead_letters(EMAIL_RECIPIENTS, &[pointer]).await;
    remove_bug(&db).await;
    system.kafka.write(USER_STATE, &Draft::user_state(id, 2, Some("second@example.com"))).await;
    eventually("the newer one has come", async || system.stores.recipient(id).await).await;
    system.kafka.force_compaction().await;
    eventually("the source is gone", async || {
        system.kafka.roll_states().await;
        let is_source = |record: &Record| (record.partition, record.offset) == pointer;
        (!system.kafka.read(USER_STATE).iter().any(is_source)).then_some(())
    })
    .await;
    let superseded = "0 settled, 1 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, EMAIL_RECIPIENTS, &[]).await, superseded);
    assert_eq!(system.stores.recipient(id).await, Some((2, Some("second@example.com".to_owned()))));
    assert_eq!(system.kafka.dead_letters(EMAIL_RECIPIENTS).len(), 0);
}

/// A redrive that cannot reach Kafka says so and ends; nothing is settled by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_without_kafka_ends_with_an_error() {
    let mut system = System::empty().await;
    system.processes.set("KAFKA_BROKERS", &format!("127.0.0.1:{}", testbed::testing::free_port()));
    let error = system.processes.run(CACHE, &["redrive"]).await.unwrap_err().to_string();
    assert!(error.contains("cannot read the dead letters"), "{error}");
}

/// The services that read states, the email service with a bug: it refuses whatever has version 1.
async fn state_readers() -> (System, PgPool) {
    let system = System::start_only(&[USER, EMAIL, CACHE]).await;
    let db = system.stores.database(EMAIL).await;
    add_bug(&db, "recipients", "new.version = 1").await;
    (system, db)
}

/// A registration that analytics refuses, between two that it takes, in one partition. Answers the record and where it is.
async fn refused_fact(system: &System, db: &PgPool) -> (Draft, (i32, i64)) {
    let registered = |id| Draft::user_event("user.registered", id, 1).on(0);
    let id = Uuid::now_v7();
    add_bug(db, "funnel", &format!("new.user_id = '{id}'")).await;
    let fact = registered(id);
    system.kafka.write(USER_EVENTS, &registered(Uuid::now_v7())).await;
    let at = system.kafka.write(USER_EVENTS, &fact).await;
    system.kafka.write(USER_EVENTS, &registered(Uuid::now_v7())).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[at]).await;
    assert_eq!(
        system.kafka.dead_letters(ANALYTICS_USERS)[&system.kafka.letter_key(ANALYTICS_USERS, at)].header("dlq-reason"),
        Some("SQLSTATE 23514")
    );
    (fact, at)
}

/// Writes a letter that points to a record.
async fn point(system: &System, group: &str, (partition, offset): (i32, i64), user: Uuid) {
    let headers = [
        ("dlq-key", user.to_string()),
        ("dlq-topic", system.kafka.prefixed(USER_STATE)),
        ("dlq-partition", partition.to_string()),
        ("dlq-offset", offset.to_string()),
        ("dlq-reason", "written by a test".to_owned()),
        ("dlq-attempts", "1".to_owned()),
    ];
    let headers = headers.map(|(name, value)| (name.to_owned(), Some(value.into_bytes()))).into();
    let key = system.kafka.letter_key(group, (partition, offset)).into_bytes();
    let letter = Draft { partition: None, key: Some(key), value: None, headers };
    system.kafka.write(&dead_letters_of(group), &letter).await;
}
