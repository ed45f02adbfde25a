//! Dead letters in the hands of an operator: listed, tried without consequence, redriven in thousands.

use serde_json::Value;
use tests::log::Draft;
use tests::{Part, System, api, counted_up_to, eventually_eq};
use uuid::Uuid;

use crate::dead_letters::{analytics, analytics_with, break_for, mend, redriven};
use crate::rebalancing::{SLOW, SLOW_BATCH};

const USERS: &str = "analytics.users";
const WELCOME: &str = "email.welcome";
const TOPIC: &str = "user.events.v1";
const MANY: usize = 2_000;
/// As many letters a redrive tries at once.
const CHUNK: usize = 100;
const SECRET: &str = "ada.lovelace@secret.example";

/// T34, I7 I11: a bad deploy with the breaker switched off makes thousands of letters. The redrive is looked at first, killed in
/// the middle, and run again: every registration counts once.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_letters_are_redriven_with_exact_counts() {
    let (mut system, db) = analytics_with(&[("BREAKER_SHARE", "1")]).await;
    break_for(&db, "registrations", "true").await;
    let registrations: Vec<Draft> =
        (0..MANY).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1)).collect();
    system.write_all(TOPIC, &registrations).await;
    counted_up_to("letters open", MANY as i64, async || system.letters_open(USERS).await.unwrap_or(0.0) as i64).await;
    eventually_eq("dead-lettered", MANY as f64, async || system.counted(USERS, "dead_lettered").await).await;
    assert_eq!(system.counted_in_all(USERS).await, MANY as f64);
    assert_eq!(listed(&system, Part::Analytics).await.len(), MANY);

    let looked_at = redriven_in_the_end(&system, &["--dry-run"]).await;
    assert_eq!(looked_at, format!("{MANY} would be tried, 0 parked"));
    let untouched = listed(&system, Part::Analytics).await;
    assert!(untouched.len() == MANY && untouched.iter().all(|letter| letter["attempts"] == 1), "{untouched:?}");

    mend(&db).await;
    system.until_counted(0, 0).await;
    system.set("FAULT_AT", "redrive.after_effect:3:kill");
    system.run(Part::Analytics, &["redrive"]).await.unwrap_err();
    system.set("FAULT_AT", "none:1:kill");
    system.until_counted(3 * CHUNK as i64, 0).await;
    let left = MANY - 2 * CHUNK;
    assert_eq!(system.dead_letters(USERS).len(), left, "killed before the tombstones of the third");
    let settled = format!("{left} settled, 0 superseded, 0 failed again, 0 parked");
    assert_eq!(redriven(&system, Part::Analytics, USERS, &[]).await, settled);
    system.until_counted(MANY as i64, 0).await;
    eventually_eq("letters open", Some(0.0), async || system.letters_open(USERS).await).await;
    let nothing = "0 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redriven(&system, Part::Analytics, USERS, &[]).await, nothing);
    system.until_counted(MANY as i64, 0).await;
}

/// One bad letter among many that work again: the others settle, it alone fails again.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_fails_again_hinders_no_other() {
    let (system, db) = analytics().await;
    let users: Vec<Uuid> = (0..10).map(|_| Uuid::now_v7()).collect();
    break_for(&db, "registrations", "true").await;
    let facts: Vec<Draft> = users.iter().map(|id| Draft::user_event("user.registered", *id, 1).on(0)).collect();
    let at = system.write_all(TOPIC, &facts).await;
    system.until_open_letters(USERS, &at).await;
    mend(&db).await;
    break_for(&db, "funnel", &format!("new.user_id = '{}'", users[4])).await;
    let some = "9 settled, 0 superseded, 1 failed again, 0 parked";
    assert_eq!(redriven(&system, Part::Analytics, USERS, &[]).await, some);
    system.until_counted(9, 0).await;
    let [letter] = &listed(&system, Part::Analytics).await[..] else { panic!("not one letter") };
    assert_eq!((&letter["key"], &letter["attempts"]), (&users[4].to_string().into(), &2.into()));
}

/// T34 T18: letters that take too long together are tried one by one.
#[tokio::test(flavor = "multi_thread")]
async fn letters_that_are_slow_together_are_redriven_one_by_one() {
    let (system, db) = analytics_with(&[("BREAKER_SHARE", "1")]).await;
    break_for(&db, "registrations", "true").await;
    let facts: Vec<Draft> = (0..SLOW_BATCH).map(|_| Draft::user_event("user.registered", Uuid::now_v7(), 1)).collect();
    system.write_all(TOPIC, &facts).await;
    eventually_eq("letters open", Some(SLOW_BATCH as f64), async || system.letters_open(USERS).await).await;
    mend(&db).await;
    sqlx::raw_sql(SLOW).execute(&db).await.unwrap();
    let settled = format!("{SLOW_BATCH} settled, 0 superseded, 0 failed again, 0 parked");
    assert_eq!(redriven(&system, Part::Analytics, USERS, &[]).await, settled);
    system.until_counted(SLOW_BATCH, 0).await;
}

