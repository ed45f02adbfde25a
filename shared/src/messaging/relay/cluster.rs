//! What Kafka's metadata says about topics and partitions. The relay asks before it enqueues a
//! record: a transaction that has touched a partition cannot end, not even by abort, while that
//! partition has no leader or too few in-sync replicas.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use rdkafka::admin::{AdminOptions, ResourceSpecifier};
use rdkafka::error::RDKafkaErrorCode;
use tokio::runtime::Handle as Runtime;

use crate::messaging::topics::Admin;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How old the answer about a topic may be.
const MAX_AGE: Duration = Duration::from_secs(1);
/// How old the answer about a topic's settings may be.
const SETTINGS_MAX_AGE: Duration = Duration::from_secs(60);

pub struct Cluster {
    admin: Arc<Admin>,
    /// By the names on the broker.
    topics: BTreeMap<String, Known>,
}

struct Known {
    asked_at: Instant,
    state: TopicState,
    settings_asked_at: Instant,
    min_in_sync: usize,
}

/// A topic as metadata shows it.
#[derive(Clone, Debug)]
pub enum TopicState {
    /// No record can be written, for this reason.
    Unavailable(String),
    Available {
        partitions: i32,
        /// The partitions that take no records, with the reasons.
        unavailable: BTreeMap<i32, String>,
    },
}

impl Cluster {
    pub fn new(admin: Arc<Admin>) -> Self {
        Self { admin, topics: BTreeMap::new() }
    }

    /// The state of a topic, by its name on the broker, at most a second old.
    ///
    /// # Errors
    /// Kafka does not answer.
    pub fn topic(&mut self, name: &str, runtime: &Runtime) -> anyhow::Result<TopicState> {
        self.known_for(name, MAX_AGE, SETTINGS_MAX_AGE, runtime)
    }

    /// Asks about a topic if the last answer will soon be too old. The relay does so after a round,
    /// so that the next row need not wait for the answer.
    ///
    /// # Errors
    /// Kafka does not answer.
    pub fn renew(&mut self, name: &str, runtime: &Runtime) -> anyhow::Result<()> {
        self.known_for(name, MAX_AGE / 2, SETTINGS_MAX_AGE / 2, runtime).map(drop)
    }

    fn known_for(
        &mut self,
        name: &str,
        max_age: Duration,
        settings_max_age: Duration,
        runtime: &Runtime,
    ) -> anyhow::Result<TopicState> {
        if !is_topic_name(name) {
            // The client would panic for some of these names.
            return Ok(TopicState::Unavailable(RDKafkaErrorCode::InvalidTopic.to_string()));
        }
        let known = self.topics.get(name);
        if let Some(known) = known.filter(|known| known.asked_at.elapsed() < max_age) {
            return Ok(known.state.clone());
        }
        let fresh = known.filter(|known| known.settings_asked_at.elapsed() < settings_max_age);
        let (settings_asked_at, min_in_sync) = match fresh {
            Some(known) => (known.settings_asked_at, known.min_in_sync),
            None => (Instant::now(), runtime.block_on(min_in_sync(&self.admin, name))),
        };
        let state = self.ask(name, min_in_sync)?;
        let known = Known { asked_at: Instant::now(), state: state.clone(), settings_asked_at, min_in_sync };
        self.topics.insert(name.to_owned(), known);
        Ok(state)
    }

    /// Forgets the answer about a topic, because a record was rejected.
    pub fn forget(&mut self, name: &str) {
        self.topics.remove(name);
    }

    fn ask(&self, name: &str, min_in_sync: usize) -> anyhow::Result<TopicState> {
        let metadata = self.admin.inner().fetch_metadata(Some(name), REQUEST_TIMEOUT);
        let metadata = metadata.context("Kafka does not answer a request for metadata")?;
        let topic = metadata.topics().first().context("Kafka sent no metadata of the topic")?;
        if let Some(error) = topic.error() {
            return Ok(TopicState::Unavailable(RDKafkaErrorCode::from(error).to_string()));
        }
        let partitions = topic.partitions();
        let unavailable = partitions.iter().filter_map(|partition| {
            let reason = if partition.leader() < 0 {
                "it has no leader".to_owned()
            } else if partition.isr().len() < min_in_sync {
                format!("{} in-sync replicas, but min.insync.replicas is {min_in_sync}", partition.isr().len())
            } else {
                return None;
            };
            Some((partition.id(), reason))
        });
        let unavailable = unavailable.collect();
        Ok(TopicState::Available { partitions: i32::try_from(partitions.len())?, unavailable })
    }
}

/// Kafka's rule for the names of topics.
fn is_topic_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=249).contains(&name.len()) && name.chars().all(allowed) && name != "." && name != ".."
}

/// The topic's `min.insync.replicas`; 1 if Kafka does not tell.
async fn min_in_sync(admin: &Admin, name: &str) -> usize {
    let options = AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT));
    let described = admin.describe_configs([&ResourceSpecifier::Topic(name)], &options).await;
    let topic = described.ok().and_then(|mut described| described.pop()?.ok());
    let value = topic.and_then(|topic| topic.get("min.insync.replicas")?.value.clone());
    value.and_then(|value| value.parse().ok()).unwrap_or(1)
}
