//! The view: for each user a hash of version and profile, for each partition a position and a mark of completeness.
//!
//! The position is compared and set in the same script as the profiles. So after a flush or a failover the very next batch,
//! or the next second of a quiet topic, meets another position than it expects, and the consumer starts again where the view
//! really stands. For the same reason a frozen process that wakes up can change nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, RedisError, Script};
use shared::events::{Event, Profile, Topic, UserState};
use shared::fault;
use shared::messaging::{Failure, Handler, Outcome, Record};
use uuid::Uuid;

/// For one answer of Valkey; a batch's script takes a few milliseconds.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const PARTITIONS: i32 = UserState::TOPIC.partitions;

#[derive(Clone)]
pub struct View {
    valkey: ConnectionManager,
    /// Stands before every key, so that several systems can share a server.
    prefix: String,
    script: Arc<Script>,
}

/// What the view knows of a user.
pub struct Lookup {
    /// Whether every partition was read to its end since the view was last empty. Until then what is absent may only be late,
    /// and what is there may be an old version of it.
    pub complete: bool,
    /// 0: never seen.
    pub version: i64,
    /// `None`: never seen, or erased.
    pub profile: Option<Profile>,
}

impl View {
    /// Connects when first used.
    ///
    /// # Errors
    /// The URL is malformed.
    pub fn new(url: &str, prefix: &str) -> anyhow::Result<Self> {
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        let valkey = ConnectionManager::new_lazy_with_config(Client::open(url)?, config)?;
        Ok(Self { valkey, prefix: prefix.to_owned(), script: Arc::new(Script::new(include_str!("view.lua"))) })
    }

    /// Reads the user and all partitions' marks in one round trip, in one transaction: a flush in between would make a user
    /// look absent from a complete view.
    pub async fn find(&self, id: Uuid) -> anyhow::Result<Lookup> {
        let mut pipe = redis::pipe();
        pipe.atomic().cmd("HMGET").arg(self.profile_key(id)).arg("version").arg("profile").cmd("EXISTS");
        for partition in 0..PARTITIONS {
            pipe.arg(self.mark_key(partition));
        }
        let ((version, profile), marks): ((Option<i64>, Option<String>), i32) =
            pipe.query_async(&mut self.valkey.clone()).await?;
        let profile = profile.filter(|json| !json.is_empty()).map(|json| serde_json::from_str(&json)).transpose()?;
        Ok(Lookup { complete: marks == PARTITIONS, version: version.unwrap_or(0), profile })
    }

    /// Runs the script for one partition. `after` is where the view must stand (`None`: wherever), `next` where it stands then.
    async fn apply(
        &self,
        partition: i32,
        after: Option<i64>,
        next: i64,
        records: &[&Record<UserState>],
    ) -> Result<Outcome, Failure> {
        let mut call = self.script.key(self.position_key(partition));
        call.key(self.mark_key(partition));
        call.arg(after.map(|after| after.to_string()).unwrap_or_default()).arg(next);
        for record in records {
            let profile = match &record.event {
                UserState::Current(profile) => serde_json::to_string(profile)?,
                UserState::Erased => String::new(),
            };
            call.key(self.profile_key(record.envelope.key)).arg(record.envelope.version).arg(profile);
        }
        let done: Result<(u64, u64, u64), RedisError> = call.invoke_async(&mut self.valkey.clone()).await;
        match done {
            Ok((applied, duplicate, stale)) => Ok(Outcome { applied, duplicate, stale }),
            Err(error) if error.code() == Some("POSITION") => Err(Failure::Resume),
            Err(error) => Err(error.into()),
        }
    }

    fn profile_key(&self, id: Uuid) -> String {
        format!("{}profile:{id}", self.prefix)
    }

    fn position_key(&self, partition: i32) -> String {
        format!("{}position:{}:{partition}", self.prefix, Topic::USER_STATE.name)
    }

    fn mark_key(&self, partition: i32) -> String {
        format!("{}complete:{}:{partition}", self.prefix, Topic::USER_STATE.name)
    }
}

impl Handler for View {
    type Event = UserState;

    /// A script per partition; each is atomic. Crash between two of them: the batch comes again, the first finds the view moved
    /// on and asks to resume from there.
    async fn handle(&self, batch: &[Record<UserState>]) -> Result<Outcome, Failure> {
        let mut partitions: BTreeMap<i32, Vec<&Record<UserState>>> = BTreeMap::new();
        for record in batch {
            partitions.entry(record.source.partition).or_default().push(record);
        }
        let mut outcome = Outcome::default();
        for (partition, records) in partitions {
            let (first, last) = (records[0], records[records.len() - 1]);
            fault::point("cache.before_script");
            outcome += self.apply(partition, first.after, last.source.offset + 1, &records).await?;
            fault::point("cache.after_script");
        }
        Ok(outcome)
    }

    /// The position stands beside the data; nothing stored is the beginning.
    async fn resume_at(&self, partition: i32) -> anyhow::Result<Option<i64>> {
        let mut get = redis::cmd("GET");
        let stored: Option<i64> = get.arg(self.position_key(partition)).query_async(&mut self.valkey.clone()).await?;
        Ok(Some(stored.unwrap_or(0)))
    }

    /// Marks the partition as complete, under the same comparison: after a flush it is not, and the view is filled again.
    async fn caught_up(&self, partition: i32, after: i64, position: i64) -> Result<(), Failure> {
        self.apply(partition, Some(after), position, &[]).await.map(|_| ())
    }
}
