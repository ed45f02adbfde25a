//! What the routes act on: the consumer groups of the process, and the record of actions. The admin
//! port opens before the service has connected to anything, so the groups are added later.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio::task::block_in_place;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::events::{Event, Kind as TopicKind};
use crate::messaging::actions::{Actions, Begun, Intent};
use crate::messaging::consumer::BlockedRecords;
use crate::messaging::dead_letters::{DeadLetterWriter, Job, LetterIndex, Redriver};
use crate::messaging::handler::Handler;
use crate::messaging::kafka::KafkaConfig;
use crate::messaging::reader::TopicReader;
use crate::messaging::record::Coordinates;
use crate::platform::problem::{IntoProblem, Kind, internal_error, problem};

pub(super) const INVALID_ACTION: Kind = Kind::new("invalid-action", StatusCode::BAD_REQUEST);
const UNKNOWN_GROUP: Kind = Kind::new("unknown-group", StatusCode::NOT_FOUND);
pub(super) const LETTER_NOT_OPEN: Kind = Kind::new("letter-not-open", StatusCode::NOT_FOUND);
const LETTER_OF_SEVERAL_GROUPS: Kind = Kind::new("letter-of-several-groups", StatusCode::CONFLICT);
pub(super) const TOPIC_UNREADABLE: Kind = Kind::new("topic-unreadable", StatusCode::SERVICE_UNAVAILABLE);
const ACTION_NOT_RECORDED: Kind = Kind::new("action-not-recorded", StatusCode::SERVICE_UNAVAILABLE);
const OUTCOME_NOT_RECORDED: Kind = Kind::new("outcome-not-recorded", StatusCode::SERVICE_UNAVAILABLE);

/// Characters of a reason.
const REASON_MAX_LENGTH: usize = 200;
/// Requests that read from Kafka at the same time. Each has a client of its own, with its threads
/// and connections. Further requests wait.
const READS: usize = 4;

/// Checks a reason that an operator gives.
///
/// # Errors
/// The reason is empty, too long, or could change the output of a terminal.
pub(super) fn reason(text: &str) -> Result<String, String> {
    if (1..=REASON_MAX_LENGTH).contains(&text.chars().count()) && !text.contains(char::is_control) {
        Ok(text.to_owned())
    } else {
        Err(format!("the reason has 1 to {REASON_MAX_LENGTH} characters, and no control characters"))
    }
}

/// Why a request is refused or has failed.
#[derive(Debug)]
pub(super) struct Refused {
    pub kind: Kind,
    pub detail: String,
}

impl Refused {
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }

    pub fn unreadable(error: &anyhow::Error) -> Self {
        Self::new(TOPIC_UNREADABLE, format!("{error:#}"))
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        problem(self.kind, self.detail).into_response()
    }
}

/// The body of an action.
pub(super) type Body<T> = Result<Json<T>, JsonRejection>;

/// # Errors
/// The body does not have the form of a `T`.
#[expect(clippy::result_large_err, reason = "an answer, made once for a request")]
pub(super) fn parsed<T>(body: Body<T>) -> Result<T, Response> {
    body.map(|Json(body)| body).map_err(|rejection| rejection.into_problem().into_response())
}

/// A consumer group of this process.
pub(super) struct Group {
    pub name: &'static str,
    /// The topic that it reads.
    pub records_topic: String,
    pub kind: TopicKind,
    pub index: LetterIndex,
    pub letters: Arc<DeadLetterWriter>,
    /// Orders for the thread that redrives. It takes one at a time, and one more may wait.
    pub redrives: mpsc::Sender<Job>,
}

/// The state of all routes. Clones share it.
#[derive(Clone)]
pub(crate) struct Operations(Arc<State>);

struct State {
    kafka: KafkaConfig,
    service: &'static str,
    actions: Actions,
    groups: Mutex<BTreeMap<&'static str, Arc<Group>>>,
    blocked_records: BlockedRecords,
    /// Changes when an operator closes breakers.
    resumed: watch::Sender<()>,
    /// Why an operator has paused the consumers.
    paused: watch::Sender<Option<String>>,
    reads: Semaphore,
    /// Actions in progress. They continue if their client disconnects.
    tasks: TaskTracker,
}

