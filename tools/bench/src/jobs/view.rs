//! `view`: a backlog of states in the topic, until the cache has all of them. The limit is a bare
//! client that calls the same script with the same data, and has several calls on their way.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use redis::aio::MultiplexedConnection;
use redis::{Client, Script};
use shared::events::{Cause, Envelope, Profile, Topic, UserState, mint_id, now};
use testbed::paths::root;
use testbed::services::RunningService;
use tokio::time::{Instant, sleep};
use topology::CACHE;
use uuid::Uuid;

use crate::bed::{Bed, Lab};
use crate::checks;
use crate::kafka::{self, Writer};
use crate::meter::Slice;
use crate::report::Report;
use crate::slices::{Contest, measure};

const STATES: u64 = 200_000;
const GOAL: f64 = 0.7;
/// Records of one call of the limit.
const BATCH: usize = 500;
/// Calls of the limit on their way at the same time.
const CALLS: usize = 4;
const POLL: Duration = Duration::from_millis(2);
/// How long a slice may take.
const LIMIT: Duration = Duration::from_secs(300);
/// States of a user in a backlog.
const VERSIONS: u64 = 4;

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: taking a record from Kafka costs the service 5 us (decompressing, headers, JSON), and the script needs about
2 us for it in Redis. At these costs two cores handle at most 290,000 states a second, a ratio of 0.5. The bare client has
the states in memory and only formats them.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("view").await?;
    let mut view = View::start(&lab).await?;
    let slices = measure(bed, &mut view).await?;
    view.check().await?;
    let what = ["the cache's consumer of states", "the same script from a bare client, four calls at a time"];
    Ok(Report::of_slices("view", "states", what, slices, GOAL).limited_by(LIMITED_BY))
}

struct View<'a> {
    lab: &'a Lab<'a>,
    service: RunningService,
    store: MultiplexedConnection,
    script: Script,
    writer: Writer,
    users: u64,
    /// The users of the last slice of our side.
    written: Vec<Uuid>,
    slices: usize,
}

impl<'a> View<'a> {
    async fn start(lab: &'a Lab<'a>) -> Result<Self> {
        lab.create_topics().await?;
        let service = lab.start(CACHE, &[]).await?;
        let store = Client::open(lab.bed.stack.redis.url())?.get_multiplexed_async_connection().await?;
        let script = Script::new(&std::fs::read_to_string(root().join("services/cache/src/view.lua"))?);
        let writer = Writer::transactional(lab.bed, &lab.prefixed("backlog"))?;
        let users = lab.bed.size().of(STATES) / VERSIONS;
        Ok(Self { lab, service, store, script, writer, users, written: vec![], slices: 0 })
    }

    /// Whether the view's position of each partition is at or after these offsets.
    async fn has_reached(&mut self, ends: &BTreeMap<i32, i64>) -> Result<bool> {
        let mut ask = redis::cmd("MGET");
        for partition in ends.keys() {
            ask.arg(self.lab.prefixed(&format!("position:{}:{partition}", Topic::USER_STATE.name)));
        }
        let positions: Vec<Option<i64>> = ask.query_async(&mut self.store).await?;
        Ok(positions.iter().zip(ends.values()).all(|(position, end)| position.unwrap_or(0) >= *end))
    }

    /// The users of both sides have their last versions.
    async fn check(&mut self) -> Result<()> {
        let prefixes = [self.lab.prefixed(""), self.limit_prefix(self.slices)];
        for prefix in prefixes {
            let mut complete = 0;
            for user in &self.written {
                let mut read = redis::cmd("HGET");
                read.arg(format!("{prefix}profile:{user}")).arg("version");
                let version: Option<u64> = read.query_async(&mut self.store).await?;
                complete += u64::from(version == Some(VERSIONS));
            }
            checks::require_equal("users have their last version", complete, self.users)?;
        }
        self.service.stop().await;
        Ok(())
    }

    fn limit_prefix(&self, slice: usize) -> String {
        self.lab.prefixed(&format!("limit{slice}."))
    }
}

/// The profile of a user.
pub fn profile(user: Uuid) -> Profile {
    Profile { email: format!("{}@example.com", user.simple()), display_name: "Ada Lovelace".to_owned(), owner: None }
}

/// A state of a user.
pub fn state(user: Uuid, version: i64) -> (Envelope, UserState) {
    let envelope = Envelope {
        id: mint_id(),
        kind: "user.state".to_owned(),
        source: "/user".to_owned(),
        key: user,
        version,
        time: now(),
        cause: Cause::command(None),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00".to_owned()),
        tracestate: None,
    };
    (envelope, UserState::Current(profile(user)))
}

impl Contest for View<'_> {
    async fn ours(&mut self) -> Result<Slice> {
        let topic = self.lab.prefixed(Topic::USER_STATE.name);
        self.written = (0..self.users).map(|_| mint_id()).collect();
        self.writer.begin()?;
        for version in 1..=VERSIONS {
            for user in &self.written {
                let (envelope, event) = state(*user, version as i64);
                self.writer.send_event(&topic, &envelope, &event)?;
            }
        }
        self.writer.wait()?;
        // After the last record: the marker of the transaction is written after the commit.
        let ends = kafka::ends(self.lab.bed, &topic)?;
        let meter = self.lab.bed.meter(&[&self.service])?;
        let deadline = Instant::now() + LIMIT;
        self.writer.commit()?;
        while !self.has_reached(&ends).await? {
            ensure!(Instant::now() < deadline, "the cache does not write the states");
            sleep(POLL).await;
        }
        meter.stop(self.users * VERSIONS)
    }

    async fn limit(&mut self) -> Result<Slice> {
        self.slices += 1;
        let prefix = self.limit_prefix(self.slices);
        let mut partitions: BTreeMap<i32, Vec<Uuid>> = BTreeMap::new();
        for user in &self.written {
            partitions.entry(Topic::USER_STATE.partition_of(*user)).or_default().push(*user);
        }
        let meter = self.lab.bed.meter(&[])?;
        // As in our side, the calls of a partition follow each other, and each moves the position.
        let calls = partitions.into_iter().map(|(partition, users)| {
            let (prefix, script, mut store) = (prefix.clone(), &self.script, self.store.clone());
            async move {
                let states = (1..=VERSIONS).flat_map(|version| users.iter().map(move |user| (version, *user)));
                let states: Vec<(u64, Uuid)> = states.collect();
                for (number, batch) in states.chunks(BATCH).enumerate() {
                    let mut call = script.key(format!("{prefix}position:{partition}"));
                    call.key(format!("{prefix}complete:{partition}"));
                    call.arg(number * BATCH).arg((number + 1) * BATCH).arg("identity");
                    for (version, user) in batch {
                        let json = serde_json::to_string(&profile(*user))?;
                        call.key(format!("{prefix}profile:{user}")).arg(*version).arg(json);
                    }
                    let counts: Option<(u64, u64, u64)> = call.invoke_async(&mut store).await?;
                    ensure!(counts == Some((batch.len() as u64, 0, 0)), "the script answered {counts:?}");
                }
                anyhow::Ok(())
            }
        });
        stream::iter(calls).buffer_unordered(CALLS).try_collect::<Vec<()>>().await?;
        meter.stop(self.users * VERSIONS)
    }
}
