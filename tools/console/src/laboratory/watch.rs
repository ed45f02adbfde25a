//! Checks the registrations once a second while the page is open, and computes the indicators.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use futures::future::join_all;
use tokio::sync::watch;
use tokio::time::{Duration, Instant, MissedTickBehavior, interval};
use topology::{ANALYTICS, SERVICES, Service, USER};

use super::Laboratory;
use super::fates::{Checked, Received, Situation};
use super::indicators::{Indicator, indicators};
use super::registrations::Registration;
use super::totals::{Compared, Round, Totals};
use crate::config::ServiceAddress;
use crate::kafka::{Offsets, Recent};
use crate::system::{Operations, Survey};

/// How often new records are read from the tail, which keeps the newest 10,000.
const TICK: Duration = Duration::from_millis(250);
/// How often the services are asked.
const ROUND: Duration = Duration::from_secs(1);
/// Registrations that are checked in one round. Each needs three requests.
const LOOKS: usize = 60;
/// Registrations that are checked at the same time.
const AT_ONCE: usize = 8;
/// How long after the last visit of the page the registrations are checked. Without visitors the
/// services and the mail server get no requests about registrations.
const VISIT: Duration = Duration::from_secs(30);
/// The control port reports at most so many mails. Then it may leave out that of a registration.
const MAILS: u32 = 10_000;
/// The group whose total is compared.
const COUNTING: &str = "analytics.users";

/// What the page shows.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    pub indicators: Vec<Indicator>,
    pub watched: usize,
    pub accepted: u64,
    pub refused: u64,
}

/// Where the Laboratory sees what happens.
pub struct Sources {
    pub surveys: watch::Receiver<Arc<Survey>>,
    pub offsets: watch::Receiver<Arc<Offsets>>,
    pub recent: Recent,
    pub operations: Operations,
}

/// Runs until the end of the process. `further` gets the processes that the control port has
/// started: the map shows them too.
pub async fn watch(
    laboratory: Laboratory,
    sources: Sources,
    further: watch::Sender<Vec<ServiceAddress>>,
    findings: watch::Sender<Arc<Findings>>,
) -> Result<()> {
    let mut watcher = Watcher { laboratory, sources, further, totals: Totals::default(), seen: None, mails: None };
    let mut compared = Compared::NotYet;
    let mut asked: Option<Instant> = None;
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        watcher.read_new_records();
        let is_round = asked.is_none_or(|asked| asked.elapsed() >= ROUND);
        if is_round {
            asked = Some(Instant::now());
            watcher.ask_control().await;
            if watcher.is_visited() {
                watcher.look().await;
                compared = watcher.compare().await;
            }
        }
        if is_round || watcher.is_visited() {
            findings.send_replace(Arc::new(watcher.findings(&compared)));
        }
    }
}

struct Watcher {
    laboratory: Laboratory,
    sources: Sources,
    further: watch::Sender<Vec<ServiceAddress>>,
    totals: Totals,
    /// The number of the last record that was read.
    seen: Option<u64>,
    mails: Option<BTreeMap<String, Received>>,
}

impl Watcher {
    fn is_visited(&self) -> bool {
        self.laboratory.visited.borrow().is_some_and(|visited| visited.elapsed() < VISIT)
    }

    fn read_new_records(&mut self) {
        let new = self.sources.recent.after(self.seen, usize::MAX, |_| true);
        let Some(newest) = new.first() else { return };
        // The tail has skipped some, or more than it keeps have arrived.
        let expected = newest.number - self.seen.map_or(0, |seen| seen + 1) + 1;
        if new.len() as u64 != expected {
            self.totals.restart();
        }
        self.seen = Some(newest.number);
        let mut registrations = self.laboratory.registrations();
        for seen in new.iter().rev() {
            registrations.saw(seen);
            self.totals.saw(seen);
        }
    }

    async fn ask_control(&self) {
        self.laboratory.ask_state().await;
        let Some(state) = self.laboratory.state() else { return };
        let further = state.processes.iter().filter(|process| process.is_further);
        let further = further.map(|process| ServiceAddress {
            service: process.service.clone(),
            host: "127.0.0.1".to_owned(),
            port: process.admin,
        });
        self.further.send_replace(further.collect());
    }

    /// Asks the services about some registrations. The outbox and the lags are read first. So if
    /// they were empty, an effect that is missing afterwards is lost.
    async fn look(&mut self) {
        self.mails = self.ask_mails().await;
        let situation = self.situation();
        let next = self.laboratory.registrations().next(LOOKS);
        for some in next.chunks(AT_ONCE) {
            join_all(some.iter().map(|registration| self.look_at(registration, &situation))).await;
        }
    }

