//! The recorded history of a run. The fields of services that did not run are `None` and are not
//! checked.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use testbed::smtp_sink::Mail;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::record::Record;

#[derive(Clone, Debug, Default)]
pub struct History {
    /// Requests of the clients. The requests of one client are in their order.
    pub operations: Vec<Operation>,
    /// Rows of the table `users`.
    pub users: BTreeMap<Uuid, StoredUser>,
    /// Rows that the user service inserted into its outbox and committed.
    pub inserted: Vec<Inserted>,
    /// Events that the test wrote without an outbox.
    pub written_by_test: BTreeSet<Uuid>,
    /// Records of `user.events.v1`. As in all topics here, those of one partition are in the order
    /// of their offsets.
    pub facts: Vec<Record>,
    /// Records of `user.state.v1`.
    pub states: Vec<Record>,
    /// Whether `user.state.v1` was compacted. If so, superseded records are missing.
    pub compacted: bool,
    pub email: Option<Email>,
    pub analytics: Option<Analytics>,
    /// Profiles in Valkey.
    pub cache: Option<BTreeMap<Uuid, StoredUser>>,
    /// Dead letters ever written, by consumer group, without the tombstones.
    pub letters: BTreeMap<&'static str, Vec<Record>>,
    /// Dead letters that are open at the end, by consumer group.
    pub open: BTreeMap<&'static str, Vec<Record>>,
    /// Letters that operators discarded, as `operator.actions.v1` says. They are settled without an
    /// effect.
    pub discards: Vec<Discard>,
    /// Number of records that a consumer group counted as delivered. It contains only groups whose
    /// single process ran from the start of the run to its end.
    pub counted: BTreeMap<&'static str, u64>,
    /// Work that was not done at the end.
    pub work_left: Vec<String>,
    /// Processes that ended though the test did not end them.
    pub ended: Vec<String>,
    /// Places that contain personal data although they must not.
    pub leaks: Vec<String>,
}

impl History {
    /// The facts of a topic, each once, without those that are open dead letters of the group, and
    /// without those whose every copy was discarded.
    pub fn facts_for(&self, group: &str, records: &[Record]) -> Vec<Fact> {
        let dead_lettered: BTreeSet<Uuid> =
            self.open.get(group).into_iter().flatten().filter_map(Fact::of).map(|fact| fact.id).collect();
        let of_group = self.discards.iter().filter(|discard| discard.group == group);
        let discarded: BTreeSet<(i32, i64)> = of_group.filter_map(Discard::place).collect();
        let handled: Vec<Record> =
            records.iter().filter(|record| !discarded.contains(&(record.partition, record.offset))).cloned().collect();
        Fact::distinct(&handled).into_iter().filter(|fact| !dead_lettered.contains(&fact.id)).collect()
    }
}

/// An action that discarded a dead letter. If its process died, it may not have settled the letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discard {
    pub group: String,
    /// The coordinates of the record: the key of its letter.
    pub letter: String,
    /// Whether the second record of the action says that it was done.
    pub is_done: bool,
}

impl Discard {
    /// Partition and offset of the record.
    pub fn place(&self) -> Option<(i32, i64)> {
        let mut fields = self.letter.rsplitn(3, '-');
        let offset = fields.next()?.parse().ok()?;
        Some((fields.next()?.parse().ok()?, offset))
    }

    /// The discards in the records of `operator.actions.v1`.
    pub fn all(actions: &[Record]) -> Vec<Self> {
        let mut discards: BTreeMap<String, Self> = BTreeMap::new();
        for record in actions {
            let action: Value = serde_json::from_slice(record.value.as_deref().unwrap_or_default()).unwrap_or_default();
            if action["action"] != "discard" {
                continue;
            }
            let text = |name: &str| action[name].as_str().unwrap_or_default().to_owned();
            let discard = discards.entry(text("action_id")).or_insert_with(|| Self {
                group: text("group"),
                letter: text("target"),
                is_done: false,
            });
            discard.is_done |= action["outcome"] == "done";
        }
        discards.into_values().collect()
    }
}

/// A request and its outcome.
#[derive(Clone, Debug)]
pub struct Operation {
    /// The user. `None` for a registration whose id the client does not know.
    pub user: Option<Uuid>,
    pub request: Request,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Register {
        email: String,
    },
    Rename {
        display_name: String,
    },
    ChangeEmail {
        email: String,
    },
    Erase,
    /// `GET /profiles/{id}` of the cache.
    Read,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The answer was a success. Contains the version in the answer.
    Done(i64),
    /// The answer had this status of 400 to 499. The request took no effect.
    Refused(u16),
    /// There was no answer, or one with a status of 500 or more. The request may have taken effect.
    Unknown,
}

/// A user as a store has it: the user service, the cache, or `user.state.v1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredUser {
    pub version: i64,
    /// `None` if the user is erased.
    pub person: Option<Person>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    pub email: String,
    pub display_name: String,
}

