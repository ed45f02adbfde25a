//! T42: releases of different age read each other's events. A release only adds fields. A reader
//! ignores fields that it does not know, rejects an event without a field that it needs, and never
//! mistakes one event type for another. No bytes make it panic.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use shared::events::{
    ActionOutcome, ActionStep, DecodeError, Delivery, EmailEvent, Envelope, Event, OperatorAction, Profile,
    Undelivered, UserEvent, UserRef, UserState,
};
use uuid::{Uuid, uuid};

const USER: Uuid = uuid!("01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a01");
const DELIVERY: Uuid = uuid!("01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a02");

/// Data and headers as the first release wrote them, byte for byte. Topics are kept permanently, so
/// these samples are never edited; new ones are added.
const USER_REF: &str = r#"{"user_id":"01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a01"}"#;
const PROFILE: &str = r#"{"email":"ada@example.com","display_name":"Ada Lovelace"}"#;
const OWNED_PROFILE: &str =
    r#"{"email":"ada@example.com","display_name":"Ada Lovelace","owner":"01a0a3f0-8d7e-8c60-b9f2-2f6d6f0f1a06"}"#;
const SENT: &str = r#"{"delivery_id":"01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a02","user_id":"01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a01","template":"welcome"}"#;
const FAILED: &str = r#"{"delivery_id":"01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a02","user_id":"01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a01","template":"welcome","smtp_code":550}"#;
const HEADERS: [(&str, &str); 10] = [
    ("ce_specversion", "1.0"),
    ("ce_id", "01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a03"),
    ("ce_type", "user.registered"),
    ("ce_source", "/user"),
    ("ce_subject", "01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a01"),
    ("ce_time", "2026-11-22T12:00:00.123456789Z"),
    ("ce_dataschema", "urn:waybill:user.registered:1"),
    ("ce_sequence", "1"),
    ("content-type", "application/json"),
    ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
];

/// Fields that were added after the first release.
const OPTIONAL: [&str; 1] = ["owner"];

/// Headers that were added after the first release.
const CAUSE: [(&str, &str); 3] = [
    ("ce_causationid", "01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a04"),
    ("ce_correlationid", "01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a05"),
    ("ce_actor", "01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a06"),
];

fn user() -> UserRef {
    UserRef { user_id: USER }
}

fn delivery() -> Delivery {
    Delivery { delivery_id: DELIVERY, user_id: USER, template: "welcome".to_owned() }
}

/// An event type, its data, and the event that they mean.
type Sample<E> = (&'static str, &'static str, E);

fn user_events() -> Vec<Sample<UserEvent>> {
    vec![
        ("user.registered", USER_REF, UserEvent::Registered(user())),
        ("user.profile_changed", USER_REF, UserEvent::ProfileChanged(user())),
        ("user.email_changed", USER_REF, UserEvent::EmailChanged(user())),
        ("user.deleted", USER_REF, UserEvent::Deleted(user())),
    ]
}

fn user_states() -> Vec<Sample<UserState>> {
    let profile = |owner| {
        let display_name = "Ada Lovelace".to_owned();
        UserState::Current(Profile { email: "ada@example.com".to_owned(), display_name, owner })
    };
    let owner = uuid!("01a0a3f0-8d7e-8c60-b9f2-2f6d6f0f1a06");
    vec![("user.state", PROFILE, profile(None)), ("user.state", OWNED_PROFILE, profile(Some(owner)))]
}

fn email_events() -> Vec<Sample<EmailEvent>> {
    let failed = Undelivered { delivery: delivery(), smtp_code: 550 };
    vec![("email.sent", SENT, EmailEvent::Sent(delivery())), ("email.failed", FAILED, EmailEvent::Failed(failed))]
}

/// Checks that this release reads the old samples, and that it writes the same bytes, which older
/// readers need.
fn assert_read_and_written_unchanged<E: Event + PartialEq>(samples: Vec<Sample<E>>) {
    for (kind, data, event) in samples {
        let (written_kind, written) = event.encode();
        assert_eq!(written_kind, kind, "the written type of {kind}");
        assert_eq!(written.as_deref(), Some(data.as_bytes()), "the written data of {kind}");
        assert!(E::decode(kind, Some(data.as_bytes())) == Ok(Some(event)), "{kind} is read as another event");
    }
}

/// T42.
#[test]
fn events_of_the_first_release_are_read_and_written_unchanged() {
    assert_read_and_written_unchanged(user_events());
    assert_read_and_written_unchanged(user_states());
    assert_read_and_written_unchanged(email_events());
    assert!(UserState::decode("user.state", None) == Ok(Some(UserState::Erased)));
    assert!(UserState::Erased.encode() == ("user.state", None));
}

