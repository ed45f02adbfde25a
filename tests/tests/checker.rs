//! The checker on histories written by hand: a clean one has no violation, and each invariant has
//! at least one broken history that it notices.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;

use serde_json::json;
use testbed::smtp_sink::{Mail, Outcome as Answer};
use tests::checker::{
    Analytics, Asked, Delivery, Email, History, Inserted, Known, Operation, Outcome, Person, violations,
};
use tests::record::{Draft, Record};
use tests::services::{ANALYTICS_USERS, CACHE_PROFILES, EMAIL_EVENTS, EMAIL_WELCOME, USER_EVENTS, USER_STATE};
use uuid::Uuid;

/// 2026-11-22 12:00 UTC, the time of every event here.
const NOON: i64 = 1_795_348_800;
const ADA: Uuid = Uuid::from_u128(1);
const BOB: Uuid = Uuid::from_u128(2);

/// Appends a record to a log, with its time; its event's id.
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

/// Ada registers, changes and is read; Bob registers, gets a second copy of his mail after an
/// unknown answer, and is erased.
fn clean() -> History {
    let mut history = History { email: Some(Email::default()), ..History::default() };
    let mut inbox = BTreeMap::from([(USER_EVENTS, vec![]), (EMAIL_EVENTS, vec![])]);
    for (user, kinds) in
        [(ADA, ["user.registered", "user.profile_changed"]), (BOB, ["user.registered", "user.deleted"])]
    {
        for (version, kind) in (1..).zip(kinds) {
            let fact = append(&mut history.facts, Draft::user_event(kind, user, version));
            history.inserted.push(Inserted { event_id: fact, topic: USER_EVENTS });
            inbox.get_mut(USER_EVENTS).unwrap().push(fact);
            let email = (kind != "user.deleted").then_some("ada@example.com");
            let state = append(&mut history.states, Draft::user_state(user, version, email));
            history.inserted.push(Inserted { event_id: state, topic: USER_STATE });
            let asked = match kind {
                "user.registered" => Asked::Register { email: "ada@example.com".to_owned() },
                "user.deleted" => Asked::Erase,
                _ => Asked::Rename { display_name: "Version 2".to_owned() },
            };
            history.operations.push(Operation { user: Some(user), asked, outcome: Outcome::Done(version) });
            let read = Operation { user: Some(user), asked: Asked::Read, outcome: Outcome::Done(version) };
            history.operations.push(read);
        }
    }
    history.operations.last_mut().unwrap().outcome = Outcome::Refused(404);
    let known = BTreeMap::from([
        (ADA, Known { version: 2, person: Some(person(2)) }),
        (BOB, Known { version: 2, person: None }),
    ]);
    history.users = known.clone();
    history.cache = Some(known.clone());
    history.email.as_mut().unwrap().recipients = known;
    mail(&mut history, ADA, &["pending", "sending", "sent"], 1, &mut inbox);
    mail(&mut history, BOB, &["pending", "sending", "unknown", "sending", "sent"], 2, &mut inbox);
    let time = Some(NOON * 1_000_000);
    history.analytics = Some(Analytics {
        registrations: BTreeMap::from([(NOON, 2)]),
        funnel: BTreeMap::from([(ADA, (time, time)), (BOB, (time, time))]),
        inbox: inbox.into_iter().map(|(topic, ids)| (topic, ids.into_iter().collect())).collect(),
    });
    history.counted = BTreeMap::from([(ANALYTICS_USERS, 4)]);
    history
}

fn mail(
    history: &mut History,
    user: Uuid,
    states: &[&str],
    copies: usize,
    inbox: &mut BTreeMap<&'static str, Vec<Uuid>>,
) {
    let id = Uuid::from_u128(user.as_u128() + 16);
    let email = history.email.as_mut().unwrap();
    let fact = Draft::user_event("email.sent", user, 1);
    let fact = append(&mut email.facts, Draft { key: Some(id.to_string().into_bytes()), ..fact });
    email.inserted.push(Inserted { event_id: fact, topic: EMAIL_EVENTS });
    inbox.get_mut(EMAIL_EVENTS).unwrap().push(fact);
    email.deliveries.push(Delivery { id, user, states: states.iter().map(|state| (*state).to_owned()).collect() });
    email.mails.extend((0..copies).map(|_| accepted(id)));
}

