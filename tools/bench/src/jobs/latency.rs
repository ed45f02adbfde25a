//! `latency`: an idle system and one request each 200 ms. Measured is the time from the answer to
//! `POST /users` until a consumer has the event: written at the replica whose relay leads, and at
//! another one. For comparison: a record that a bare producer writes, until the same consumer has
//! it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use http::StatusCode;
use rdkafka::Message;
use rdkafka::error::KafkaError;
use rdkafka::message::OwnedHeaders;
use serde_json::{Value, json};
use shared::events::{Topic, mint_id};
use testbed::services::RunningService;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{sleep, sleep_until, timeout};
use topology::USER;
use uuid::Uuid;

use crate::bed::{Bed, Lab};
use crate::http::Connection;
use crate::kafka::{self, Writer};
use crate::report::{Bound, Figure, Report};
use crate::{checks, kafka::ends};

const INTERVAL: Duration = Duration::from_millis(200);
/// Requests of one kind that follow each other.
const ROW: u64 = 25;
/// The least number of them.
const LEAST: u64 = 3;
/// Requests of each kind.
const REQUESTS: u64 = 250;
/// Requests that follow each other without a pause, before anything is measured: each makes a Kafka
/// transaction of its own, and the broker compiles the code for it.
const WARM_UP: u64 = 500;
/// How long an event may take.
const LIMIT: Duration = Duration::from_secs(10);
/// How often the reader looks whether the job is over, and the job whether a relay leads.
const POLL: Duration = Duration::from_millis(100);
// Goals in milliseconds.
const MEDIAN_GOAL: f64 = 4.0;
const P99_GOAL: f64 = 12.0;
const FOLLOWER_P99_GOAL: f64 = 30.0;

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: a Kafka transaction has steps that follow each other: the partitions are added to it, the records of two topics
are written, it is committed, and the broker writes a marker into each partition. Only then a consumer sees the event. In a
log of librdkafka the broker and the fetch took 9.5 of 12 ms with a cold broker, librdkafka's own timer before the first step
1.2 ms, and the relay 1.2 ms. The bare producer has one step.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("latency").await?;
    // The first one becomes the leader before the second one starts.
    let mut leader = lab.start(USER, &[]).await?;
    timeout(LIMIT, until_it_leads(&leader)).await.context("the relay of the first replica does not lead")??;
    let mut follower = lab.start(USER, &[]).await?;
    ensure!(!leads(&follower).await?, "the relay of the second replica leads");
    let mut latency = Latency::start(&lab, &leader, &follower).await?;
    let requests = bed.size().of(REQUESTS);
    let row = requests.clamp(LEAST, ROW);
    // The first requests open connections and run code that is not compiled yet. They do not count.
    if bed.warms_up() {
        latency.row(Kind::Leader, WARM_UP, Duration::ZERO).await?;
    }
    for kind in [Kind::Leader, Kind::Follower, Kind::Bare] {
        latency.row(kind, if bed.warms_up() { row } else { LEAST }, INTERVAL).await?;
    }
    let warm_up = latency.forget();
    for _ in 0..requests.div_ceil(row) {
        for kind in [Kind::Leader, Kind::Follower, Kind::Bare] {
            latency.row(kind, row, INTERVAL).await?;
        }
    }
    let report = latency.report().limited_by(LIMITED_BY);
    latency.check(warm_up + requests.div_ceil(row) * row * 2)?;
    leader.stop().await;
    follower.stop().await;
    Ok(report)
}

/// A service is ready before its relay leads: on a new cluster the first term begins after seconds.
async fn until_it_leads(service: &RunningService) -> Result<()> {
    while !leads(service).await? {
        sleep(POLL).await;
    }
    Ok(())
}

async fn leads(service: &RunningService) -> Result<bool> {
    let metrics = reqwest::get(format!("{}/metrics", service.instance.admin_url())).await?.text().await?;
    Ok(metrics.lines().any(|line| line == "relay_leader 1"))
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Leader,
    Follower,
    Bare,
}

struct Latency<'a> {
    lab: &'a Lab<'a>,
    /// The ports of the two replicas.
    leader: u16,
    follower: u16,
    bare: Writer,
    arrivals: UnboundedReceiver<(Uuid, Instant)>,
    is_over: Arc<AtomicBool>,
    /// Milliseconds from the answer to the arrival.
    delays: HashMap<Kind, Vec<f64>>,
    /// Milliseconds from the intended start of a request to its answer.
    answers: Vec<f64>,
}

impl<'a> Latency<'a> {
    async fn start(lab: &'a Lab<'a>, leader: &RunningService, follower: &RunningService) -> Result<Self> {
        let topics = [lab.prefixed(Topic::USER_EVENTS.name), lab.prefixed("bare")];
        kafka::create_topic(lab.bed, &topics[1], Topic::USER_EVENTS.partitions).await?;
        let (sender, arrivals) = unbounded_channel();
        let is_over: Arc<AtomicBool> = Arc::default();
        for topic in topics {
            read(lab.bed, topic, sender.clone(), Arc::clone(&is_over))?;
        }
        Ok(Self {
            lab,
            leader: leader.instance.http,
            follower: follower.instance.http,
            bare: Writer::without_linger(lab.bed)?,
            arrivals,
            is_over,
            delays: HashMap::new(),
            answers: vec![],
        })
    }

