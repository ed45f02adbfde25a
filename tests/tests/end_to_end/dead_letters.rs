//! Redrive: a dead letter goes through the same handler once more, whenever somebody likes, as often as they like.

use sqlx::PgPool;
use tests::log::{Draft, Raw};
use tests::{Part, System, eventually, eventually_eq};
use uuid::Uuid;

const USERS: &str = "analytics.users";
const RECIPIENTS: &str = "email.recipients";
const PROFILES: &str = "cache.profiles";

/// T34, I7 I11: a bug meets one user's fact. While it is there the letter fails again; once it is gone the letter settles, and
/// the counts are exact, however often the redrive is run and the fact comes again.
#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_letter_has_its_effect_once() {
    let (system, db) = analytics().await;
    let (fact, at) = refused_fact(&system, &db).await;
    let key = system.letter_key(USERS, at);
    // The others of its batch and the partition went on.
    system.until_counted(2, 0).await;
    eventually_eq("letters open", Some(1.0), async || system.letters_open(USERS).await).await;

    assert_eq!(
        redriven(&system, Part::Analytics, USERS, &[]).await,
        "0 settled, 0 superseded, 1 failed again, 0 parked"
    );
    assert_eq!(attempts(&system, USERS, &key), 2);
    system.until_counted(2, 0).await;

    mend(&db).await;
    assert_eq!(
        redriven(&system, Part::Analytics, USERS, &[]).await,
        "1 settled, 0 superseded, 0 failed again, 0 parked"
    );
    system.until_counted(3, 0).await;
    assert_eq!(
        redriven(&system, Part::Analytics, USERS, &[]).await,
        "0 settled, 0 superseded, 0 failed again, 0 parked"
    );
    eventually_eq("letters open", Some(0.0), async || system.letters_open(USERS).await).await;

    system.write("user.events.v1", &fact).await;
    let duplicates = async || system.counted(USERS, "duplicate").await;
    eventually_eq("the fact that came again is known", 1.0, duplicates).await;
    system.until_counted(3, 0).await;
}

/// T34: two redrives at the same time, and one that dies between the effect and the letter's tombstone: still one effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_that_dies_or_has_company_does_nothing_twice() {
    let (mut system, db) = analytics().await;
    refused_fact(&system, &db).await;
    mend(&db).await;
    system.set("FAULT_AT", "redrive.after_effect:1:kill");
    system.run(Part::Analytics, &["redrive"]).await.unwrap_err();
    system.set("FAULT_AT", "none:1:kill");
    assert_eq!(system.dead_letters(USERS).len(), 1, "killed before the tombstone");
    system.until_counted(3, 0).await;
    let both = tokio::join!(system.run(Part::Analytics, &["redrive"]), system.run(Part::Analytics, &["redrive"]));
    both.0.unwrap();
    both.1.unwrap();
    assert_eq!(system.dead_letters(USERS).len(), 0);
    system.until_counted(3, 0).await;
}