impl Operations {
    pub fn new(kafka: &KafkaConfig, service: &'static str) -> Self {
        Self(Arc::new(State {
            kafka: kafka.clone(),
            service,
            actions: Actions::new(kafka, service),
            groups: Mutex::default(),
            blocked_records: BlockedRecords::default(),
            resumed: watch::Sender::new(()),
            paused: watch::Sender::new(None),
            reads: Semaphore::new(READS),
            tasks: TaskTracker::new(),
        }))
    }

    /// Adds the group of a handler. Returns the group's index, which a thread has to fill, and what
    /// redrives its letters.
    pub fn add<H: Handler>(
        &self,
        handler: H,
        stop: &CancellationToken,
    ) -> (LetterIndex, Redriver<H>, mpsc::Receiver<Job>) {
        let kafka = self.kafka().clone();
        let topic = H::Event::TOPIC;
        let records_topic = kafka.prefixed(topic.name);
        let index = LetterIndex::new(records_topic.clone());
        let letters = Arc::new(DeadLetterWriter::new(&kafka, H::GROUP, topic.kind));
        let (redrives, jobs) = mpsc::channel(1);
        let group = Group {
            name: H::GROUP,
            records_topic,
            kind: topic.kind,
            index: index.clone(),
            letters: Arc::clone(&letters),
            redrives,
        };
        self.0.groups.lock().unwrap_or_else(PoisonError::into_inner).insert(H::GROUP, Arc::new(group));
        (index.clone(), Redriver { handler, kafka, index, letters, stop: stop.clone() }, jobs)
    }

    /// Waits after the stop until the actions in progress have ended.
    pub async fn finish(self, stop: CancellationToken) -> anyhow::Result<()> {
        stop.cancelled().await;
        self.0.tasks.close();
        self.0.tasks.wait().await;
        Ok(())
    }

    pub fn blocked_records(&self) -> &BlockedRecords {
        &self.0.blocked_records
    }

    pub fn resumed(&self) -> &watch::Sender<()> {
        &self.0.resumed
    }

    pub fn paused(&self) -> &watch::Sender<Option<String>> {
        &self.0.paused
    }

    pub(super) fn kafka(&self) -> &KafkaConfig {
        &self.0.kafka
    }

