//! Topics on the broker: their owner creates them as declared and refuses to run on one that differs.

use anyhow::{Context, anyhow, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use tokio::time::{Duration, sleep};

use crate::events::Topic;
use crate::service::KafkaConfig;

type Admin = AdminClient<DefaultClientContext>;

const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// The replication factor, and with it `min.insync.replicas`, is the broker's own.
const BROKER_DEFAULT: i32 = -1;

/// Creates what is missing and checks what is there. Waits for Kafka as long as it takes.
///
/// # Errors
/// A topic differs from its declaration in what cannot be mended by waiting.
pub(crate) async fn ensure(kafka: &KafkaConfig, topics: &[Topic]) -> anyhow::Result<()> {
    for topic in topics {
        let name = kafka.prefixed(topic.name);
        ensure_one(kafka, &name, topic.partitions, topic.settings()).await?;
    }
    Ok(())
}

/// The same for one topic, by its full name.
pub(crate) async fn ensure_one(
    kafka: &KafkaConfig,
    name: &str,
    partitions: i32,
    settings: &[(&str, &str)],
) -> anyhow::Result<()> {
    let admin: Admin = kafka.client().create().context("the Kafka settings are wrong")?;
    loop {
        match step(&admin, kafka, name, partitions, settings).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(mismatch)) => return Err(mismatch),
            Err(error) => tracing::warn!(topic = name, error = %format!("{error:#}"), "waiting for Kafka"),
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// Waits until a topic that another service owns is there.
///
/// # Errors
/// It has another number of partitions than this release knows.
pub(crate) async fn exists(kafka: &KafkaConfig, name: &str, partitions: i32) -> anyhow::Result<()> {
    let admin: Admin = kafka.client().create().context("the Kafka settings are wrong")?;
    loop {
        match existing_partitions(&admin, name).await {
            Ok(existing) if existing == partitions => return Ok(()),
            Ok(existing) => bail!("topic {name} has {existing} partitions, this release knows it with {partitions}"),
            Err(error) => tracing::info!(topic = name, error = %format!("{error:#}"), "waiting for the topic"),
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// The outer error may mend itself, the inner one does not. Two owners at once are fine: the second is told that the topic
/// exists.
async fn step(
    admin: &Admin,
    kafka: &KafkaConfig,
    name: &str,
    partitions: i32,
    settings: &[(&str, &str)],
) -> anyhow::Result<anyhow::Result<()>> {
    if kafka.manage_topics {
        let replicas = kafka.kafka_replication_factor.map_or(BROKER_DEFAULT, i32::from);
        let in_sync = (replicas / 2 + 1).to_string();
        let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(replicas));
        topic.config = settings.to_vec();
        if replicas != BROKER_DEFAULT {
            // What is acknowledged is on a majority, and losing one broker of three stops nobody.
            topic.config.push(("min.insync.replicas", &in_sync));
        }
        for result in admin.create_topics([&topic], &options()).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, RDKafkaErrorCode::InvalidReplicationFactor)) => {
                    bail!("cannot create it: there are fewer brokers than KAFKA_REPLICATION_FACTOR asks for")
                }
                Err((_, code)) => bail!("cannot create it: {code}"),
            }
        }
    }
    let existing = existing_partitions(admin, name).await?;
    if existing != partitions {
        return Ok(Err(anyhow!(
            "topic {name} has {existing} partitions, declared are {partitions}; with another number keys change their \
             partition, so move the data to a new topic and name that one in the declaration"
        )));
    }
    let declared = settings.iter().find(|(key, _)| *key == "cleanup.policy").map_or("delete", |(_, value)| value);
    let actual = cleanup_policy(admin, name).await?;
    if actual != declared {
        return Ok(Err(anyhow!(
            "topic {name} has cleanup.policy={actual}, declared is {declared}; alter the topic, or the declaration"
        )));
    }
    Ok(Ok(()))
}

async fn existing_partitions(admin: &Admin, name: &str) -> anyhow::Result<i32> {
    // `fetch_metadata` blocks, for at most its time-out.
    let metadata = tokio::task::block_in_place(|| admin.inner().fetch_metadata(Some(name), ADMIN_TIMEOUT))?;
    let topic = metadata.topics().first().context("no answer about the topic")?;
    match topic.error() {
        None => Ok(i32::try_from(topic.partitions().len())?),
        Some(error) => bail!("it does not exist yet: {}", RDKafkaErrorCode::from(error)),
    }
}

/// Any broker may be asked, and one of several may not have heard of a new topic yet: no value is no answer.
async fn cleanup_policy(admin: &Admin, name: &str) -> anyhow::Result<String> {
    let mut described = admin.describe_configs([&ResourceSpecifier::Topic(name)], &options()).await?;
    let topic = described.pop().context("no answer about the topic's settings")?;
    let topic = topic.map_err(|code| anyhow!("cannot read its settings: {code}"))?;
    topic
        .get("cleanup.policy")
        .and_then(|entry| entry.value.clone())
        .context("this broker does not know its settings yet")
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(ADMIN_TIMEOUT)).operation_timeout(Some(ADMIN_TIMEOUT))
}