/// T34: after five attempts a letter is parked. It is kept and counted, and tried only when it is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_fails_five_times_is_parked_until_it_is_named() {
    let (system, db) = analytics().await;
    let (_, at) = refused_fact(&system, &db).await;
    let key = system.letter_key(USERS, at);
    for attempt in 2..=5 {
        redriven(&system, Part::Analytics, USERS, &[]).await;
        assert_eq!(attempts(&system, USERS, &key), attempt);
    }
    let parked = "0 settled, 0 superseded, 0 failed again, 1 parked";
    assert_eq!(redriven(&system, Part::Analytics, USERS, &[]).await, parked);
    assert_eq!(attempts(&system, USERS, &key), 5, "a parked letter is left alone");
    let named = redriven(&system, Part::Analytics, USERS, &["--only", &key]).await;
    assert_eq!(named, "0 settled, 0 superseded, 1 failed again, 0 parked");
    assert_eq!(attempts(&system, USERS, &key), 6);
    eventually_eq("letters open", Some(1.0), async || system.letters_open(USERS).await).await;

    mend(&db).await;
    assert_eq!(redriven(&system, Part::Analytics, USERS, &[]).await, parked);
    let other = redriven(&system, Part::Analytics, USERS, &["--only", "another-0-0"]).await;
    assert_eq!(other, "0 settled, 0 superseded, 0 failed again, 0 parked");
    system.until_counted(2, 0).await;
    let named = redriven(&system, Part::Analytics, USERS, &["--only", &key]).await;
    assert_eq!(named, "1 settled, 0 superseded, 0 failed again, 0 parked");
    system.until_counted(3, 0).await;
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
        pointers.push(system.write("user.state.v1", &Draft::user_state(id, 1, Some("first@example.com"))).await);
    }
    system.until_open_letters(RECIPIENTS, &pointers).await;
    mend(&db).await;
    system.write("user.state.v1", &Draft::user_state(newer, 2, Some("second@example.com"))).await;
    system.write("user.state.v1", &Draft::user_state(erased, 2, None)).await;
    eventually_eq("the tombstone has come", Some((2, None)), async || system.recipient(erased).await).await;
    eventually("the newer one has come", async || system.recipient(newer).await).await;
    // The cache rejects nothing that it can read, so its letters are written by hand, as an older release may have left them.
    for (pointer, id) in pointers.iter().zip([fresh, newer, erased]) {
        point(&system, PROFILES, *pointer, id).await;
    }
    system.until_cached(newer, 2).await;

    let settled = "3 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redriven(&system, Part::Email, RECIPIENTS, &[]).await, settled);
    assert_eq!(redriven(&system, Part::Cache, PROFILES, &[]).await, settled);
    let known = |version, email: Option<&str>| Some((version, email.map(str::to_owned)));
    assert_eq!(system.recipient(fresh).await, known(1, Some("first@example.com")));
    assert_eq!(system.recipient(newer).await, known(2, Some("second@example.com")));
    assert_eq!(system.recipient(erased).await, known(2, None));
    assert_eq!(system.until_cached(newer, 1).await.body["email"], "second@example.com");
    eventually_eq("erased", 404, async || system.profile(erased, None).await.unwrap().status.as_u16()).await;
    assert_eq!((system.dead_letters(RECIPIENTS).len(), system.dead_letters(PROFILES).len()), (0, 0));
}

/// T34, I13: where compaction took the source, something newer has taken its place: the letter is settled as superseded.
#[tokio::test(flavor = "multi_thread")]
async fn a_pointer_whose_source_was_compacted_away_is_superseded() {
    let (system, db) = state_readers().await;
    let id = Uuid::now_v7();
    let pointer = system.write("user.state.v1", &Draft::user_state(id, 1, Some("first@example.com"))).await;
    system.until_open_letters(RECIPIENTS, &[pointer]).await;
    mend(&db).await;
    system.write("user.state.v1", &Draft::user_state(id, 2, Some("second@example.com"))).await;
    eventually("the newer one has come", async || system.recipient(id).await).await;
    system.force_compaction().await;
    eventually("the source is gone", async || {
        system.roll_states().await;
        let is_source = |record: &Raw| (record.partition, record.offset) == pointer;
        (!system.read("user.state.v1").iter().any(is_source)).then_some(())
    })
    .await;
    let superseded = "0 settled, 1 superseded, 0 failed again, 0 parked";
    assert_eq!(redriven(&system, Part::Email, RECIPIENTS, &[]).await, superseded);
    assert_eq!(system.recipient(id).await, Some((2, Some("second@example.com".to_owned()))));
    assert_eq!(system.dead_letters(RECIPIENTS).len(), 0);
}

/// A redrive that cannot reach Kafka says so and ends; nothing is settled by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_redrive_without_kafka_ends_with_an_error() {
    let mut system = System::empty().await;
    system.set("KAFKA_BROKERS", &format!("127.0.0.1:{}", testbed::testing::free_port()));
    let error = system.run(Part::Cache, &["redrive"]).await.unwrap_err().to_string();
    assert!(error.contains("cannot read the dead letters"), "{error}");
}

