//! The checker is tested with histories written by hand. It finds no violation in a correct
//! history, and for each invariant it reports at least one history that violates it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;

use serde_json::json;
use testbed::smtp_sink::{Mail, Outcome as Answer};
use tests::checker::{
    Analytics, Audited, Delivery, Discard, Email, Fact, History, Inserted, Operation, Outcome, Person, Recipient,
    Request, Steps, StoredUser, violations,
};
use tests::record::{Draft, Record};
use tests::services::{ANALYTICS_USERS, CACHE_PROFILES, EMAIL_EVENTS, EMAIL_WELCOME, USER_EVENTS, USER_STATE};
use uuid::Uuid;

/// The time of every event: 2026-11-22 12:00 UTC, in seconds since 1970.
const NOON: i64 = 1_795_348_800;
const ADA: Uuid = Uuid::from_u128(1);
const BOB: Uuid = Uuid::from_u128(2);

/// Appends a record to a log and returns the id of its event.
fn append(log: &mut Vec<Record>, draft: Draft) -> Uuid {
    let draft = draft.replace_header("ce_time", b"2026-11-22T12:00:00Z");
    let offset = i64::try_from(log.len()).unwrap();
    let record = Record { partition: 0, offset, key: draft.key, value: draft.value, headers: draft.headers };
    let id = record.header("ce_id").unwrap().parse().unwrap();
    log.push(record);
    id
}

fn person(version: i64) -> Person {
    Person { email: "ada@example.com".to_owned(), display_name: format!("Version {version}") }
}

/// Ada registers, changes her name and is read. Bob registers, gets a second copy of his mail
/// because the first answer was lost, and is erased.
fn correct_history() -> History {
    let mut history = History { email: Some(Email::default()), ..History::default() };
    let mut inbox = BTreeMap::from([(USER_EVENTS, vec![]), (EMAIL_EVENTS, vec![])]);
    let commands = [(ADA, ["user.registered", "user.profile_changed"]), (BOB, ["user.registered", "user.deleted"])];
    for (user, kinds) in commands {
        for (version, kind) in (1..).zip(kinds) {
            let fact = append(&mut history.facts, Draft::user_event(kind, user, version));
            history.inserted.push(Inserted { event_id: fact, topic: USER_EVENTS });
            inbox.get_mut(USER_EVENTS).unwrap().push(fact);
            let email = (kind != "user.deleted").then_some("ada@example.com");
            let state = append(&mut history.states, Draft::user_state(user, version, email));
            history.inserted.push(Inserted { event_id: state, topic: USER_STATE });
            let request = match kind {
                "user.registered" => Request::Register { email: "ada@example.com".to_owned() },
                "user.deleted" => Request::Erase,
                _ => Request::Rename { display_name: "Version 2".to_owned() },
            };
            history.operations.push(Operation { user: Some(user), request, outcome: Outcome::Done(version) });
            let read = Operation { user: Some(user), request: Request::Read, outcome: Outcome::Done(version) };
            history.operations.push(read);
        }
    }
    history.operations.last_mut().unwrap().outcome = Outcome::Refused(404);
    let stored = BTreeMap::from([
        (ADA, StoredUser { version: 2, person: Some(person(2)) }),
        (BOB, StoredUser { version: 2, person: None }),
    ]);
    history.users = stored.clone();
    history.cache = Some(stored.clone());
    history.email.as_mut().unwrap().recipients =
        stored.iter().map(|(user, state)| (*user, Recipient::from(state))).collect();
    deliver(&mut history, ADA, &["pending", "sending", "sent"], 1, &mut inbox);
    // The answer to Bob's first mail was lost, the second one was refused, and an operator released
    // it.
    let states = ["pending", "sending", "unknown", "sending", "failed", "pending", "sending", "sent"];
    deliver(&mut history, BOB, &states, 2, &mut inbox);
    let noon = Some(NOON * 1_000_000);
    let steps = Steps { registered: noon, mailed: noon };
    history.analytics = Some(Analytics {
        registrations: BTreeMap::from([(NOON, 2)]),
        funnel: BTreeMap::from([(ADA, steps), (BOB, steps)]),
        totals: (2, 2),
        inbox: inbox.into_iter().map(|(topic, ids)| (topic, ids.into_iter().collect())).collect(),
        audit: Fact::distinct(&history.facts).iter().map(Audited::from).collect(),
    });
    history.counted = BTreeMap::from([(ANALYTICS_USERS, 4)]);
    history
}

