//! How long everything takes. A full run of all scenarios must take less than half an hour on two
//! cores.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::scenario::Scenario;
use crate::subject::Side;

/// Shares of what the slower side can take.
pub const LIGHT: f64 = 0.3;
pub const HEAVY: f64 = 0.8;
/// Of the light load.
pub const BURST: f64 = 5.0;
/// Registrations per second while something fails, at most, of all sides that run at the same time.
/// Enough to count what is lost, and so few that the checker reads all of them in seconds.
const FAULT_RATE: f64 = 80.0;
/// How much slower the mail server is, in milliseconds.
pub const SLOW_MS: u64 = 500;
/// How long the mail server takes while the registering process is killed, in milliseconds. With a
/// server that answers in one, most kills would meet no request.
pub const USUAL_MS: u64 = 200;
/// Registrations per second that debug programs take on any machine, on two sides at once.
const SMOKE_RATE: f64 = 100.0;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Size {
    /// For figures to be published.
    Full,
    /// A sixth of the time.
    Quick,
    /// Just enough to check the claims of the page. The times say nothing.
    Smoke,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Plan {
    pub size: Size,
    pub sides: Vec<Side>,
    pub scenarios: Vec<Scenario>,
    /// Of the load that finds what a side can take.
    pub capacity: Duration,
    /// The registrations per second that the slower side can take, if it is not measured.
    pub slowest: Option<f64>,
    /// Of a scenario without a fault.
    pub healthy: Duration,
    /// The load before a fault, and after it.
    pub before: Duration,
    pub after: Duration,
    /// Of a fault.
    pub fault: Duration,
    /// How often the registering process is killed, and the time from one kill to the next.
    pub kills: u32,
    pub between_kills: Duration,
    /// How long a client that repeats its request does so. Unless it is short for a test, it is
    /// longer than the time after which the synchronous version lets a repeated request take over.
    pub repeat: Duration,
    /// After the load, a scenario ends when every effect exists, or when no effect was added for so
    /// long. Longer than any retry of the two sides waits after the faults of this plan.
    pub quiet: Duration,
    /// Whether the faults of all sides happen at the same time. Then their times say little.
    pub side_by_side: bool,
}

impl Plan {
    pub fn of(size: Size) -> Self {
        let seconds = Duration::from_secs;
        match size {
            Size::Full => Self {
                size,
                sides: Side::ALL.to_vec(),
                scenarios: Scenario::ALL.to_vec(),
                capacity: seconds(8),
                slowest: None,
                healthy: seconds(12),
                before: seconds(4),
                after: seconds(4),
                fault: seconds(30),
                kills: 10,
                between_kills: seconds(3),
                repeat: seconds(15),
                quiet: seconds(15),
                side_by_side: false,
            },
            Size::Quick => Self {
                capacity: seconds(3),
                healthy: seconds(4),
                before: seconds(1),
                after: seconds(1),
                fault: seconds(5),
                kills: 3,
                between_kills: seconds(2),
                quiet: seconds(8),
                side_by_side: true,
                ..Self { size, ..Self::of(Size::Full) }
            },
            Size::Smoke => Self {
                size,
                sides: vec![Side::Resilient, Side::Background, Side::Waybill],
                scenarios: Scenario::CLAIMED.to_vec(),
                slowest: Some(SMOKE_RATE),
                healthy: seconds(2),
                fault: seconds(2),
                between_kills: seconds(1),
                repeat: seconds(2),
                quiet: seconds(6),
                ..Self::of(Size::Quick)
            },
        }
    }

    pub fn title(&self, scenario: Scenario) -> String {
        let fault = self.fault.as_secs();
        match scenario {
            Scenario::Light => "Healthy, at 30 % of what the slowest side can take".to_owned(),
            Scenario::Heavy => "Healthy, at 80 % of what the slowest side can take".to_owned(),
            Scenario::Burst => {
                format!("A burst of 150 % of what the slowest side can take, for {} s", self.burst().as_secs())
            }
            Scenario::SlowMail => format!("The mail server takes {SLOW_MS} ms longer"),
            Scenario::MailDown => format!("The mail server is down for {fault} s"),
            Scenario::AnalyticsDown => format!("The database of analytics is down for {fault} s"),
            Scenario::StoreDown => format!("The store of the cache is down for {fault} s"),
            Scenario::KafkaDown => format!("Kafka does not answer for {fault} s"),
            Scenario::Killed => {
                format!("The registering process is killed {} times; a mail takes {USUAL_MS} ms", self.kills)
            }
        }
    }

    /// Registrations per second while something fails. `slowest` is what the slowest side can take.
    pub fn fault_rate(&self, slowest: f64) -> f64 {
        let at_once = if self.side_by_side { self.sides.len() } else { 1 };
        (LIGHT * slowest).min(FAULT_RATE / at_once as f64)
    }

    pub fn burst(&self) -> Duration {
        self.fault.min(Duration::from_secs(20))
    }

    pub fn has(&self, scenario: Scenario) -> bool {
        self.scenarios.contains(&scenario)
    }
}
