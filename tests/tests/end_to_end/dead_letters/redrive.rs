//! A redrive runs the handler again on open dead letters. It may be repeated, killed and run twice
//! at the same time.

use sqlx::PgPool;
use tests::record::{Draft, Record};
use tests::services::{
    ANALYTICS_USERS, CACHE_PROFILES, EMAIL_RECIPIENTS, EMAIL_WELCOME, USER_EVENTS, USER_STATE, dead_letters_of,
};
use tests::users::address;
use tests::{System, eventually, eventually_eq, eventually_reaches};
use topology::{ANALYTICS, CACHE, EMAIL, USER};
use uuid::Uuid;

use super::{actions, add_bug, analytics, analytics_with, attempts, listed, redrive, remove_bug, summary};
use crate::rebalancing::{SLOW, SLOW_BATCH};

const MANY: usize = 2_000;
/// Letters that a redrive tries together.
const CHUNK: usize = 100;
const BREAKER_OFF: (&str, &str) = ("BREAKER_SHARE", "1");

/// T34, I7 I11: A bug makes the handler reject one user's fact. While the bug is there the letter
/// fails again; once it is fixed the letter settles. The counts are exact, however often the
/// redrive runs and the fact comes again.
#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_letter_takes_effect_once() {
    let (system, db) = analytics().await;
    let (fact, coordinates) = write_rejected_fact(&system, &db).await;
    let key = system.kafka.letter_key(ANALYTICS_USERS, coordinates);
    // The other records of the batch and the partition are handled.
    system.users.until_counted(2, 0).await;
    until_open_letters(&system, 1).await;

    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, "0 settled, 0 superseded, 1 failed again, 0 parked");
    assert_eq!(attempts(&system, ANALYTICS_USERS, &key), 2);
    system.users.until_counted(2, 0).await;

    remove_bug(&db).await;
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, "1 settled, 0 superseded, 0 failed again, 0 parked");
    system.users.until_counted(3, 0).await;
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, "0 settled, 0 superseded, 0 failed again, 0 parked");
    until_open_letters(&system, 0).await;

    system.kafka.write(USER_EVENTS, &fact).await;
    let duplicates = async || system.processes.counted(ANALYTICS_USERS, "duplicate").await;
    eventually_eq("duplicates", 1.0, duplicates).await;
    system.users.until_counted(3, 0).await;
}

/// T34: One redrive is killed between the effect and the tombstone of the letter. Then two run at
/// the same time. The effect happens once.
#[tokio::test(flavor = "multi_thread")]
async fn killed_and_concurrent_redrives_do_nothing_twice() {
    let (mut system, db) = analytics().await;
    write_rejected_fact(&system, &db).await;
    remove_bug(&db).await;
    redrive_killed_at(&mut system, "redrive.after_effect:1:kill").await;
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 1, "killed before the tombstone");
    system.users.until_counted(3, 0).await;
    let mut copy = system.processes.spawn_another(ANALYTICS);
    copy.until_ready().await;
    let address = copy.admin().url("").replace("http://", "");
    let of_the_copy = [("ADMIN_ADDR", &*address)];
    let (one, other) = tokio::join!(
        system.processes.run(ANALYTICS, &["redrive"]),
        system.processes.run_with(ANALYTICS, &["redrive"], &of_the_copy),
    );
    one.unwrap();
    other.unwrap();
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
    system.users.until_counted(3, 0).await;
}

