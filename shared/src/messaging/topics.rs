//! Topics on the broker. Their owner creates them as declared and compares existing ones with the
//! declaration. At its start the owner exits with an error if records would be lost. While it runs,
//! it reports differences and continues.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use rdkafka::admin::{AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::metadata::Metadata;
use tokio::time::{Duration, Instant, sleep};

use super::kafka::{KafkaConfig, create};
use crate::events::{Kind, Topic};
use crate::platform::health::Health;
use crate::platform::metrics::{Metrics, TopicLabels};

/// A client that administers topics. Its calls may be made by several threads at the same time.
pub(super) type Admin = AdminClient<DefaultClientContext>;

const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How often the settings of topics are compared while the service runs.
const WATCH_INTERVAL: Duration = Duration::from_secs(15);
/// How long the subcommand `create-topics` tries.
const CREATE_LIMIT: Duration = Duration::from_secs(30);
/// Lets the broker choose the replication factor.
const BROKER_DEFAULT: i32 = -1;
const CLEANUP_POLICY: &str = "cleanup.policy";
const MIN_IN_SYNC: &str = "min.insync.replicas";
/// If one of these settings differs, Kafka deletes records that must be kept, or loses records that
/// it has acknowledged.
const KEEPING: [&str; 5] =
    [CLEANUP_POLICY, "retention.ms", "retention.bytes", "unclean.leader.election.enable", MIN_IN_SYNC];
/// From this number of replicas on, the service does not start if fewer than the majority must
/// acknowledge a record. With fewer replicas this is only reported.
const MANY_REPLICAS: usize = 3;

/// A topic as its owner declares it.
#[derive(Clone)]
pub(crate) struct Declared {
    /// The full name on the broker.
    pub name: String,
    pub partitions: i32,
    /// Whether the topic may have more partitions.
    pub may_grow: bool,
    pub settings: &'static [(&'static str, &'static str)],
}

impl Declared {
    /// Facts may have more partitions than declared: their effects commute. The number of
    /// partitions of a state topic never changes.
    pub fn of(kafka: &KafkaConfig, topic: &Topic) -> Self {
        Self {
            name: kafka.prefixed(topic.name),
            partitions: topic.partitions,
            may_grow: topic.kind == Kind::Facts,
            settings: topic.settings(),
        }
    }

    fn has_partitions(&self, existing: i32) -> bool {
        existing == self.partitions || (self.may_grow && existing > self.partitions)
    }
}

/// The topics of the cluster. Clones share one Kafka client: each client has threads and
/// connections of its own.
#[derive(Clone)]
pub(crate) struct Topics {
    kafka: KafkaConfig,
    admin: Arc<Admin>,
}

impl Topics {
    /// # Errors
    /// The Kafka settings are invalid.
    pub fn new(kafka: &KafkaConfig) -> anyhow::Result<Self> {
        Ok(Self { kafka: kafka.clone(), admin: Arc::new(create(&kafka.client())?) })
    }

    pub fn admin(&self) -> Arc<Admin> {
        Arc::clone(&self.admin)
    }

    /// Creates missing topics and checks existing ones. Waits for Kafka indefinitely.
    ///
    /// # Errors
    /// An existing topic differs from its declaration in a way that would lose records.
    pub async fn ensure(&self, topics: &[Declared]) -> anyhow::Result<()> {
        self.ensure_until(topics, None).await
    }

    /// As [`Topics::ensure`], for an operator: creates topics whatever MANAGE_TOPICS says, and
    /// gives up after half a minute.
    ///
    /// # Errors
    /// As [`Topics::ensure`]; Kafka refuses the request, or does not answer.
    pub async fn create_now(kafka: &KafkaConfig, topics: &[Declared]) -> anyhow::Result<()> {
        kafka.check()?;
        let mut kafka = kafka.clone();
        kafka.manage_topics = true;
        Self::new(&kafka)?.ensure_until(topics, Some(Instant::now() + CREATE_LIMIT)).await
    }

