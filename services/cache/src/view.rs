//! The view: per user a hash of version and profile, per partition a position and a completeness
//! mark.
//!
//! One script compares and sets the position and writes the profiles. After a flush or a failover
//! the position differs from the one that the next batch expects. On a quiet topic the next
//! `caught_up` call expects it. Then the consumer restarts from the view's position. For the same
//! reason a frozen process that resumes cannot change the view.
//!
//! A mark holds the identity of the server that made it. A server that comes back from a snapshot
//! brings old profiles, old positions and old marks. So does a replica that lags and is promoted,
//! and so does a master that was its replica in between. All of them have another identity than the
//! marks, so the view is incomplete until each partition has been read to its end again.
//!
//! A server that evicts keys loses profiles and keeps positions and marks. While it does, the view
//! is incomplete and not written, and its positions are removed. So it is filled from the beginning
//! when the server evicts no more.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use futures::future::join_all;
use redis::{Client, RedisResult, Script};
use shared::events::{Event, Profile, Topic, UserState};
use shared::fault;
use shared::messaging::{EndOfPartition, Failure, Handler, Outcome, Record};
use uuid::Uuid;

use crate::valkey::{Server, Valkey};

const PARTITIONS: i32 = UserState::TOPIC.partitions;

#[derive(Clone)]
pub struct View {
    valkey: Arc<Valkey>,
    /// Prefix of every key, so that several systems can share a server.
    prefix: String,
    script: Arc<Script>,
}

/// The positions of one partition before and after a call of the script.
#[derive(Clone, Copy)]
struct Positions {
    partition: i32,
    /// The position that the view must have. `None` in a redrive: any position, and it stays.
    expected: Option<i64>,
    /// The position that the view has afterwards.
    next: i64,
}

/// What the store has about a user.
#[derive(Clone)]
pub struct Stored {
    complete: bool,
    version: Option<i64>,
    /// As JSON, empty for an erased user.
    profile: Option<String>,
}

/// The view's entry for a user.
pub struct Lookup {
    /// Whether every partition was read to its end since this server was started, promoted or
    /// emptied, and it evicts no keys. Otherwise an absent user may exist, and a present one may
    /// have an old version.
    pub complete: bool,
    /// 0: the view has no record of the user.
    pub version: i64,
    /// `None`: no record of the user, or erased.
    pub profile: Option<Profile>,
}

impl TryFrom<Stored> for Lookup {
    type Error = serde_json::Error;

    fn try_from(stored: Stored) -> Result<Self, serde_json::Error> {
        let Stored { complete, version, profile } = stored;
        let profile = profile.filter(|json| !json.is_empty()).map(|json| serde_json::from_str(&json)).transpose()?;
        Ok(Self { complete, version: version.unwrap_or(0), profile })
    }
}

impl Lookup {
    /// Whether a caller that requires this version may see the entry. An incomplete view may
    /// contain an older version than the service has returned before.
    pub fn satisfies(&self, min_version: i64) -> bool {
        self.complete && self.version >= min_version
    }
}

impl View {
    /// Connects on first use.
    pub fn new(client: Client, prefix: &str) -> Self {
        let valkey = Arc::new(Valkey::new(client));
        Self { valkey, prefix: prefix.to_owned(), script: Arc::new(Script::new(include_str!("view.lua"))) }
    }

    /// Reads one user.
    pub async fn find(&self, id: Uuid) -> anyhow::Result<Lookup> {
        let mut found = self.find_all(&[id]).await?;
        let stored = found.pop().context("the answer has no entry for the user")?;
        Ok(stored.try_into()?)
    }

    /// Reads the users, the marks of all partitions and the server's role in one transaction. A
    /// flush between two reads would make a user appear absent from a complete view, and a server
    /// that was a replica between two reads would have other data than the marks say. The marks and
    /// the role cost the server several times as much as a user, and are read once for all users.
    ///
    /// # Errors
    /// Valkey does not answer, or does not accept the commands.
    pub async fn find_all(&self, ids: &[Uuid]) -> RedisResult<Vec<Stored>> {
        let mut pipe = redis::pipe();
        pipe.atomic().cmd("MGET");
        for partition in 0..PARTITIONS {
            pipe.arg(self.mark_key(partition));
        }
        pipe.cmd("INFO").arg("replication");
        for id in ids {
            pipe.cmd("HMGET").arg(self.profile_key(*id)).arg("version").arg("profile");
        }
        let find = async |mut server: Server| {
            let answers: Vec<redis::Value> = pipe.query_async(&mut server.connection).await?;
            let mut answers = answers.into_iter();
            let marks: Vec<Option<String>> = redis::from_redis_value(answers.next().unwrap_or_default())?;
            let replication: String = redis::from_redis_value(answers.next().unwrap_or_default())?;
            server.require_unchanged_master(&replication)?;
            let valid = server.identity.mark();
            let complete = !server.evicts && marks.iter().all(|mark| mark.as_ref() == Some(&valid));
            let stored = answers.map(|answer| {
                let (version, profile) = redis::from_redis_value(answer)?;
                Ok(Stored { complete, version, profile })
            });
            stored.collect()
        };
        self.valkey.request(find).await
    }