/// T34: After five attempts a letter is parked. It is kept and counted, and tried only if a redrive
/// names it.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_fails_five_times_is_parked_until_a_redrive_names_it() {
    let (system, db) = analytics().await;
    let (_, coordinates) = write_rejected_fact(&system, &db).await;
    let key = system.kafka.letter_key(ANALYTICS_USERS, coordinates);
    for attempt in 2..=5 {
        redrive(&system, ANALYTICS_USERS, &[]).await;
        assert_eq!(attempts(&system, ANALYTICS_USERS, &key), attempt);
    }
    let parked = "0 settled, 0 superseded, 0 failed again, 1 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, parked);
    assert_eq!(attempts(&system, ANALYTICS_USERS, &key), 5, "a redrive tried a parked letter");
    let named = redrive(&system, ANALYTICS_USERS, &["--only", &key]).await;
    assert_eq!(named, "0 settled, 0 superseded, 1 failed again, 0 parked");
    assert_eq!(attempts(&system, ANALYTICS_USERS, &key), 6);
    until_open_letters(&system, 1).await;

    remove_bug(&db).await;
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, parked);
    let other_named = redrive(&system, ANALYTICS_USERS, &["--only", "another-0-0"]).await;
    assert_eq!(other_named, "0 settled, 0 superseded, 0 failed again, 0 parked");
    system.users.until_counted(2, 0).await;
    let named = redrive(&system, ANALYTICS_USERS, &["--only", &key]).await;
    assert_eq!(named, "1 settled, 0 superseded, 0 failed again, 0 parked");
    system.users.until_counted(3, 0).await;
}

/// T34, I7 I11: After a bad deploy with the breaker off there are thousands of letters. The
/// operator starts with a dry run. Then one redrive is killed in the middle, and another runs to
/// its end. Every registration counts once.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_of_thousands_of_letters_counts_each_registration_once() {
    let (mut system, db) = analytics_with(&[BREAKER_OFF]).await;
    add_bug(&db, "registrations", "true").await;
    system.kafka.write_all(USER_EVENTS, &registrations(MANY)).await;
    eventually_reaches("open dead letters", MANY as i64, async || {
        system.processes.dead_letters_open(ANALYTICS_USERS).await.unwrap_or(0.0) as i64
    })
    .await;
    let dead_lettered = async || system.processes.counted(ANALYTICS_USERS, "dead_lettered").await;
    eventually_eq("records counted as dead-lettered", MANY as f64, dead_lettered).await;
    assert_eq!(system.processes.counted_in_all(ANALYTICS_USERS).await, MANY as f64);
    assert_eq!(listed(&system, ANALYTICS_USERS).await.len(), MANY);

    let dry_run = redrive(&system, ANALYTICS_USERS, &["--dry-run"]).await;
    assert_eq!(dry_run, format!("{MANY} would be tried, 0 parked"));
    let untouched = listed(&system, ANALYTICS_USERS).await;
    assert_eq!(untouched.len(), MANY);
    assert!(untouched.iter().all(|letter| letter["attempts"] == 1), "{untouched:?}");

    remove_bug(&db).await;
    system.users.until_counted(0, 0).await;
    redrive_killed_at(&mut system, "redrive.after_effect:3:kill").await;
    system.users.until_counted(3 * CHUNK as i64, 0).await;
    let left = MANY - 2 * CHUNK;
    let open = system.kafka.dead_letters(ANALYTICS_USERS).len();
    assert_eq!(open, left, "open letters after a kill before the third chunk's tombstones");
    let settled = format!("{left} settled, 0 superseded, 0 failed again, 0 parked");
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, settled);
    system.users.until_counted(MANY as i64, 0).await;
    until_open_letters(&system, 0).await;
    let nothing = "0 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, nothing);
    system.users.until_counted(MANY as i64, 0).await;
    let acted = |outcome: Option<&str>| ("redrive".to_owned(), ANALYTICS_USERS.to_owned(), outcome.map(str::to_owned));
    let found: Vec<_> = actions(&system, ANALYTICS).await.iter().map(summary).collect();
    assert_eq!(found, [acted(Some("done")), acted(None)], "the redrive that was killed has no outcome");
}

