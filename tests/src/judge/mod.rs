//! The judge records a run, reads what it left, and has the checker find violations.

mod search;

use std::collections::BTreeMap;

use topology::{ANALYTICS, CACHE, EMAIL, USER};

use crate::checker::{self, Discard, Email, History, Violation};
use crate::load::Answers;
use crate::record::Record;
use crate::services::{EMAIL_EVENTS, OPERATOR_ACTIONS, USER_EVENTS, USER_STATE, dead_letters_of, groups, service_of};
use crate::system::System;
use crate::waiting::DEADLINE;

/// All personal data that the load and the facets write contains one of these.
const PERSONAL: [&str; 2] = ["@example.com", "Lovelace"];
/// The places that may contain personal data.
const ALLOWED: [&str; 4] = ["cache", "email public.recipients", "topic user.state.v1", "user public.users"];

/// Records the outboxes and the deliveries since it was created.
pub struct Judge {
    records_email: bool,
}

impl System {
    /// Records the run from now on. The services that run must have migrated their databases.
    pub async fn judge(&self) -> Judge {
        self.stores.record_outbox(USER).await;
        let records_email = self.processes.was_started(EMAIL);
        if records_email {
            self.stores.record_outbox(EMAIL).await;
            self.stores.record_deliveries().await;
        }
        Judge { records_email }
    }
}

impl Judge {
    /// Waits until the system is idle and checks the run.
    ///
    /// # Panics
    /// There are violations. The message lists all of them, and the whole history is written next
    /// to the logs.
    pub async fn check(&self, system: &mut System) -> History {
        self.check_with(system, &Answers::default()).await
    }

    /// As [`Judge::check`], and checks that the answers which the clients got are true.
    pub async fn check_with(&self, system: &mut System, answers: &Answers) -> History {
        let (history, violations) = self.violations(system, answers).await;
        if !violations.is_empty() {
            let file = system.processes.file("history.txt");
            std::fs::write(&file, format!("{history:#?}")).unwrap();
            let list: Vec<String> = violations.iter().map(Violation::to_string).collect();
            panic!("{} violations, the history is in {}:\n{}", list.len(), file.display(), list.join("\n"));
        }
        history
    }

    /// Waits until the system is idle, and returns the history of the run and its violations.
    pub async fn violations(&self, system: &mut System, answers: &Answers) -> (History, Vec<Violation>) {
        let work_left = system.drain(DEADLINE).await;
        let mut history = self.history(system, answers).await;
        history.work_left = work_left;
        let violations = checker::violations(&history);
        (history, violations)
    }

    /// The places with any of `texts`, sorted: `user public.users`, `topic user.state.v1`, `cache`,
    /// `log of email`, …
    pub async fn places_of(&self, system: &System, texts: &[&str]) -> Vec<String> {
        search::places_of(system, texts).await
    }

    async fn history(&self, system: &mut System, answers: &Answers) -> History {
        let ended = ended(system).await;
        let kafka = &system.kafka;
        let stores = &system.stores;
        let processes = &system.processes;
        let mut letters = BTreeMap::new();
        let mut open = BTreeMap::new();
        for group in groups() {
            let is_letter = |record: &Record| !record.headers.is_empty();
            letters.insert(group, kafka.read(&dead_letters_of(group)).into_iter().filter(is_letter).collect());
            open.insert(group, kafka.dead_letters(group).into_values().collect());
        }
        History {
            operations: answers.operations.clone(),
            users: stores.users().await,
            inserted: stores.outbox_record(USER).await,
            written_by_test: kafka.written_by_test(),
            facts: kafka.read(USER_EVENTS),
            states: kafka.read(USER_STATE),
            compacted: kafka.was_compacted(),
            email: if self.records_email { Some(email(system).await) } else { None },
            analytics: if processes.was_started(ANALYTICS) { Some(stores.analytics().await) } else { None },
            cache: if processes.was_started(CACHE) { Some(stores.cached_profiles().await) } else { None },
            letters,
            open,
            discards: Discard::all(&kafka.read(OPERATOR_ACTIONS)),
            counted: counted(system).await,
            work_left: vec![],
            ended,
            leaks: leaks(system).await,
        }
    }
}

/// The processes that ended by themselves, and those that run and do not answer `/livez`.
async fn ended(system: &mut System) -> Vec<String> {
    let mut ended = system.processes.ended_by_themselves();
    for service in system.processes.should_run() {
        let is_alive = system.processes.admin(service).is_alive().await;
        ended.extend((!is_alive).then(|| format!("{} is not alive", service.name)));
    }
    ended
}

async fn email(system: &System) -> Email {
    Email {
        deliveries: system.stores.deliveries().await,
        recipients: system.stores.recipients().await,
        inserted: system.stores.outbox_record(EMAIL).await,
        facts: system.kafka.read(EMAIL_EVENTS),
        mails: system.mail.all(),
    }
}

/// How many records each group counted. Only groups whose single process has run since the
/// beginning, because counters are lost with their process.
async fn counted(system: &System) -> BTreeMap<&'static str, u64> {
    let mut counted = BTreeMap::new();
    for group in groups() {
        if system.processes.has_run_alone(service_of(group)) {
            counted.insert(group, system.processes.counted_in_all(group).await as u64);
        }
    }
    counted
}

async fn leaks(system: &System) -> Vec<String> {
    let mut places = search::places_of(system, &PERSONAL).await;
    places.retain(|place| !ALLOWED.contains(&place.as_str()));
    places
}
