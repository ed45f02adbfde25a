//! The client settings of every kind of client, in one place: KAFKA_PROPERTY may set every property
//! of librdkafka except these.

use rdkafka::ClientConfig;

use super::KafkaConfig;

/// Readers of committed records wait at most this long (ms) for a transaction whose leader died.
const TRANSACTION_TIMEOUT_MS: &str = "10000";
/// A round of the relay fails if a record is not acknowledged within this time (ms). Below the
/// transaction's time-out.
const ROUND_DELIVERY_TIMEOUT_MS: &str = "8000";
/// A topic that is unknown for this long (ms) does not exist. Below the delivery time-out.
const ROUND_TOPIC_UNKNOWN_MS: &str = "4000";
/// How long a dead letter may take to be acknowledged (ms).
const LETTER_DELIVERY_TIMEOUT_MS: &str = "10000";
/// How long the writer of dead letters waits for an unknown topic before it fails (ms). The client's
/// default of 30 s allows for a topic that was just created.
const LETTER_TOPIC_UNKNOWN_MS: &str = "2000";
/// Bytes. The largest record that a topic accepts by default has 1 MiB. Its letter has a few more
/// headers.
pub(in crate::messaging) const LETTER_MAX_BYTES: &str = "2097152";
/// Bytes. librdkafka compares a record with its limit before it compresses it; the broker compares
/// the compressed batch. A record may have come from another client with a higher limit of its own.
const LETTER_MAX_UNCOMPRESSED_BYTES: &str = "67108864";
/// How long (ms) Kafka waits before it reports to a replay that an empty partition has no more
/// records.
const REPLAY_FETCH_WAIT_MS: &str = "20";
/// Bytes of a partition in one answer to a consumer, compressed. A thousand small events, or one
/// larger batch of a producer. With librdkafka's default of 1 MiB the records of six partitions took
/// 60 MB, because `queued.max.messages.kbytes` counts neither headers nor the overhead of a record.
/// With less, the partitions also advance more evenly, and the ids of a batch are closer together in
/// the indexes.
const PARTITION_FETCH_BYTES: &str = "131072";
/// How long (ms) the client waits before it fetches again from a partition whose queue was full. With
/// librdkafka's default of 1 s a consumer with a backlog handled its queue in 0.2 s and then waited.
const FETCH_AGAIN_MS: &str = "10";

impl KafkaConfig {
    /// Every kind of client, to find out which properties are ours.
    pub(super) fn kinds(&self) -> Vec<ClientConfig> {
        vec![
            self.own_client(),
            self.own_member("", 0),
            self.own_reader(""),
            self.own_redriver(""),
            self.own_replay(""),
            self.own_transactions(""),
            self.own_letters(),
        ]
    }

    /// A client that neither reads nor writes records.
    pub fn client(&self) -> ClientConfig {
        self.with_properties(self.own_client())
    }

    /// A member of a consumer group. `number` distinguishes the members of this process.
    pub fn group_member(&self, group: &str, number: u16) -> ClientConfig {
        self.with_properties(self.own_member(group, number))
    }

    /// A consumer that joins no group and commits nothing: it assigns partitions to itself. An offset
    /// that Kafka does not have is an error. librdkafka requires a group id nevertheless, and looks
    /// for the coordinator of that group. So `group` is one of the service's own groups: the service
    /// has rights on no other.
    pub fn reader(&self, group: &str) -> ClientConfig {
        self.with_properties(self.own_reader(group))
    }

    /// As [`KafkaConfig::reader`], for records that may have been compacted away. The reader then
    /// gets a later record, and recognises it by its offset.
    pub fn redriver(&self, group: &str) -> ClientConfig {
        self.with_properties(self.own_redriver(group))
    }

    /// As [`KafkaConfig::reader`], for a whole topic.
    pub fn replay(&self, group: &str) -> ClientConfig {
        self.with_properties(self.own_replay(group))
    }

    /// The producer of a relay's leader.
    pub fn transactions(&self, transactional_id: &str) -> ClientConfig {
        self.with_properties(self.own_transactions(transactional_id))
    }

    /// The producer of dead letters and of the actions of operators.
    pub fn letters(&self) -> ClientConfig {
        self.with_properties(self.own_letters())
    }

