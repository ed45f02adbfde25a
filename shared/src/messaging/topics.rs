//! Topics on the broker. Their owner creates them as declared, and exits with an error if an
//! existing one differs.

use anyhow::{Context, anyhow, bail};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::RDKafkaErrorCode;
use tokio::time::{Duration, sleep};

use super::kafka::{KafkaConfig, create};
use crate::events::Topic;

type Admin = AdminClient<DefaultClientContext>;

const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Lets the broker choose the replication factor; `min.insync.replicas` then is the broker's
/// default too.
const BROKER_DEFAULT: i32 = -1;

/// Creates missing topics and checks existing ones. Waits for Kafka indefinitely.
///
/// # Errors
/// An existing topic differs from its declaration.
pub(crate) async fn ensure(kafka: &KafkaConfig, topics: &[Topic]) -> anyhow::Result<()> {
    for topic in topics {
        let name = kafka.prefixed(topic.name);
        ensure_one(kafka, &name, topic.partitions, topic.settings()).await?;
    }
    Ok(())
}

/// As [`ensure`], for one topic. `name` is its full name on the broker.
pub(crate) async fn ensure_one(
    kafka: &KafkaConfig,
    name: &str,
    partitions: i32,
    settings: &[(&str, &str)],
) -> anyhow::Result<()> {
    let admin: Admin = create(&kafka.client())?;
    loop {
        match create_and_check(&admin, kafka, name, partitions, settings).await {
            Ok(Check::AsDeclared) => return Ok(()),
            Ok(Check::Differs(how)) => bail!(how),
            Err(error) => {
                tracing::warn!(topic = name, error = %format!("{error:#}"), "cannot create or check the topic; will retry");
            }
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// Waits until a topic exists that another service owns.
///
/// # Errors
/// The topic has another number of partitions than this release expects.
pub(crate) async fn wait_until_exists(kafka: &KafkaConfig, name: &str, partitions: i32) -> anyhow::Result<()> {
    let admin: Admin = create(&kafka.client())?;
    loop {
        match existing_partitions(&admin, name).await {
            Ok(existing) if existing == partitions => return Ok(()),
            Ok(existing) => bail!("topic {name} has {existing} partitions, but this release expects {partitions}"),
            Err(error) => {
                tracing::info!(topic = name, error = %format!("{error:#}"), "the topic does not exist yet; will retry")
            }
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// How a topic compares with its declaration.
enum Check {
    AsDeclared,
    /// It differs. The text says how, and what to do.
    Differs(String),
}

/// Two owners may do this at once: the second gets the answer that the topic exists.
///
/// # Errors
/// Kafka does not answer or refuses the request. The caller retries.
async fn create_and_check(
    admin: &Admin,
    kafka: &KafkaConfig,
    name: &str,
    partitions: i32,
    settings: &[(&str, &str)],
) -> anyhow::Result<Check> {
    if kafka.manage_topics {
        let replicas = kafka.kafka_replication_factor.map_or(BROKER_DEFAULT, i32::from);
        let in_sync = (replicas / 2 + 1).to_string();
        let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(replicas));
        topic.config = settings.to_vec();
        if replicas != BROKER_DEFAULT {
            // A record is acknowledged when a majority of the replicas has it. So producers can
            // continue when one of three brokers is lost.
            topic.config.push(("min.insync.replicas", &in_sync));
        }
        for result in admin.create_topics([&topic], &options()).await? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, RDKafkaErrorCode::InvalidReplicationFactor)) => {
                    bail!("cannot create the topic: the cluster has fewer brokers than KAFKA_REPLICATION_FACTOR")
                }
                Err((_, code)) => bail!("cannot create the topic: {code}"),
            }
        }
    }
    let existing = existing_partitions(admin, name).await?;
    if existing != partitions {
        return Ok(Check::Differs(format!(
            "topic {name} has {existing} partitions, but its declaration has {partitions}. With another number keys move \
             to other partitions, so copy the data to a new topic and declare that one"
        )));
    }
    let declared = settings.iter().find(|(key, _)| *key == "cleanup.policy").map_or("delete", |(_, value)| value);
    let actual = cleanup_policy(admin, name).await?;
    if actual != declared {
        return Ok(Check::Differs(format!(
            "topic {name} has cleanup.policy={actual}, but its declaration has {declared}: alter the topic or the declaration"
        )));
    }
    Ok(Check::AsDeclared)
}

async fn existing_partitions(admin: &Admin, name: &str) -> anyhow::Result<i32> {
    // `fetch_metadata` blocks for at most its time-out.
    let metadata = tokio::task::block_in_place(|| admin.inner().fetch_metadata(Some(name), ADMIN_TIMEOUT))?;
    let topic = metadata.topics().first().context("Kafka sent no metadata of the topic")?;
    match topic.error() {
        None => Ok(i32::try_from(topic.partitions().len())?),
        Some(error) => bail!("no metadata of the topic: {}", RDKafkaErrorCode::from(error)),
    }
}

/// A broker that does not know a new topic yet answers without a value. This is an error, so the
/// caller retries.
async fn cleanup_policy(admin: &Admin, name: &str) -> anyhow::Result<String> {
    let mut described = admin.describe_configs([&ResourceSpecifier::Topic(name)], &options()).await?;
    let topic = described.pop().context("Kafka sent no settings of the topic")?;
    let topic = topic.map_err(|code| anyhow!("cannot read the settings of the topic: {code}"))?;
    topic
        .get("cleanup.policy")
        .and_then(|entry| entry.value.clone())
        .context("the broker does not know the settings of the topic yet")
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(ADMIN_TIMEOUT)).operation_timeout(Some(ADMIN_TIMEOUT))
}
