//! Any client may write anything to a topic. A record that cannot be read is dead-lettered, and the
//! records around it are handled.

use std::collections::BTreeMap;

use tests::processes::OUTCOMES;
use tests::record::{Draft, Record};
use tests::services::{
    ANALYTICS_USERS, CACHE_PROFILES, DEFAULT_CONSUMERS, EMAIL_RECIPIENTS, EMAIL_WELCOME, USER_EVENTS, USER_STATE,
    topic_of,
};
use tests::users::address;
use tests::{System, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, USER};
use uuid::Uuid;

/// All records are in one partition, so that a record that blocks anything blocks the others.
const PARTITION: i32 = 3;
const OTHER_PARTITION: i32 = 5;
const FACT_GROUPS: [&str; 2] = [EMAIL_WELCOME, ANALYTICS_USERS];
const STATE_GROUPS: [&str; 2] = [EMAIL_RECIPIENTS, CACHE_PROFILES];
/// Bytes of a value that, with its headers, just fits into the 1 MiB that a broker accepts for a
/// batch.
const LARGE: usize = 1_047_500;
/// Part of keys, values and headers of bad records. It must not appear in letters about states or
/// in logs.
const SECRET: &str = "ada.lovelace@secret.example";
const INCOMPLETE: &str = "data: incomplete JSON";
const OTHER_TYPE: &str = "data: JSON that does not match its type: a field is missing or has another type";
const EXTREME_TIME: &str = "ce_time: not between the years 1 and 9999 in UTC";
const NEWER_SCHEMA: &str = "ce_dataschema: a major version that this release cannot read";

/// A record, and the reason of its dead letter. `None`: it does not become a dead letter.
type Case = (Draft, Option<&'static str>);

/// T30, I11 I13: Every class of bad record is written among good ones, to both kinds of topic.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_records_are_dead_lettered_and_the_others_handled() {
    let mut system = System::start().await;
    let pids = SERVICES.map(|service| system.processes.pid(service));
    let users: Vec<Uuid> = (0..3).map(|_| Uuid::now_v7()).collect();
    let facts = bad_facts();
    let states = bad_states();
    let good_fact = |id| Draft::user_event("user.registered", id, 1);
    let facts_at = write_among_good(&system, USER_EVENTS, &facts, &users, good_fact).await;
    let good_state = |id| Draft::user_state(id, 1, Some(&address()));
    let states_at = write_among_good(&system, USER_STATE, &states, &users, good_state).await;

    until_good_records_are_handled(&system, &users).await;
    for group in FACT_GROUPS {
        system.kafka.until_dead_letters(group, &rejected(&facts, &facts_at)).await;
        assert_letters_are_copies(&system, group, &facts, &facts_at);
    }
    for group in STATE_GROUPS {
        let mut expected = rejected(&states, &states_at);
        // Only a database rejects this record: Postgres stores no NUL in a text.
        let with_nul = states.iter().position(|(draft, _)| value_contains(draft, "\\u0000")).unwrap();
        expected.extend((group == EMAIL_RECIPIENTS).then_some(states_at[with_nul]));
        system.kafka.until_dead_letters(group, &expected).await;
        assert_letters_are_pointers(&system, group, &states, &states_at);
    }
    system.until_drained().await;
    for group in FACT_GROUPS.into_iter().chain(STATE_GROUPS) {
        assert_each_record_is_counted_once(&system, group).await;
    }
    for (service, pid) in SERVICES.into_iter().zip(pids) {
        assert!(!system.processes.has_ended(service), "{} has ended", service.name);
        assert_eq!(system.processes.pid(service), pid, "{} was restarted", service.name);
        assert!(!system.processes.log(service).contains(SECRET), "{} logged data of a bad record", service.name);
    }
}