    async fn look_at(&self, registration: &Registration, situation: &Situation) {
        let user = registration.user;
        let mut checked = self.laboratory.apis.check(user).await;
        if is_missing(&checked) && situation.reason(registration.registered.accepted, USER).is_none() {
            if self.laboratory.apis.is_erased(user).await {
                self.laboratory.registrations().forget(user);
                return;
            }
            checked.letter = self.letter(registration).await;
        }
        self.laboratory.registrations().judge(user, &checked, situation);
    }

    /// The group that has a dead letter of this user.
    async fn letter(&self, registration: &Registration) -> Option<&'static str> {
        let key = registration.user.to_string();
        let groups = SERVICES.into_iter().flat_map(|service| service.groups.iter().map(move |group| (service, group)));
        let groups: Vec<_> = groups.filter(|(_, group)| USER.writes.contains(&group.topic)).collect();
        for (service, group) in groups {
            let address = self.sources.surveys.borrow().address(service);
            let Some(address) = address else { continue };
            let query = [("group", group.name), ("key", &key), ("limit", "1")];
            let found = self.sources.operations.letters(address, &query).await;
            if found.is_ok_and(|page| !page.letters.is_empty()) {
                return Some(group.name);
            }
        }
        None
    }

    async fn ask_mails(&self) -> Option<BTreeMap<String, Received>> {
        match (&self.laboratory.control, &self.laboratory.mailpit) {
            (Some(control), _) => control.mails().await.ok(),
            (None, Some(mailpit)) => mailpit.mails().await.ok(),
            (None, None) => None,
        }
    }

    fn situation(&self) -> Situation {
        let survey = self.sources.surveys.borrow().clone();
        let offsets = self.sources.offsets.borrow().clone();
        Situation {
            outbox: survey.largest(USER, "outbox_rows").map(|rows| rows as i64),
            lags: SERVICES.map(|service| (service.name, lag(&offsets, service))).into(),
            mails: self.mails.clone(),
            keeps_mails: self.laboratory.has_control() && self.all_mails() < MAILS,
            taken: survey.at,
        }
    }

    /// How many mails the mail server has reported.
    fn all_mails(&self) -> u32 {
        self.mails.iter().flat_map(BTreeMap::values).map(|received| received.mails).sum()
    }

    /// Compares the total of the analytics service with the topic.
    async fn compare(&mut self) -> Compared {
        let offsets = self.sources.offsets.borrow().clone();
        let group = ANALYTICS.groups.iter().find(|group| group.name == COUNTING);
        let lag = group.filter(|_| offsets.error.is_none()).and_then(|group| offsets.group_lag(group));
        let round = match (lag, offsets.asked, offsets.ends.get(USER.writes[0])) {
            (Some(0), Some(asked), Some(ends)) => {
                let counted = self.laboratory.apis.funnel().await.ok();
                counted.map(|counted| Round { ends: ends.clone(), asked, counted, answered: Instant::now() })
            }
            _ => None,
        };
        let registrations = self.laboratory.registrations();
        let known = registrations.all().filter_map(|registration| {
            let place = registration.registered.places.get(USER.writes[0])?;
            Some((registration.user, *place))
        });
        self.totals.compare(round, known)
    }

    fn findings(&self, compared: &Compared) -> Findings {
        let registrations = self.laboratory.registrations();
        let all: Vec<&Registration> = registrations.all().collect();
        Findings {
            indicators: indicators(all.iter().copied(), self.mails.as_ref(), compared),
            watched: all.len(),
            accepted: registrations.accepted,
            refused: registrations.refused,
        }
    }
}

/// Whether a service has answered that an effect is missing, or that the mail was cancelled. Both
/// are also true of an erased user.
fn is_missing(checked: &Checked) -> bool {
    let Checked { counted, cached, deliveries, .. } = checked;
    let is_unmailed = deliveries.as_ref().is_some_and(|deliveries| {
        deliveries.is_empty() || deliveries.iter().any(|delivery| delivery.status == "cancelled")
    });
    *counted == Some(0) || *cached == Some(None) || is_unmailed
}

/// The lag of the groups of a service that read what the user service writes.
fn lag(offsets: &Offsets, service: Service) -> Option<i64> {
    let groups = service.groups.iter().filter(|group| USER.writes.contains(&group.topic));
    let lags: Option<Vec<i64>> = groups.map(|group| offsets.group_lag(group)).collect();
    lags.filter(|_| offsets.error.is_none()).map(|lags| lags.iter().sum())
}