fn accepted(id: Uuid) -> Mail {
    Mail {
        message_id: Some(format!("{id}@waybill.example")),
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

/// A letter of `analytics.users` about the fact at this place of the log.
fn letter(history: &History, place: usize) -> Record {
    let source = &history.facts[place];
    Record { key: Some(format!("t.user.events.v1-0-{place}").into_bytes()), ..source.clone() }
}

/// The clean history with one thing wrong is noticed, as a violation of this invariant.
#[track_caller]
fn noticed<R>(invariant: &str, spoil: impl FnOnce(&mut History) -> R) {
    let mut history = clean();
    spoil(&mut history);
    let found = violations(&history);
    assert!(found.iter().any(|violation| violation.invariant == invariant), "not noticed as {invariant}: {found:?}");
}

fn email(history: &mut History) -> &mut Email {
    history.email.as_mut().unwrap()
}

fn analytics(history: &mut History) -> &mut Analytics {
    history.analytics.as_mut().unwrap()
}

fn cache(history: &mut History) -> &mut BTreeMap<Uuid, Known> {
    history.cache.as_mut().unwrap()
}

#[test]
fn a_clean_history_has_no_violation() {
    assert_eq!(violations(&clean()), []);
    assert_eq!(violations(&History::default()), []);
}

#[test]
fn copies_at_new_offsets_and_a_state_published_anew_are_no_violations() {
    let mut history = clean();
    let copy = Record { offset: 9, ..history.facts[0].clone() };
    history.facts.push(copy);
    let anew = append(&mut history.states, Draft::user_state(BOB, 2, None));
    history.inserted.push(Inserted { event_id: anew, topic: USER_STATE });
    history.counted.insert(ANALYTICS_USERS, 5);
    assert_eq!(violations(&history), []);
}

#[test]
fn a_dead_letter_of_a_fact_without_effect_is_no_violation() {
    let mut history = clean();
    let fact = letter(&history, 1);
    analytics(&mut history).inbox.get_mut(USER_EVENTS).unwrap().remove(&history_id(&fact));
    history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![fact.clone()])]);
    history.open = BTreeMap::from([(ANALYTICS_USERS, vec![fact])]);
    assert_eq!(violations(&history), []);
}

#[test]
fn a_registration_that_is_set_aside_is_not_counted() {
    let mut history = clean();
    let fact = letter(&history, 0);
    history.open = BTreeMap::from([(ANALYTICS_USERS, vec![fact.clone()])]);
    let mailed = history.analytics.as_ref().unwrap().funnel[&ADA].1;
    analytics(&mut history).funnel.insert(ADA, (None, mailed));
    analytics(&mut history).registrations.insert(NOON, 1);
    analytics(&mut history).inbox.get_mut(USER_EVENTS).unwrap().remove(&history_id(&fact));
    assert_eq!(violations(&history), []);
}

fn history_id(record: &Record) -> Uuid {
    record.header("ce_id").unwrap().parse().unwrap()
}

#[test]
fn what_was_acknowledged_and_is_not_there() {
    noticed("I1", |history| history.users.remove(&ADA));
    noticed("I1", |history| history.users.get_mut(&ADA).unwrap().version = 1);
    noticed("I1", |history| history.users.get_mut(&BOB).unwrap().person = Some(person(2)));
    noticed("I1", |history| history.facts.remove(0));
    // The version went up, and the name stayed what it was.
    noticed("I1", |history| history.states[1].value = history.states[0].value.clone());
}

#[test]
fn what_was_refused_or_rolled_back_and_is_there() {
    noticed("I2", |history| {
        let asked = Asked::Register { email: "eve@example.com".to_owned() };
        history.operations.push(Operation { user: None, asked, outcome: Outcome::Refused(409) });
        let eve = Person { email: "eve@example.com".to_owned(), ..person(1) };
        history.users.insert(Uuid::from_u128(3), Known { version: 1, person: Some(eve) });
    });
    noticed("I2", |history| history.inserted.remove(0));
    noticed("I2", |history| history.operations.retain(|operation| !matches!(operation.asked, Asked::Rename { .. })));
}

#[test]
fn what_was_committed_and_is_not_in_the_log() {
    noticed("I3", |history| history.facts.pop());
    noticed("I3", |history| history.states.remove(1));
    noticed("I3", |history| email(history).facts.pop());
    // The log has another name than the table.
    noticed("I3", |history| history.users.get_mut(&ADA).unwrap().person = Some(person(1)));
}

#[test]
fn a_log_out_of_order() {
    noticed("I4", |history| history.facts.swap(0, 1));
    noticed("I4", |history| history.facts[1].partition = 1);
    // An old state behind the tombstone: compaction would bring Bob back.
    noticed("I4", |history| history.states.push(Record { offset: 9, ..history.states[2].clone() }));
    noticed("I4", |history| {
        let copy =
            Record { offset: 9, value: Some(json!({ "user_id": BOB }).to_string().into()), ..history.facts[0].clone() };
        history.facts.push(copy);
    });
}

