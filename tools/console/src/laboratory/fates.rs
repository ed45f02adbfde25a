//! Judges the effects of one registration: each effect exists, waits in a place that can be seen,
//! or is wrong.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use topology::{ANALYTICS, CACHE, EMAIL, Service, USER};

/// While a registration is younger than this, an effect that a service does not have counts as
/// waiting. The services measure their outboxes every 2 s. The console asks them and Kafka every
/// second, and each answer may take some seconds.
const GRACE: Duration = Duration::from_secs(10);

/// Where a record is: its partition and its offset.
pub type Place = (i32, i64);

/// What the user service has accepted.
#[derive(Clone, Debug)]
pub struct Registered {
    pub email: String,
    pub accepted: Instant,
    /// The newest version that a command has returned.
    pub version: i64,
    /// The first record of each topic with this user's key, as far as the console has seen it.
    pub places: BTreeMap<&'static str, Place>,
}

/// What a registration must cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The fact and the state are in their topics.
    Topic,
    Mail,
    Count,
    Cache,
}

impl Effect {
    pub const ALL: [Self; 4] = [Self::Topic, Self::Mail, Self::Count, Self::Cache];
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    Done,
    /// Where the effect waits.
    Waits(String),
    /// It is missing, and nothing that can be seen accounts for that.
    Missing(String),
    /// There is more of it than there should be.
    TooMuch(String),
}

impl Fate {
    /// Why the fate is a violation.
    pub fn violation(&self) -> Option<&str> {
        match self {
            Self::Done | Self::Waits(_) => None,
            Self::Missing(text) | Self::TooMuch(text) => Some(text),
        }
    }
}

/// Mails of a recipient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub struct Received {
    pub mails: u32,
    /// Mails whose answer was lost.
    pub unanswered: u32,
}

/// A mail, as the email service lists it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Delivery {
    pub status: String,
    pub attempts: u32,
}

/// What the services say about one user. `None`: no answer.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// How many registrations of the user the analytics service has recorded.
    pub counted: Option<usize>,
    /// The version in the cache. `Some(None)`: the cache has no such user.
    pub cached: Option<Option<i64>>,
    pub deliveries: Option<Vec<Delivery>>,
    /// The group that has a dead letter of this user.
    pub letter: Option<&'static str>,
}

/// What waits in the system, asked before the services were asked about the user.
#[derive(Clone, Debug)]
pub struct Situation {
    /// Rows in the outbox of the user service. `None`: unknown.
    pub outbox: Option<i64>,
    /// The lag of the groups of a service that read what the user service writes. `None`: unknown.
    pub lags: BTreeMap<&'static str, Option<i64>>,
    /// What the mail server has accepted. `None`: it cannot be asked.
    pub mails: Option<BTreeMap<String, Received>>,
    /// Whether the mail server keeps all mails as long as the console runs.
    pub keeps_mails: bool,
    pub taken: Instant,
}

impl Situation {
    /// Why an event of this age that a service has not handled is still on its way. `None`: nothing
    /// waits.
    pub fn reason(&self, accepted: Instant, service: Service) -> Option<String> {
        if self.taken.saturating_duration_since(accepted) < GRACE {
            return Some("registered just now".to_owned());
        }
        match (self.outbox, self.lags.get(service.name).copied().flatten()) {
            (None, _) => Some("the outbox is unknown: the user service does not answer".to_owned()),
            (Some(rows), _) if rows > 0 => Some(format!("the outbox of {} has {rows} rows", USER.name)),
            (_, None) if service == USER => None,
            (_, None) => Some("the lag is unknown: Kafka does not answer".to_owned()),
            (_, Some(lag)) if lag > 0 => Some(format!("the groups of {} lag by {lag} offsets", service.name)),
            _ => None,
        }
    }

    /// Nothing waits anywhere.
    #[cfg(test)]
    pub fn quiet() -> Self {
        let lags = topology::SERVICES.map(|service| (service.name, Some(0)));
        Self {
            outbox: Some(0),
            lags: lags.into(),
            mails: Some(BTreeMap::new()),
            keeps_mails: true,
            taken: Instant::now(),
        }
    }
}

impl Effect {
    pub fn fate(self, registered: &Registered, checked: &Checked, situation: &Situation) -> Fate {
        let reason = |service: Service| situation.reason(registered.accepted, service);
        let absent = |service: Service, what: &str| {
            let letter = checked.letter.map(|group| format!("a dead letter of {group} has it"));
            let waits = reason(service).or(letter);
            waits.map_or_else(|| Fate::Missing(what.to_owned()), Fate::Waits)
        };
        let silent = |service: Service| Fate::Waits(format!("{} does not answer", service.name));
        match self {
            Self::Topic => {
                let is_seen = USER.writes.iter().all(|topic| registered.places.contains_key(topic));
                // Their consumers read it there and nowhere else.
                let is_handled = checked.counted > Some(0) && checked.cached.flatten().is_some();
                if is_seen || is_handled { Fate::Done } else { absent(USER, "accepted, but not in the topic") }
            }
            Self::Mail => match &checked.deliveries {
                None => silent(EMAIL),
                Some(deliveries) => match deliveries.first() {
                    None => absent(EMAIL, "the email service has no mail for the user"),
                    Some(delivery) => mail(registered, delivery, situation),
                },
            },
            Self::Count => match checked.counted {
                None => silent(ANALYTICS),
                Some(0) => absent(ANALYTICS, "the registration is not counted"),
                Some(1) => Fate::Done,
                Some(times) => Fate::TooMuch(format!("the registration is counted {times} times")),
            },
            Self::Cache => match checked.cached {
                None => silent(CACHE),
                Some(Some(version)) if version >= registered.version => Fate::Done,
                Some(None) => absent(CACHE, "the cache does not have the user"),
                Some(Some(_)) => absent(CACHE, "the cache has an old version of the user"),
            },
        }
    }
}