    /// Requests of one kind at their intended times.
    async fn row(&mut self, kind: Kind, requests: u64, interval: Duration) -> Result<()> {
        // The service closes a connection that is idle during the rows of the other kinds.
        let port = if kind == Kind::Follower { self.follower } else { self.leader };
        let mut client = Connection::open(port).await?;
        let start = Instant::now();
        for number in 1..=requests {
            let intended = start + interval * number as u32;
            sleep_until(intended.into()).await;
            let (key, answered) = match kind {
                Kind::Leader | Kind::Follower => register(&mut client).await?,
                Kind::Bare => {
                    let key = mint_id();
                    let written = Instant::now();
                    let topic = self.lab.prefixed("bare");
                    let headers = OwnedHeaders::new();
                    self.bare.send(&topic, key.to_string().as_bytes(), headers, Some(b"{}"))?;
                    (key, written)
                }
            };
            if kind != Kind::Bare {
                self.answers.push(answered.duration_since(intended).as_secs_f64() * 1000.0);
            }
            let arrived = timeout(LIMIT, self.arrival(key)).await.context("an event does not arrive")??;
            let delay = arrived.saturating_duration_since(answered).as_secs_f64() * 1000.0;
            self.delays.entry(kind).or_default().push(delay);
        }
        Ok(())
    }

    /// Forgets what was measured so far. Returns the number of registrations.
    fn forget(&mut self) -> u64 {
        self.delays.clear();
        std::mem::take(&mut self.answers).len() as u64
    }

    async fn arrival(&mut self, key: Uuid) -> Result<Instant> {
        loop {
            let (arrived, at) = self.arrivals.recv().await.context("the reader has ended")?;
            if arrived == key {
                return Ok(at);
            }
        }
    }

    fn report(&self) -> Report {
        let delays = |kind| self.delays.get(&kind).cloned().unwrap_or_default();
        let leader = Figure::new("from the answer to the consumer", "ms", delays(Kind::Leader));
        let follower = Figure::new("the same, written at another replica", "ms", delays(Kind::Follower));
        let bare = Figure::new("a record of a bare producer", "ms", delays(Kind::Bare));
        let answers = Figure::new("from the intended start of the request to its answer", "ms", self.answers.clone());
        let goals = [
            ("median", leader.spread.median, MEDIAN_GOAL),
            ("p99", leader.spread.p99, P99_GOAL),
            ("p99 at another replica", follower.spread.p99, FOLLOWER_P99_GOAL),
        ];
        let what = "an idle system, one request each 200 ms: when a consumer has the event";
        let report = Report::of_figures("latency", what, vec![leader, follower, bare, answers]);
        goals
            .into_iter()
            .fold(report, |report, (what, value, most)| report.with_goal(what, value, "ms", Bound::AtMost(most)))
    }

    fn check(&self, registered: u64) -> Result<()> {
        let topic = self.lab.prefixed(Topic::USER_EVENTS.name);
        let starts = ends(self.lab.bed, &topic)?.into_keys().map(|partition| (partition, 0)).collect();
        checks::require_events(self.lab.bed, &topic, &starts, registered)
    }
}

impl Drop for Latency<'_> {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// Registers a user. Returns its id and the time of the answer.
async fn register(client: &mut Connection) -> Result<(Uuid, Instant)> {
    let body = json!({ "email": format!("{}@example.com", mint_id().simple()), "display_name": "Ada Lovelace" });
    let (status, body) = client.post("/users", body.to_string()).await?;
    let answered = Instant::now();
    ensure!(status == StatusCode::CREATED, "{status}: {}", String::from_utf8_lossy(&body));
    let body: Value = serde_json::from_slice(&body)?;
    Ok((body["id"].as_str().context("the answer has no id")?.parse()?, answered))
}

/// Reads a topic on a thread of its own, and reports each record when it arrives.
fn read(bed: &Bed, topic: String, arrivals: UnboundedSender<(Uuid, Instant)>, is_over: Arc<AtomicBool>) -> Result<()> {
    let reader = kafka::reader(bed)?;
    kafka::assign(&reader, &topic, &ends(bed, &topic)?)?;
    std::thread::spawn(move || {
        while !is_over.load(Ordering::Relaxed) {
            match reader.poll(POLL) {
                Some(Ok(message)) => {
                    let at = Instant::now();
                    let key = message.key().and_then(|key| Uuid::try_parse_ascii(key).ok());
                    if key.is_none_or(|key| arrivals.send((key, at)).is_err()) {
                        return;
                    }
                }
                None | Some(Err(KafkaError::PartitionEOF(_))) => {}
                Some(Err(_)) => return,
            }
        }
    });
    Ok(())
}
