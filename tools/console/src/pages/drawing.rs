//! Draws what the map shows, from the answers of the processes, Kafka's offsets and the tail.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;
use topology::{Group, SERVICES, Service};

use super::diagram::{BAR_WIDTH, PARTITIONS};
use super::text::{duration, rate, shortened, whole};
use super::view::{ProcessRow, View};
use crate::kafka::{Offsets, Recent};
use crate::system::{Answer, Process, Survey};

/// Characters of a reason that fit into a box.
const REASON: usize = 36;
/// A bar shows the lag of a partition on a logarithmic scale that ends here.
const FULL_LAG: f64 = 1_000_000.0;

/// Draws a view of each survey. Ends only with an error.
pub async fn draw(
    mut surveys: watch::Receiver<Arc<Survey>>,
    offsets: watch::Receiver<Arc<Offsets>>,
    recent: Recent,
    views: watch::Sender<Arc<View>>,
) -> anyhow::Result<()> {
    let mut before = Moment { survey: surveys.borrow().clone(), seen: recent.counts() };
    loop {
        surveys.changed().await?;
        let now = Moment { survey: surveys.borrow_and_update().clone(), seen: recent.counts() };
        let drawing = Drawing { offsets: &offsets.borrow().clone(), before: &before, now: &now };
        views.send_replace(Arc::new(drawing.view()));
        before = now;
    }
}

/// What is known at one moment. Rates are differences of two.
struct Moment {
    survey: Arc<Survey>,
    /// Records per topic since the start of the console.
    seen: BTreeMap<&'static str, u64>,
}

struct Drawing<'a> {
    offsets: &'a Offsets,
    before: &'a Moment,
    now: &'a Moment,
}

