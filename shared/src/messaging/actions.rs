//! The record of what operators did, in the topic `operator.actions.v1`. An action leaves two
//! records. Kafka acknowledges the first before anything is done, and the second before the
//! operator gets an answer. So a crash leaves at most an action without an outcome, and never an
//! effect without a record.

use std::collections::HashMap;
use std::ops::ControlFlow;

use anyhow::Context;
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::FutureRecord;
use serde::{Deserialize, Serialize};
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::acknowledged::AcknowledgedWriter;
use super::kafka::KafkaConfig;
use super::reader::TopicReader;
use super::topics::Declared;
use crate::events::{self, ActionOutcome, ActionStep, OperatorAction, Topic};
use crate::fault;

/// Records of the topic that the list of actions reads, at most, from its end. That is half as many
/// actions: far more than a team looks at, and few enough to read for each request.
const LISTED_RECORDS: i64 = 10_000;
/// How often the second record of an action is tried. Each attempt waits for Kafka by itself. More
/// than one, because the action has already been done.
const END_ATTEMPTS: u32 = 3;

/// The topic as each service that writes it declares it. The list of actions reads one partition,
/// so the topic may not have more.
pub fn declared_topic(kafka: &KafkaConfig) -> Declared {
    Declared { may_grow: false, ..Declared::of(kafka, &Topic::OPERATOR_ACTIONS) }
}

/// What an operator asks for.
pub struct Intent {
    /// For example `discard`.
    pub action: &'static str,
    /// What is acted on: the key of both records.
    pub target: String,
    pub group: Option<&'static str>,
    /// The name of the operator's token.
    pub operator: String,
    pub reason: Option<String>,
    /// What was chosen, if the target does not say it.
    pub detail: Option<String>,
}

/// An action that has begun.
pub struct Begun(OperatorAction);

/// Writes the actions of the operators of one service.
pub struct Actions {
    writer: AcknowledgedWriter,
    service: &'static str,
}

impl Actions {
    pub fn new(kafka: &KafkaConfig, service: &'static str) -> Self {
        let topic = kafka.prefixed(Topic::OPERATOR_ACTIONS.name);
        Self { writer: AcknowledgedWriter::new(topic, kafka.letters()), service }
    }

    /// Writes the first record. Only after that may the action be done. Crash after this: the list
    /// shows an action without an outcome.
    ///
    /// # Errors
    /// Kafka does not accept the record. Nothing may be done then.
    pub async fn begin(&self, intent: Intent) -> anyhow::Result<Begun> {
        let Intent { action, target, group, operator, reason, detail } = intent;
        tracing::info!(operator, action, target, group, "an operator acts");
        let record = OperatorAction {
            action_id: events::mint_id(),
            step: ActionStep::Begun,
            action: action.to_owned(),
            target,
            group: group.map(str::to_owned),
            service: self.service.to_owned(),
            operator,
            reason,
            time: events::now(),
            outcome: None,
            detail,
        };
        self.write(&record).await?;
        fault::point("actions.begun");
        Ok(Begun(record))
    }

    /// Writes the second record: what was done, or why not. Crash before this: the action has no
    /// outcome, and may have been done.
    ///
    /// # Errors
    /// Kafka does not accept the record, although it accepted the first one. What was done is done.
    pub async fn end(&self, Begun(begun): Begun, result: Result<String, String>) -> anyhow::Result<()> {
        let (outcome, detail) = match result {
            Ok(detail) => (ActionOutcome::Done, detail),
            Err(detail) => (ActionOutcome::Failed, detail),
        };
        let OperatorAction { action, target, operator, .. } = &begun;
        tracing::info!(operator, action, target, ?outcome, detail, "the action of an operator has ended");
        let ended = OperatorAction {
            step: ActionStep::Ended,
            time: events::now(),
            outcome: Some(outcome),
            detail: Some(detail),
            ..begun
        };
        let mut attempt = 1;
        while let Err(error) = self.write(&ended).await {
            tracing::warn!(error = %format!("{error:#}"), attempt, "cannot record the outcome of an action");
            if attempt == END_ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
        }
        Ok(())
    }