/// Adds a user's delivery with these states, its events, and this many copies of its mail.
fn deliver(
    history: &mut History,
    user: Uuid,
    states: &[&str],
    copies: usize,
    inbox: &mut BTreeMap<&'static str, Vec<Uuid>>,
) {
    let id = Uuid::from_u128(user.as_u128() + 16);
    let email = history.email.as_mut().unwrap();
    let endings = states.iter().filter(|status| ["sent", "failed"].contains(*status));
    for (ending, version) in endings.zip(1..) {
        let fact = Draft::user_event(&format!("email.{ending}"), user, version);
        let fact = append(&mut email.facts, Draft { key: Some(id.to_string().into_bytes()), ..fact });
        email.inserted.push(Inserted { event_id: fact, topic: EMAIL_EVENTS });
        inbox.get_mut(EMAIL_EVENTS).unwrap().push(fact);
    }
    email.deliveries.push(Delivery { id, user, states: states.iter().map(|state| (*state).to_owned()).collect() });
    email.mails.extend((0..copies).map(|_| accepted_mail(id)));
}

/// A mail of this delivery, accepted and answered by the mail server.
fn accepted_mail(delivery: Uuid) -> Mail {
    Mail {
        message_id: Some(format!("{delivery}@waybill.example")),
        from: String::new(),
        to: vec!["ada@example.com".to_owned()],
        subject: None,
        text: None,
        html: None,
        raw: String::new(),
        received_at_ms: 0,
        outcome: Answer::Answered,
    }
}

/// A dead letter of `analytics.users` about the fact at this offset.
fn letter(history: &History, offset: usize) -> Record {
    let fact = history.facts[offset].clone();
    Record { key: Some(format!("t.user.events.v1-0-{offset}").into_bytes()), ..fact }
}

fn event_id(record: &Record) -> Uuid {
    record.header("ce_id").unwrap().parse().unwrap()
}

/// Removes an event from the inbox of `analytics.users`, as if it had no effect there.
fn remove_effect(history: &mut History, fact: &Record) {
    analytics(history).inbox.get_mut(USER_EVENTS).unwrap().remove(&event_id(fact));
}

/// Checks that the checker reports a violation of this invariant after `change` of the correct
/// history.
#[track_caller]
fn assert_reported<R>(invariant: &str, change: impl FnOnce(&mut History) -> R) {
    let mut history = correct_history();
    change(&mut history);
    let found = violations(&history);
    let reported = found.iter().any(|violation| violation.invariant == invariant);
    assert!(reported, "no violation of {invariant} is reported: {found:?}");
}

fn email(history: &mut History) -> &mut Email {
    history.email.as_mut().unwrap()
}

fn analytics(history: &mut History) -> &mut Analytics {
    history.analytics.as_mut().unwrap()
}

fn cache(history: &mut History) -> &mut BTreeMap<Uuid, StoredUser> {
    history.cache.as_mut().unwrap()
}

#[test]
fn a_correct_history_has_no_violation() {
    assert_eq!(violations(&correct_history()), []);
    assert_eq!(violations(&History::default()), []);
}

#[test]
fn copies_of_events_and_republished_states_are_no_violations() {
    let mut history = correct_history();
    let copy = Record { offset: 9, ..history.facts[0].clone() };
    history.facts.push(copy);
    let republished = append(&mut history.states, Draft::user_state(BOB, 2, None));
    history.inserted.push(Inserted { event_id: republished, topic: USER_STATE });
    history.counted.insert(ANALYTICS_USERS, 5);
    assert_eq!(violations(&history), []);
}

