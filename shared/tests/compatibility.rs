//! T42: releases of different age read each other's events. The rules: fields are only ever added; a reader ignores what it does
//! not know, misses what it needs, and never takes one thing for another; whatever the bytes are, it does not panic.

#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use shared::events::{
    DecodeError, Delivery, EmailEvent, Envelope, Event, Profile, Undelivered, UserEvent, UserRef, UserState,
};
use uuid::{Uuid, uuid};

const USER: Uuid = uuid!("01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a01");
const DELIVERY: Uuid = uuid!("01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a02");

/// What the first release wrote, byte for byte. Topics are kept for ever, so this is never edited, only added to.
const USER_REF: &str = r#"{"user_id":"01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a01"}"#;
const PROFILE: &str = r#"{"email":"ada@example.com","display_name":"Ada Lovelace"}"#;
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

fn user() -> UserRef {
    UserRef { user_id: USER }
}

fn delivery() -> Delivery {
    Delivery { delivery_id: DELIVERY, user_id: USER, template: "welcome".to_owned() }
}

/// A sample of every type, and what it means.
fn user_events() -> Vec<(&'static str, &'static str, UserEvent)> {
    vec![
        ("user.registered", USER_REF, UserEvent::Registered(user())),
        ("user.profile_changed", USER_REF, UserEvent::ProfileChanged(user())),
        ("user.email_changed", USER_REF, UserEvent::EmailChanged(user())),
        ("user.deleted", USER_REF, UserEvent::Deleted(user())),
    ]
}

fn user_states() -> Vec<(&'static str, &'static str, UserState)> {
    let profile = Profile { email: "ada@example.com".to_owned(), display_name: "Ada Lovelace".to_owned() };
    vec![("user.state", PROFILE, UserState::Current(profile))]
}

fn email_events() -> Vec<(&'static str, &'static str, EmailEvent)> {
    let failed = Undelivered { delivery: delivery(), smtp_code: 550 };
    vec![("email.sent", SENT, EmailEvent::Sent(delivery())), ("email.failed", FAILED, EmailEvent::Failed(failed))]
}

/// Old samples, this release: read as what they meant, and written in the same way still, so that older readers go on.
fn old_is_read_and_written<E: Event + PartialEq>(samples: Vec<(&str, &str, E)>) {
    for (kind, data, event) in samples {
        let (written_kind, written) = event.encode();
        assert_eq!((written_kind, written.as_deref()), (kind, Some(data.as_bytes())), "{kind} is written as ever");
        assert!(E::decode(kind, Some(data.as_bytes())) == Ok(Some(event)), "{kind} is read as what it meant");
    }
}

/// T42.
#[test]
fn what_the_first_release_wrote_is_read_and_written_still() {
    old_is_read_and_written(user_events());
    old_is_read_and_written(user_states());
    old_is_read_and_written(email_events());
    assert!(UserState::decode("user.state", None) == Ok(Some(UserState::Erased)));
    assert!(UserState::Erased.encode() == ("user.state", None));
}

/// New samples, this release as the old reader: what a later release adds is ignored, wherever it stands and whatever it is.
fn additions_are_ignored<E: Event + PartialEq>(samples: Vec<(&str, &str, E)>) {
    for (kind, data, event) in samples {
        let added =
            json!({ "locale": "en", "tags": ["a", null], "address": { "user_id": 7 }, "smtp_code_v2": 1.5e300 });
        let mut newer: Value = serde_json::from_str(data).unwrap();
        newer.as_object_mut().unwrap().extend(added.as_object().unwrap().clone());
        assert!(E::decode(kind, Some(newer.to_string().as_bytes())) == Ok(Some(event)), "{kind} with more fields");
    }
}

/// T42.
#[test]
fn what_a_later_release_adds_is_ignored() {
    additions_are_ignored(user_events());
    additions_are_ignored(user_states());
    additions_are_ignored(email_events());
}

