//! `console`: what the console needs while many events arrive and a browser shows them, and whether
//! the relay is slower while the console runs. The other side is the same relay without a console.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use reqwest::Client;
use shared::events::Topic;
use testbed::tools::RunningTool;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::consume::registration;
use super::relay::Relay;
use crate::Size;
use crate::bed::{Bed, Lab};
use crate::kafka::Writer;
use crate::meter::Slice;
use crate::report::{Bound, Report};
use crate::slices::{Contest, measure};

/// Events per second.
const RATE: u64 = 10_000;
/// How often the next events are written.
const TICK: Duration = Duration::from_millis(10);
/// How long events are written.
const WINDOW: Duration = Duration::from_secs(20);
/// The live updates that a browser subscribes to, one page each.
const STREAMS: [&str; 2] = ["/live/map", "/live/events"];
/// Rows of a slice of the relay.
const ROWS: u64 = 200_000;

/// Updates of a page per second.
const UPDATES_GOAL: f64 = 20.0;
/// Cores.
const CPU_GOAL: f64 = 0.3;
/// MB.
const MEMORY_GOAL: f64 = 64.0;
/// The relay's rate with the console, relative to its rate without.
const GOAL: f64 = 0.95;

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: the console reads at most 10,000 records a second and skips the others. It also asks Kafka for the ends of
all partitions and each service for its metrics, once a second. It shares two cores with Kafka and the relay.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("console").await?;
    lab.create_topics().await?;
    let watched = watch(&lab).await?;
    let mut relay = Relay::start(&lab).await?;
    let rows = bed.size().of(ROWS);
    let slices = measure(bed, &mut WithAndWithout { lab: &lab, relay: &mut relay, rows }).await?;
    relay.check().await?;
    let what = ["the relay while the console runs", "the relay without a console"];
    let Watched { updates, cores, memory } = watched;
    Ok(Report::of_slices("console", "rows", what, slices, GOAL)
        .with_goal("updates of a page per second", updates, "", Bound::AtMost(UPDATES_GOAL))
        .with_goal("CPU of the console", cores, "cores", Bound::AtMost(CPU_GOAL))
        .with_goal("memory of the console", memory, "MB", Bound::AtMost(MEMORY_GOAL))
        .limited_by(LIMITED_BY))
}

/// What the console needed while events arrived.
struct Watched {
    /// Per second and page.
    updates: f64,
    cores: f64,
    /// Peak, in MB.
    memory: f64,
}

async fn watch(lab: &Lab<'_>) -> Result<Watched> {
    let mut console = lab.start_console().await?;
    let window = if lab.bed.size() == Size::Full { WINDOW } else { WINDOW / 10 };
    let writer = Writer::new(lab.bed)?;
    // The relay does not write this topic, so its events can be checked.
    let topic = lab.prefixed(Topic::EMAIL_EVENTS.name);
    let until = Instant::now() + window;
    let meter = lab.bed.meter_of(console.process.pid())?;
    let write = async {
        let mut written = 0;
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        while Instant::now() < until {
            ticks.tick().await;
            for _ in 0..RATE * TICK.as_millis() as u64 / 1_000 {
                let (envelope, event) = registration();
                writer.send_event(&topic, &envelope, &event)?;
                written += 1;
            }
        }
        anyhow::Ok(written)
    };
    let streams = try_join_all(STREAMS.map(|path| count_updates(&console, path, until)));
    let (written, streams) = tokio::try_join!(write, streams)?;
    let slice = meter.stop(written)?;
    writer.wait()?;
    console.stop().await;
    let most = streams.iter().map(|stream| stream.updates).max().unwrap_or(0);
    ensure!(most > 0, "no page was updated");
    ensure!(streams.iter().any(|stream| stream.says_left_out), "no page says that it leaves records out");
    Ok(Watched {
        updates: most as f64 / window.as_secs_f64(),
        cores: slice.cpu.service / slice.seconds,
        memory: slice.peak_memory,
    })
}

struct Stream {
    updates: u64,
    says_left_out: bool,
}

/// Counts the updates of a page until a time.
async fn count_updates(console: &RunningTool, path: &str, until: Instant) -> Result<Stream> {
    let mut answer = Client::new().get(format!("{}{path}", console.url())).send().await?.error_for_status()?;
    let mut text = String::new();
    while let Ok(chunk) = timeout_at(until, answer.chunk()).await {
        let chunk = chunk?.with_context(|| format!("the console has ended {path}"))?;
        text.push_str(&String::from_utf8_lossy(&chunk));
    }
    let updates = text.lines().filter(|line| line.starts_with("data:")).count() as u64;
    let left_out = text.split("\"left_out\":").skip(1).any(|rest| !rest.starts_with('0'));
    Ok(Stream { updates, says_left_out: left_out })
}

struct WithAndWithout<'a, 'l> {
    lab: &'a Lab<'l>,
    relay: &'a mut Relay<'l>,
    rows: u64,
}

impl Contest for WithAndWithout<'_, '_> {
    async fn ours(&mut self) -> Result<Slice> {
        let mut console = self.lab.start_console().await?;
        let slice = self.relay.publish(self.rows).await;
        console.stop().await;
        slice
    }

    async fn limit(&mut self) -> Result<Slice> {
        self.relay.publish(self.rows).await
    }
}