#[test]
fn a_dead_lettered_fact_without_effect_is_no_violation() {
    let mut history = correct_history();
    let fact = letter(&history, 1);
    remove_effect(&mut history, &fact);
    history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![fact.clone()])]);
    history.open = BTreeMap::from([(ANALYTICS_USERS, vec![fact])]);
    assert_eq!(violations(&history), []);
}

/// A discard of the letter of the fact at this offset by `analytics.users`.
fn discard(offset: usize) -> Discard {
    let letter = format!("t.user.events.v1-0-{offset}");
    Discard { group: ANALYTICS_USERS.to_owned(), letter, is_done: true }
}

#[test]
fn a_discarded_fact_without_effect_is_no_violation() {
    let mut history = correct_history();
    let fact = letter(&history, 1);
    remove_effect(&mut history, &fact);
    history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![fact])]);
    history.discards.push(discard(1));
    assert_eq!(violations(&history), []);
    // The process died between the two records of the action.
    history.discards[0].is_done = false;
    assert_eq!(violations(&history), []);
    // Another copy of the fact took effect.
    let copy = Record { offset: 9, ..history.facts[1].clone() };
    analytics(&mut history).inbox.get_mut(USER_EVENTS).unwrap().insert(event_id(&copy));
    history.facts.push(copy);
    history.counted.insert(ANALYTICS_USERS, 5);
    assert_eq!(violations(&history), []);
}

#[test]
fn the_records_of_a_discard_are_one_discard() {
    let record = |value: serde_json::Value| Record {
        partition: 0,
        offset: 0,
        key: None,
        value: Some(value.to_string().into_bytes()),
        headers: vec![],
    };
    let target = discard(1).letter;
    let first = json!({ "action_id": "1", "action": "discard", "target": target, "group": ANALYTICS_USERS });
    let mut second = first.clone();
    second["outcome"] = json!("done");
    let other = json!({ "action_id": "2", "action": "show", "target": target, "group": ANALYTICS_USERS });
    let actions = [first, other].map(record);
    assert_eq!(Discard::all(&actions), [Discard { is_done: false, ..discard(1) }]);
    let [first, other] = actions;
    assert_eq!(Discard::all(&[first, other, record(second)]), [discard(1)]);
    assert_eq!(discard(1).place(), Some((0, 1)));
}

#[test]
fn a_dead_lettered_registration_that_is_not_counted_is_no_violation() {
    let mut history = correct_history();
    let fact = letter(&history, 0);
    history.open = BTreeMap::from([(ANALYTICS_USERS, vec![fact.clone()])]);
    remove_effect(&mut history, &fact);
    analytics(&mut history).funnel.get_mut(&ADA).unwrap().registered = None;
    analytics(&mut history).registrations.insert(NOON, 1);
    analytics(&mut history).totals = (1, 1);
    assert_eq!(violations(&history), []);
}

#[test]
fn a_lost_acknowledged_change_is_reported() {
    assert_reported("I1", |history| history.users.remove(&ADA));
    assert_reported("I1", |history| history.users.get_mut(&ADA).unwrap().version = 1);
    assert_reported("I1", |history| history.users.get_mut(&BOB).unwrap().person = Some(person(2)));
    assert_reported("I1", |history| history.facts.remove(0));
    // The version increased and the name did not change.
    assert_reported("I1", |history| history.states[1].value = history.states[0].value.clone());
}

#[test]
fn a_refused_or_uncommitted_change_that_took_effect_is_reported() {
    assert_reported("I2", |history| {
        let request = Request::Register { email: "eve@example.com".to_owned() };
        history.operations.push(Operation { user: None, request, outcome: Outcome::Refused(409) });
        let eve = Person { email: "eve@example.com".to_owned(), ..person(1) };
        history.users.insert(Uuid::from_u128(3), StoredUser { version: 1, person: Some(eve) });
    });
    assert_reported("I2", |history| history.inserted.remove(0));
    assert_reported("I2", |history| {
        history.operations.retain(|operation| !matches!(operation.request, Request::Rename { .. }));
    });
}

