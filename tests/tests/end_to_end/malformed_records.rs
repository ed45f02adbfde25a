//! Anybody may write anything to a topic. What cannot be read is set aside, and what stands around it is handled.

use std::collections::BTreeMap;

use tests::processes::OUTCOMES;
use tests::record::{Draft, Record};
use tests::services::{
    ANALYTICS_USERS, CACHE_PROFILES, EMAIL_RECIPIENTS, EMAIL_WELCOME, USER_EVENTS, USER_STATE, topic_of,
};
use tests::users::address;
use tests::{System, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, USER};
use uuid::Uuid;

/// All of these records stand in one partition, so that each blocks the others if it blocks anything.
const PARTITION: i32 = 3;
const FACT_READERS: [&str; 2] = [EMAIL_WELCOME, ANALYTICS_USERS];
const STATE_READERS: [&str; 2] = [EMAIL_RECIPIENTS, CACHE_PROFILES];
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
    let processes = SERVICES.map(|service| system.processes.pid(service));
    let users: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    let facts = bad_facts();
    let states = bad_states();
    let registered = |id| Draft::user_event("user.registered", id, 1);
    let facts_at = among_good(&system, USER_EVENTS, &facts, &users, registered).await;
    let state = |id| Draft::user_state(id, 1, Some(&address()));
    let states_at = among_good(&system, USER_STATE, &states, &users, state).await;

    good_ones_are_handled(&system, &users).await;
    for group in FACT_READERS {
        system.kafka.until_dead_letters(group, &rejected(&facts, &facts_at)).await;
        letters_are_copies(&system, group, &facts, &facts_at);
    }
    for group in STATE_READERS {
        let mut expected = rejected(&states, &states_at);
        // Valid for everybody but a database, which stores no NUL in a text.
        let nul = states.iter().position(|(draft, _)| holds(draft, "\\u0000")).unwrap();
        expected.extend((group == EMAIL_RECIPIENTS).then_some(states_at[nul]));
        system.kafka.until_dead_letters(group, &expected).await;
        letters_are_pointers(&system, group, &states, &states_at);
    }
    system.until_drained().await;
    for group in FACT_READERS.into_iter().chain(STATE_READERS) {
        everything_is_counted(&system, group).await;
    }
    for (service, process) in SERVICES.into_iter().zip(processes) {
        assert!(!system.processes.has_ended(service), "{} died", service.name);
        assert_eq!(system.processes.pid(service), process, "{} was restarted", service.name);
        assert!(!system.processes.log(service).contains(SECRET), "{} logged what was in a bad record", service.name);
    }
}

/// T30, I11: a header's name that is not UTF-8. librdkafka hands it out as it is and the Rust client panics on it, so a hostile
/// record could end every consumer, again and again. No client library writes such a name: the request is made by hand.
#[tokio::test(flavor = "multi_thread")]
async fn a_header_name_that_is_not_utf8_is_set_aside() {
    let mut system = System::start().await;
    let user = Uuid::now_v7();
    let key = Uuid::now_v7().to_string();
    let good = Draft::user_event("user.profile_changed", user, 2).on(PARTITION);
    system.kafka.write(USER_EVENTS, &good).await;
    let header: (&[u8], &[u8]) = (b"ce_\xff\xfe", b"1");
    let (_, bad) = system.kafka.write_bytes(USER_EVENTS, PARTITION, key.as_bytes(), b"{}", &[header]).await;
    system.kafka.write(USER_EVENTS, &good).await;
    for group in FACT_READERS {
        system.kafka.until_dead_letters(group, &[(PARTITION, bad)]).await;
        let letter = system.kafka.dead_letters(group).into_values().next().unwrap();
        assert_eq!(letter.header("dlq-reason"), Some("headers: a name that is not UTF-8"));
        assert_eq!((letter.value.as_deref(), letter.header("dlq-key")), (Some(&b"{}"[..]), Some(&*key)));
        eventually_eq("the three records", 3.0, async || system.processes.counted_in_all(group).await).await;
        assert_eq!(system.processes.counted(group, "dead_lettered").await, 1.0);
    }
    system.until_drained().await;
    assert!(!system.processes.has_ended(EMAIL) && !system.processes.has_ended(ANALYTICS));
}