/// T30, I11: The name of a header is not UTF-8. librdkafka returns it as it is, and the Rust client
/// panics on it, so one hostile record could end every consumer at each start. No client library
/// writes such a name, so the test builds the request itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_with_a_header_name_that_is_not_utf8_is_dead_lettered() {
    let mut system = System::start().await;
    let user = Uuid::now_v7();
    let key = Uuid::now_v7().to_string();
    let good = Draft::user_event("user.profile_changed", user, 2).on(PARTITION);
    system.kafka.write(USER_EVENTS, &good).await;
    let header: (&[u8], &[u8]) = (b"ce_\xff\xfe", b"1");
    let bad = system.kafka.write_bytes(USER_EVENTS, PARTITION, key.as_bytes(), b"{}", &[header]).await;
    system.kafka.write(USER_EVENTS, &good).await;
    for group in FACT_GROUPS {
        system.kafka.until_dead_letters(group, &[bad]).await;
        let letter = system.kafka.dead_letters(group).into_values().next().unwrap();
        assert_eq!(letter.header("dlq-reason"), Some("headers: a name that is not UTF-8"));
        assert_eq!(letter.value.as_deref(), Some(&b"{}"[..]));
        assert_eq!(letter.header("dlq-key"), Some(&*key));
        eventually_eq("counted records", 3.0, async || system.processes.counted_in_all(group).await).await;
        assert_eq!(system.processes.counted(group, "dead_lettered").await, 1.0);
    }
    system.until_drained().await;
    assert!(!system.processes.has_ended(EMAIL));
    assert!(!system.processes.has_ended(ANALYTICS));
}

/// T42, I11: an older release reads an event that only a newer one knows, in a roll-out that
/// deploys the writer first. It is skipped and counted, and the log says where the first one of each
/// partition is. If the group is set back to it, nothing happens twice.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_of_a_newer_release_is_skipped_counted_and_logged_once_for_each_partition() {
    let mut system = System::start_with(&[USER, EMAIL, ANALYTICS], &DEFAULT_CONSUMERS).await;
    let fact = |kind| Draft::user_event(kind, Uuid::now_v7(), 1).on(PARTITION);
    let kinds = ["user.registered", "user.promoted", "user.promoted", "user.registered"];
    let written = system.kafka.write_all(USER_EVENTS, &kinds.map(fact)).await;
    let elsewhere = system.kafka.write(USER_EVENTS, &fact("user.promoted").on(OTHER_PARTITION)).await;
    system.users.until_counted(2, 0).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    let skipped = async || system.processes.counted(ANALYTICS_USERS, "skipped").await;
    eventually_eq("skipped records", 3.0, skipped).await;
    let (_, offset) = written[1];
    let log = system.processes.log(ANALYTICS);
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("does not know the type of an event") && line.contains(ANALYTICS_USERS))
        .collect();
    for (partition, offset) in [written[1], elsewhere] {
        let coordinates = format!("{}-{partition}-{offset}\"", system.kafka.prefixed(USER_EVENTS));
        assert!(lines.iter().any(|line| line.contains(&coordinates)), "{coordinates}: {lines:?}");
    }
    assert_eq!(lines.len(), 2, "the second record of a partition is logged too: {lines:?}");

    system.processes.stop(ANALYTICS).await;
    system.kafka.commit(ANALYTICS_USERS, PARTITION, offset);
    system.processes.start(&[ANALYTICS]).await;
    eventually_eq("skipped records", 2.0, async || system.processes.counted(ANALYTICS_USERS, "skipped").await).await;
    system.kafka.until_caught_up(ANALYTICS_USERS).await;
    system.users.until_counted(2, 0).await;
}

/// T30 T16, I9 I13: The cache stores its own position and moves it with the good records of a
/// batch. If it is killed before it writes the letter of a bad record, it must read that record
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_killed_before_it_writes_a_dead_letter_reads_the_record_again() {
    let mut system = System::start_only(&[USER]).await;
    let users: Vec<Uuid> = (0..2).map(|_| Uuid::now_v7()).collect();
    let bad = [(Draft::user_state(users[0], 2, None).without_header("ce_id"), Some("ce_id: missing"))];
    let good = |id| Draft::user_state(id, 1, Some("somebody@example.com"));
    let bad_at = write_among_good(&system, USER_STATE, &bad, &users, good).await;
    system.processes.spawn_with(CACHE, &[("FAULT_AT", "dead_letters.before_write:1:kill")]);
    system.processes.until_ended(CACHE).await;
    system.processes.start(&[CACHE]).await;
    for id in users {
        system.users.until_cached(id, 1).await;
    }
    system.kafka.until_dead_letters(CACHE_PROFILES, &bad_at).await;
}