/// Checks that this release ignores fields of any type and name that a later release adds.
fn assert_added_fields_are_ignored<E: Event + PartialEq>(samples: Vec<Sample<E>>) {
    for (kind, data, event) in samples {
        let added =
            json!({ "locale": "en", "tags": ["a", null], "address": { "user_id": 7 }, "smtp_code_v2": 1.5e300 });
        let mut newer: Value = serde_json::from_str(data).unwrap();
        newer.as_object_mut().unwrap().extend(added.as_object().unwrap().clone());
        let read = E::decode(kind, Some(newer.to_string().as_bytes()));
        assert!(read == Ok(Some(event)), "{kind} with more fields is not read as the same event");
    }
}

/// T42.
#[test]
fn fields_added_by_a_later_release_are_ignored() {
    assert_added_fields_are_ignored(user_events());
    assert_added_fields_are_ignored(user_states());
    assert_added_fields_are_ignored(email_events());
}

/// T42: a type that a later release adds is skipped and not guessed from its data. A type of
/// another topic is unknown too.
#[test]
fn an_unknown_event_type_is_skipped_whatever_its_data() {
    for kind in ["user.promoted", "user.registered.v2", "User.Registered", "user.registered ", "email.opened", ""] {
        for data in [Some(USER_REF), Some(PROFILE), Some(SENT), Some("not JSON"), None] {
            let data = data.map(str::as_bytes);
            assert!(UserEvent::decode(kind, data) == Ok(None), "{kind:?}");
            assert!(UserState::decode(kind, data) == Ok(None), "{kind:?}");
            assert!(EmailEvent::decode(kind, data) == Ok(None), "{kind:?}");
        }
    }
    assert!(UserEvent::decode("user.state", Some(PROFILE.as_bytes())) == Ok(None));
    assert!(UserState::decode("user.deleted", Some(USER_REF.as_bytes())) == Ok(None));
}

/// Checks that an event is rejected if a field is missing, null or of another type. The reason is
/// written to a header of the dead letter, so it must not contain a value.
fn assert_every_field_is_required<E: Event + PartialEq>(samples: Vec<Sample<E>>) {
    for (kind, data, _) in samples {
        let sample: Value = serde_json::from_str(data).unwrap();
        for field in sample.as_object().unwrap().keys() {
            let is_optional = OPTIONAL.contains(&field.as_str());
            let mut without = sample.clone();
            without.as_object_mut().unwrap().remove(field);
            if is_optional {
                assert!(
                    matches!(E::decode(kind, Some(without.to_string().as_bytes())), Ok(Some(_))),
                    "{kind}: {without}"
                );
                without[field] = json!("ada");
            }
            let nothing = if is_optional { json!("") } else { json!(null) };
            let others = [nothing, json!([]), json!({}), json!(true), json!(-7.5)];
            let changed = others.map(|other| {
                let mut changed = sample.clone();
                changed[field] = other;
                changed
            });
            for bad in changed.iter().chain([&without]) {
                let Err(error) = E::decode(kind, Some(bad.to_string().as_bytes())) else {
                    panic!("{kind} is read without a valid {field}: {bad}");
                };
                assert_eq!(error.field, "data", "{kind}: {bad}");
                assert!(!error.to_string().contains("ada"), "the error quotes a value: {error}");
            }
        }
        assert!(kind == "user.state" || E::decode(kind, None).is_err(), "the fact {kind} is read without data");
    }
}

/// T42.
#[test]
fn an_event_without_a_valid_required_field_is_rejected() {
    assert_every_field_is_required(user_events());
    assert_every_field_is_required(user_states());
    assert_every_field_is_required(email_events());
}

fn parse(headers: &[(String, Option<Vec<u8>>)]) -> Result<Envelope, DecodeError> {
    let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    Envelope::parse(Some(USER.to_string().as_bytes()), &headers)
}

fn headers() -> Vec<(String, Option<Vec<u8>>)> {
    HEADERS.map(|(name, value)| (name.to_owned(), Some(value.as_bytes().to_vec()))).into()
}

/// T42: a later release, or another CloudEvents library, may add headers to the envelope.
#[test]
fn an_envelope_of_the_first_release_is_read_and_added_headers_are_ignored() {
    let first = parse(&headers()).unwrap();
    assert_eq!((first.key, first.version, first.kind.as_str()), (USER, 1, "user.registered"));
    assert_eq!(first.headers(), HEADERS.map(|(name, value)| (name, value.to_owned())), "the written headers");
    let mut newer = headers();
    newer.push(("ce_partitionkey".to_owned(), Some(b"7".to_vec())));
    newer.push(("ce_partitionkey".to_owned(), None));
    newer.push(("".to_owned(), Some(vec![0xff])));
    for (name, value) in &mut newer {
        if name == "content-type" {
            *value = Some(b"application/json; charset=utf-8".to_vec());
        }
    }
    assert_eq!(parse(&newer), Ok(first));
}

