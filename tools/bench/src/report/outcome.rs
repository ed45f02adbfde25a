//! The outcome of a job.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::figures::{Figure, Spread};
use crate::meter::Slice;
use crate::slices::Slices;
use crate::usage::{Cpu, load_average};

/// The machine at the start of a run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Machine {
    pub cores: usize,
    pub processor: String,
    /// The load average of the minute before the run.
    pub load: f64,
}

impl Machine {
    /// # Errors
    /// The machine does not run Linux.
    pub fn look() -> Result<Self> {
        let information = fs::read_to_string("/proc/cpuinfo").context("the benchmark needs Linux")?;
        let model = information.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Ok(Self {
            cores: std::thread::available_parallelism()?.get(),
            processor: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            load: load_average()?,
        })
    }
}

impl Display for Machine {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} cores, {}, load {:.2}", self.cores, self.processor, self.load)
    }
}

/// The outcome of a job.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub job: String,
    /// What our side does in a slice.
    pub ours: String,
    /// What the limit does in a slice.
    pub limit: String,
    /// What limits our side, for readers of the page.
    pub limited_by: String,
    /// What is counted, for example `rows`.
    pub unit: String,
    /// Of a job with two sides.
    pub slices: Option<Pairs>,
    /// What was measured besides.
    pub figures: Vec<Figure>,
    pub goals: Vec<Goal>,
    /// Times of fdatasync during the job, in milliseconds.
    pub disk: Option<Spread>,
}

/// The slices of both sides, measured in turn.
#[derive(Clone, Debug, Serialize)]
pub struct Pairs {
    pub ours: Vec<Slice>,
    pub limit: Vec<Slice>,
    /// Our rate divided by the limit's.
    pub ratio: Spread,
}

/// What a figure should be.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    pub what: String,
    pub value: f64,
    pub unit: String,
    pub bound: Bound,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    pub fn is_met(&self) -> bool {
        match self.bound {
            Bound::AtLeast(bound) => self.value >= bound,
            Bound::AtMost(bound) => self.value <= bound,
        }
    }
}

impl Display for Goal {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (relation, bound) = match self.bound {
            Bound::AtLeast(bound) => (">=", bound),
            Bound::AtMost(bound) => ("<=", bound),
        };
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        write!(f, "{} {:.2}{unit}, goal {relation} {bound}{unit}", self.what, self.value)
    }
}

impl Report {
    /// A job without a limit.
    pub fn of_figures(job: &str, ours: &str, figures: Vec<Figure>) -> Self {
        Self {
            job: job.to_owned(),
            ours: ours.to_owned(),
            limit: String::new(),
            limited_by: String::new(),
            unit: String::new(),
            slices: None,
            figures,
            goals: vec![],
            disk: None,
        }
    }

    /// A job with two sides, whose ratio should be at least `goal`.
    pub fn of_slices(job: &str, unit: &str, [ours, limit]: [&str; 2], slices: Slices, goal: f64) -> Self {
        let ratios = slices.ours.iter().zip(&slices.limit).map(|(ours, limit)| ours.rate() / limit.rate());
        let ratio = Spread::of(ratios);
        let mut report = Self::of_figures(job, ours, vec![]);
        limit.clone_into(&mut report.limit);
        unit.clone_into(&mut report.unit);
        report.slices = Some(Pairs { ours: slices.ours, limit: slices.limit, ratio });
        report.with_goal("ratio", ratio.median, "", Bound::AtLeast(goal))
    }

    pub fn with_goal(mut self, what: &str, value: f64, unit: &str, bound: Bound) -> Self {
        self.goals.push(Goal { what: what.to_owned(), value, unit: unit.to_owned(), bound });
        self
    }

    /// Adds the goal that our side needs at most this much memory (MB).
    pub fn with_memory_goal(self, most: f64) -> Self {
        let peak = self.ours().iter().map(|slice| slice.peak_memory).fold(0.0, f64::max);
        self.with_goal("peak memory", peak, "MB", Bound::AtMost(most))
    }

    /// The median of what our service needs for 100,000, in CPU seconds.
    pub fn service_cpu(&self) -> f64 {
        Spread::of(self.ours().iter().map(|slice| slice.cpu_per_100_000().service)).median
    }

    /// Says what limits our side.
    pub fn limited_by(mut self, text: &str) -> Self {
        text.clone_into(&mut self.limited_by);
        self
    }

    pub fn with_disk(mut self, times: &[Duration]) -> Self {
        self.disk = (!times.is_empty()).then(|| Spread::of(times.iter().map(|time| time.as_secs_f64() * 1000.0)));
        self
    }

    fn ours(&self) -> &[Slice] {
        self.slices.as_ref().map_or(&[], |pairs| &pairs.ours)
    }

    fn is_ok(&self) -> bool {
        self.goals.iter().all(Goal::is_met)
    }
}

/// The columns of a table with the sides of a job.
pub(super) const COLUMNS: [&str; 8] =
    ["per second", "service", "Postgres", "Kafka", "Redis", "load", "others", "peak MB"];

/// The medians of the slices of one side, as [`COLUMNS`] names them.
pub(super) fn medians(slices: &[Slice]) -> [String; 8] {
    let median = |of: fn(&Slice) -> f64| Spread::of(slices.iter().map(of)).median;
    let cpu = |of: fn(&Cpu) -> f64| Spread::of(slices.iter().map(|slice| of(&slice.cpu_per_100_000()))).median;
    let peak = median(|slice| slice.peak_memory);
    [
        format!("{:.0}", median(Slice::rate)),
        format!("{:.2}", cpu(|cpu| cpu.service)),
        format!("{:.2}", cpu(|cpu| cpu.postgres)),
        format!("{:.2}", cpu(|cpu| cpu.kafka)),
        format!("{:.2}", cpu(|cpu| cpu.redis)),
        format!("{:.2}", cpu(|cpu| cpu.load)),
        format!("{:.2}", cpu(|cpu| cpu.others)),
        if peak > 0.0 { format!("{peak:.1}") } else { String::new() },
    ]
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}: {}", self.job, self.ours)?;
        if let Some(Pairs { ours, limit, ratio }) = &self.slices {
            writeln!(f, "  limit: {}", self.limit)?;
            writeln!(f, "  medians of {} slices; CPU in seconds per 100,000 {}", ours.len(), self.unit)?;
            let row = |f: &mut Formatter<'_>, name: &str, cells: &[String]| {
                write!(f, "  {name:<6}")?;
                cells.iter().try_for_each(|cell| write!(f, " {cell:>10}"))?;
                writeln!(f)
            };
            row(f, "", &COLUMNS.map(str::to_owned))?;
            row(f, "ours", &medians(ours))?;
            row(f, "limit", &medians(limit))?;
            writeln!(f, "  ratio {:.3}, from {:.3} to {:.3}", ratio.median, ratio.least, ratio.most)?;
        }
        for figure in &self.figures {
            writeln!(f, "  {figure}")?;
        }
        if let Some(disk) = &self.disk {
            writeln!(f, "  fdatasync: median {:.2} ms, p99 {:.2} ms", disk.median, disk.p99)?;
        }
        let goals: Vec<String> =
            self.goals.iter().map(|goal| format!("{goal}{}", if goal.is_met() { "" } else { " (short)" })).collect();
        let verdict = if self.is_ok() { "ok" } else { "short" };
        if goals.is_empty() {
            write!(f, "{}: measured", self.job)
        } else {
            write!(f, "{}: {}: {verdict}", self.job, goals.join("; "))
        }
    }
}