    async fn ensure_until(&self, topics: &[Declared], deadline: Option<Instant>) -> anyhow::Result<()> {
        for topic in topics {
            let mut logged = None;
            loop {
                match create_and_check(&self.admin, &self.kafka, topic).await {
                    Ok(differences) if differences.refused.is_empty() => break,
                    Ok(differences) => bail!(
                        "topic {} {}: alter the topic, or the declaration, and start the service again",
                        topic.name,
                        differences.refused.join(", and ")
                    ),
                    Err(error) if deadline.is_some_and(|deadline| Instant::now() > deadline) => {
                        return Err(error.context(format!("topic {}", topic.name)));
                    }
                    Err(error) => warn_once(&mut logged, topic, &error, "cannot create or check the topic; will retry"),
                }
                sleep(RETRY_INTERVAL).await;
            }
        }
        Ok(())
    }

    /// Compares the topics with their declarations while the service runs. Reports differences in
    /// `/status`, as a metric, and when they change in the log. Never ends.
    pub async fn watch(&self, topics: &[Declared], health: &Health, metrics: &Metrics) -> anyhow::Result<()> {
        let mut reported: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let mut missing: BTreeSet<&str> = BTreeSet::new();
        loop {
            for topic in topics {
                let differences = match existing(&self.admin, &topic.name).await {
                    Ok(Some(existing)) => {
                        missing.remove(topic.name.as_str());
                        compare(topic, &existing).all()
                    }
                    // A broker of several may not know a new topic yet. So the topic counts as deleted
                    // only if it is missing twice in a row.
                    Ok(None) if missing.insert(topic.name.as_str()) => continue,
                    Ok(None) => vec!["does not exist any more".to_owned()],
                    Err(error) => {
                        tracing::debug!(topic = topic.name, error = %format!("{error:#}"), "cannot check the topic; will retry");
                        continue;
                    }
                };
                // Also 0, so that a query that adds it to other series has an answer.
                let labels = TopicLabels { topic: topic.name.clone() };
                metrics.topic_settings_changed.get_or_create(&labels).set(differences.len() as i64);
                let known = reported.insert(&topic.name, differences.clone()).unwrap_or_default();
                if known != differences {
                    report(topic, &differences, health);
                }
            }
            sleep(WATCH_INTERVAL).await;
        }
    }

    /// Waits until a topic exists that another service owns.
    ///
    /// # Errors
    /// The topic has another number of partitions than this release can read.
    pub async fn wait_until_exists(&self, topic: &Declared) -> anyhow::Result<()> {
        let mut logged = None;
        loop {
            match existing_partitions(&self.admin, &topic.name) {
                Ok(Some((existing, _))) if topic.has_partitions(existing) => return Ok(()),
                Ok(Some((existing, _))) => {
                    bail!(
                        "topic {} has {existing} partitions, but this release expects {}",
                        topic.name,
                        topic.partitions
                    )
                }
                Ok(None) => {
                    warn_once(&mut logged, topic, &anyhow!("it does not exist"), "cannot find the topic; will retry")
                }
                Err(error) => warn_once(&mut logged, topic, &error, "cannot find the topic; will retry"),
            }
            sleep(RETRY_INTERVAL).await;
        }
    }
}

fn report(topic: &Declared, differences: &[String], health: &Health) {
    let component = format!("topic {}", topic.name);
    if differences.is_empty() {
        tracing::info!(topic = topic.name, "the topic is as declared again");
        health.resolved(&component);
    } else {
        tracing::error!(topic = topic.name, ?differences, "the topic differs from its declaration; alter the topic");
        health.report(&component, format!("an operator: the topic {}", differences.join(", and ")));
    }
}

/// Logs an error, unless it is the one that was logged last.
fn warn_once(logged: &mut Option<String>, topic: &Declared, error: &anyhow::Error, message: &'static str) {
    let error = format!("{error:#}");
    if logged.as_ref() != Some(&error) {
        tracing::warn!(topic = topic.name, error, "{message}");
        *logged = Some(error);
    }
}

/// Two owners may do this at once: the second gets the answer that the topic exists.
///
/// # Errors
/// Kafka does not answer or refuses the request. The caller retries.
async fn create_and_check(admin: &Admin, kafka: &KafkaConfig, topic: &Declared) -> anyhow::Result<Differences> {
    if kafka.manage_topics {
        create_missing(admin, kafka, topic).await?;
    }
    let existing = existing(admin, &topic.name).await?.context("it does not exist")?;
    Ok(compare(topic, &existing))
}

