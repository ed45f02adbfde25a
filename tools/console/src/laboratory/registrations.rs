//! What the Laboratory has registered, and what it did. Kept in memory only.

use std::collections::{BTreeMap, VecDeque};

use shared::events;
use tokio::time::Instant;
use uuid::Uuid;

use super::fates::{Checked, Effect, Fate, Place, Registered, Situation};
use crate::kafka::Seen;

/// The newest registrations that are watched. Each needs about 1 KiB.
const KEPT: usize = 1_000;
/// The newest records without a registration that are remembered: a record may arrive before the
/// answer to the registration that caused it. Each needs 48 bytes.
const EARLY: usize = 2_000;
/// The newest notes that the page shows.
const NOTES: usize = 12;
/// How many checks in a row must find an effect wrong before it is reported. Kafka and the outbox
/// are read again before each check.
const CHECKS: u32 = 3;

/// A user whom the Laboratory has registered.
#[derive(Clone, Debug)]
pub struct Registration {
    pub user: Uuid,
    pub registered: Registered,
    pub looked: Option<Instant>,
    fates: [Fate; Effect::ALL.len()],
    /// How often in a row each effect was wrong.
    wrong: [u32; Effect::ALL.len()],
}

impl Registration {
    pub fn fate(&self, effect: Effect) -> &Fate {
        &self.fates[effect as usize]
    }

    fn is_complete(&self) -> bool {
        self.fates.iter().all(|fate| *fate == Fate::Done)
    }
}

/// A line of the list of what the Laboratory did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Note {
    pub time: String,
    pub text: String,
}

#[derive(Default)]
pub struct Registrations {
    all: VecDeque<Registration>,
    pub accepted: u64,
    /// Registrations that were refused or got no answer.
    pub refused: u64,
    notes: VecDeque<Note>,
    /// Records whose key does not belong to a registration, at least not yet.
    early: VecDeque<(Uuid, &'static str, Place)>,
}

impl Registrations {
    pub fn accept(&mut self, user: Uuid, email: String, version: i64) {
        if self.all.len() == KEPT {
            self.all.pop_front();
        }
        self.accepted += 1;
        let mut places = BTreeMap::new();
        for (_, topic, place) in self.early.iter().rev().filter(|(key, ..)| *key == user) {
            places.entry(*topic).or_insert(*place);
        }
        self.all.push_back(Registration {
            user,
            registered: Registered { email, accepted: Instant::now(), version, places },
            looked: None,
            fates: std::array::from_fn(|_| Fate::Waits("not checked yet".to_owned())),
            wrong: Default::default(),
        });
    }

    pub fn set_version(&mut self, user: Uuid, version: i64) {
        self.change(user, |registration| registration.registered.version = version);
    }

    /// Another client has erased the user: the registration is not watched any more.
    pub fn forget(&mut self, user: Uuid) {
        self.all.retain(|registration| registration.user != user);
    }

    /// A record has arrived.
    pub fn saw(&mut self, seen: &Seen) {
        let Some(user) = seen.key else { return };
        let place = (seen.partition, seen.offset);
        let is_known = self.change(user, |registration| {
            registration.registered.places.entry(seen.topic).or_insert(place);
        });
        if !is_known {
            self.early.truncate(EARLY - 1);
            self.early.push_front((user, seen.topic, place));
        }
    }

    pub fn all(&self) -> impl DoubleEndedIterator<Item = &Registration> + Clone {
        self.all.iter()
    }

    pub fn find(&self, user: Uuid) -> Option<&Registration> {
        self.all.iter().find(|registration| registration.user == user)
    }

    /// The registrations to check next: first those that are not complete, then those whose last
    /// check was longest ago.
    pub fn next(&self, limit: usize) -> Vec<Registration> {
        let mut order: Vec<&Registration> = self.all.iter().collect();
        order.sort_by_key(|registration| (registration.is_complete(), registration.looked));
        order.into_iter().take(limit).cloned().collect()
    }