/// T42: the ids of the cause are written as they were read. Older readers ignore them.
#[test]
fn an_envelope_with_a_cause_is_read_and_written_unchanged() {
    let mut headers = headers();
    let trace = headers.pop().unwrap();
    headers.extend(CAUSE.map(|(name, value)| (name.to_owned(), Some(value.as_bytes().to_vec()))));
    headers.push(trace);
    let envelope = parse(&headers).unwrap();
    let ids = [envelope.cause.causation, envelope.cause.correlation, envelope.cause.actor];
    assert_eq!(ids.map(|id| id.unwrap().to_string()), CAUSE.map(|(_, value)| value.to_owned()));
    let written = envelope.headers().into_iter();
    let written: Vec<_> = written.map(|(name, value)| (name.to_owned(), Some(value.into_bytes()))).collect();
    assert_eq!(written, headers);
}

/// One damage to bytes.
#[derive(Clone, Debug)]
enum Damage {
    Set(Index, u8),
    Insert(Index, u8),
    Remove(Index),
    Cut(Index),
    Repeat(Index),
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let one = prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Insert(at, byte)),
        any::<Index>().prop_map(Damage::Remove),
        any::<Index>().prop_map(Damage::Cut),
        any::<Index>().prop_map(Damage::Repeat),
    ];
    prop::collection::vec(one, 1..4)
}

fn apply(damages: &[Damage], bytes: &mut Vec<u8>) {
    for damage in damages {
        if bytes.is_empty() {
            return;
        }
        match damage {
            Damage::Set(at, byte) => *at.get_mut(bytes) = *byte,
            Damage::Insert(at, byte) => bytes.insert(at.index(bytes.len()), *byte),
            Damage::Remove(at) => drop(bytes.remove(at.index(bytes.len()))),
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Damage::Repeat(at) => bytes.extend_from_within(at.index(bytes.len())..),
        }
    }
}

/// Checks that an event that is read from damaged data can be written and read again as the same
/// event. So no event is read in part.
fn check_damaged<E: Event + PartialEq>(samples: Vec<Sample<E>>, damages: &[Damage]) -> Result<(), TestCaseError> {
    for (kind, data, _) in samples {
        let mut bytes = data.as_bytes().to_vec();
        apply(damages, &mut bytes);
        if let Ok(read) = E::decode(kind, Some(&bytes)) {
            let Some(event) = read else {
                return Err(TestCaseError::fail(format!("{kind} is skipped as an unknown type")));
            };
            let (written_kind, written) = event.encode();
            prop_assert_eq!(written_kind, kind);
            let read_again = E::decode(kind, written.as_deref());
            prop_assert!(read_again == Ok(Some(event)), "{} is read again as another event", kind);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    /// T42.
    #[test]
    fn damaged_data_is_rejected_or_read_completely(damages in damage()) {
        check_damaged(user_events(), &damages)?;
        check_damaged(user_states(), &damages)?;
        check_damaged(email_events(), &damages)?;
    }

    /// T42.
    #[test]
    fn damaged_headers_are_rejected_or_read_completely(
        which in any::<Index>(),
        in_name in any::<bool>(),
        damages in damage(),
    ) {
        let mut headers = headers();
        let (name, value) = which.get_mut(&mut headers);
        if in_name {
            let mut bytes = name.clone().into_bytes();
            apply(&damages, &mut bytes);
            *name = String::from_utf8_lossy(&bytes).into_owned();
        } else {
            apply(&damages, value.as_mut().unwrap());
        }
        if let Ok(envelope) = parse(&headers) {
            let written = envelope.headers().into_iter();
            let written: Vec<_> = written.map(|(name, value)| (name.to_owned(), Some(value.into_bytes()))).collect();
            prop_assert_eq!(parse(&written), Ok(envelope));
        }
    }
}

/// The records of an operator's action, byte for byte as the first release wrote them. They are
/// kept permanently too.
#[test]
fn the_actions_of_operators_are_read_in_every_release() {
    let begun = r#"{"action_id":"01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a07","step":"begun","action":"discard","target":"user.events.v1-0-7","group":"analytics.users","service":"analytics","operator":"on-call","reason":"imported twice","time":"2026-11-22T12:00:00.123456789Z"}"#;
    let action: OperatorAction = serde_json::from_str(begun).unwrap();
    assert_eq!((action.step, action.outcome, action.operator.as_str()), (ActionStep::Begun, None, "on-call"));
    assert_eq!(serde_json::to_string(&action).unwrap(), begun);
    // Without a group and a reason, and with a field of a newer release.
    let ended = r#"{"action_id":"01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a07","step":"ended","action":"pause-consumers","target":"analytics","service":"analytics","operator":"on-call","time":"2026-11-22T12:00:01Z","outcome":"failed","detail":"no","ticket":4711}"#;
    let action: OperatorAction = serde_json::from_str(ended).unwrap();
    assert_eq!((action.step, action.outcome), (ActionStep::Ended, Some(ActionOutcome::Failed)));
    assert_eq!((action.group, action.reason, action.detail.as_deref()), (None, None, Some("no")));
}