/// The user service, for its topics, and analytics; and analytics' database.
pub async fn analytics() -> (System, PgPool) {
    analytics_with(&[]).await
}

/// The same with settings of the test's own.
pub async fn analytics_with(settings: &[(&str, &str)]) -> (System, PgPool) {
    let mut system = System::empty().await;
    for (name, value) in settings {
        system.set(name, value);
    }
    system.spawn(Part::User, &[]);
    // Its relay makes the other topic that analytics reads.
    system.spawn(Part::Email, &[]);
    system.spawn(Part::Analytics, &[]);
    system.ready(&[Part::User, Part::Email, Part::Analytics]).await;
    let db = system.database(Part::Analytics).await;
    (system, db)
}

/// The services that read states, the email service with a bug: it refuses whatever has version 1.
async fn state_readers() -> (System, PgPool) {
    let mut system = System::empty().await;
    for part in [Part::User, Part::Email, Part::Cache] {
        system.spawn(part, &[]);
    }
    system.ready(&[Part::User, Part::Email, Part::Cache]).await;
    let db = system.database(Part::Email).await;
    break_for(&db, "recipients", "new.version = 1").await;
    (system, db)
}

/// A registration that analytics refuses, between two that it takes, in one partition. Answers the record and where it is.
async fn refused_fact(system: &System, db: &PgPool) -> (Draft, (i32, i64)) {
    let registered = |id| Draft::user_event("user.registered", id, 1).on(0);
    let id = Uuid::now_v7();
    break_for(db, "funnel", &format!("new.user_id = '{id}'")).await;
    let fact = registered(id);
    system.write("user.events.v1", &registered(Uuid::now_v7())).await;
    let at = system.write("user.events.v1", &fact).await;
    system.write("user.events.v1", &registered(Uuid::now_v7())).await;
    system.until_open_letters(USERS, &[at]).await;
    assert_eq!(system.dead_letters(USERS)[&system.letter_key(USERS, at)].header("dlq-reason"), Some("SQLSTATE 23514"));
    (fact, at)
}

/// A bug of a handler: the database refuses rows of `table` that meet `condition`, as a wrong check would.
pub async fn break_for(db: &PgPool, table: &str, condition: &str) {
    let sql = format!(
        "create function bug() returns trigger language plpgsql as
             $$ begin if {condition} then raise check_violation; end if; return new; end $$;
         create trigger bug before insert or update on {table} for each row execute function bug()"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.as_str())).execute(db).await.unwrap();
}

pub async fn mend(db: &PgPool) {
    sqlx::raw_sql("drop function bug() cascade").execute(db).await.unwrap();
}

/// What a redrive says it did with the letters of the group.
pub async fn redriven(system: &System, part: Part, group: &str, options: &[&str]) -> String {
    let arguments: Vec<&str> = ["redrive"].iter().chain(options).copied().collect();
    let printed = system.run(part, &arguments).await.unwrap();
    let line = printed.lines().find_map(|line| line.strip_prefix(&format!("{group}: ")));
    line.unwrap_or_else(|| panic!("nothing about {group} in {printed}")).to_owned()
}

pub fn attempts(system: &System, group: &str, key: &str) -> u32 {
    system.dead_letters(group)[key].header("dlq-attempts").unwrap().parse().unwrap()
}

/// Writes a letter that points to a record.
async fn point(system: &System, group: &str, (partition, offset): (i32, i64), user: Uuid) {
    let headers = [
        ("dlq-key", user.to_string()),
        ("dlq-topic", system.prefixed("user.state.v1")),
        ("dlq-partition", partition.to_string()),
        ("dlq-offset", offset.to_string()),
        ("dlq-reason", "written by a test".to_owned()),
        ("dlq-attempts", "1".to_owned()),
    ];
    let headers = headers.map(|(name, value)| (name.to_owned(), Some(value.into_bytes()))).into();
    let key = system.letter_key(group, (partition, offset)).into_bytes();
    let letter = Draft { partition: None, key: Some(key), value: None, headers };
    system.write(&format!("{group}.dlq"), &letter).await;
}