/// T42: a type of a later release is skipped, not guessed from its data; nor is one topic's type read on another.
#[test]
fn an_unknown_type_is_skipped_whatever_it_carries() {
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

/// A field that a release needs is not made up where another left it out, made it null, or changed its type; and the reason
/// that ends in a dead letter's header holds no value.
fn needs_are_missed<E: Event + PartialEq>(samples: Vec<(&str, &str, E)>) {
    for (kind, data, _) in samples {
        let sample: Value = serde_json::from_str(data).unwrap();
        for field in sample.as_object().unwrap().keys() {
            let mut without = sample.clone();
            without.as_object_mut().unwrap().remove(field);
            let others = [json!(null), json!([]), json!({}), json!(true), json!(-7.5)];
            let changed = others.map(|other| {
                let mut changed = sample.clone();
                changed[field] = other;
                changed
            });
            for bad in changed.iter().chain([&without]) {
                let Err(error) = E::decode(kind, Some(bad.to_string().as_bytes())) else { panic!("{kind}: {bad}") };
                assert_eq!(error.field, "data", "{kind}: {bad}");
                assert!(!error.to_string().contains("ada"), "{error}");
            }
        }
        assert!(kind == "user.state" || E::decode(kind, None).is_err(), "{kind} is a fact and carries data");
    }
}

/// T42.
#[test]
fn what_is_needed_is_missed_and_never_made_up() {
    needs_are_missed(user_events());
    needs_are_missed(user_states());
    needs_are_missed(email_events());
}

fn parse(headers: &[(String, Option<Vec<u8>>)]) -> Result<Envelope, DecodeError> {
    let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    Envelope::parse(Some(USER.to_string().as_bytes()), &headers)
}

fn headers() -> Vec<(String, Option<Vec<u8>>)> {
    HEADERS.map(|(name, value)| (name.to_owned(), Some(value.as_bytes().to_vec()))).into()
}

/// T42: the envelope of the first release, with what a later one, or somebody else's library, adds to it.
#[test]
fn the_first_envelope_is_read_still_and_additions_to_it_are_ignored() {
    let first = parse(&headers()).unwrap();
    assert_eq!((first.key, first.version, first.kind.as_str()), (USER, 1, "user.registered"));
    let written: Vec<_> = first.headers().into_iter().collect();
    assert_eq!(written, HEADERS.map(|(name, value)| (name, value.to_owned())), "it is written as ever");
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

/// How bytes are spoilt.
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

fn spoil(bytes: &mut Vec<u8>, damages: &[Damage]) {
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

/// Whatever is read of spoilt bytes can be written and read again as the same: nothing half-read gets through.
fn survives<E: Event + PartialEq>(samples: Vec<(&str, &str, E)>, damages: &[Damage]) -> Result<(), TestCaseError> {
    for (kind, data, _) in samples {
        let mut bytes = data.as_bytes().to_vec();
        spoil(&mut bytes, damages);
        if let Ok(read) = E::decode(kind, Some(&bytes)) {
            let Some(event) = read else { return Err(TestCaseError::fail(format!("{kind} became unknown"))) };
            let (written_kind, written) = event.encode();
            prop_assert_eq!(written_kind, kind);
            prop_assert!(E::decode(kind, written.as_deref()) == Ok(Some(event)), "{} is not what was read", kind);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    /// T42.
    #[test]
    fn spoilt_data_is_refused_or_read_whole(damages in damage()) {
        survives(user_events(), &damages)?;
        survives(user_states(), &damages)?;
        survives(email_events(), &damages)?;
    }

    /// T42.
    #[test]
    fn spoilt_headers_are_refused_or_read_whole(which in any::<Index>(), in_name in any::<bool>(), damages in damage()) {
        let mut headers = headers();
        let (name, value) = which.get_mut(&mut headers);
        if in_name {
            let mut bytes = name.clone().into_bytes();
            spoil(&mut bytes, &damages);
            *name = String::from_utf8_lossy(&bytes).into_owned();
        } else {
            spoil(value.as_mut().unwrap(), &damages);
        }
        if let Ok(envelope) = parse(&headers) {
            let written = envelope.headers().into_iter();
            let written: Vec<_> = written.map(|(name, value)| (name.to_owned(), Some(value.into_bytes()))).collect();
            prop_assert_eq!(parse(&written), Ok(envelope));
        }
    }
}
