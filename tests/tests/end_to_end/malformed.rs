//! Anybody may write anything to a topic. What cannot be read is set aside, and what stands around it is handled.

use std::collections::BTreeMap;

use tests::consume::{OUTCOMES, part_of, topic_of};
use tests::log::{Draft, Raw};
use tests::{Part, System, api, eventually_eq};
use uuid::Uuid;

/// All of these records stand in one partition, so that each blocks the others if it blocks anything.
const PARTITION: i32 = 3;
const FACT_READERS: [&str; 2] = ["email.welcome", "analytics.users"];
const STATE_READERS: [&str; 2] = ["email.recipients", "cache.profiles"];
/// Below the 1 MiB that a broker takes for a batch, by no more than the headers need.
const LARGE: usize = 1_047_500;
/// Stands in keys, values and headers of bad records, and must not come out in letters or logs.
const SECRET: &str = "ada.lovelace@secret.example";

/// A record, and why it becomes a dead letter; `None`: it does not.
type Case = (Draft, Option<&'static str>);

/// T30, I11 I13: every class of bad record among good ones, on both kinds of topic.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_records_are_set_aside_and_the_others_handled() {
    let mut system = System::start().await;
    let processes = Part::ALL.map(|part| system.pid(part));
    let users: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    let (facts, states) = (bad_facts(), bad_states());
    let registered = |id| Draft::user_event("user.registered", id, 1);
    let facts_at = among_good(&system, "user.events.v1", &facts, &users, registered).await;
    let state = |id| Draft::user_state(id, 1, Some(&api::address()));
    let states_at = among_good(&system, "user.state.v1", &states, &users, state).await;

    good_ones_are_handled(&system, &users).await;
    for group in FACT_READERS {
        system.until_open_letters(group, &rejected(&facts, &facts_at)).await;
        letters_are_copies(&system, group, &facts, &facts_at);
    }
    for group in STATE_READERS {
        let mut expected = rejected(&states, &states_at);
        // Valid for everybody but a database, which stores no NUL in a text.
        let nul = states.iter().position(|(draft, _)| holds(draft, "\\u0000")).unwrap();
        expected.extend((group == "email.recipients").then_some(states_at[nul]));
        system.until_open_letters(group, &expected).await;
        letters_are_pointers(&system, group, &states, &states_at);
    }
    system.until_drained().await;
    for group in FACT_READERS.into_iter().chain(STATE_READERS) {
        everything_is_counted(&system, group).await;
    }
    for (part, process) in Part::ALL.into_iter().zip(processes) {
        assert!(!system.has_ended(part), "{part:?} died");
        assert_eq!(system.pid(part), process, "{part:?} was restarted");
        assert!(!system.log_of(part).contains(SECRET), "{part:?} logged what was in a bad record");
    }
}

/// T30, I11: a header's name that is not UTF-8. librdkafka hands it out as it is and the Rust client panics on it, so a hostile
/// record could end every consumer, again and again. No client library writes such a name: the request is made by hand.
#[tokio::test(flavor = "multi_thread")]
async fn a_header_name_that_is_not_utf8_is_set_aside() {
    let mut system = System::start().await;
    let (user, key) = (Uuid::now_v7(), Uuid::now_v7().to_string());
    let good = Draft::user_event("user.profile_changed", user, 2).on(PARTITION);
    system.write("user.events.v1", &good).await;
    let header: (&[u8], &[u8]) = (b"ce_\xff\xfe", b"1");
    let (_, bad) = system.write_by_hand("user.events.v1", PARTITION, key.as_bytes(), b"{}", &[header]).await;
    system.write("user.events.v1", &good).await;
    for group in FACT_READERS {
        system.until_open_letters(group, &[(PARTITION, bad)]).await;
        let letter = system.dead_letters(group).into_values().next().unwrap();
        assert_eq!(letter.header("dlq-reason"), Some("headers: a name that is not UTF-8"));
        assert_eq!((letter.value.as_deref(), letter.header("dlq-key")), (Some(&b"{}"[..]), Some(&*key)));
        eventually_eq("the three records", 3.0, async || system.counted_in_all(group).await).await;
        assert_eq!(system.counted(group, "dead_lettered").await, 1.0);
    }
    system.until_drained().await;
    assert!(!system.has_ended(Part::Email) && !system.has_ended(Part::Analytics));
}