#[test]
fn an_intent_too_many_or_too_few_or_forgotten() {
    noticed("I5", |history| email(history).deliveries.pop());
    noticed("I5", |history| {
        let twin = email(history).deliveries[0].clone();
        email(history).deliveries.push(twin);
    });
    noticed("I5", |history| email(history).deliveries[0].user = Uuid::from_u128(3));
    noticed("I5", |history| email(history).deliveries[0].states.pop());
    noticed("I5", |history| email(history).deliveries[0].states = vec!["pending".to_owned(), "cancelled".to_owned()]);
}

#[test]
fn a_mail_that_is_missing_or_came_twice_without_a_reason() {
    noticed("I6", |history| email(history).mails.remove(0));
    noticed("I6", |history| {
        let twin = email(history).mails[0].clone();
        email(history).mails.push(twin);
    });
    noticed("I6", |history| email(history).mails[0].message_id = None);
    noticed("I6", |history| email(history).mails[0].to = vec!["bob@example.com".to_owned()]);
    noticed("I6", |history| email(history).mails.push(accepted(Uuid::from_u128(3))));
    noticed("I6", |history| email(history).deliveries[0].states = vec!["failed".to_owned()]);
}

#[test]
fn a_read_model_that_is_not_the_fold_of_the_log() {
    noticed("I7", |history| analytics(history).registrations.insert(NOON, 3));
    noticed("I7", |history| analytics(history).funnel.insert(ADA, (Some(NOON * 1_000_000), None)));
    noticed("I7", |history| analytics(history).funnel.insert(Uuid::from_u128(3), (Some(0), None)));
    noticed("I7", |history| {
        analytics(history).inbox.get_mut(USER_EVENTS).unwrap().insert(Uuid::from_u128(3));
    });
}

#[test]
fn a_view_that_is_behind_or_went_backwards() {
    noticed("I8", |history| cache(history).insert(ADA, Known { version: 1, person: Some(person(1)) }));
    noticed("I8", |history| cache(history).remove(&BOB));
    noticed("I8", |history| cache(history).insert(Uuid::from_u128(3), Known { version: 1, person: Some(person(1)) }));
    for outcome in [Outcome::Done(1), Outcome::Refused(404)] {
        noticed("I8", |history| {
            history.operations.push(Operation { user: Some(ADA), asked: Asked::Read, outcome });
        });
    }
}

#[test]
fn an_offset_that_passed_an_effect() {
    noticed("I9", |history| {
        let id = history_id(&history.facts[1]);
        analytics(history).inbox.get_mut(USER_EVENTS).unwrap().remove(&id);
    });
    // Another group's letter is no excuse, and neither is one that was settled.
    noticed("I9", |history| {
        let fact = letter(history, 1);
        analytics(history).inbox.get_mut(USER_EVENTS).unwrap().remove(&history_id(&fact));
        history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![fact.clone()])]);
        history.open = BTreeMap::from([(EMAIL_WELCOME, vec![fact])]);
    });
}

#[test]
fn a_recipient_who_is_not_the_newest_state() {
    noticed("I10", |history| {
        email(history).recipients.insert(BOB, Known { version: 1, person: Some(person(1)) });
    });
}

#[test]
fn a_record_that_nobody_counted() {
    noticed("I11", |history| history.counted.insert(ANALYTICS_USERS, 3));
}

#[test]
fn a_run_that_does_not_drain_or_a_process_that_ended() {
    noticed("I12", |history| history.work_left.push("email.welcome 0: 3 of 4".to_owned()));
    noticed("I12", |history| history.ended.push("email: exit status 1".to_owned()));
}

#[test]
fn a_dead_letter_that_points_nowhere_or_says_too_much() {
    let with = |spoil: fn(&mut Record)| {
        move |history: &mut History| {
            let mut wrong = letter(history, 1);
            spoil(&mut wrong);
            history.letters = BTreeMap::from([(ANALYTICS_USERS, vec![wrong])]);
        }
    };
    noticed("I13", with(|letter| letter.key = Some(b"t.user.events.v1-0-99".to_vec())));
    noticed("I13", with(|letter| letter.key = Some(b"t.no.such.topic-0-1".to_vec())));
    noticed("I13", with(|letter| letter.value = Some(b"other bytes".to_vec())));
    noticed(
        "I13",
        with(|letter| letter.headers.push(("dlq-reason".to_owned(), Some(b"not ada@example.com".to_vec())))),
    );
    noticed("I13", |history| {
        let key = Some(b"t.user.state.v1-0-1".to_vec());
        let profile = Record { key, ..history.states[1].clone() };
        history.letters = BTreeMap::from([(CACHE_PROFILES, vec![profile])]);
    });
}

#[test]
fn personal_data_out_of_place() {
    noticed("I14", |history| history.leaks.push("log of email".to_owned()));
}
