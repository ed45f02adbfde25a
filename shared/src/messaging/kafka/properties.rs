//! KAFKA_PROPERTY: properties of librdkafka that have no setting of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Debug, Formatter};

use anyhow::ensure;
use clap::Args;

/// Properties of librdkafka that have two names (`CONFIGURATION.md`, "Alias for"): the other name,
/// and the one to compare.
const ALIASES: [(&str, &str); 10] = [
    ("metadata.broker.list", "bootstrap.servers"),
    ("max.in.flight", "max.in.flight.requests.per.connection"),
    ("sasl.mechanisms", "sasl.mechanism"),
    ("fetch.message.max.bytes", "max.partition.fetch.bytes"),
    ("queue.buffering.max.ms", "linger.ms"),
    ("message.send.max.retries", "retries"),
    ("compression.codec", "compression.type"),
    ("request.required.acks", "acks"),
    ("delivery.timeout.ms", "message.timeout.ms"),
    ("auto.commit.enable", "enable.auto.commit"),
];

/// The name to compare of a property that may have two.
fn unaliased(name: &str) -> &str {
    ALIASES.iter().find(|(other, _)| *other == name).map_or(name, |(_, name)| name)
}

/// The documentation of librdkafka lists the properties (`CONFIGURATION.md`).
#[derive(Args, Clone)]
pub(super) struct PropertyConfig {
    /// A property of librdkafka, `name=value`. Repeat the flag for more, or write one property a
    /// line into the environment variable. Properties that the service sets itself are refused.
    #[arg(long = "kafka-property", env = "KAFKA_PROPERTY", hide_env_values = true, value_delimiter = '\n',
          value_parser = property)]
    kafka_property: Vec<(String, String)>,
}

fn property(line: &str) -> Result<(String, String), &'static str> {
    let line = line.trim();
    if line.is_empty() {
        return Ok((String::new(), String::new())); // a line break at the end
    }
    let (name, value) =
        line.split_once('=').ok_or("a property is name=value, for example socket.keepalive.enable=true")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// Only the names: a value may be a password.
impl Debug for PropertyConfig {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|(name, _)| name)).finish()
    }
}

impl PropertyConfig {
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let given = self.kafka_property.iter().filter(|(name, _)| !name.is_empty());
        given.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// `kinds` are the properties that our own clients set.
    ///
    /// # Errors
    /// A property is one of ours, or it would load code.
    pub fn check<'a>(&self, kinds: impl Iterator<Item = BTreeMap<&'a str, &'a str>>) -> anyhow::Result<()> {
        let ours: BTreeSet<&str> = kinds.flat_map(BTreeMap::into_keys).map(unaliased).collect();
        for (name, _) in self.iter() {
            ensure!(name != "plugin.library.paths", "KAFKA_PROPERTY: {name} is refused, because it would load code");
            ensure!(
                !ours.contains(unaliased(name)),
                "KAFKA_PROPERTY: {name} is refused, because the service sets it itself; look for a setting in --help"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_property_is_refused_under_both_of_its_names() {
        for (other, name) in ALIASES {
            for (given, ours) in [(other, name), (name, other), (name, name)] {
                let given = PropertyConfig { kafka_property: vec![(given.to_owned(), "1".to_owned())] };
                let kinds = || [BTreeMap::from([(ours, "2")])].into_iter();
                assert!(given.check(kinds()).is_err(), "{given:?} although {ours} is set");
            }
        }
    }
}