    /// Compares the server's eviction policy with the one that the connection has found. While the
    /// server evicts keys, removes the positions and the marks: what was evicted comes back only
    /// from the beginning of the topic. Returns whether the server evicts keys.
    ///
    /// Crash before the removal: the next call repeats it. Crash after it: the view is filled
    /// again.
    pub async fn check_policy(&self) -> anyhow::Result<bool> {
        let mut memory = redis::cmd("INFO");
        memory.arg("memory");
        let mut remove = redis::cmd("DEL");
        for partition in 0..PARTITIONS {
            remove.arg(self.position_key(partition)).arg(self.mark_key(partition));
        }
        let check = async |mut server: Server| {
            let memory: String = memory.query_async(&mut server.connection).await?;
            server.require_unchanged_policy(&memory)?;
            if server.evicts {
                let () = remove.query_async(&mut server.connection).await?;
            }
            Ok(server.evicts)
        };
        Ok(self.valkey.request(check).await?)
    }

    /// Runs the script for the records of one partition. Without records it marks the partition as
    /// complete.
    async fn apply(&self, positions: Positions, records: &[&Record<UserState>]) -> Result<Outcome, Failure> {
        let Positions { partition, expected, next } = positions;
        let mut profiles = vec![];
        for record in records {
            let profile = match &record.event {
                UserState::Current(profile) => serde_json::to_string(profile)?,
                UserState::Erased => String::new(),
            };
            profiles.push((self.profile_key(record.envelope.key), record.envelope.version, profile));
        }
        let call = async |mut server: Server| {
            server.require_no_eviction()?;
            let mut call = self.script.key(self.position_key(partition));
            call.key(self.mark_key(partition));
            call.arg(expected.map(|position| position.to_string()).unwrap_or_default()).arg(next);
            call.arg(server.identity.mark());
            for (key, version, profile) in &profiles {
                call.key(key).arg(version).arg(profile);
            }
            call.invoke_async(&mut server.connection).await
        };
        let counts: Option<(u64, u64, u64)> = self.valkey.request(call).await?;
        let (applied, duplicate, stale) = counts.ok_or(Failure::Resume)?;
        Ok(Outcome { applied, duplicate, stale })
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

    const GROUP: &'static str = "cache.profiles";

    /// Writes a key that expires at once: a server that is full or read-only answers to reads.
    async fn dependency_works(&self) -> bool {
        let mut set = redis::cmd("SET");
        set.arg(format!("{}probe", self.prefix)).arg("").arg("PX").arg(1);
        let write = async |mut server: Server| -> redis::RedisResult<()> {
            server.require_no_eviction()?;
            set.query_async(&mut server.connection).await
        };
        self.valkey.request(write).await.is_ok()
    }

    /// One atomic script per partition. The scripts do not depend on each other, so all are sent
    /// before the first answer comes. Crash before the last one: any of them may have run. The
    /// batch comes again, each of these scripts finds a later position, and the handler asks to
    /// resume from there. The same follows if only some of them fail.
    async fn handle(&self, batch: &[Record<UserState>]) -> Result<Outcome, Failure> {
        let mut partitions: BTreeMap<i32, Vec<&Record<UserState>>> = BTreeMap::new();
        for record in batch {
            partitions.entry(record.coordinates.partition).or_default().push(record);
        }
        let scripts = partitions.into_iter().map(async |(partition, records)| {
            let first = records[0];
            let last = records[records.len() - 1];
            let positions =
                Positions { partition, expected: first.expected_position, next: last.coordinates.offset + 1 };
            fault::point("cache.before_script");
            let outcome = self.apply(positions, &records).await?;
            fault::point("cache.after_script");
            Ok(outcome)
        });
        // Waits for all answers, also after a failure: what follows from it reads the positions.
        let outcomes: Vec<Result<Outcome, Failure>> = join_all(scripts).await;
        let mut sum = Outcome::default();
        for outcome in outcomes {
            sum += outcome?;
        }
        Ok(sum)
    }

    /// The position is stored with the data. No stored position means the beginning.
    async fn resume_at(&self, partition: i32) -> anyhow::Result<Option<i64>> {
        let mut get = redis::cmd("GET");
        get.arg(self.position_key(partition));
        let stored: Option<i64> =
            self.valkey.request(async |mut server| get.query_async(&mut server.connection).await).await?;
        Ok(Some(stored.unwrap_or(0)))
    }

    /// Marks the partition as complete, with the same comparison of the position: after a flush it
    /// differs, and the view is filled again.
    async fn caught_up(&self, end: EndOfPartition) -> Result<(), Failure> {
        let EndOfPartition { partition, expected_position, next_offset } = end;
        let positions = Positions { partition, expected: Some(expected_position), next: next_offset };
        self.apply(positions, &[]).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;
    use shared::events::mint_id;
    use tokio::runtime::Runtime;

    use super::*;

    const CASES: u32 = 32;

    /// An empty view on the shared server, separated from others by its key prefix.
    fn view() -> View {
        view_on(&testbed::testing::stack().valkey, &testbed::testing::prefix())
    }

    fn view_on(url: &str, prefix: &str) -> View {
        View::new(Client::open(url).unwrap(), prefix)
    }

    fn record(user: Uuid, version: i64, event: UserState, positions: Positions) -> Record<UserState> {
        let mut record = Record::sample(user, version, event);
        record.coordinates.partition = positions.partition;
        record.coordinates.offset = positions.next - 1;
        record.expected_position = positions.expected;
        record
    }

    fn current(version: i64) -> UserState {
        let email = format!("v{version}@example.com");
        UserState::Current(Profile { email, display_name: format!("Version {version}"), owner: None })
    }

    /// A record in partition 0 with the user's state at this version.
    fn update(user: Uuid, version: i64, expected: i64, next: i64) -> Record<UserState> {
        record(user, version, current(version), Positions { partition: 0, expected: Some(expected), next })
    }

    async fn seen(view: &View, user: Uuid) -> (i64, Option<String>) {
        let found = view.find(user).await.unwrap();
        (found.version, found.profile.map(|profile| profile.email))
    }

    /// Three users in three partitions. Each has this many versions, and the last one may be its
    /// erasure.
    type Histories = [(i64, bool); 3];
    /// Users and versions in batches, in any order, with repetitions and gaps.
    type Batches = Vec<Vec<(usize, Index)>>;

    fn batches() -> impl Strategy<Value = Batches> {
        prop::collection::vec(prop::collection::vec((0..3_usize, any::<Index>()), 1..6), 1..6)
    }

    /// T26, I8 I10: even outside the topic's order, as in a redrive. An erased user stays erased.
    #[test]
    fn the_highest_version_of_a_state_wins_in_any_order() {
        let runtime = Runtime::new().unwrap();
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        let histories = prop::array::uniform3((1..12_i64, any::<bool>()));
        proptest!(config, |(histories in histories, batches in batches(), redriven in any::<bool>())| {
            runtime.block_on(check(histories, batches, redriven))?;
        });
    }

    async fn check(histories: Histories, batches: Batches, redriven: bool) -> Result<(), TestCaseError> {
        let view = view();
        let users = [(); 3].map(|()| mint_id());
        let mut highest = [0; 3];
        let mut next_offsets = [0; 3];
        for batch in batches {
            let records = batch.iter().map(|(user, index)| {
                let (last, erased) = histories[*user];
                let version = 1 + index.index(last as usize) as i64;
                highest[*user] = version.max(highest[*user]);
                let expected = (!redriven).then_some(next_offsets[*user]);
                // Offsets have gaps.
                next_offsets[*user] += 1 + version % 2;
                let event = if erased && version == last { UserState::Erased } else { current(version) };
                let positions = Positions { partition: *user as i32, expected, next: next_offsets[*user] };
                record(users[*user], version, event, positions)
            });
            let records: Vec<_> = records.collect();
            let outcome = view.handle(&records).await.unwrap();
            prop_assert_eq!(outcome.applied + outcome.duplicate + outcome.stale, records.len() as u64);
            for user in 0..3 {
                let (last, erased) = histories[user];
                let lives = highest[user] > 0 && !(erased && highest[user] == last);
                let address = lives.then(|| format!("v{}@example.com", highest[user]));
                prop_assert_eq!(seen(&view, users[user]).await, (highest[user], address));
                let position = view.resume_at(user as i32).await.unwrap();
                prop_assert_eq!(position, Some(if redriven { 0 } else { next_offsets[user] }));
            }
        }
        Ok(())
    }

    /// I8: the view's position differs after a flush, or when another process has written to it.
    #[tokio::test]
    async fn a_batch_that_expects_another_position_changes_nothing() {
        let view = view();
        let user = mint_id();
        view.handle(&[update(user, 1, 0, 7)]).await.unwrap();
        for expected in [0, 3, 8] {
            let failure = view.handle(&[update(user, 2, expected, 9)]).await.unwrap_err();
            assert!(matches!(failure, Failure::Resume), "{failure:?}");
        }
        assert_eq!(seen(&view, user).await, (1, Some("v1@example.com".to_owned())));
        assert_eq!(view.resume_at(0).await.unwrap(), Some(7));
        // A redrive does not follow the order of the partition: it is applied, and the position
        // does not change.
        let redriven = Positions { partition: 0, expected: None, next: 3 };
        view.handle(&[record(user, 2, current(2), redriven)]).await.unwrap();
        assert_eq!((seen(&view, user).await.0, view.resume_at(0).await.unwrap()), (2, Some(7)));
    }

    /// I8.
    #[tokio::test]
    async fn a_view_is_complete_when_every_partition_was_read_to_its_end_since_the_view_was_empty() {
        let view = view();
        let user = mint_id();
        view.handle(&[update(user, 1, 0, 1)]).await.unwrap();
        for partition in 0..PARTITIONS {
            assert!(!view.find(user).await.unwrap().complete, "before partition {partition}");
            let (expected_position, next_offset) = if partition == 0 { (1, 2) } else { (0, 0) };
            view.caught_up(EndOfPartition { partition, expected_position, next_offset }).await.unwrap();
        }
        assert!(view.find(user).await.unwrap().complete);
        assert_eq!(view.resume_at(0).await.unwrap(), Some(2));
        // As after a flush. The consumer still expects its old position.
        let mut keys = vec![view.profile_key(user)];
        keys.extend((0..PARTITIONS).flat_map(|partition| [view.mark_key(partition), view.position_key(partition)]));
        let mut del = redis::cmd("DEL");
        del.arg(keys);
        let () = view.valkey.request(async |mut server| del.query_async(&mut server.connection).await).await.unwrap();
        let end = EndOfPartition { partition: 0, expected_position: 2, next_offset: 2 };
        let failure = view.caught_up(end).await.unwrap_err();
        assert!(matches!(failure, Failure::Resume), "{failure:?}");
        assert!(!view.find(user).await.unwrap().complete);
    }

    /// I10: even with versions that a number in Lua cannot represent exactly.
    #[tokio::test]
    async fn the_highest_version_wins_within_a_batch() {
        let view = view();
        let user = mint_id();
        let other = mint_id();
        let large = (1 << 53) + 1;
        let versions = [(user, 9), (user, 10), (other, large - 1), (user, 9), (user, 10), (other, large)];
        let batch: Vec<_> =
            (0..).zip(versions).map(|(offset, (user, version))| update(user, version, offset, offset + 1)).collect();
        let outcome = view.handle(&batch).await.unwrap();
        assert_eq!(outcome, Outcome { applied: 4, duplicate: 1, stale: 1 });
        assert_eq!((seen(&view, user).await.0, seen(&view, other).await.0), (10, large));
        assert_eq!(view.resume_at(0).await.unwrap(), Some(6));
    }

    /// I11: an outage of the store is not the record's fault.
    #[tokio::test]
    async fn a_store_that_is_down_causes_a_retry() {
        let view = view_on(&format!("redis://127.0.0.1:{}", testbed::testing::free_port()), "");
        let started = std::time::Instant::now();
        let failure = view.handle(&[update(mint_id(), 1, 0, 1)]).await.unwrap_err();
        assert!(matches!(failure, Failure::Retry(_)), "{failure:?}");
        view.resume_at(0).await.unwrap_err();
        // Neither call waits longer than its time-out.
        assert!(started.elapsed() < 2 * crate::valkey::RESPONSE_TIMEOUT, "two calls took {:?}", started.elapsed());
    }
}
