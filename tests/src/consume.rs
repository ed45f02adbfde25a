//! What consumers leave behind: dead letters, counted outcomes, members of a group, read models as their tables show them.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use reqwest::StatusCode;
use serde_json::json;
use testbed::kafka::Kafka;
use testbed::postgres::{Durability, Postgres};
use testbed::process::{Logs, Scratch};
use testbed::redis::Redis;
use testbed::testing::{free_port, prefix};
use uuid::Uuid;

use crate::log::{Draft, GROUPS, Raw};
use crate::proxy::Proxy;
use crate::{Part, System, eventually_eq};

const TIMEOUT: Duration = Duration::from_secs(10);

/// What becomes of a delivered record; each is exactly one of them.
pub const OUTCOMES: [&str; 5] = ["applied", "duplicate", "stale", "skipped", "dead_lettered"];

/// The service that runs a group.
pub fn part_of(group: &str) -> Part {
    match group.split('.').next() {
        Some("email") => Part::Email,
        Some("analytics") => Part::Analytics,
        Some("cache") => Part::Cache,
        _ => panic!("no service runs {group}"),
    }
}

/// The topic that a group reads.
pub fn topic_of(group: &str) -> &'static str {
    GROUPS.iter().find(|(known, _)| *known == group).map(|(_, topic)| *topic).expect("one of GROUPS")
}

/// A component of this test's own, beside the shared rest.
pub struct Own<T> {
    pub component: T,
    _scratch: Scratch,
}

impl Raw {
    /// The same record once more, to be written at a new offset, as a relay does after a crash.
    pub fn again(&self) -> Draft {
        let (key, value, headers) = (self.key.clone(), self.value.clone(), self.headers.clone());
        Draft { partition: Some(self.partition), key, value, headers }
    }
}

impl Draft {
    /// Who `user` is at this version; `None` is the tombstone.
    pub fn user_state(user: Uuid, version: i64, email: Option<&str>) -> Self {
        let value =
            email.map(|email| json!({ "email": email, "display_name": format!("Version {version}") }).to_string());
        Self { value: value.map(String::into_bytes), ..Self::envelope("user.state", user, version) }
    }

    pub fn on(mut self, partition: i32) -> Self {
        self.partition = Some(partition);
        self
    }

    pub fn valued(mut self, value: &[u8]) -> Self {
        self.value = Some(value.to_vec());
        self
    }

    /// With this header instead of the one of the same name.
    pub fn instead(self, header: &str, value: &[u8]) -> Self {
        self.without(header).with(header, value)
    }
}

