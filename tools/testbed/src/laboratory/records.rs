//! Faulty records, written with Kafka's own tools, as an operator would. The console writes to no
//! topic.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::fetch::Fetched;
use crate::kafka::{run_java, run_java_on};
use crate::process::{Logs, Scratch};

const CONSUMER: &str = "org.apache.kafka.tools.consumer.ConsoleConsumer";
const PRODUCER: &str = "org.apache.kafka.tools.ConsoleProducer";
/// The topic of the malformed records. Several groups read it.
pub const FACTS: &str = topology::USER.writes[0];
/// How long the consumer waits for the record, in milliseconds.
const READ_LIMIT: &str = "10000";
/// Control characters, which no header, key or value of Waybill contains.
const BETWEEN_HEADERS: char = '\u{1f}';
const NULL: &str = "\u{1e}";
/// The consumer prints this instead of the headers if a record has none.
const MARK: &str = "NO_HEADERS";

/// Writes records to the topics of a running Kafka.
pub struct Records {
    fetched: Fetched,
    /// Bootstrap servers. In a secured stack: the listener for operators, who may use every topic.
    servers: String,
    logs: Logs,
    scratch: Scratch,
    /// Lets one tool run at a time: each starts a JVM, which needs about 100 MB.
    turn: Mutex<()>,
}

impl Records {
    /// # Errors
    /// The scratch folder cannot be created.
    pub fn new(fetched: &Fetched, servers: String, logs: &Logs) -> Result<Self> {
        let scratch = Scratch::create("records")?;
        Ok(Self { fetched: fetched.clone(), servers, logs: logs.clone(), scratch, turn: Mutex::default() })
    }

    /// Writes a fact whose value is not JSON, and returns its key, which no user
    /// has.
    ///
    /// # Errors
    /// Kafka does not accept the record.
    pub async fn malformed(&self) -> Result<Uuid> {
        let _turn = self.turn.lock().await;
        let key = Uuid::now_v7();
        let kind = "user.profile_changed";
        let headers = [
            ("ce_specversion", "1.0".to_owned()),
            ("ce_id", Uuid::now_v7().to_string()),
            ("ce_type", kind.to_owned()),
            ("ce_source", "/laboratory".to_owned()),
            ("ce_subject", key.to_string()),
            ("ce_time", "2026-01-01T00:00:00Z".to_owned()),
            ("ce_dataschema", format!("urn:waybill:{kind}:1")),
            ("ce_sequence", format!("{:020}", 1)),
            ("content-type", "application/json".to_owned()),
        ];
        let headers = headers.map(|(name, value)| format!("{name}:{value}")).join(&BETWEEN_HEADERS.to_string());
        self.write(FACTS, &format!("{headers}\t{key}\tthis is not JSON")).await?;
        Ok(key)
    }

    /// Reads a record and writes it again. It gets a new offset at the end of the partition of its
    /// key.
    ///
    /// # Errors
    /// There is no such record, or Kafka does not accept it.
    pub async fn again(&self, topic: &str, partition: i32, offset: i64) -> Result<()> {
        let _turn = self.turn.lock().await;
        let record = self.read(topic, partition, offset).await?;
        self.write(topic, &record).await
    }

    /// A record as the tools print it: headers, key and value.
    async fn read(&self, topic: &str, partition: i32, offset: i64) -> Result<String> {
        let name = "laboratory-read";
        let mut arguments = self.about(topic);
        arguments.extend(["--partition", &partition.to_string(), "--offset", &offset.to_string()].map(str::to_owned));
        arguments.extend(["--max-messages", "1", "--timeout-ms", READ_LIMIT].map(str::to_owned));
        arguments.extend(["--isolation-level", "read_committed"].map(str::to_owned));
        for property in [
            "print.offset=true".to_owned(),
            "print.headers=true".to_owned(),
            "print.key=true".to_owned(),
            format!("headers.separator={BETWEEN_HEADERS}"),
            format!("null.literal={NULL}"),
        ] {
            arguments.extend(["--formatter-property".to_owned(), property]);
        }
        let (_, printed) = run_java(&self.fetched, name, CONSUMER, &arguments, &self.logs).await?;
        // The record may have personal data, which must not stay in a log.
        let _ = fs::remove_file(self.logs.file(name));
        let start = format!("Offset:{offset}\t");
        let record = printed.lines().find_map(|line| line.strip_prefix(&start));
        let record = record.with_context(|| format!("there is no record {topic}/{partition}/{offset}"))?;
        ensure!(!record.starts_with(MARK), "the record {topic}/{partition}/{offset} has no headers");
        Ok(record.to_owned())
    }

    async fn write(&self, topic: &str, record: &str) -> Result<()> {
        let name = "laboratory-write";
        let mut arguments = self.about(topic);
        for property in [
            "parse.headers=true".to_owned(),
            "parse.key=true".to_owned(),
            format!("headers.separator={BETWEEN_HEADERS}"),
            format!("null.marker={NULL}"),
        ] {
            arguments.extend(["--reader-property".to_owned(), property]);
        }
        // Fails instead of waiting a minute if Kafka is down.
        arguments.extend(["--command-property".to_owned(), format!("max.block.ms={READ_LIMIT}")]);
        let input = Input::create(self.scratch.path(), record)?;
        let written = run_java_on(&self.fetched, name, PRODUCER, &arguments, &input.0, &self.logs).await;
        let (status, printed) = written?;
        // The tool prints an error of Kafka, and ends with success.
        let error = printed.lines().find(|line| line.contains("ERROR") || line.contains("Exception"));
        ensure!(status.success() && error.is_none(), "Kafka does not accept the record: {}", error.unwrap_or(&printed));
        Ok(())
    }

    fn about(&self, topic: &str) -> Vec<String> {
        ["--bootstrap-server", &self.servers, "--topic", topic].map(str::to_owned).into()
    }
}

/// A file with a record. It is removed on drop.
struct Input(PathBuf);

impl Input {
    fn create(folder: &Path, record: &str) -> Result<Self> {
        let input = Self(folder.join("record"));
        fs::write(&input.0, format!("{record}\n")).context("cannot write a file for Kafka's tool")?;
        Ok(input)
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