impl Drawing<'_> {
    fn view(&self) -> View {
        let mut view = View::default();
        for service in SERVICES {
            self.service(&mut view, service);
            service.groups.iter().for_each(|group| self.group(&mut view, service, group));
            service.writes.iter().for_each(|topic| self.topic(&mut view, topic));
        }
        self.facts(&mut view);
        view.processes = self.now.survey.processes.iter().map(row).collect();
        view
    }

    fn service(&self, view: &mut View, service: Service) {
        let processes: Vec<&Process> = self.processes(service.name).collect();
        let answers: Vec<&Answer> = processes.iter().filter_map(|process| process.answer.as_ref()).collect();
        let waiting = answers.iter().flat_map(|answer| &answer.waiting_for).next();
        let (state, text) = match (answers.len(), waiting) {
            (0, _) => ("bad", "does not answer".to_owned()),
            (_, Some((component, reason))) => ("wait", format!("{component}: {reason}")),
            (some, None) if some < processes.len() => ("wait", format!("{some} of {} answer", processes.len())),
            (1, None) => ("good", "works".to_owned()),
            (several, None) => ("good", format!("{several} processes work")),
        };
        view.states.insert(format!("service:{}", service.name), state);
        view.texts.insert(format!("status:{}", service.name), shortened(&text, REASON));
        view.texts.insert(format!("why:{}", service.name), text);
        if !service.writes.is_empty() {
            // Every process reports the rows of the database that they share.
            let rows = self.largest(service.name, "outbox_rows");
            let age = self.largest(service.name, "outbox_oldest_age_seconds");
            let text = match (rows, age) {
                (Some(rows), Some(age)) if rows > 0.0 => format!("{} rows · {}", whole(rows as i64), duration(age)),
                (Some(_), _) => "empty".to_owned(),
                (None, _) => "–".to_owned(),
            };
            view.texts.insert(format!("outbox:{}", service.name), text);
        }
    }

    fn group(&self, view: &mut View, service: Service, group: &Group) {
        let labels = [("group", group.name)];
        let count = |outcome: &str| {
            let labels = [("group", group.name), ("outcome", outcome)];
            self.total(service.name, "events_consumed_total", &labels).map_or("–".to_owned(), |n| whole(n as i64))
        };
        for outcome in ["applied", "duplicate", "stale", "skipped"] {
            view.texts.insert(format!("{outcome}:{}", group.name), count(outcome));
        }
        let lag = self.offsets.group_lag(group);
        let rate_text = self.rate(service.name, "events_consumed_total", &labels).map(rate);
        let lag_text = lag.map_or("–".to_owned(), whole);
        let letters = self.letters(service.name, &labels);
        view.texts.insert(format!("lag:{}", group.name), lag_text.clone());
        view.texts.insert(format!("rate:{}", group.name), rate_text.clone().unwrap_or("–".to_owned()));
        view.texts.insert(format!("letters:{}", group.name), letters.map_or("–".to_owned(), |n| whole(n as i64)));
        view.states.insert(format!("lag:{}", group.name), if lag.is_some_and(|lag| lag > 0) { "wait" } else { "" });
        let has_letters = letters.is_some_and(|letters| letters > 0.0);
        view.states.insert(format!("letters:{}", group.name), if has_letters { "bad" } else { "" });
        let text = match rate_text {
            Some(rate) => format!("lag {lag_text} · {rate} /s"),
            None => format!("lag {lag_text}"),
        };
        view.texts.insert(format!("group:{}", group.name), text);
        let rate = self.rate(service.name, "events_consumed_total", &labels);
        view.flows.insert(format!("reads:{}", group.name), rate.is_some_and(|rate| rate > 0.0));
    }

    fn topic(&self, view: &mut View, topic: &'static str) {
        let arrived = |moment: &Moment| moment.seen.get(topic).copied().unwrap_or(0);
        let arrived = arrived(self.now).saturating_sub(arrived(self.before));
        let per_second = arrived as f64 / self.seconds();
        view.texts.insert(format!("topic:{topic}"), format!("{} /s", rate(per_second)));
        view.flows.insert(format!("writes:{topic}"), arrived > 0);
        for partition in 0..PARTITIONS {
            let groups = SERVICES.iter().flat_map(|service| service.groups).filter(|group| group.topic == topic);
            let lag = groups.filter_map(|group| self.offsets.lag(group, partition)).max().unwrap_or(0);
            view.widths.insert(format!("lag:{topic}:{partition}"), bar(lag));
        }
    }

    fn facts(&self, view: &mut View) {
        let posted = [("method", "POST"), ("route", "/users"), ("status", "201")];
        let registrations = self.rate("user", "http_request_duration_seconds_count", &posted);
        let groups = SERVICES.iter().flat_map(|service| service.groups);
        let lags: Vec<i64> = groups.filter_map(|group| self.offsets.group_lag(group)).collect();
        let late = lags.iter().filter(|lag| **lag > 0).count();
        let ages = SERVICES.iter().filter_map(|service| self.largest(service.name, "outbox_oldest_age_seconds"));
        let letters: Vec<f64> = SERVICES.iter().filter_map(|service| self.letters(service.name, &[])).collect();
        let facts = [
            ("registrations", registrations.map_or("–".to_owned(), rate)),
            ("outbox", ages.reduce(f64::max).map_or("–".to_owned(), duration)),
            ("lag", if lags.is_empty() { "–".to_owned() } else { whole(lags.iter().sum()) }),
            ("late", whole(late as i64)),
            ("letters", if letters.is_empty() { "–".to_owned() } else { whole(letters.iter().sum::<f64>() as i64) }),
        ];
        for (name, text) in facts {
            view.texts.insert(format!("fact:{name}"), text);
        }
        let waiting = self.now.survey.processes.iter().find_map(|process| {
            let (component, reason) = process.answer.as_ref()?.waiting_for.first_key_value()?;
            Some(format!("{} waits for {component}: {reason}", process.service))
        });
        let silent = self.now.survey.processes.iter().find(|process| process.answer.is_none());
        let (state, text) = match (&self.offsets.error, silent, waiting) {
            (_, Some(process), _) => ("bad", format!("{} does not answer", process.service)),
            (Some(error), ..) => ("bad", error.clone()),
            (.., Some(waiting)) => ("wait", waiting),
            _ => ("good", "all parts work".to_owned()),
        };
        view.states.insert("all".to_owned(), state);
        view.texts.insert("all".to_owned(), shortened(&text, 90));
    }

    fn processes<'b>(&'b self, service: &'b str) -> impl Iterator<Item = &'b Process> + 'b {
        self.now.survey.processes.iter().filter(move |process| process.service == service)
    }

    /// The sum of a metric over the processes of a service.
    fn total(&self, service: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let answers = self.processes(service).filter_map(|process| process.answer.as_ref());
        answers.filter_map(|answer| answer.metrics.sum(name, labels)).reduce(|sum, value| sum + value)
    }

    /// The largest value of a metric that every process of a service reports about the same thing.
    fn largest(&self, service: &str, name: &str) -> Option<f64> {
        let answers = self.processes(service).filter_map(|process| process.answer.as_ref());
        answers.filter_map(|answer| answer.metrics.max(name, &[])).reduce(f64::max)
    }

    /// Open letters of a service's groups. Every process counts the letters of its groups, which
    /// they share.
    fn letters(&self, service: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let answers = self.processes(service).filter_map(|process| process.answer.as_ref());
        answers.filter_map(|answer| answer.metrics.sum("dead_letters_open", labels)).reduce(f64::max)
    }

    /// How much a counter grows per second, over the processes that answered both times. A process
    /// that has started again counts from zero and is left out once.
    fn rate(&self, service: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let grown = self.processes(service).filter_map(|process| {
            let now = process.answer.as_ref()?.metrics.sum(name, labels)?;
            let before = self.before.survey.processes.iter().find(|other| other.address == process.address)?;
            let before = before.answer.as_ref()?.metrics.sum(name, labels).unwrap_or(0.0);
            (now >= before).then_some(now - before)
        });
        Some(grown.reduce(|sum, more| sum + more)? / self.seconds())
    }

    fn seconds(&self) -> f64 {
        (self.now.survey.at - self.before.survey.at).as_secs_f64().max(0.1)
    }
}