impl System {
    /// A Valkey of this test's own for the cache, to be killed and emptied.
    pub async fn own_valkey(&mut self) -> Own<Redis> {
        let scratch = Scratch::create("own-valkey").unwrap();
        let logs = Logs::to_files(&format!("tests/valkey-{}", prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let component = Redis::start(&fetched, scratch.path(), free_port(), &logs).await.unwrap();
        self.valkey = component.url();
        self.set("VALKEY_URL", &component.url());
        Own { component, _scratch: scratch }
    }

    /// A Postgres of this test's own for all services, to be killed.
    pub async fn own_postgres(&mut self) -> Own<Postgres> {
        let scratch = Scratch::create("own-postgres").unwrap();
        let logs = Logs::to_files(&format!("tests/postgres-{}", prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let component =
            Postgres::start(&fetched, scratch.path(), free_port(), Durability::Process, &logs).await.unwrap();
        for (setting, url) in component.database_urls() {
            self.set(&setting, &url);
        }
        Own { component, _scratch: scratch }
    }

    /// A Kafka of this test's own for all services, with a second way in, through the proxy: a broker tells its clients to come
    /// by the way that they came.
    pub async fn own_kafka(&mut self) -> (Own<Kafka>, Proxy) {
        let scratch = Scratch::create("own-kafka").unwrap();
        let logs = Logs::to_files(&format!("tests/kafka-{}", prefix())).unwrap();
        let fetched = testbed::fetch::fetch().await.unwrap();
        let (direct, proxied, controller) = (free_port(), free_port(), free_port());
        let proxy = Proxy::before(&format!("127.0.0.1:{proxied}")).await;
        let settings = format!(
            "listeners=PLAINTEXT://127.0.0.1:{direct},PROXIED://127.0.0.1:{proxied},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{direct},PROXIED://{}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.quorum.voters=1@127.0.0.1:{controller}",
            proxy.address()
        );
        let component = Kafka::start(&fetched, scratch.path(), direct, &settings, &logs).await.unwrap();
        self.kafka = component.address();
        self.set("KAFKA_BROKERS", &component.address());
        (Own { component, _scratch: scratch }, proxy)
    }

    /// The open dead letters of a group by their key, as anybody sees them who reads the table.
    pub fn dead_letters(&self, group: &str) -> BTreeMap<String, Raw> {
        let mut table = BTreeMap::new();
        for letter in self.read(&format!("{group}.dlq")) {
            if letter.headers.is_empty() {
                table.remove(&letter.key_text());
            } else {
                table.insert(letter.key_text(), letter);
            }
        }
        table
    }

    /// The key of the dead letter of a record.
    pub fn letter_key(&self, group: &str, (partition, offset): (i32, i64)) -> String {
        format!("{}-{partition}-{offset}", self.prefixed(topic_of(group)))
    }

    /// Waits until exactly these records have open dead letters in the group.
    pub async fn until_open_letters(&self, group: &str, records: &[(i32, i64)]) {
        let mut expected: Vec<_> = records.iter().map(|record| self.letter_key(group, *record)).collect();
        expected.sort();
        let what = format!("the open dead letters of {group}");
        eventually_eq(&what, expected, async || self.dead_letters(group).into_keys().collect()).await;
    }

    /// How many records the running process of the group's service has counted under an outcome.
    pub async fn counted(&self, group: &str, outcome: &str) -> f64 {
        let labels = [format!("group=\"{group}\""), format!("outcome=\"{outcome}\"")];
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        self.metric(part_of(group), "events_consumed_total", &labels).await.unwrap_or(0.0)
    }

    /// The same for all outcomes.
    pub async fn counted_in_all(&self, group: &str) -> f64 {
        let mut all = 0.0;
        for outcome in OUTCOMES {
            all += self.counted(group, outcome).await;
        }
        all
    }

    pub async fn letters_open(&self, group: &str) -> Option<f64> {
        self.metric(part_of(group), "dead_letters_open", &[&format!("group=\"{group}\"")]).await
    }

    pub async fn retries(&self, group: &str) -> f64 {
        let labels = [&*format!("group=\"{group}\"")];
        self.metric(part_of(group), "consumer_retries_total", &labels).await.unwrap_or(0.0)
    }

    /// The ids that Kafka gave the members of a group. They stay the same for as long as nobody joins or leaves.
    pub fn members(&self, group: &str) -> Vec<String> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.kafka)
            .set("broker.address.family", "v4")
            .create()
            .unwrap();
        let groups = consumer.fetch_group_list(Some(&self.prefixed(group)), TIMEOUT).unwrap();
        let mut members: Vec<String> =
            groups.groups().iter().flat_map(|group| group.members()).map(|member| member.id().to_owned()).collect();
        members.sort();
        members
    }

    /// How often the processes of a service were given or lost partitions, by their log.
    pub fn rebalances(&self, part: Part) -> usize {
        self.log_of(part).matches("rebalanced").count()
    }

    /// The sum of `GET /registrations`. `None`: no answer.
    pub async fn registrations(&self) -> Option<i64> {
        let answer = self.get(Part::Analytics, "/registrations?bucket=day").await.ok()?;
        answer.body.as_array()?.iter().map(|bucket| bucket["registrations"].as_i64()).sum()
    }

    /// Waits until registrations and funnel say this.
    pub async fn until_counted(&self, registered: i64, mailed: i64) {
        let what = "registrations, registered, mailed";
        eventually_eq(what, (Some(registered), registered, mailed), async || {
            let (in_funnel, mailed) = self.funnel().await;
            (self.registrations().await, in_funnel, mailed)
        })
        .await;
    }

    /// What `GET /profiles/{id}` says: the version, or why there is none.
    pub async fn seen(&self, id: Uuid) -> Result<i64, StatusCode> {
        match self.profile(id, None).await {
            Ok(answer) if answer.status == StatusCode::OK => Ok(answer.version()),
            Ok(answer) => Err(answer.status),
            Err(_) => Err(StatusCode::BAD_GATEWAY),
        }
    }

    /// Version and address that the email service has of a user; `None` for the address of an erased one.
    pub async fn recipient(&self, id: Uuid) -> Option<(i64, Option<String>)> {
        sqlx::query_as("select version, email from recipients where user_id = $1")
            .bind(id)
            .fetch_optional(&self.database(Part::Email).await)
            .await
            .unwrap()
    }
}