/// One of ten letters fails again. The others settle.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_fails_again_blocks_no_other() {
    let (system, db) = analytics().await;
    let users: Vec<Uuid> = (0..10).map(|_| Uuid::now_v7()).collect();
    add_bug(&db, "registrations", "true").await;
    let facts: Vec<Draft> = users.iter().map(|id| Draft::user_event("user.registered", *id, 1).on(0)).collect();
    let written = system.kafka.write_all(USER_EVENTS, &facts).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &written).await;
    remove_bug(&db).await;
    add_bug(&db, "funnel", &format!("new.user_id = '{}'", users[4])).await;
    let all_but_one = "9 settled, 0 superseded, 1 failed again, 0 parked";
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, all_but_one);
    system.users.until_counted(9, 0).await;
    let letters = listed(&system, ANALYTICS_USERS).await;
    let [letter] = &letters[..] else { panic!("not one letter: {letters:?}") };
    assert_eq!(letter["key"], users[4].to_string());
    assert_eq!(letter["attempts"], 2);
}

/// T34 T18: The handler is too slow for all letters together. The redrive tries them one by one.
#[tokio::test(flavor = "multi_thread")]
async fn letters_that_are_too_slow_together_are_redriven_one_by_one() {
    let (system, db) = analytics_with(&[BREAKER_OFF]).await;
    add_bug(&db, "registrations", "true").await;
    system.kafka.write_all(USER_EVENTS, &registrations(SLOW_BATCH as usize)).await;
    until_open_letters(&system, SLOW_BATCH).await;
    remove_bug(&db).await;
    sqlx::raw_sql(SLOW).execute(&db).await.unwrap();
    let settled = format!("{SLOW_BATCH} settled, 0 superseded, 0 failed again, 0 parked");
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, settled);
    system.users.until_counted(SLOW_BATCH, 0).await;
}

/// T34, I5 I6: The facts of two registrations were rejected and are redriven. The user who exists
/// gets one mail, however often the fact comes. The user who was erased gets none.
#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_registration_is_mailed_once_and_not_after_an_erasure() {
    let system = System::start_only(&[USER, EMAIL]).await;
    let db = system.stores.database(EMAIL).await;
    add_bug(&db, "deliveries", "true").await;
    let address = address();
    let existing = system.users.register_as(&address).await;
    let erased = system.users.register().await;
    eventually_eq("dead letters", 2, async || system.kafka.dead_letters(EMAIL_WELCOME).len()).await;
    system.users.erase(erased).await.unwrap();
    eventually_eq("the address of the erased user", Some(None), async || {
        system.stores.recipient(erased).await.map(|(_, email)| email)
    })
    .await;
    remove_bug(&db).await;
    let settled = "2 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, EMAIL_WELCOME, &[]).await, settled);
    system.users.until_mailed(existing).await;
    system.users.until_delivery_is(erased, "cancelled").await;
    // The same facts again, as if the letters were redriven a second time.
    let facts: Vec<Draft> = system.kafka.read(USER_EVENTS).iter().map(Record::to_draft).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;
    system.kafka.until_caught_up(EMAIL_WELCOME).await;
    system.users.until_mailed(existing).await;
    let mails = system.mail.all();
    assert_eq!(mails.iter().map(|mail| &mail.to).collect::<Vec<_>>(), [&[address][..]]);
}

