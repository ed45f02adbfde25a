//! The subcommand `create-topics`.

use crate::events::Topic;
use crate::messaging::{self, Declared, KafkaConfig, Topics};

/// Creates the topics that a service owns, the dead-letter topics of its consumer groups and, if it
/// has any, the topic of the operators' actions. Checks those that exist. An operator runs it with
/// a login that may create topics, so that the service does not need this right. Safe to repeat.
///
/// # Errors
/// Kafka refuses a topic or does not answer, or an existing topic differs from its declaration.
#[expect(clippy::print_stdout, reason = "the output of the subcommand")]
pub async fn create_topics(kafka: &KafkaConfig, topics: &[Topic], groups: &[&str]) -> anyhow::Result<()> {
    let owned = topics.iter().map(|topic| Declared::of(kafka, topic));
    let dead_letters = groups.iter().map(|group| messaging::dead_letter_topic(kafka, group));
    let actions = (!groups.is_empty()).then(|| messaging::actions_topic(kafka));
    let declared: Vec<Declared> = owned.chain(dead_letters).chain(actions).collect();
    Topics::create_now(kafka, &declared).await?;
    for topic in declared {
        println!("{} exists as declared", topic.name);
    }
    Ok(())
}