    pub(super) fn service(&self) -> &'static str {
        self.0.service
    }

    pub(super) fn tasks(&self) -> &TaskTracker {
        &self.0.tasks
    }

    /// The groups of the process, in the order of their names.
    ///
    /// # Errors
    /// The process has none, or has not started its consumers yet.
    pub(super) fn groups(&self) -> Result<Vec<Arc<Group>>, Refused> {
        let groups: Vec<_> = self.0.groups.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        if groups.is_empty() {
            let detail = "this process has no consumers, or has not started them yet: /status says what it waits for";
            return Err(Refused::new(UNKNOWN_GROUP, detail));
        }
        Ok(groups)
    }

    /// The group of this name, or all groups.
    ///
    /// # Errors
    /// There is no such group.
    pub(super) fn groups_named(&self, name: Option<&str>) -> Result<Vec<Arc<Group>>, Refused> {
        let all = self.groups()?;
        let Some(name) = name else { return Ok(all) };
        match all.iter().find(|group| group.name == name) {
            Some(group) => Ok(vec![Arc::clone(group)]),
            None => {
                let names = all.iter().map(|group| group.name).collect::<Vec<_>>().join(", ");
                Err(Refused::new(UNKNOWN_GROUP, format!("group: this service has {names}, and not {name}")))
            }
        }
    }

    /// The group in which the record has an open letter, and the offset of the letter.
    ///
    /// # Errors
    /// There is none, or there are several and `name` does not say which; Kafka does not answer.
    pub(super) async fn letter(
        &self,
        reader: &TopicReader,
        record: &Coordinates,
        name: Option<&str>,
    ) -> Result<(Arc<Group>, i64), Refused> {
        let mut found = vec![];
        for group in self.groups_named(name)? {
            self.until_current(reader, &group).await?;
            found.extend(group.index.letter_of(record).map(|offset| (group, offset)));
        }
        match found.len() {
            0 => {
                let detail = format!("{record} is not an open dead letter: it was settled, or never dead-lettered");
                Err(Refused::new(LETTER_NOT_OPEN, detail))
            }
            1 => Ok(found.remove(0)),
            _ => {
                let names = found.iter().map(|(group, _)| group.name).collect::<Vec<_>>().join(" and ");
                let detail = format!("group: {record} is a dead letter of {names}; name one of them");
                Err(Refused::new(LETTER_OF_SEVERAL_GROUPS, detail))
            }
        }
    }

    /// A client that reads the topics of any of the groups, and the permission to use it. Further
    /// requests wait for the permission.
    ///
    /// # Errors
    /// There are no groups, or the Kafka settings are invalid.
    pub(super) async fn reader(&self) -> Result<(TopicReader, SemaphorePermit<'_>), Refused> {
        let group = Arc::clone(&self.groups()?[0]);
        let permit = self.0.reads.acquire().await.expect("the semaphore is never closed");
        let reader = TopicReader::new(self.kafka(), group.name).map_err(|error| Refused::unreadable(&error))?;
        Ok((reader, permit))
    }

    /// Waits until the group's index has all letters that are written by now. Returns the end of
    /// their topic.
    ///
    /// # Errors
    /// Kafka does not answer, or the topic does not exist.
    pub(super) async fn until_current(&self, reader: &TopicReader, group: &Group) -> Result<i64, Refused> {
        let end = block_in_place(|| reader.end(group.letters.topic()));
        let end = end.map_err(|error| Refused::unreadable(&error))?;
        let read = group.index.until_read(end).await;
        read.map_err(|error| Refused::unreadable(&error.context(group.letters.topic().to_owned())))?;
        Ok(end)
    }

    /// Records an action, does it, and records its outcome. `work` returns the answer and what is
    /// recorded of it. Continues to the end if the client disconnects.
    ///
    /// # Errors
    /// Kafka does not accept the first record: nothing was done. `work` failed. Or Kafka does not
    /// accept the second record.
    pub(super) async fn act<T: Send + 'static>(
        &self,
        intent: Intent,
        work: impl Future<Output = Result<(T, String), Refused>> + Send + 'static,
    ) -> Result<T, Response> {
        let this = self.clone();
        let acting = self.0.tasks.spawn(async move {
            let begun = this.begin(intent).await?;
            let result = work.await;
            let outcome = match &result {
                Ok((_, detail)) => Ok(detail.clone()),
                Err(failed) => Err(failed.detail.clone()),
            };
            this.end(begun, outcome).await?;
            result.map(|(answer, _)| answer)
        });
        match acting.await {
            Ok(result) => result.map_err(Refused::into_response),
            // The task panicked. The panic was logged.
            Err(_) => Err(internal_error().into_response()),
        }
    }

    pub(super) async fn begin(&self, intent: Intent) -> Result<Begun, Refused> {
        self.0.actions.begin(intent).await.map_err(|error| {
            Refused::new(ACTION_NOT_RECORDED, format!("nothing was done, because Kafka did not record it: {error:#}"))
        })
    }

    pub(super) async fn end(&self, begun: Begun, outcome: Result<String, String>) -> Result<(), Refused> {
        let detail = outcome.clone().unwrap_or_else(|failed| failed);
        self.0.actions.end(begun, outcome).await.map_err(|error| {
            let what = format!("{detail}. Kafka did not record this outcome: {error:#}");
            Refused::new(OUTCOME_NOT_RECORDED, what)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_short_and_printable() {
        assert!(reason("a broken release").is_ok());
        for wrong in ["", "two\nlines", "\u{1b}[2J", "\u{9b}2J", &"a".repeat(REASON_MAX_LENGTH + 1)] {
            assert!(reason(wrong).is_err(), "{wrong:?}");
        }
    }
}
