//! What the console asks Kafka. It joins no group, commits nothing and writes nothing.

mod offsets;
mod record;
mod tail;
mod history;

use std::time::Duration;

use shared::messaging::KafkaConfig;
use topology::SERVICES;

pub use history::LOOKED_BACK;
pub use offsets::{Offsets, watch_offsets};
pub use record::{Content, Found, Reader};
pub use tail::{KEPT, Recent, Seen, follow};

/// The group id of the console's readers. librdkafka requires one. The console never joins the
/// group.
const GROUP: &str = "console";
/// How long Kafka may take to answer a question.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Every topic that a service writes.
pub fn topics() -> Vec<&'static str> {
    SERVICES.iter().flat_map(|service| service.writes).copied().collect()
}

/// The logical name of a topic on the broker.
fn logical(kafka: &KafkaConfig, name: &str) -> Option<&'static str> {
    topics().into_iter().find(|topic| kafka.prefixed(topic) == name)
}