    fn own_client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client
            .set("bootstrap.servers", &self.kafka_brokers)
            .set("client.id", self.kafka_client_id.as_deref().unwrap_or("waybill"))
            .set("allow.auto.create.topics", "false")
            // The longest wait (ms) before the next connection attempt after an outage;
            // librdkafka's default is 10 s.
            .set("reconnect.backoff.max.ms", "1000")
            // A frozen broker keeps its connections open and does not answer. After this time (ms)
            // the client tries another broker; the default is a minute. librdkafka allows no more
            // than the relay's transaction.timeout.ms.
            .set("socket.timeout.ms", "10000");
        if let Some(rack) = &self.kafka_client_rack {
            client.set("client.rack", rack);
        }
        self.security.apply(&mut client);
        client
    }

    fn own_member(&self, group: &str, number: u16) -> ClientConfig {
        let mut member = self.own_client();
        member
            .set("group.id", self.prefixed(group))
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("isolation.level", "read_committed")
            // Commits the offsets that we store.
            .set("enable.auto.commit", "true")
            .set("enable.auto.offset.store", "false")
            .set("auto.commit.interval.ms", self.offset_commit_ms.to_string())
            // We choose the start of every partition. An offset that Kafka does not have is an
            // error and skips nothing.
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("session.timeout.ms", "10000")
            .set("max.poll.interval.ms", self.max_poll_interval().as_millis().to_string())
            .set("statistics.interval.ms", "500")
            // A group that forms before a broker knows the new topic gets no partitions. It looks
            // again after this time (ms); librdkafka's default is five minutes.
            .set("topic.metadata.refresh.interval.ms", "5000")
            // Two bounds on memory: bytes of the whole queue, and records per partition, because
            // the bytes do not count the overhead of a record. The default of 100,000 small records
            // exceeded the memory of a container.
            .set("queued.max.messages.kbytes", "16384")
            .set("queued.min.messages", "1000")
            .set("max.partition.fetch.bytes", PARTITION_FETCH_BYTES)
            .set("fetch.queue.backoff.ms", FETCH_AGAIN_MS)
            .set("fetch.wait.max.ms", "100");
        if let Some(id) = &self.kafka_group_instance_id {
            member.set("group.instance.id", format!("{id}-{number}"));
        }
        member
    }

    fn own_reader(&self, group: &str) -> ClientConfig {
        let mut reader = self.own_client();
        reader
            .set("group.id", self.prefixed(group))
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("isolation.level", "read_committed")
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            // As for a member of a group. The bytes do not count the overhead of a record, and a table
            // of dead letters has many small ones.
            .set("queued.max.messages.kbytes", "16384")
            .set("queued.min.messages", "1000")
            .set("fetch.queue.backoff.ms", FETCH_AGAIN_MS);
        reader
    }

    fn own_redriver(&self, group: &str) -> ClientConfig {
        let mut reader = self.own_reader(group);
        reader.set("auto.offset.reset", "earliest");
        reader
    }

    fn own_replay(&self, group: &str) -> ClientConfig {
        let mut reader = self.own_reader(group);
        reader.set("fetch.wait.max.ms", REPLAY_FETCH_WAIT_MS).set("queued.min.messages", "100000");
        reader
    }

    /// Java clients choose partitions by murmur2; librdkafka's default would choose others.
    fn own_producer(&self) -> ClientConfig {
        let mut producer = self.own_client();
        producer
            .set("partitioner", "murmur2_random")
            .set("enable.idempotence", "true")
            .set("acks", "all")
            // JSON becomes much smaller, on the network and on the brokers' disks.
            .set("compression.type", "zstd");
        producer
    }

    fn own_transactions(&self, transactional_id: &str) -> ClientConfig {
        let mut producer = self.own_producer();
        producer
            .set("transactional.id", self.prefixed(transactional_id))
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT_MS)
            .set("message.timeout.ms", ROUND_DELIVERY_TIMEOUT_MS)
            .set("topic.metadata.propagation.max.ms", ROUND_TOPIC_UNKNOWN_MS)
            // The relay counts what is in flight. A report of each delivered record would cost as much
            // as reading its row.
            .set("delivery.report.only.error", "true")
            .set("linger.ms", "1"); // the round is the batch
        producer
    }

    fn own_letters(&self) -> ClientConfig {
        let mut producer = self.own_producer();
        producer
            .set("message.timeout.ms", LETTER_DELIVERY_TIMEOUT_MS)
            .set("topic.metadata.propagation.max.ms", LETTER_TOPIC_UNKNOWN_MS)
            .set("message.max.bytes", LETTER_MAX_UNCOMPRESSED_BYTES)
            // The writer waits for each letter, so there are no others to send with it.
            .set("linger.ms", "0");
        producer
    }
}