    /// Judges the result of a check. An effect is reported as wrong only after several checks in a
    /// row.
    pub fn judge(&mut self, user: Uuid, checked: &Checked, situation: &Situation) {
        self.change(user, |registration| {
            registration.looked = Some(Instant::now());
            for effect in Effect::ALL {
                let place = effect as usize;
                let fate = effect.fate(&registration.registered, checked, situation);
                let is_wrong = fate.violation().is_some();
                registration.wrong[place] = if is_wrong { registration.wrong[place] + 1 } else { 0 };
                registration.fates[place] = match fate.violation() {
                    Some(text) if registration.wrong[place] < CHECKS => Fate::Waits(format!("checking again: {text}")),
                    _ => fate,
                };
            }
        });
    }

    pub fn note(&mut self, text: String) {
        let time = events::now();
        let time = format!("{:02}:{:02}:{:02}", time.hour(), time.minute(), time.second());
        self.notes.truncate(NOTES - 1);
        self.notes.push_front(Note { time, text });
    }

    pub fn notes(&self) -> impl Iterator<Item = &Note> {
        self.notes.iter()
    }

    /// Changes a registration, if it is one. The newest come last, and most records are about them.
    fn change(&mut self, user: Uuid, change: impl FnOnce(&mut Registration)) -> bool {
        let found = self.all.iter_mut().rev().find(|registration| registration.user == user);
        found.map(change).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_registrations_are_kept_and_the_incomplete_come_first() {
        let mut registrations = Registrations::default();
        for number in 0..1_200 {
            registrations.accept(Uuid::from_u128(number), String::new(), 1);
        }
        assert_eq!((registrations.all().count(), registrations.accepted), (KEPT, 1_200));
        assert!(registrations.find(Uuid::from_u128(199)).is_none());
        let _ = registrations.change(Uuid::from_u128(200), |first| first.fates = std::array::from_fn(|_| Fate::Done));
        assert_eq!(registrations.next(1)[0].user, Uuid::from_u128(201));
        registrations.forget(Uuid::from_u128(201));
        assert_eq!(registrations.next(1)[0].user, Uuid::from_u128(202));
    }

    #[test]
    fn a_record_may_arrive_before_the_answer_to_its_registration() {
        let seen = |user, offset| Seen {
            number: 0,
            topic: "user.events.v1",
            partition: 2,
            offset,
            time: None,
            key: Some(Uuid::from_u128(user)),
            kind: String::new(),
            version: String::new(),
            size: 0,
            event: None,
            trace: None,
            is_tombstone: false,
        };
        let mut registrations = Registrations::default();
        registrations.saw(&seen(1, 10));
        (0..10_000).for_each(|user| registrations.saw(&seen(user, 11)));
        registrations.saw(&seen(2, 20));
        for user in [1, 2] {
            registrations.accept(Uuid::from_u128(user), String::new(), 1);
        }
        registrations.saw(&seen(2, 30));
        let place =
            |user| registrations.find(Uuid::from_u128(user)).unwrap().registered.places.get("user.events.v1").copied();
        assert_eq!((place(1), place(2)), (None, Some((2, 20))), "the memory is bounded, and the first record counts");
    }

    #[test]
    fn a_missing_effect_is_wrong_only_after_several_looks() {
        let mut registrations = Registrations::default();
        let user = Uuid::from_u128(1);
        registrations.accept(user, String::new(), 1);
        registrations
            .change(user, |registration| registration.registered.accepted -= std::time::Duration::from_secs(60));
        let found = Checked { counted: Some(1), cached: Some(None), ..Checked::default() };
        let quiet = Situation::quiet();
        for look in 1..=CHECKS {
            let is_wrong = |registrations: &Registrations| {
                registrations.find(user).unwrap().fate(Effect::Cache).violation().is_some()
            };
            assert!(!is_wrong(&registrations), "before look {look}");
            registrations.judge(user, &found, &quiet);
            assert_eq!(is_wrong(&registrations), look == CHECKS, "after look {look}");
        }
        registrations.judge(user, &Checked { cached: Some(Some(1)), ..found }, &quiet);
        assert_eq!(registrations.find(user).unwrap().fate(Effect::Cache), &Fate::Done);
    }

    #[test]
    fn notes_are_bounded_and_the_newest_comes_first() {
        let mut registrations = Registrations::default();
        (0..100).for_each(|number| registrations.note(number.to_string()));
        let texts: Vec<&str> = registrations.notes().map(|note| note.text.as_str()).collect();
        assert_eq!((texts.len(), texts[0]), (NOTES, "99"));
    }
}
