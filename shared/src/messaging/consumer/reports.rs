//! Reports why a consumer does not handle some records while it handles others: in `/status`, as a
//! metric, and once in the log. None of it makes the process unready.

use prometheus_client::metrics::gauge::Gauge;

use super::reading::Oldest;
use crate::platform::health::Health;
use crate::platform::metrics::{GroupLabels, Metrics, PartitionLabels, RebalanceLabels, RefusalLabels, WaitLabels};

/// Why the records of a partition wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// The next record fails each time, although the handler's dependency answers.
    FailingRecord,
    /// The broker does not let the client read the partition, or the partition has no leader.
    NotRead,
    /// Another program has left a transaction open.
    OpenTransaction,
}

impl Wait {
    const ALL: [Self; 3] = [Self::FailingRecord, Self::NotRead, Self::OpenTransaction];

    /// The label of the metric, and a part of the component's name.
    fn name(self) -> &'static str {
        match self {
            Self::FailingRecord => "failing_record",
            Self::NotRead => "not_read",
            Self::OpenTransaction => "open_transaction",
        }
    }
}

/// The reports of one consumer.
pub(super) struct Reports {
    pub group: &'static str,
    /// The consumer's name in `/status`.
    pub consumer: String,
    pub topic: String,
    pub health: Health,
    pub metrics: Metrics,
}

impl Reports {
    /// Reports that the records of a partition wait for this reason.
    pub fn waits(&self, partition: i32, wait: Wait, reason: &str) {
        self.health.report(&self.component(partition, wait), reason);
        self.metrics.consumer_partition_waits.get_or_create(&self.wait_labels(partition, wait)).set(1);
    }

    /// Reports that the records of a partition do not wait for this reason any more.
    pub fn continues(&self, partition: i32, wait: Wait) {
        self.health.resolved(&self.component(partition, wait));
        self.metrics.consumer_partition_waits.remove(&self.wait_labels(partition, wait));
    }

    /// Reports that Kafka refuses requests of the consumer with these codes.
    pub fn refuses(&self, codes: &[&str]) {
        let codes = codes.join(", ");
        let reason = format!("an operator: Kafka refuses requests of this consumer with {codes}");
        self.health.report(&self.refusals(), reason);
    }

    pub fn count_refusal(&self, code: &str) {
        let labels = RefusalLabels { group: self.group.to_owned(), code: code.to_owned() };
        self.metrics.consumer_refusals.get_or_create(&labels).inc();
    }

    /// Ends the report about refused requests.
    pub fn accepts(&self) {
        self.health.resolved(&self.refusals());
    }

    /// Counts a change of the assignment.
    pub fn count_rebalance(&self, action: &'static str) {
        let labels = RebalanceLabels { group: self.group.to_owned(), action };
        self.metrics.consumer_rebalances.get_or_create(&labels).inc();
    }

    /// Counts partitions that the consumer reads from now on.
    pub fn count_started(&self, partitions: usize) {
        self.partitions().inc_by(partitions as i64);
    }

    /// Counts partitions that the consumer does not read any more.
    pub fn count_stopped(&self, partitions: usize) {
        self.partitions().dec_by(partitions as i64);
    }

    pub fn lag(&self, partition: i32, records: i64) {
        self.metrics.consumer_lag.get_or_create(&self.labels(partition)).set(records);
    }

    /// Reports the age of the lag.
    pub fn oldest(&self, partition: i32, oldest: Oldest) {
        let labels = self.labels(partition);
        let ages = &self.metrics.consumer_lag_seconds;
        match oldest {
            Oldest::None => ages.get_or_create(&labels).set_zero(),
            Oldest::Since(moment_ms) => ages.get_or_create(&labels).set(moment_ms),
            Oldest::AboutToPoll => {}
            Oldest::Unknown => {
                ages.remove(&labels);
            }
        }
    }

    /// Removes the lag of a partition whose end is not known.
    pub fn forget_records(&self, partition: i32) {
        self.metrics.consumer_lag.remove(&self.labels(partition));
    }

    /// Removes the lag of a partition: another consumer has the partition and reports its lag.
    pub fn forget_lag(&self, partition: i32) {
        self.forget_records(partition);
        self.oldest(partition, Oldest::Unknown);
    }

    /// Ends the reports about a partition that the client stopped reading.
    pub fn stopped(&self, partition: i32) {
        for wait in Wait::ALL {
            self.continues(partition, wait);
        }
        self.oldest(partition, Oldest::Unknown);
    }

    fn component(&self, partition: i32, wait: Wait) -> String {
        format!("{} partition {partition} {}", self.consumer, wait.name())
    }

    fn refusals(&self) -> String {
        format!("{} refused", self.consumer)
    }

    fn partitions(&self) -> Gauge {
        self.metrics.consumer_partitions.get_or_create_owned(&GroupLabels { group: self.group.to_owned() })
    }

    fn labels(&self, partition: i32) -> PartitionLabels {
        PartitionLabels { group: self.group.to_owned(), topic: self.topic.clone(), partition }
    }

    fn wait_labels(&self, partition: i32, wait: Wait) -> WaitLabels {
        WaitLabels { group: self.group.to_owned(), topic: self.topic.clone(), partition, reason: wait.name() }
    }
}