/// T34, I8 I10 I13: Letters about a compacted topic's records are pointers. A redrive reads the
/// record and handles it. It takes effect if there is no newer state, and replaces no newer state.
/// It does not restore the address of an erased user, although the topic still has the record.
#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_pointer_replaces_no_newer_state() {
    let (system, db) = state_readers().await;
    let only = Uuid::now_v7();
    let renewed = Uuid::now_v7();
    let erased = Uuid::now_v7();
    let mut written = vec![];
    for id in [only, renewed, erased] {
        written.push(system.kafka.write(USER_STATE, &Draft::user_state(id, 1, Some("first@example.com"))).await);
    }
    system.kafka.until_dead_letters(EMAIL_RECIPIENTS, &written).await;
    remove_bug(&db).await;
    system.kafka.write(USER_STATE, &Draft::user_state(renewed, 2, Some("second@example.com"))).await;
    system.kafka.write(USER_STATE, &Draft::user_state(erased, 2, None)).await;
    eventually_eq("the erased recipient", Some((2, None)), async || system.stores.recipient(erased).await).await;
    eventually("the newer state has arrived", async || system.stores.recipient(renewed).await).await;
    // The cache rejects no record that it can read. So the test writes its letters, as an older
    // release may have left them.
    for (coordinates, id) in written.iter().zip([only, renewed, erased]) {
        write_pointer(&system, CACHE_PROFILES, *coordinates, id).await;
    }
    system.users.until_cached(renewed, 2).await;

    let settled = "3 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, EMAIL_RECIPIENTS, &[]).await, settled);
    assert_eq!(redrive(&system, CACHE_PROFILES, &[]).await, settled);
    let recipient = |version, email: Option<&str>| Some((version, email.map(str::to_owned)));
    assert_eq!(system.stores.recipient(only).await, recipient(1, Some("first@example.com")));
    assert_eq!(system.stores.recipient(renewed).await, recipient(2, Some("second@example.com")));
    assert_eq!(system.stores.recipient(erased).await, recipient(2, None));
    assert_eq!(system.users.until_cached(renewed, 1).await.body["email"], "second@example.com");
    let status = async || system.users.profile(erased, None).await.unwrap().status.as_u16();
    eventually_eq("the cache's status for the erased user", 404, status).await;
    assert_eq!(system.kafka.dead_letters(EMAIL_RECIPIENTS).len(), 0);
    assert_eq!(system.kafka.dead_letters(CACHE_PROFILES).len(), 0);
}

/// T34, I13: Compaction deletes a record only if its key has a newer one. So the letter that points
/// to it is settled as superseded.
#[tokio::test(flavor = "multi_thread")]
async fn a_pointer_to_a_compacted_record_is_superseded() {
    let (system, db) = state_readers().await;
    let id = Uuid::now_v7();
    let written = system.kafka.write(USER_STATE, &Draft::user_state(id, 1, Some("first@example.com"))).await;
    system.kafka.until_dead_letters(EMAIL_RECIPIENTS, &[written]).await;
    remove_bug(&db).await;
    system.kafka.write(USER_STATE, &Draft::user_state(id, 2, Some("second@example.com"))).await;
    eventually("the newer state has arrived", async || system.stores.recipient(id).await).await;
    system.kafka.force_compaction().await;
    eventually("the record is compacted away", async || {
        system.kafka.roll_states().await;
        let is_there = |record: &Record| (record.partition, record.offset) == written;
        (!system.kafka.read(USER_STATE).iter().any(is_there)).then_some(())
    })
    .await;
    let superseded = "0 settled, 1 superseded, 0 failed again, 0 parked";
    assert_eq!(redrive(&system, EMAIL_RECIPIENTS, &[]).await, superseded);
    assert_eq!(system.stores.recipient(id).await, Some((2, Some("second@example.com".to_owned()))));
    assert_eq!(system.kafka.dead_letters(EMAIL_RECIPIENTS).len(), 0);
}

/// A process that cannot reach Kafka redrives nothing, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_without_kafka_ends_with_an_error() {
    let mut system = System::empty().await;
    system.processes.set("KAFKA_BROKERS", &format!("127.0.0.1:{}", testbed::testing::free_port()));
    system.processes.spawn(CACHE);
    system.processes.until_reported(CACHE, "the topic").await;
    let error = system.processes.run(CACHE, &["redrive"]).await.unwrap_err().to_string();
    assert!(error.contains("/problems/topic-unreadable"), "{error}");
}

/// The services that read states. A bug makes the email service reject every state of version 1.
async fn state_readers() -> (System, PgPool) {
    let system = System::start_only(&[USER, EMAIL, CACHE]).await;
    let db = system.stores.database(EMAIL).await;
    add_bug(&db, "recipients", "new.version = 1").await;
    (system, db)
}