/// T30 T16, I9 I13: the cache keeps its own position and moves it with the good records of a batch. Killed before the letter of a
/// bad one is written, it must meet that one again.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_killed_before_it_writes_a_letter_meets_the_record_again() {
    let mut system = System::empty().await;
    system.restart(Part::User, &[]).await;
    let users: Vec<Uuid> = (0..2).map(|_| Uuid::now_v7()).collect();
    let bad = [(Draft::user_state(users[0], 2, None).without("ce_id"), Some("ce_id: missing"))];
    let good = |id| Draft::user_state(id, 1, Some("somebody@example.com"));
    let at = among_good(&system, "user.state.v1", &bad, &users, good).await;
    system.spawn(Part::Cache, &[("FAULT_AT", "dead_letters.before_write:1:kill")]);
    system.until_ended(Part::Cache).await;
    system.restart(Part::Cache, &[]).await;
    for id in users {
        system.until_cached(id, 1).await;
    }
    system.until_open_letters("cache.profiles", &at).await;
}

fn bad_facts() -> Vec<Case> {
    let mut cases = badly_enveloped(|| Draft::user_event("user.registered", Uuid::now_v7(), 1));
    // A compacted topic takes no record without a key.
    let keyless = Draft { key: None, ..Draft::user_event("user.registered", Uuid::now_v7(), 1) };
    cases.push((keyless, Some("key: missing")));
    let null = Draft::envelope("user.registered", Uuid::now_v7(), 1);
    cases.push((null, Some("data: null, but facts always carry data")));
    let unknown = Draft::user_event("user.promoted", Uuid::now_v7(), 1);
    cases.push((unknown, None));
    cases
}