#[test]
fn a_committed_event_that_is_not_in_its_topic_is_reported() {
    assert_reported("I3", |history| history.facts.pop());
    assert_reported("I3", |history| history.states.remove(1));
    assert_reported("I3", |history| email(history).facts.pop());
    // The newest state has another name than the table.
    assert_reported("I3", |history| history.users.get_mut(&ADA).unwrap().person = Some(person(1)));
}

#[test]
fn a_topic_out_of_order_is_reported() {
    assert_reported("I4", |history| history.facts.swap(0, 1));
    assert_reported("I4", |history| history.facts[1].partition = 1);
    // An old state after the tombstone: compaction would keep it, and Bob would exist again.
    assert_reported("I4", |history| history.states.push(Record { offset: 9, ..history.states[2].clone() }));
    // A copy with another value.
    assert_reported("I4", |history| {
        let value = json!({ "user_id": BOB }).to_string().into();
        let copy = Record { offset: 9, value: Some(value), ..history.facts[0].clone() };
        history.facts.push(copy);
    });
}

#[test]
fn a_missing_extra_or_unfinished_delivery_is_reported() {
    assert_reported("I5", |history| email(history).deliveries.pop());
    assert_reported("I5", |history| {
        let second = email(history).deliveries[0].clone();
        email(history).deliveries.push(second);
    });
    assert_reported("I5", |history| email(history).deliveries[0].user = Uuid::from_u128(3));
    assert_reported("I5", |history| email(history).deliveries[0].states.pop());
    assert_reported("I5", |history| {
        email(history).deliveries[0].states = vec!["pending".to_owned(), "cancelled".to_owned()];
    });
}

#[test]
fn a_missing_mail_or_a_copy_without_a_reason_is_reported() {
    assert_reported("I6", |history| email(history).mails.remove(0));
    assert_reported("I6", |history| {
        let copy = email(history).mails[0].clone();
        email(history).mails.push(copy);
    });
    assert_reported("I6", |history| email(history).mails[0].message_id = None);
    assert_reported("I6", |history| email(history).mails[0].to = vec!["bob@example.com".to_owned()]);
    assert_reported("I6", |history| email(history).mails.push(accepted_mail(Uuid::from_u128(3))));
    assert_reported("I6", |history| email(history).deliveries[0].states = vec!["failed".to_owned()]);
    // A second ending with the version of the first.
    assert_reported("I6", |history| {
        let Record { partition, offset, .. } = email(history).facts[2];
        let draft = email(history).facts[2].to_draft().replace_header("ce_sequence", b"1");
        email(history).facts[2] =
            Record { partition, offset, key: draft.key, value: draft.value, headers: draft.headers };
    });
    assert_reported("I6", |history| {
        let states = &mut email(history).deliveries[1].states;
        states.retain(|status| status != "failed");
    });
}

#[test]
fn a_read_model_that_differs_from_its_topics_is_reported() {
    assert_reported("I7", |history| analytics(history).registrations.insert(NOON, 3));
    assert_reported("I7", |history| analytics(history).totals = (2, 1));
    assert_reported("I7", |history| analytics(history).funnel.get_mut(&ADA).unwrap().mailed = None);
    assert_reported("I7", |history| analytics(history).funnel.insert(Uuid::from_u128(3), Steps::default()));
    assert_reported("I7", |history| {
        analytics(history).inbox.get_mut(USER_EVENTS).unwrap().insert(Uuid::from_u128(3));
    });
    assert_reported("I7", |history| {
        let copy = analytics(history).audit[0].clone();
        analytics(history).audit.push(copy);
    });
    assert_reported("I7", |history| analytics(history).audit[0].kind = "user.deleted".to_owned());
    assert_reported("I7", |history| analytics(history).audit[0].event = Uuid::from_u128(3));
    assert_reported("I9", |history| analytics(history).audit.pop());
}