/// A row that a committed transaction inserted into an outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inserted {
    pub event_id: Uuid,
    pub topic: &'static str,
}

/// The history of the email service.
#[derive(Clone, Debug, Default)]
pub struct Email {
    pub deliveries: Vec<Delivery>,
    pub recipients: BTreeMap<Uuid, Recipient>,
    pub inserted: Vec<Inserted>,
    /// Records of `email.events.v1`.
    pub facts: Vec<Record>,
    /// Mails that the mail server accepted.
    pub mails: Vec<Mail>,
}

/// A user as the email service has it. The address is `None` if the user is erased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    pub version: i64,
    pub email: Option<String>,
}

impl From<&StoredUser> for Recipient {
    fn from(user: &StoredUser) -> Self {
        Self { version: user.version, email: user.person.as_ref().map(|person| person.email.clone()) }
    }
}

#[derive(Clone, Debug)]
pub struct Delivery {
    pub id: Uuid,
    pub user: Uuid,
    /// States that the delivery ever had, in order.
    pub states: Vec<String>,
}

/// The read models of the analytics service.
#[derive(Clone, Debug, Default)]
pub struct Analytics {
    /// Number of registrations by hour. An hour is named by its beginning, in seconds since 1970.
    pub registrations: BTreeMap<i64, i64>,
    pub funnel: Funnel,
    /// How many users are registered, and how many of them mailed.
    pub totals: (i64, i64),
    /// Ids of the events that are in the read models, by topic.
    pub inbox: BTreeMap<&'static str, BTreeSet<Uuid>>,
    /// Rows of the audit.
    pub audit: Vec<Audited>,
}

/// A row of the audit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Audited {
    pub event: Uuid,
    pub user: Uuid,
    pub kind: String,
}

impl From<&Fact> for Audited {
    fn from(fact: &Fact) -> Self {
        Self { event: fact.id, user: fact.user, kind: fact.kind.clone() }
    }
}

impl Analytics {
    /// The read models that these facts must produce: registrations by hour, and the funnel. Each
    /// fact counts once, and their order does not matter.
    pub fn fold(users: &[Fact], emails: &[Fact]) -> (BTreeMap<i64, i64>, Funnel) {
        let mut hours: BTreeMap<i64, i64> = BTreeMap::new();
        let mut funnel = Funnel::new();
        let earliest = |slot: &mut Option<i64>, time: i64| *slot = Some(slot.map_or(time, |known| known.min(time)));
        for fact in users.iter().filter(|fact| fact.kind == "user.registered") {
            *hours.entry(fact.hour()).or_default() += 1;
            earliest(&mut funnel.entry(fact.user).or_default().registered, fact.time);
        }
        for fact in emails.iter().filter(|fact| fact.kind == "email.sent") {
            earliest(&mut funnel.entry(fact.user).or_default().mailed, fact.time);
        }
        (hours, funnel)
    }

    /// The totals that this funnel must have.
    pub fn totals(funnel: &Funnel) -> (i64, i64) {
        let registered = funnel.values().filter(|steps| steps.registered.is_some());
        let mailed = registered.clone().filter(|steps| steps.mailed.is_some());
        (registered.count() as i64, mailed.count() as i64)
    }
}

/// The steps of each user.
pub type Funnel = BTreeMap<Uuid, Steps>;

/// When a user was registered and mailed, in microseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    pub registered: Option<i64>,
    pub mailed: Option<i64>,
}

/// A decoded record of a topic with facts.
#[derive(Clone, Debug)]
pub struct Fact {
    pub id: Uuid,
    pub kind: String,
    pub user: Uuid,
    /// Microseconds since 1970.
    pub time: i64,
}

impl Fact {
    /// `None` if no service writes such a record. Consumers skip it or dead-letter it.
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

    /// Each fact once. The topic may contain copies.
    pub fn distinct(records: &[Record]) -> Vec<Self> {
        let facts = records.iter().filter_map(Self::of).map(|fact| (fact.id, fact));
        facts.collect::<BTreeMap<_, _>>().into_values().collect()
    }

    /// Beginning of its hour, in seconds since 1970.
    pub fn hour(&self) -> i64 {
        self.time.div_euclid(3_600_000_000) * 3600
    }
}

impl StoredUser {
    /// The user and the state in a record of `user.state.v1`. `None` if it is malformed.
    pub fn of(record: &Record) -> Option<(Uuid, Self)> {
        let person = match record.value.as_deref() {
            None => None,
            Some(value) => Some(Person::of(&serde_json::from_slice(value).ok()?)?),
        };
        let version = record.header("ce_sequence")?.parse().ok()?;
        Some((record.key_text().parse().ok()?, Self { version, person }))
    }

    /// The state with the highest version of each user.
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