    async fn write(&self, action: &OperatorAction) -> anyhow::Result<()> {
        let time = action.time.format(&Rfc3339).context("a time that cannot be written")?;
        let headers = [
            ("ce_specversion", "1.0".to_owned()),
            ("ce_id", events::mint_id().to_string()),
            ("ce_type", action.step.kind().to_owned()),
            ("ce_source", format!("/{}", self.service)),
            ("ce_time", time),
            ("content-type", "application/json".to_owned()),
        ];
        let headers = headers
            .iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
        let value = serde_json::to_vec(action)?;
        let record = FutureRecord::to(self.writer.topic()).key(&action.target).headers(headers).payload(&value[..]);
        self.writer.send(record).await
    }
}

/// An action in the list. Programs read these fields, so their names do not change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    pub id: Uuid,
    pub action: String,
    pub target: String,
    pub group: Option<String>,
    pub service: String,
    pub operator: String,
    pub reason: Option<String>,
    /// When the action began and ended, as RFC 3339. Without `ended` it is in progress, or its
    /// process has died: then it may have been done or not.
    pub begun: Option<String>,
    pub ended: Option<String>,
    /// `done`, `failed`, or null.
    pub outcome: Option<ActionOutcome>,
    pub detail: Option<String>,
}

impl Listed {
    fn new(action: OperatorAction) -> Self {
        let mut listed = Self {
            id: action.action_id,
            action: action.action.clone(),
            target: action.target.clone(),
            group: action.group.clone(),
            service: action.service.clone(),
            operator: action.operator.clone(),
            reason: action.reason.clone(),
            begun: None,
            ended: None,
            outcome: None,
            detail: None,
        };
        listed.add(action);
        listed
    }

    fn add(&mut self, record: OperatorAction) {
        let time = record.time.format(&Rfc3339).ok();
        match record.step {
            ActionStep::Begun => self.begun = time,
            ActionStep::Ended => {
                self.ended = time;
                self.outcome = record.outcome;
            }
        }
        self.detail = record.detail.or(self.detail.take());
    }
}

/// The actions in the newest part of the topic, newest first. Blocks the calling thread.
///
/// # Errors
/// Kafka refuses or does not answer.
pub fn newest(reader: &mut TopicReader, kafka: &KafkaConfig) -> anyhow::Result<Vec<Listed>> {
    let topic = kafka.prefixed(Topic::OPERATOR_ACTIONS.name);
    let end = reader.end(&topic)?;
    let mut records = vec![];
    reader.scan(&topic, (end - LISTED_RECORDS).max(0), end, |message| {
        // Another program may have written anything.
        records.extend(serde_json::from_slice::<OperatorAction>(message.payload().unwrap_or_default()).ok());
        ControlFlow::Continue(())
    })?;
    Ok(fold(records))
}

/// One entry for each action. The first record of an old action may be before the part that was
/// read; the second one has the same fields.
fn fold(records: Vec<OperatorAction>) -> Vec<Listed> {
    let mut actions: Vec<Listed> = vec![];
    let mut places: HashMap<Uuid, usize> = HashMap::new();
    for record in records {
        match places.get(&record.action_id) {
            Some(place) => actions[*place].add(record),
            None => {
                places.insert(record.action_id, actions.len());
                actions.push(Listed::new(record));
            }
        }
    }
    actions.reverse();
    actions
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u128, step: ActionStep, outcome: Option<ActionOutcome>) -> OperatorAction {
        OperatorAction {
            action_id: Uuid::from_u128(id),
            step,
            action: "discard".to_owned(),
            target: "some.events.v1-0-7".to_owned(),
            group: Some("a.b".to_owned()),
            service: "analytics".to_owned(),
            operator: "on-call".to_owned(),
            reason: None,
            time: events::now(),
            outcome,
            detail: None,
        }
    }

    #[test]
    fn two_records_are_one_action_and_the_newest_is_first() {
        use ActionStep::{Begun, Ended};
        let done = Some(ActionOutcome::Done);
        let listed = fold(vec![
            record(1, Ended, done), // its first record is not among the newest
            record(2, Begun, None),
            record(3, Begun, None), // its process died
            record(2, Ended, done),
            record(2, Ended, done), // written again because the acknowledgement was lost
        ]);
        let seen: Vec<_> =
            listed.iter().map(|action| (action.id.as_u128(), action.begun.is_some(), action.outcome)).collect();
        assert_eq!(seen, [(3, true, None), (2, true, done), (1, false, done)]);
    }
}