#[test]
fn a_stale_cache_or_a_reader_that_sees_an_older_version_is_reported() {
    let old = || StoredUser { version: 1, person: Some(person(1)) };
    assert_reported("I8", |history| cache(history).insert(ADA, old()));
    assert_reported("I8", |history| cache(history).remove(&BOB));
    assert_reported("I8", |history| cache(history).insert(Uuid::from_u128(3), old()));
    for outcome in [Outcome::Done(1), Outcome::Refused(404)] {
        assert_reported("I8", |history| {
            history.operations.push(Operation { user: Some(ADA), request: Request::Read, outcome });
        });
    }
}

#[test]
fn an_offset_past_a_missing_effect_is_reported() {
    assert_reported("I9", |history| {
        let fact = history.facts[1].clone();
        remove_effect(history, &fact);
    });
    // Only an open letter of the same group excuses a missing effect. Here the letter of the group
    // was settled, and the open one is another group's.
    assert_reported("I9", |history| {
        let fact = letter(history, 1);
        remove_effect(history, &fact);
        history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![fact.clone()])]);
        history.open = BTreeMap::from([(EMAIL_WELCOME, vec![fact])]);
    });
}

#[test]
fn a_recipient_that_is_not_the_newest_state_is_reported() {
    assert_reported("I10", |history| {
        email(history).recipients.insert(BOB, Recipient { version: 1, email: Some(person(1).email) });
    });
}

#[test]
fn an_uncounted_record_is_reported() {
    assert_reported("I11", |history| history.counted.insert(ANALYTICS_USERS, 3));
}

#[test]
fn a_wrong_discard_is_reported() {
    // It was no dead letter.
    assert_reported("I11", |history| history.discards.push(discard(1)));
    // The action says that it was done, and the letter is open.
    assert_reported("I11", |history| {
        let fact = letter(history, 1);
        remove_effect(history, &fact);
        history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![fact.clone()])]);
        history.open = history.letters.clone();
        history.discards.push(discard(1));
    });
    // Another group's discard does not excuse a missing effect.
    assert_reported("I9", |history| {
        let fact = letter(history, 1);
        remove_effect(history, &fact);
        history.letters = BTreeMap::from([(EMAIL_WELCOME, vec![fact])]);
        history.discards.push(Discard { group: EMAIL_WELCOME.to_owned(), ..discard(1) });
    });
}

#[test]
fn a_letter_that_compaction_would_delete_is_reported() {
    assert_reported("I11", |history| {
        let wrong = Record { value: None, ..letter(history, 1) };
        history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![wrong])]);
    });
}

#[test]
fn a_run_that_does_not_drain_or_a_process_that_exits_is_reported() {
    assert_reported("I12", |history| history.work_left.push("email.welcome 0: 3 of 4".to_owned()));
    assert_reported("I12", |history| history.ended.push("email: exit status 1".to_owned()));
}

#[test]
fn a_dead_letter_without_its_record_or_with_too_much_data_is_reported() {
    let with_letter = |change: fn(&mut Record)| {
        move |history: &mut History| {
            let mut wrong = letter(history, 1);
            change(&mut wrong);
            history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![wrong])]);
        }
    };
    assert_reported("I13", with_letter(|letter| letter.key = Some(b"t.user.events.v1-0-99".to_vec())));
    assert_reported("I13", with_letter(|letter| letter.key = Some(b"t.no.such.topic-0-1".to_vec())));
    assert_reported("I13", with_letter(|letter| letter.value = Some(b"other bytes".to_vec())));
    assert_reported(
        "I13",
        with_letter(|letter| {
            letter.headers.push(("dlq-reason".to_owned(), Some(b"not ada@example.com".to_vec())));
        }),
    );
    // A dead letter about a state that has the state's data.
    assert_reported("I13", |history| {
        let key = Some(b"t.user.state.v1-0-1".to_vec());
        let profile = Record { key, ..history.states[1].clone() };
        history.letters = BTreeMap::from([(CACHE_PROFILES, vec![profile])]);
    });
}

#[test]
fn personal_data_in_a_wrong_place_is_reported() {
    assert_reported("I14", |history| history.leaks.push("log of email".to_owned()));
}
