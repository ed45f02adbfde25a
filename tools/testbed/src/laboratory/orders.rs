//! What the control port can be asked for, and the check of a request.

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use serde::Deserialize;
use topology::{SERVICES, Service};

use crate::smtp_sink::{Behaviour, Fault, Stage};
use crate::system::Component;

/// The answer of a slow mail server comes this much later. The email service waits longer.
const SLOW_MS: u64 = 5_000;
/// How many answers are lost. Then the mail server works again: a mail whose answer is lost too
/// often would wait for an operator.
const LOST_ANSWERS: u32 = 3;

/// The body of a request.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Wanted {
    act: String,
    target: String,
    topic: String,
    partition: Option<i32>,
    offset: Option<i64>,
}

/// A checked request.
#[derive(Debug, PartialEq)]
pub enum Wish {
    Order(Order),
    Mail(Behaviour),
    Malformed,
    Again { topic: &'static str, partition: i32, offset: i64 },
}

/// A request about processes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Order {
    pub act: Act,
    pub target: Target,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    Kill,
    Freeze,
    Resume,
    Restart,
    Add,
    Remove,
    Stop,
    Start,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    Service(Service),
    Component(Component),
}

const ACTS: [(&str, Act); 8] = [
    ("kill", Act::Kill),
    ("freeze", Act::Freeze),
    ("resume", Act::Resume),
    ("restart", Act::Restart),
    ("add", Act::Add),
    ("remove", Act::Remove),
    ("stop", Act::Stop),
    ("start", Act::Start),
];
/// What else can be asked for.
const MAIL: &str = "mail";
const MALFORMED: &str = "malformed";
const AGAIN: &str = "again";

impl Wanted {
    /// # Errors
    /// A field is missing or wrong. The error names it.
    pub fn checked(&self) -> Result<Wish> {
        match self.act.as_str() {
            MAIL => Ok(Wish::Mail(behaviour(&self.target)?)),
            MALFORMED => Ok(Wish::Malformed),
            AGAIN => Ok(Wish::Again {
                topic: self.topic()?,
                partition: self
                    .partition
                    .filter(|partition| *partition >= 0)
                    .context("partition: must be 0 or more")?,
                offset: self.offset.filter(|offset| *offset >= 0).context("offset: must be 0 or more")?,
            }),
            other => {
                let act = ACTS.iter().find(|(name, _)| *name == other);
                let (_, act) = act.with_context(|| format!("act: unknown {other:?}; use one of {}", names()))?;
                let target = target(&self.target)?;
                let is_of_service = !matches!(act, Act::Stop | Act::Start);
                ensure!(is_of_service == matches!(target, Target::Service(_)), does_not_apply(*act, target));
                Ok(Wish::Order(Order { act: *act, target }))
            }
        }
    }

    fn topic(&self) -> Result<&'static str> {
        let mut topics = SERVICES.iter().flat_map(|service| service.writes);
        let topic = topics.find(|topic| **topic == self.topic);
        topic.copied().with_context(|| format!("topic: no service writes {:?}", self.topic))
    }
}

fn names() -> String {
    let acts = ACTS.iter().map(|(name, _)| *name).chain([MAIL, MALFORMED, AGAIN]);
    acts.collect::<Vec<_>>().join(", ")
}

fn target(name: &str) -> Result<Target> {
    if let Some(service) = SERVICES.into_iter().find(|service| service.name == name) {
        return Ok(Target::Service(service));
    }
    let component = Component::ALL.into_iter().find(|component| component.name() == name);
    component.map(Target::Component).with_context(|| {
        let services = SERVICES.map(|service| service.name).join(", ");
        let components = Component::ALL.map(Component::name).join(", ");
        format!("target: unknown {name:?}; use one of {services}, {components}")
    })
}

/// What the mail server does from now on.
fn behaviour(name: &str) -> Result<Behaviour> {
    Ok(match name {
        "normal" => Behaviour::default(),
        "slow" => Fault::Slow { ms: SLOW_MS, stage: Stage::Dot }.into(),
        "refusing" => Fault::Refuse.into(),
        "losing" => Fault::DropAfterDot.times(LOST_ANSWERS),
        _ => bail!("target: unknown {name:?}; the mail server can be normal, slow, refusing or losing"),
    })
}

/// The name of what the mail server does.
pub fn name_of(behaviour: &Behaviour) -> &'static str {
    match behaviour.fault {
        Fault::None => "normal",
        Fault::Slow { .. } => "slow",
        Fault::Refuse => "refusing",
        Fault::DropAfterDot => "losing",
        _ => "another fault",
    }
}

pub fn does_not_apply(act: Act, target: Target) -> Error {
    let (target, can) = match target {
        Target::Service(service) => (service.name, "kill, freeze, resume, restart, add, remove"),
        Target::Component(component) => (component.name(), "stop, start"),
    };
    anyhow!("act: {act:?} does not apply to {target}; use one of {can}")
}

#[cfg(test)]
mod tests {
    use topology::EMAIL;

    use super::*;

    fn checked(json: &str) -> Result<Wish> {
        serde_json::from_str::<Wanted>(json).unwrap().checked()
    }

    #[test]
    fn a_request_is_checked_field_by_field() {
        let kill = Order { act: Act::Kill, target: Target::Service(EMAIL) };
        assert_eq!(checked(r#"{"act":"kill","target":"email"}"#).unwrap(), Wish::Order(kill));
        let stop = Order { act: Act::Stop, target: Target::Component(Component::Kafka) };
        assert_eq!(checked(r#"{"act":"stop","target":"kafka"}"#).unwrap(), Wish::Order(stop));
        let again = Wish::Again { topic: "user.state.v1", partition: 3, offset: 17 };
        let json = r#"{"act":"again","topic":"user.state.v1","partition":3,"offset":17}"#;
        assert_eq!(checked(json).unwrap(), again);
    }

    #[test]
    fn an_error_names_the_field() {
        for (json, field) in [
            ("{}", "act:"),
            (r#"{"act":"explode","target":"email"}"#, "act:"),
            (r#"{"act":"kill"}"#, "target:"),
            (r#"{"act":"kill","target":"mars"}"#, "target:"),
            (r#"{"act":"kill","target":"kafka"}"#, "act:"),
            (r#"{"act":"stop","target":"email"}"#, "act:"),
            (r#"{"act":"mail","target":"friendly"}"#, "target:"),
            (r#"{"act":"again","topic":"operator.actions.v1","partition":0,"offset":1}"#, "topic:"),
            (r#"{"act":"again","topic":"user.state.v1","offset":1}"#, "partition:"),
            (r#"{"act":"again","topic":"user.state.v1","partition":0,"offset":-1}"#, "offset:"),
        ] {
            let error = checked(json).unwrap_err().to_string();
            assert!(error.starts_with(field), "{json}: {error}");
        }
    }

    #[test]
    fn the_behaviour_of_the_mail_server_keeps_its_name() {
        for name in ["normal", "slow", "refusing", "losing"] {
            assert_eq!(name_of(&behaviour(name).unwrap()), name);
        }
    }
}