/// T30, I11: what is unusual or malformed in a header on which no effect depends is no reason to
/// reject a record: a trace context, the ids of the cause, the spelling of the media type. The
/// first and the last time that an event may have break no query.
#[tokio::test(flavor = "multi_thread")]
async fn records_with_unusual_headers_take_effect() {
    let system = System::start().await;
    let long = vec![b'a'; 100_000];
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let ends_in_nul = format!("{trace}\0");
    let headers: [&[(&str, &[u8])]; 9] = [
        &[("traceparent", ends_in_nul.as_bytes())],
        &[("traceparent", &long)],
        &[("traceparent", trace.as_bytes()), ("tracestate", b"a=1\0")],
        &[("traceparent", trace.as_bytes()), ("tracestate", &long)],
        &[("traceparent", b"\xff\xfe"), ("ce_causationid", b"\xff"), ("ce_correlationid", SECRET.as_bytes())],
        &[("content-type", b"Application/JSON; charset=UTF-8")],
        &[("content-type", b"application/json;charset=utf-8")],
        &[("ce_time", b"0001-01-01T00:00:00Z")],
        &[("ce_time", b"9999-12-31T23:59:59.9999999Z")],
    ];
    let users = headers.map(|_| Uuid::now_v7());
    for (user, headers) in users.iter().zip(headers) {
        let with_headers = |draft: Draft| {
            headers.iter().fold(draft.on(PARTITION), |draft, (name, value)| draft.replace_header(name, value))
        };
        system.kafka.write(USER_STATE, &with_headers(Draft::user_state(*user, 1, Some(&address())))).await;
        // A mail for an event of the year 1 would be held.
        let is_old = headers.iter().any(|(name, value)| *name == "ce_time" && value.starts_with(b"0001"));
        let fact = with_headers(Draft::user_event("user.registered", *user, 1));
        system.kafka.write(USER_EVENTS, &fact).await;
        if !is_old {
            system.users.until_mailed(*user).await;
        }
        system.users.until_cached(*user, 1).await;
    }
    let count = users.len() as i64;
    system.users.until_counted(count, count - 1).await;
    for bucket in ["day", "hour"] {
        let answer = system.users.get(ANALYTICS, &format!("/registrations?bucket={bucket}")).await.unwrap();
        assert_eq!(answer.status.as_u16(), 200, "{bucket}: {answer:?}");
    }
    for group in FACT_GROUPS.into_iter().chain(STATE_GROUPS) {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
    }
}

fn bad_facts() -> Vec<Case> {
    let mut cases = bad_on_every_topic(|| Draft::user_event("user.registered", Uuid::now_v7(), 1));
    // Only on a topic of facts: a compacted topic accepts no record without a key.
    let without_key = Draft { key: None, ..Draft::user_event("user.registered", Uuid::now_v7(), 1) };
    cases.push((without_key, Some("key: missing")));
    let without_value = Draft::envelope("user.registered", Uuid::now_v7(), 1);
    cases.push((without_value, Some("data: null, but facts always carry data")));
    let of_unknown_type = Draft::user_event("user.promoted", Uuid::now_v7(), 1);
    cases.push((of_unknown_type, None));
    cases
}

