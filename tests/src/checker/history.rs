//! What a run records. The parts of services that did not run are `None`, and are not judged.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use testbed::smtp_sink::Mail;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::record::Record;

#[derive(Clone, Debug, Default)]
pub struct History {
    /// What clients asked for, each client's in its order.
    pub operations: Vec<Operation>,
    /// The table `users`.
    pub users: BTreeMap<Uuid, Known>,
    /// Every committed insert into the user service's outbox.
    pub inserted: Vec<Inserted>,
    /// The events that a test wrote without an outbox.
    pub by_hand: BTreeSet<Uuid>,
    /// `user.events.v1`, per partition in the order of the log, as all topics here.
    pub facts: Vec<Record>,
    /// `user.state.v1`.
    pub states: Vec<Record>,
    /// Whether `user.state.v1` was compacted: then it lacks what was superseded.
    pub compacted: bool,
    pub email: Option<Email>,
    pub analytics: Option<Analytics>,
    /// The profiles in Valkey.
    pub cache: Option<BTreeMap<Uuid, Known>>,
    /// By consumer group: every letter ever written, tombstones left out.
    pub letters: BTreeMap<&'static str, Vec<Record>>,
    /// The letters that are open at the end.
    pub open: BTreeMap<&'static str, Vec<Record>>,
    /// By consumer group: how many records its process counted as delivered. Only of processes that ran from the start to the end.
    pub counted: BTreeMap<&'static str, u64>,
    /// What was still under way when the run was over.
    pub behind: Vec<String>,
    /// Processes that ended though nobody killed or stopped them.
    pub ended: Vec<String>,
    /// Places with personal data that must not have any.
    pub leaks: Vec<String>,
}

impl History {
    /// The facts of a topic, each once, without those that the group has set aside and not taken since.
    pub fn facts_for(&self, group: &str, records: &[Record]) -> Vec<Fact> {
        let aside: BTreeSet<Uuid> =
            self.open.get(group).into_iter().flatten().filter_map(Fact::of).map(|fact| fact.id).collect();
        Fact::distinct(records).into_iter().filter(|fact| !aside.contains(&fact.id)).collect()
    }
}

/// A request and what came of it.
#[derive(Clone, Debug)]
pub struct Operation {
    /// `None`: a registration whose id was never learnt.
    pub user: Option<Uuid>,
    pub asked: Asked,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    Register {
        email: String,
    },
    Rename {
        display_name: String,
    },
    Move {
        email: String,
    },
    Erase,
    /// `GET /profiles/{id}` of the cache.
    Read,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered with success: the version in the answer.
    Done(i64),
    /// An answer with a status of 400 to 499: it surely took no effect.
    Refused(u16),
    /// No answer, or one with a status of 500 or more: it may have taken effect.
    Unknown,
}

/// What somebody knows of a user: the user service's table, the email service's, the cache, or the log of states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub version: i64,
    /// `None`: erased.
    pub person: Option<Person>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    pub email: String,
    pub display_name: String,
}

/// A row that an outbox was given, by a transaction that committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inserted {
    pub event_id: Uuid,
    pub topic: &'static str,
}

/// The email service.
#[derive(Clone, Debug, Default)]
pub struct Email {
    pub deliveries: Vec<Delivery>,
    pub recipients: BTreeMap<Uuid, Known>,
    pub inserted: Vec<Inserted>,
    /// `email.events.v1`.
    pub facts: Vec<Record>,
    /// What the mail server accepted.
    pub mails: Vec<Mail>,
}

#[derive(Clone, Debug)]
pub struct Delivery {
    pub id: Uuid,
    pub user: Uuid,
    /// Every status that it ever had, in order.
    pub states: Vec<String>,
}

/// The read models.
#[derive(Clone, Debug, Default)]
pub struct Analytics {
    /// By the hour's beginning, in seconds since 1970.
    pub registrations: BTreeMap<i64, i64>,
    pub funnel: Funnel,
    /// By topic: the ids of the events that are in the read models.
    pub inbox: BTreeMap<&'static str, BTreeSet<Uuid>>,
}

impl Analytics {
    /// The read models as they are meant: each fact once, in any order.
    pub fn fold(users: &[Fact], emails: &[Fact]) -> (BTreeMap<i64, i64>, Funnel) {
        let (mut hours, mut funnel): (BTreeMap<i64, i64>, Funnel) = Default::default();
        let earliest = |slot: &mut Option<i64>, time: i64| *slot = Some(slot.map_or(time, |known| known.min(time)));
        for fact in users.iter().filter(|fact| fact.kind == "user.registered") {
            *hours.entry(fact.hour()).or_default() += 1;
            earliest(&mut funnel.entry(fact.user).or_default().0, fact.time);
        }
        for fact in emails.iter().filter(|fact| fact.kind == "email.sent") {
            earliest(&mut funnel.entry(fact.user).or_default().1, fact.time);
        }
        (hours, funnel)
    }
}

/// By user: when registered, when mailed, in microseconds since 1970.
pub type Funnel = BTreeMap<Uuid, (Option<i64>, Option<i64>)>;

/// A record of a topic of facts, read.
#[derive(Clone, Debug)]
pub struct Fact {
    pub id: Uuid,
    pub kind: String,
    pub user: Uuid,
    /// Microseconds since 1970.
    pub time: i64,
}

impl Fact {
    /// `None`: not a fact that any of the services writes, so a dead letter or skipped.
    pub fn of(record: &Record) -> Option<Self> {
        let data: Value = serde_json::from_slice(record.value.as_deref()?).ok()?;
        let time = OffsetDateTime::parse(record.header("ce_time")?, &Rfc3339).ok()?;
        Some(Self {
            id: record.header("ce_id")?.parse().ok()?,
            kind: record.header("ce_type")?.to_owned(),
            user: data["user_id"].as_str()?.parse().ok()?,
            time: i64::try_from(time.unix_timestamp_nanos() / 1000).ok()?,
        })
    }

    /// Each fact once, though the log may hold copies.
    pub fn distinct(records: &[Record]) -> Vec<Self> {
        let facts = records.iter().filter_map(Self::of).map(|fact| (fact.id, fact));
        facts.collect::<BTreeMap<_, _>>().into_values().collect()
    }

    /// The beginning of its hour, in seconds since 1970.
    pub fn hour(&self) -> i64 {
        self.time.div_euclid(3_600_000_000) * 3600
    }
}

impl Known {
    /// From a record of `user.state.v1`: whose, and what it says. `None`: malformed.
    pub fn of(record: &Record) -> Option<(Uuid, Self)> {
        let person = match record.value.as_deref() {
            None => None,
            Some(value) => Some(Person::of(&serde_json::from_slice(value).ok()?)?),
        };
        let version = record.header("ce_sequence")?.parse().ok()?;
        Some((record.key_text().parse().ok()?, Self { version, person }))
    }

    /// The log of states folded: of each user what the highest version says.
    pub fn newest(states: &[Record]) -> BTreeMap<Uuid, Self> {
        let mut newest: BTreeMap<Uuid, Self> = BTreeMap::new();
        for (user, known) in states.iter().filter_map(Self::of) {
            let slot = newest.entry(user).or_insert_with(|| known.clone());
            if slot.version < known.version {
                *slot = known;
            }
        }
        newest
    }
}

impl Person {
    pub fn of(profile: &Value) -> Option<Self> {
        let text = |name: &str| profile[name].as_str().map(str::to_owned);
        Some(Self { email: text("email")?, display_name: text("display_name")? })
    }
}