fn row(process: &Process) -> ProcessRow {
    let (state, text) = match &process.answer {
        None => ("bad", "does not answer".to_owned()),
        Some(answer) if answer.waiting_for.is_empty() => ("good", "works".to_owned()),
        Some(answer) => {
            let waiting = answer.waiting_for.iter().map(|(component, reason)| format!("{component}: {reason}"));
            ("wait", waiting.collect::<Vec<_>>().join("; "))
        }
    };
    ProcessRow { service: process.service.clone(), address: process.address.to_string(), state, text }
}

/// The width of the bar of a lag. One record is visible.
fn bar(lag: i64) -> i32 {
    if lag <= 0 {
        return 0;
    }
    let share = (lag as f64 + 1.0).log10() / FULL_LAG.log10();
    (share.min(1.0) * f64::from(BAR_WIDTH)).ceil() as i32
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::system::Samples;

    fn process(service: &str, port: u16, page: Option<&str>, waits: Option<(&str, &str)>) -> Process {
        let answer = page.map(|page| Answer {
            waiting_for: waits.into_iter().map(|(component, why)| (component.to_owned(), why.to_owned())).collect(),
            metrics: Samples::parse(page),
        });
        Process { service: service.to_owned(), address: ([127, 0, 0, 1], port).into(), answer }
    }

    fn drawn(before: Vec<Process>, now: Vec<Process>) -> View {
        let at = Instant::now();
        let moment = |at, processes, seen| Moment { survey: Arc::new(Survey { at, processes }), seen };
        let before = moment(at, before, BTreeMap::new());
        let now = moment(at + Duration::from_secs(2), now, BTreeMap::from([("user.events.v1", 7)]));
        Drawing { offsets: &Offsets::default(), before: &before, now: &now }.view()
    }

    const APPLIED: &str = "events_consumed_total{group=\"email.welcome\",outcome=\"applied\"}";

    #[test]
    fn a_rate_is_the_growth_of_the_processes_that_answered_twice() {
        let page = |count| format!("{APPLIED} {count}\n");
        let view = drawn(
            vec![process("email", 1, Some(&page(10)), None), process("email", 2, Some(&page(90)), None)],
            // The second one has started again, and the third one is new.
            vec![
                process("email", 1, Some(&page(50)), None),
                process("email", 2, Some(&page(3)), None),
                process("email", 3, Some(&page(5)), None),
            ],
        );
        assert_eq!(view.text("rate:email.welcome"), "20.0");
        assert_eq!(view.text("applied:email.welcome"), "58");
        assert!(view.flows("reads:email.welcome"));
        assert_eq!(view.text("topic:user.events.v1"), "3.5 /s");
        assert_eq!(view.text("status:email"), "3 processes work");
    }

    #[test]
    fn what_waits_and_what_does_not_answer_is_named() {
        let view = drawn(
            vec![],
            vec![
                process("email", 1, Some(""), Some(("mail server", "its answer"))),
                process("cache", 2, None, None),
                process("user", 3, Some(""), None),
            ],
        );
        assert_eq!((view.state("service:email"), view.text("why:email")), ("wait", "mail server: its answer"));
        assert_eq!((view.state("service:cache"), view.text("status:cache")), ("bad", "does not answer"));
        assert_eq!((view.state("service:user"), view.text("status:user")), ("good", "works"));
        assert_eq!((view.state("all"), view.text("all")), ("bad", "cache does not answer"));
        assert_eq!(view.text("lag:email.welcome"), "–", "a lag that is not known is not 0");
    }

    #[test]
    fn a_bar_shows_a_single_record_and_ends_at_its_width() {
        assert_eq!([0, 1, 999_999, i64::MAX].map(bar), [0, 10, BAR_WIDTH, BAR_WIDTH]);
    }
}