/// What has become of a mail that the email service knows.
fn mail(registered: &Registered, delivery: &Delivery, situation: &Situation) -> Fate {
    let received = situation.mails.as_ref().map(|mails| mails.get(&registered.email).copied().unwrap_or_default());
    match (delivery.status.as_str(), received) {
        // Each copy has an attempt of its own, which the email service counts before it sends.
        (_, Some(Received { mails, .. })) if mails > delivery.attempts => {
            Fate::TooMuch(format!("{mails} copies after {} attempts", delivery.attempts))
        }
        ("sent", Some(Received { mails: 0, .. })) if situation.keeps_mails => {
            Fate::Missing("sent, but the mail server does not have it".to_owned())
        }
        ("sent", _) => Fate::Done,
        ("failed", _) => {
            Fate::Waits("the server refused the mail permanently or for too long; it waits for an operator".to_owned())
        }
        (status, _) => Fate::Waits(format!("the mail is {status} in the email service")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registration(age: Duration) -> Registered {
        let accepted = Instant::now() - age;
        Registered { email: "lab@test".to_owned(), accepted, version: 2, places: BTreeMap::new() }
    }

    fn delivery(status: &str, attempts: u32) -> Checked {
        Checked { deliveries: Some(vec![Delivery { status: status.to_owned(), attempts }]), ..Checked::default() }
    }

    fn is_wrong(fate: &Fate) -> bool {
        fate.violation().is_some()
    }

    #[test]
    fn a_missing_effect_is_wrong_only_if_nothing_waits() {
        let old = registration(Duration::from_secs(60));
        let found = Checked { counted: Some(0), cached: Some(None), deliveries: Some(vec![]), letter: None };
        for effect in Effect::ALL {
            assert!(is_wrong(&effect.fate(&old, &found, &Situation::quiet())), "{effect:?}");
            let waits = |situation: Situation| !is_wrong(&effect.fate(&old, &found, &situation));
            assert!(waits(Situation { outbox: Some(1), ..Situation::quiet() }), "{effect:?}, outbox");
            assert!(waits(Situation { outbox: None, ..Situation::quiet() }), "{effect:?}, outbox unknown");
            let young = registration(Duration::from_secs(1));
            assert!(!is_wrong(&effect.fate(&young, &found, &Situation::quiet())), "{effect:?}, young");
            let letter = Checked { letter: Some("email.welcome"), ..found.clone() };
            assert!(!is_wrong(&effect.fate(&old, &letter, &Situation::quiet())), "{effect:?}, dead letter");
        }
        for lag in [Some(1), None] {
            let lags = topology::SERVICES.map(|service| (service.name, lag)).into();
            let lagging = Situation { lags, ..Situation::quiet() };
            for effect in [Effect::Mail, Effect::Count, Effect::Cache] {
                assert!(!is_wrong(&effect.fate(&old, &found, &lagging)), "{effect:?}, lag {lag:?}");
            }
        }
    }

    #[test]
    fn a_service_that_does_not_answer_is_no_violation() {
        let old = registration(Duration::from_secs(60));
        for effect in [Effect::Mail, Effect::Count, Effect::Cache] {
            assert!(!is_wrong(&effect.fate(&old, &Checked::default(), &Situation::quiet())), "{effect:?}");
        }
    }

    #[test]
    fn too_much_of_an_effect_is_wrong_at_once() {
        let young = registration(Duration::ZERO);
        let twice = Checked { counted: Some(2), ..Checked::default() };
        assert!(is_wrong(&Effect::Count.fate(&young, &twice, &Situation::quiet())));
        let with = |mails| Situation {
            mails: Some([("lab@test".to_owned(), Received { mails, unanswered: 1 })].into()),
            ..Situation::quiet()
        };
        assert_eq!(Effect::Mail.fate(&young, &delivery("sent", 2), &with(2)), Fate::Done, "a copy after a lost answer");
        assert!(is_wrong(&Effect::Mail.fate(&young, &delivery("sent", 1), &with(2))), "a copy without an attempt");
        assert!(is_wrong(&Effect::Mail.fate(&young, &delivery("sent", 1), &with(0))), "a mail that was not sent");
        let forgetful = Situation { keeps_mails: false, ..with(0) };
        assert_eq!(Effect::Mail.fate(&young, &delivery("sent", 1), &forgetful), Fate::Done);
        assert!(matches!(Effect::Mail.fate(&young, &delivery("held", 0), &with(0)), Fate::Waits(_)));
    }

    #[test]
    fn an_old_version_in_the_cache_is_wrong() {
        let old = registration(Duration::from_secs(60));
        let cached = |version| Checked { cached: Some(Some(version)), ..Checked::default() };
        assert_eq!(Effect::Cache.fate(&old, &cached(2), &Situation::quiet()), Fate::Done);
        assert!(is_wrong(&Effect::Cache.fate(&old, &cached(1), &Situation::quiet())));
    }
}