/// T30 T16, I9 I13: the cache keeps its own position and moves it with the good records of a batch. Killed before the letter of a
/// bad one is written, it must meet that one again.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_killed_before_it_writes_a_letter_meets_the_record_again() {
    let mut system = System::start_only(&[USER]).await;
    let users: Vec<Uuid> = (0..2).map(|_| Uuid::now_v7()).collect();
    let bad = [(Draft::user_state(users[0], 2, None).without_header("ce_id"), Some("ce_id: missing"))];
    let good = |id| Draft::user_state(id, 1, Some("somebody@example.com"));
    let at = among_good(&system, USER_STATE, &bad, &users, good).await;
    system.processes.spawn_with(CACHE, &[("FAULT_AT", "dead_letters.before_write:1:kill")]);
    system.processes.until_ended(CACHE).await;
    system.processes.start(&[CACHE]).await;
    for id in users {
        system.users.until_cached(id, 1).await;
    }
    system.kafka.until_dead_letters(CACHE_PROFILES, &at).await;
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
    cases.push((good().replace_header("ce_sequence", b"0"), Some("ce_sequence: not a positive number")));
    cases.push((good().replace_header("ce_type", b"user.avatar"), None));
    cases.push((good().with_value(br#"{"email":"nul@example.com","display_name":"A\u0000B"}"#), None));
    cases
}

/// What is wrong in the same way on every topic.
fn badly_enveloped(good: impl Fn() -> Draft) -> Vec<Case> {
    let eof = Some("data: JSON that ends too early");
    let mut null_header = good().without_header("ce_id");
    null_header.headers.push(("ce_id".to_owned(), None));
    vec![
        (good().with_value(b""), eof),
        (good().with_value(format!(r#"{{"email":"{SECRET}","user_id":"#).as_bytes()), eof),
        (good().with_value(format!(r#"["{SECRET}"]"#).as_bytes()), Some(SHAPE)),
        (good().with_value(&vec![b'x'; LARGE]), Some("data: not JSON")),
        (good().replace_header("ce_source", b"\xff\xfe"), Some("ce_source: not UTF-8")),
        (good().without_header("ce_id"), Some("ce_id: missing")),
        (null_header, Some("ce_id: missing")),
        (good().replace_header("ce_id", SECRET.as_bytes()), Some("ce_id: not a UUID")),
        (good().without_header("ce_type"), Some("ce_type: missing")),
        (good().with_header("ce_id", Uuid::now_v7().to_string().as_bytes()), Some("ce_id: given twice")),
        (good().replace_header("ce_dataschema", b"urn:waybill:some:2"), Some(NEWER)),
        (good().replace_header("content-type", b"application/avro"), Some("content-type: not application/json")),
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
            system.kafka.write(topic, &good(users.next().unwrap()).on(PARTITION)).await;
        }
        at.push(system.kafka.write(topic, &bad.clone().on(PARTITION)).await);
    }
    for user in users {
        system.kafka.write(topic, &good(user).on(PARTITION)).await;
    }
    at
}

async fn good_ones_are_handled(system: &System, users: &[Uuid]) {
    for id in users {
        system.users.until_mailed(*id).await;
        system.users.until_cached(*id, 1).await;
    }
    system.users.until_counted(users.len() as i64, users.len() as i64).await;
}

fn rejected(cases: &[Case], at: &[(i32, i64)]) -> Vec<(i32, i64)> {
    cases.iter().zip(at).filter(|((_, reason), _)| reason.is_some()).map(|(_, at)| *at).collect()
}

fn holds(draft: &Draft, text: &str) -> bool {
    draft.value.as_ref().is_some_and(|value| String::from_utf8_lossy(value).contains(text))
}

/// On facts a letter is the record as it was, and says where from and why (I13).
fn letters_are_copies(system: &System, group: &str, cases: &[Case], at: &[(i32, i64)]) {
    let letters = system.kafka.dead_letters(group);
    for ((draft, reason), at) in cases.iter().zip(at) {
        let Some(reason) = reason else { continue };
        let letter = &letters[&system.kafka.letter_key(group, *at)];
        tells(system, letter, group, *at, reason);
        assert_eq!(letter.value, draft.value, "{reason}: the value");
        let theirs: Vec<_> = letter.headers.iter().filter(|(name, _)| !name.starts_with("dlq-")).cloned().collect();
        assert_eq!(theirs, draft.headers, "{reason}: the headers");
        assert_eq!(own(letter).get("dlq-key").copied(), draft.key.as_deref(), "{reason}: the key");
    }
}

/// On a compacted topic it is a pointer: a copy would outlive the erasure of its original (I13).
fn letters_are_pointers(system: &System, group: &str, cases: &[Case], at: &[(i32, i64)]) {
    let letters = system.kafka.dead_letters(group);
    for ((draft, reason), at) in cases.iter().zip(at) {
        let key = system.kafka.letter_key(group, *at);
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

fn tells(system: &System, letter: &Record, group: &str, (partition, offset): (i32, i64), reason: &str) {
    let expected = [
        ("dlq-topic", system.kafka.prefixed(topic_of(group))),
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
fn own(letter: &Record) -> BTreeMap<&str, &[u8]> {
    let own = letter.headers.iter().filter(|(name, _)| name.starts_with("dlq-"));
    own.filter_map(|(name, value)| Some((name.as_str(), value.as_deref()?))).collect()
}

/// Nothing is dropped silently: every record in the log was counted once, under what became of it (I11).
async fn everything_is_counted(system: &System, group: &str) {
    let delivered = system.kafka.read(topic_of(group)).len() as f64;
    let letters = system.kafka.dead_letters(group).len() as f64;
    let mut by_outcome = vec![];
    for outcome in OUTCOMES {
        by_outcome.push((outcome, system.processes.counted(group, outcome).await));
    }
    assert_eq!(system.processes.counted_in_all(group).await, delivered, "{group}: {by_outcome:?}");
    assert_eq!(system.processes.counted(group, "dead_lettered").await, letters, "{group}: {by_outcome:?}");
    assert_eq!(system.processes.counted(group, "skipped").await, 1.0, "{group}: {by_outcome:?}");
    let what = format!("the metric of open dead letters of {group}");
    eventually_eq(&what, Some(letters), async || system.processes.dead_letters_open(group).await).await;
}