fn bad_states() -> Vec<Case> {
    let good = || Draft::user_state(Uuid::now_v7(), 1, Some(SECRET));
    let mut cases = bad_on_every_topic(good);
    cases.push((Draft { key: Some(SECRET.into()), ..good() }, Some("key: not a UUID")));
    cases.push((good().replace_header("ce_sequence", b"0"), Some("ce_sequence: not a positive number")));
    cases.push((good().replace_header("ce_type", b"user.avatar"), None));
    cases.push((good().with_value(br#"{"email":"nul\u0000@example.com","display_name":"A"}"#), None));
    cases
}

fn bad_on_every_topic(good: impl Fn() -> Draft) -> Vec<Case> {
    let mut null_header = good().without_header("ce_id");
    null_header.headers.push(("ce_id".to_owned(), None));
    vec![
        (good().with_value(b""), Some(INCOMPLETE)),
        (good().with_value(format!(r#"{{"email":"{SECRET}","user_id":"#).as_bytes()), Some(INCOMPLETE)),
        (good().with_value(format!(r#"["{SECRET}"]"#).as_bytes()), Some(OTHER_TYPE)),
        (good().with_value(&vec![b'x'; LARGE]), Some("data: not JSON")),
        (good().replace_header("ce_source", b"\xff\xfe"), Some("ce_source: not UTF-8")),
        (good().without_header("ce_id"), Some("ce_id: missing")),
        (null_header, Some("ce_id: missing")),
        (good().replace_header("ce_id", SECRET.as_bytes()), Some("ce_id: not a UUID")),
        (good().without_header("ce_type"), Some("ce_type: missing")),
        (good().with_header("ce_id", Uuid::now_v7().to_string().as_bytes()), Some("ce_id: given twice")),
        (good().replace_header("ce_dataschema", b"urn:waybill:some:2"), Some(NEWER_SCHEMA)),
        (good().replace_header("content-type", b"application/avro"), Some("content-type: not application/json")),
        (good().replace_header("content-type", b"application/jsonp"), Some("content-type: not application/json")),
        (good().replace_header("ce_time", b"0000-01-01T00:00:00+01:00"), Some(EXTREME_TIME)),
        (good().replace_header("ce_time", b"9999-12-31T23:59:59.9999999-05:00"), Some(EXTREME_TIME)),
        (Draft { headers: vec![], ..good() }, Some("ce_specversion: missing")),
        (Draft { key: Some(vec![]), ..good() }, Some("key: not a UUID")),
        (Draft { key: Some(b"42".to_vec()), ..good() }, Some("key: not a UUID")),
    ]
}

/// Writes the cases, with a good record before them, one after them, and the others in between.
/// Returns partition and offset of each case.
async fn write_among_good(
    system: &System,
    topic: &str,
    cases: &[Case],
    users: &[Uuid],
    good: impl Fn(Uuid) -> Draft,
) -> Vec<(i32, i64)> {
    let mut written = vec![];
    let cases_per_good_record = cases.len().div_ceil(users.len() - 1);
    let mut users = users.iter().copied();
    for (index, (bad, _)) in cases.iter().enumerate() {
        if index % cases_per_good_record == 0 {
            system.kafka.write(topic, &good(users.next().unwrap()).on(PARTITION)).await;
        }
        written.push(system.kafka.write(topic, &bad.clone().on(PARTITION)).await);
    }
    for user in users {
        system.kafka.write(topic, &good(user).on(PARTITION)).await;
    }
    written
}

async fn until_good_records_are_handled(system: &System, users: &[Uuid]) {
    for id in users {
        system.users.until_mailed(*id).await;
        system.users.until_cached(*id, 1).await;
    }
    system.users.until_counted(users.len() as i64, users.len() as i64).await;
}

/// Partition and offset of the cases that become dead letters.
fn rejected(cases: &[Case], written: &[(i32, i64)]) -> Vec<(i32, i64)> {
    let rejected = cases.iter().zip(written).filter(|((_, reason), _)| reason.is_some());
    rejected.map(|(_, coordinates)| *coordinates).collect()
}

fn value_contains(draft: &Draft, text: &str) -> bool {
    draft.value.as_ref().is_some_and(|value| String::from_utf8_lossy(value).contains(text))
}

/// A letter about a fact holds the record unchanged, its coordinates and the reason (I13).
fn assert_letters_are_copies(system: &System, group: &str, cases: &[Case], written: &[(i32, i64)]) {
    let letters = system.kafka.dead_letters(group);
    for ((draft, reason), coordinates) in cases.iter().zip(written) {
        let Some(reason) = reason else { continue };
        let letter = &letters[&system.kafka.letter_key(group, *coordinates)];
        assert_letter_names(system, letter, group, *coordinates, reason);
        // Without a value the letter would be a tombstone for compaction.
        assert_eq!(letter.value, Some(draft.value.clone().unwrap_or_default()), "{reason}: the value");
        let copied = letter.headers.iter().filter(|(name, _)| !name.starts_with("dlq-"));
        let copied: Vec<_> = copied.cloned().collect();
        assert_eq!(copied, draft.headers, "{reason}: the headers");
        assert_eq!(own_headers(letter).get("dlq-key").copied(), draft.key.as_deref(), "{reason}: the key");
    }
}

/// A letter about a compacted topic's record is a pointer. A copy would remain after the original
/// is erased (I13).
fn assert_letters_are_pointers(system: &System, group: &str, cases: &[Case], written: &[(i32, i64)]) {
    let letters = system.kafka.dead_letters(group);
    for ((draft, reason), coordinates) in cases.iter().zip(written) {
        let key = system.kafka.letter_key(group, *coordinates);
        let Some(letter) = letters.get(&key) else { continue };
        // The record that only a database rejects has no reason in the list.
        assert_letter_names(system, letter, group, *coordinates, reason.unwrap_or("SQLSTATE 22021"));
        assert_eq!(letter.value, Some(vec![]), "a pointer has an empty value");
        assert!(letter.headers.iter().all(|(name, _)| name.starts_with("dlq-")), "{:?}", letter.headers);
        assert!(!letter.text().contains(SECRET), "{}", letter.text());
        let expected_key = draft.key.as_deref().filter(|key| Uuid::try_parse_ascii(key).is_ok());
        assert_eq!(own_headers(letter).get("dlq-key").copied(), expected_key, "a pointer keeps only a UUID as key");
    }
}

fn assert_letter_names(system: &System, letter: &Record, group: &str, coordinates: (i32, i64), reason: &str) {
    let (partition, offset) = coordinates;
    let expected = [
        ("dlq-topic", system.kafka.prefixed(topic_of(group))),
        ("dlq-partition", partition.to_string()),
        ("dlq-offset", offset.to_string()),
        ("dlq-reason", reason.to_owned()),
        ("dlq-attempts", "1".to_owned()),
    ];
    for (name, value) in &expected {
        assert_eq!(letter.header(name), Some(&**value), "{name} of the letter with the reason {reason}");
    }
}

/// The headers that the writer of the letter added to those of the record.
fn own_headers(letter: &Record) -> BTreeMap<&str, &[u8]> {
    let own = letter.headers.iter().filter(|(name, _)| name.starts_with("dlq-"));
    own.filter_map(|(name, value)| Some((name.as_str(), value.as_deref()?))).collect()
}

/// No record is dropped silently: each record in the log was counted once, by its outcome (I11).
async fn assert_each_record_is_counted_once(system: &System, group: &str) {
    let delivered = system.kafka.read(topic_of(group)).len() as f64;
    let letters = system.kafka.dead_letters(group).len() as f64;
    let mut counts = vec![];
    for outcome in OUTCOMES {
        counts.push((outcome, system.processes.counted(group, outcome).await));
    }
    assert_eq!(system.processes.counted_in_all(group).await, delivered, "{group}: {counts:?}");
    assert_eq!(system.processes.counted(group, "dead_lettered").await, letters, "{group}: {counts:?}");
    assert_eq!(system.processes.counted(group, "skipped").await, 1.0, "{group}: {counts:?}");
    let what = format!("the metric of open dead letters of {group}");
    eventually_eq(&what, Some(letters), async || system.processes.dead_letters_open(group).await).await;
}