fn registrations(count: usize) -> Vec<Draft> {
    (0..count).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1)).collect()
}

/// Writes three registrations to one partition and adds a bug that makes analytics reject the
/// second. Returns the rejected fact with its partition and offset.
async fn write_rejected_fact(system: &System, db: &PgPool) -> (Draft, (i32, i64)) {
    let registration = |id| Draft::user_event("user.registered", id, 1).on(0);
    let id = Uuid::now_v7();
    add_bug(db, "funnel", &format!("new.user_id = '{id}'")).await;
    let fact = registration(id);
    system.kafka.write(USER_EVENTS, &registration(Uuid::now_v7())).await;
    let coordinates = system.kafka.write(USER_EVENTS, &fact).await;
    system.kafka.write(USER_EVENTS, &registration(Uuid::now_v7())).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[coordinates]).await;
    let letters = system.kafka.dead_letters(ANALYTICS_USERS);
    let letter = &letters[&system.kafka.letter_key(ANALYTICS_USERS, coordinates)];
    assert_eq!(letter.header("dlq-reason"), Some("SQLSTATE 23514"));
    (fact, coordinates)
}

/// Redrives the letters of analytics with a fault point that kills the process, and starts it
/// again.
async fn redrive_killed_at(system: &mut System, fault: &str) {
    system.processes.start_with(ANALYTICS, &[("FAULT_AT", fault)]).await;
    let error = system.processes.run(ANALYTICS, &["redrive"]).await.unwrap_err().to_string();
    assert!(error.contains("still open") || error.contains("connection to the service was lost"), "{error}");
    system.processes.until_ended(ANALYTICS).await;
    system.processes.start(&[ANALYTICS]).await;
}

/// T34, I11: a newer release has dead-lettered an event of a type that this release does not
/// know. A redrive by this release does not settle its letter.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_of_an_unknown_type_stays_open() {
    let (system, db) = analytics().await;
    let (_, coordinates) = write_rejected_fact(&system, &db).await;
    let key = system.kafka.letter_key(ANALYTICS_USERS, coordinates);
    until_open_letters(&system, 1).await;
    remove_bug(&db).await;
    let letter = system.kafka.dead_letters(ANALYTICS_USERS)[&key].to_draft();
    let of_newer_release = letter.replace_header("ce_type", b"user.promoted");
    system.kafka.write(&dead_letters_of(ANALYTICS_USERS), &of_newer_release).await;
    assert_eq!(redrive(&system, ANALYTICS_USERS, &[]).await, "0 settled, 0 superseded, 1 failed again, 0 parked");
    assert_eq!(attempts(&system, ANALYTICS_USERS, &key), 1, "the letter is unchanged");
    assert!(system.processes.log(ANALYTICS).contains("does not know the type of the event of a dead letter"));
}

/// Waits until the metric of the open letters of `analytics.users` has this value.
async fn until_open_letters(system: &System, count: i64) {
    let open = async || system.processes.dead_letters_open(ANALYTICS_USERS).await;
    eventually_eq("open dead letters", Some(count as f64), open).await;
}

/// Writes a dead letter that points to the record at this partition and offset.
async fn write_pointer(system: &System, group: &str, coordinates: (i32, i64), user: Uuid) {
    let (partition, offset) = coordinates;
    let headers = [
        ("dlq-key", user.to_string()),
        ("dlq-topic", system.kafka.prefixed(USER_STATE)),
        ("dlq-partition", partition.to_string()),
        ("dlq-offset", offset.to_string()),
        ("dlq-reason", "written by a test".to_owned()),
        ("dlq-attempts", "1".to_owned()),
    ];
    let headers = headers.map(|(name, value)| (name.to_owned(), Some(value.into_bytes()))).into();
    let key = system.kafka.letter_key(group, coordinates).into_bytes();
    let letter = Draft { partition: None, key: Some(key), value: Some(vec![]), headers };
    system.kafka.write(&dead_letters_of(group), &letter).await;
}