/// T34, I5 I6: the fact of a registration was refused and is redriven. Its mail is sent once, however often; and not at all to
/// somebody who was erased meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_registration_is_mailed_once_and_not_after_an_erasure() {
    let mut system = System::empty().await;
    for part in [Part::User, Part::Email] {
        system.spawn(part, &[]);
    }
    system.ready(&[Part::User, Part::Email]).await;
    let db = system.database(Part::Email).await;
    break_for(&db, "deliveries", "true").await;
    let address = api::address();
    let (stays, erased) = (system.register_as(&address).await, system.register().await);
    eventually_eq("letters", 2, async || system.dead_letters(WELCOME).len()).await;
    system.erase(erased).await.unwrap();
    eventually_eq("the erasure has come", Some(None), async || system.recipient(erased).await.map(|(_, email)| email))
        .await;
    mend(&db).await;
    let settled = "2 settled, 0 superseded, 0 failed again, 0 parked";
    assert_eq!(redriven(&system, Part::Email, WELCOME, &[]).await, settled);
    system.until_mailed(stays).await;
    eventually_eq("not sent", vec!["cancelled".to_owned()], async || system.deliveries(erased).await).await;
    // The facts once more, as another redrive of the same letters would hand them out.
    let facts: Vec<Draft> = system.read(TOPIC).iter().map(tests::log::Raw::again).collect();
    system.write_all(TOPIC, &facts).await;
    eventually_eq("caught up", vec![], async || system.lag_of(WELCOME, TOPIC)).await;
    system.until_mailed(stays).await;
    let mails = system.sink.mails();
    assert_eq!(mails.iter().map(|mail| &mail.to).collect::<Vec<_>>(), [&[address][..]]);
}

/// I13: what an operator sees of a letter, as a table and as JSON. Nothing personal, though the record has it in key and value.
#[tokio::test(flavor = "multi_thread")]
async fn letters_are_listed_without_personal_data() {
    let (mut system, _) = analytics().await;
    let id = Uuid::now_v7();
    let bad = |key: &str| Draft {
        key: Some(key.into()),
        ..Draft::user_event("user.registered", id, 1).valued(format!(r#"["{SECRET}"]"#).as_bytes()).on(0)
    };
    let at = system.write_all(TOPIC, &[bad(SECRET), bad(&id.to_string())]).await;
    system.until_open_letters(USERS, &at).await;
    let sources = [at[0], at[1]].map(|at| system.letter_key(USERS, at));
    let since = |letters: &[Value]| -> Vec<Value> { letters.iter().map(|letter| letter["since"].clone()).collect() };
    let at_first = since(&listed(&system, Part::Analytics).await);
    assert!(at_first.len() == 2 && at_first.iter().all(Value::is_string), "{at_first:?}");
    for _ in 2..=5 {
        redriven(&system, Part::Analytics, USERS, &["--only", &sources[1]]).await;
    }
    let letters = listed(&system, Part::Analytics).await;
    let [first, second] = &letters[..] else { panic!("{letters:?}") };
    let expected = serde_json::json!({
        "group": USERS, "source": sources[1], "topic": system.prefixed(TOPIC), "partition": 0, "offset": at[1].1,
        "key": id.to_string(), "attempts": 5, "parked": true,
        "reason": "data: JSON, but not the shape of its type: a field is missing or has another type",
        "since": second["since"], "age_seconds": second["age_seconds"],
    });
    assert_eq!(second, &expected);
    assert_eq!((&first["key"], &first["parked"], &first["attempts"]), (&Value::Null, &false.into(), &1.into()));
    assert_eq!(since(&letters), at_first, "a redrive does not make a letter younger");

    let table = system.run(Part::Analytics, &["dead-letters"]).await.unwrap();
    assert!(table.contains(&format!("{USERS}: 2 open, 1 of them parked")), "{table}");
    assert!(table.contains("analytics.emails: 0 open, 0 of them parked"), "{table}");
    assert!(table.contains(&sources[0]) && !table.contains(SECRET), "{table}");
    let wrong = system.run(Part::Analytics, &["redrive", "--only", "nonsense"]).await.unwrap_err().to_string();
    assert!(wrong.contains("not topic-partition-offset"), "{wrong}");
    system.stop(Part::Analytics).await;
    assert!(system.run(Part::Analytics, &["dead-letters"]).await.is_ok(), "it needs no running service");
}

/// `dead-letters --json`, parsed.
async fn listed(system: &System, part: Part) -> Vec<Value> {
    let printed = system.run(part, &["dead-letters", "--json"]).await.unwrap();
    assert!(!printed.contains(SECRET), "{printed}");
    printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The last thing that a redrive says of the group.
async fn redriven_in_the_end(system: &System, options: &[&str]) -> String {
    let arguments: Vec<&str> = ["redrive"].iter().chain(options).copied().collect();
    let printed = system.run(Part::Analytics, &arguments).await.unwrap();
    let line = printed.lines().filter_map(|line| line.strip_prefix(&format!("{USERS}: "))).next_back();
    line.unwrap_or_else(|| panic!("nothing about {USERS} in {printed}")).to_owned()
}