async fn create_missing(admin: &Admin, kafka: &KafkaConfig, topic: &Declared) -> anyhow::Result<()> {
    if existing_partitions(admin, &topic.name)?.is_some() {
        return Ok(());
    }
    let replicas = match kafka.kafka_replication_factor {
        Some(replicas) => i32::from(replicas),
        None => default_replicas(admin, &topic.name).await.unwrap_or(BROKER_DEFAULT),
    };
    let in_sync = (replicas / 2 + 1).to_string();
    let mut new = NewTopic::new(&topic.name, topic.partitions, TopicReplication::Fixed(replicas));
    new.config = topic.settings.to_vec();
    if replicas != BROKER_DEFAULT {
        // A record is acknowledged when a majority of the replicas has it. So producers can
        // continue when one of three brokers is lost, and what was acknowledged survives the loss.
        new.config.push((MIN_IN_SYNC, &in_sync));
    }
    for result in admin.create_topics([&new], &options()).await? {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((_, RDKafkaErrorCode::InvalidReplicationFactor)) => {
                bail!("cannot create the topic: the cluster has fewer brokers than KAFKA_REPLICATION_FACTOR")
            }
            Err((_, code)) => bail!("cannot create the topic: {code}"),
        }
    }
    Ok(())
}

/// The brokers' `default.replication.factor`. `None` if Kafka does not answer.
async fn default_replicas(admin: &Admin, name: &str) -> Option<i32> {
    let broker = metadata(admin, name).ok()?.brokers().first()?.id();
    let settings = settings(admin, ResourceSpecifier::Broker(broker)).await.ok()?;
    settings.get("default.replication.factor")?.parse().ok()
}

/// How a topic differs from its declaration.
#[derive(Debug, Default, PartialEq, Eq)]
struct Differences {
    /// Differences that would lose records.
    refused: Vec<String>,
    /// All others.
    reported: Vec<String>,
}

impl Differences {
    fn all(self) -> Vec<String> {
        self.refused.into_iter().chain(self.reported).collect()
    }
}

/// A topic on the broker.
struct Existing {
    partitions: i32,
    /// Replicas of the partition that has the fewest.
    replicas: usize,
    settings: BTreeMap<String, String>,
}

/// Compares the number of partitions and every declared setting.
fn compare(topic: &Declared, existing: &Existing) -> Differences {
    let mut differences = Differences::default();
    if !topic.has_partitions(existing.partitions) {
        differences.refused.push(format!(
            "has {} partitions, but its declaration has {}. With another number keys move to other partitions, so copy the \
             data to a new topic and declare that one",
            existing.partitions, topic.partitions
        ));
    }
    for (name, declared) in topic.settings {
        let actual = existing.settings.get(*name).map_or("no value", String::as_str);
        if actual != *declared {
            let lists = if KEEPING.contains(name) { &mut differences.refused } else { &mut differences.reported };
            lists.push(format!("has {name}={actual}, but its declaration has {declared}"));
        }
    }
    let majority = existing.replicas / 2 + 1;
    let in_sync = existing.settings.get(MIN_IN_SYNC).and_then(|value| value.parse().ok()).unwrap_or(1);
    if in_sync < majority {
        let lists =
            if existing.replicas >= MANY_REPLICAS { &mut differences.refused } else { &mut differences.reported };
        lists.push(format!("has {MIN_IN_SYNC}={in_sync} with {} replicas, but needs {majority}", existing.replicas));
    }
    differences
}

/// `None`: the topic does not exist.
async fn existing(admin: &Admin, name: &str) -> anyhow::Result<Option<Existing>> {
    let Some((partitions, replicas)) = existing_partitions(admin, name)? else { return Ok(None) };
    let settings = settings(admin, ResourceSpecifier::Topic(name)).await?;
    // A broker that does not know a new topic yet answers without values, and so does one that
    // refuses the request: rust-rdkafka drops the code. This is an error, so the caller retries.
    anyhow::ensure!(
        settings.contains_key(CLEANUP_POLICY),
        "Kafka sent no settings of the topic: it does not know them yet, or this service may not see them (DescribeConfigs)"
    );
    Ok(Some(Existing { partitions, replicas, settings }))
}