fn bad_states() -> Vec<Case> {
    let good = || Draft::user_state(Uuid::now_v7(), 1, Some(SECRET));
    let mut cases = badly_enveloped(good);
    cases.push((Draft { key: Some(SECRET.into()), ..good() }, Some("key: not a UUID")));
    cases.push((good().instead("ce_sequence", b"0"), Some("ce_sequence: not a positive number")));
    cases.push((good().instead("ce_type", b"user.avatar"), None));
    cases.push((good().valued(br#"{"email":"nul@example.com","display_name":"A\u0000B"}"#), None));
    cases
}

/// What is wrong in the same way on every topic.
fn badly_enveloped(good: impl Fn() -> Draft) -> Vec<Case> {
    let eof = Some("data: JSON that ends too early");
    let mut null_header = good().without("ce_id");
    null_header.headers.push(("ce_id".to_owned(), None));
    vec![
        (good().valued(b""), eof),
        (good().valued(format!(r#"{{"email":"{SECRET}","user_id":"#).as_bytes()), eof),
        (good().valued(format!(r#"["{SECRET}"]"#).as_bytes()), Some(SHAPE)),
        (good().valued(&vec![b'x'; LARGE]), Some("data: not JSON")),
        (good().instead("ce_source", b"\xff\xfe"), Some("ce_source: not UTF-8")),
        (good().without("ce_id"), Some("ce_id: missing")),
        (null_header, Some("ce_id: missing")),
        (good().instead("ce_id", SECRET.as_bytes()), Some("ce_id: not a UUID")),
        (good().without("ce_type"), Some("ce_type: missing")),
        (good().with("ce_id", Uuid::now_v7().to_string().as_bytes()), Some("ce_id: given twice")),
        (good().instead("ce_dataschema", b"urn:waybill:some:2"), Some(NEWER)),
        (good().instead("content-type", b"application/avro"), Some("content-type: not application/json")),
        (Draft { headers: vec![], ..good() }, Some("ce_specversion: missing")),
        (Draft { key: Some(vec![]), ..good() }, Some("key: not a UUID")),
        (Draft { key: Some(b"42".to_vec()), ..good() }, Some("key: not a UUID")),
    ]
}

const SHAPE: &str = "data: JSON, but not the shape of its type: a field is missing or has another type";
const NEWER: &str = "ce_dataschema: a major version this release cannot read";

/// Writes the cases, with the first good record before them, the last behind them, and the others within.
async fn among_good(
    system: &System,
    topic: &str,
    cases: &[Case],
    users: &[Uuid],
    good: impl Fn(Uuid) -> Draft,
) -> Vec<(i32, i64)> {
    let mut at = vec![];
    let every = cases.len().div_ceil(users.len() - 1);
    let mut users = users.iter().copied();
    for (index, (bad, _)) in cases.iter().enumerate() {
        if index % every == 0 {
            system.write(topic, &good(users.next().unwrap()).on(PARTITION)).await;
        }
        at.push(system.write(topic, &bad.clone().on(PARTITION)).await);
    }
    for user in users {
        system.write(topic, &good(user).on(PARTITION)).await;
    }
    at
}

async fn good_ones_are_handled(system: &System, users: &[Uuid]) {
    for id in users {
        system.until_mailed(*id).await;
        system.until_cached(*id, 1).await;
    }
    system.until_counted(users.len() as i64, users.len() as i64).await;
}

fn rejected(cases: &[Case], at: &[(i32, i64)]) -> Vec<(i32, i64)> {
    cases.iter().zip(at).filter(|((_, reason), _)| reason.is_some()).map(|(_, at)| *at).collect()
}

fn holds(draft: &Draft, text: &str) -> bool {
    draft.value.as_ref().is_some_and(|value| String::from_utf8_lossy(value).contains(text))
}

/// On facts a letter is the record as it was, and says where from and why (I13).
fn letters_are_copies(system: &System, group: &str, cases: &[Case], at: &[(i32, i64)]) {
    let letters = system.dead_letters(group);
    for ((draft, reason), at) in cases.iter().zip(at) {
        let Some(reason) = reason else { continue };
        let letter = &letters[&system.letter_key(group, *at)];
        tells(system, letter, group, *at, reason);
        assert_eq!(letter.value, draft.value, "{reason}: the value");
        let theirs: Vec<_> = letter.headers.iter().filter(|(name, _)| !name.starts_with("dlq-")).cloned().collect();
        assert_eq!(theirs, draft.headers, "{reason}: the headers");
        assert_eq!(own(letter).get("dlq-key").copied(), draft.key.as_deref(), "{reason}: the key");
    }
}

/// On a compacted topic it is a pointer: a copy would outlive the erasure of its original (I13).
fn letters_are_pointers(system: &System, group: &str, cases: &[Case], at: &[(i32, i64)]) {
    let letters = system.dead_letters(group);
    for ((draft, reason), at) in cases.iter().zip(at) {
        let key = system.letter_key(group, *at);
        // The one that only a database refuses has no reason in the list.
        let Some(letter) = letters.get(&key) else { continue };
        tells(system, letter, group, *at, reason.unwrap_or("SQLSTATE 22021"));
        assert_eq!(letter.value, None, "a pointer has no value");
        assert!(letter.headers.iter().all(|(name, _)| name.starts_with("dlq-")), "{:?}", letter.headers);
        assert!(!letter.text().contains(SECRET), "{}", letter.text());
        let kept = draft.key.as_deref().filter(|key| Uuid::try_parse_ascii(key).is_ok());
        assert_eq!(own(letter).get("dlq-key").copied(), kept, "only a key that is a UUID is kept");
    }
}

fn tells(system: &System, letter: &Raw, group: &str, (partition, offset): (i32, i64), reason: &str) {
    let expected = [
        ("dlq-topic", system.prefixed(topic_of(group))),
        ("dlq-partition", partition.to_string()),
        ("dlq-offset", offset.to_string()),
        ("dlq-reason", reason.to_owned()),
        ("dlq-attempts", "1".to_owned()),
    ];
    for (name, value) in &expected {
        assert_eq!(letter.header(name), Some(&**value), "{name} of the letter for {reason}");
    }
}

/// A letter's own headers.
fn own(letter: &Raw) -> BTreeMap<&str, &[u8]> {
    let own = letter.headers.iter().filter(|(name, _)| name.starts_with("dlq-"));
    own.filter_map(|(name, value)| Some((name.as_str(), value.as_deref()?))).collect()
}

/// Nothing is dropped silently: every record in the log was counted once, under what became of it (I11).
async fn everything_is_counted(system: &System, group: &str) {
    let delivered = system.read(topic_of(group)).len() as f64;
    let letters = system.dead_letters(group).len() as f64;
    let mut by_outcome = vec![];
    for outcome in OUTCOMES {
        by_outcome.push((outcome, system.counted(group, outcome).await));
    }
    assert_eq!(system.counted_in_all(group).await, delivered, "{group}: {by_outcome:?}");
    assert_eq!(system.counted(group, "dead_lettered").await, letters, "{group}: {by_outcome:?}");
    assert_eq!(system.counted(group, "skipped").await, 1.0, "{group}: {by_outcome:?}");
    let what = format!("the open letters that {:?} shows for {group}", part_of(group));
    eventually_eq(&what, Some(letters), async || system.letters_open(group).await).await;
}