/// How many partitions a topic has, and how many replicas. `None`: the topic does not exist.
fn existing_partitions(admin: &Admin, name: &str) -> anyhow::Result<Option<(i32, usize)>> {
    let metadata = metadata(admin, name)?;
    let topic = metadata.topics().first().context("Kafka sent no metadata of the topic")?;
    match topic.error().map(RDKafkaErrorCode::from) {
        None => {
            let replicas = topic.partitions().iter().map(|partition| partition.replicas().len()).min();
            Ok(Some((i32::try_from(topic.partitions().len())?, replicas.unwrap_or(0))))
        }
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => Ok(None),
        Some(code) => bail!("no metadata of the topic: {code}"),
    }
}

fn metadata(admin: &Admin, name: &str) -> anyhow::Result<Metadata> {
    // `fetch_metadata` blocks for at most its time-out.
    Ok(tokio::task::block_in_place(|| admin.inner().fetch_metadata(Some(name), ADMIN_TIMEOUT))?)
}

async fn settings(admin: &Admin, resource: ResourceSpecifier<'_>) -> anyhow::Result<BTreeMap<String, String>> {
    let mut described = admin.describe_configs([&resource], &options()).await?;
    let described = described.pop().context("Kafka sent no settings")?;
    let ConfigResource { entries, .. } = described.map_err(|code| anyhow!("cannot read the settings: {code}"))?;
    Ok(entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?))).collect())
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(ADMIN_TIMEOUT)).operation_timeout(Some(ADMIN_TIMEOUT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn existing_as(topic: &Topic) -> Existing {
        let settings = topic.settings().iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Existing { partitions: topic.partitions, replicas: 1, settings: settings.collect() }
    }

    fn compared(topic: &Topic, change: impl FnOnce(&mut Existing)) -> (usize, usize) {
        let declared = Declared {
            name: topic.name.to_owned(),
            partitions: topic.partitions,
            may_grow: topic.kind == Kind::Facts,
            settings: topic.settings(),
        };
        let mut existing = existing_as(topic);
        change(&mut existing);
        let differences = compare(&declared, &existing);
        (differences.refused.len(), differences.reported.len())
    }

    #[test]
    fn every_declared_setting_is_compared() {
        for topic in Topic::ALL {
            assert_eq!(compared(&topic, |_| {}), (0, 0), "{}", topic.name);
            for (name, _) in topic.settings() {
                let refused = usize::from(KEEPING.contains(name));
                let changed =
                    |existing: &mut Existing| drop(existing.settings.insert((*name).to_owned(), "7".to_owned()));
                assert_eq!(compared(&topic, changed), (refused, 1 - refused), "{} {name}", topic.name);
                let missing = |existing: &mut Existing| drop(existing.settings.remove(*name));
                assert_eq!(compared(&topic, missing), (refused, 1 - refused), "{} without {name}", topic.name);
            }
        }
    }

    #[test]
    fn facts_may_have_more_partitions_and_states_may_not() {
        assert_eq!(compared(&Topic::USER_EVENTS, |existing| existing.partitions = 12), (0, 0));
        assert_eq!(compared(&Topic::USER_EVENTS, |existing| existing.partitions = 5), (1, 0));
        assert_eq!(compared(&Topic::USER_STATE, |existing| existing.partitions = 12), (1, 0));
    }

    #[test]
    fn of_three_replicas_two_acknowledge_a_record() {
        let with = |replicas: usize, in_sync: &str| {
            compared(&Topic::USER_EVENTS, |existing| {
                existing.replicas = replicas;
                existing.settings.insert(MIN_IN_SYNC.to_owned(), in_sync.to_owned());
            })
        };
        assert_eq!((with(1, "1"), with(2, "2"), with(3, "2"), with(3, "3")), ((0, 0), (0, 0), (0, 0), (0, 0)));
        assert_eq!((with(2, "1"), with(3, "1"), with(5, "2")), ((0, 1), (1, 0), (1, 0)));
    }
}
