//! What operators did. Each action leaves two records in `operator.actions.v1`, one before and one
//! after. No handler reads them: they are for people, and for the list of actions.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

/// A record of `operator.actions.v1`. Its key is what was acted on. It contains no personal data:
/// an operator is the name of a token, and the reasons name no person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorAction {
    /// Both records of an action have the same id.
    pub action_id: Uuid,
    pub step: Step,
    /// What was done, for example `discard`.
    pub action: String,
    /// What was acted on: the coordinates of a record, a consumer group, or a service.
    pub target: String,
    /// The consumer group, if the action is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The service whose process acted.
    pub service: String,
    /// The name of the operator's token.
    pub operator: String,
    /// Why, in the words of the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When this record was made.
    #[serde(with = "time::serde::rfc3339")]
    pub time: OffsetDateTime,
    /// Only in the second record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// What was chosen, in the first record. What came of it, in the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Kafka acknowledged this record before anything was done.
    Begun,
    Ended,
}

impl Step {
    /// The header `ce_type`.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Begun => "operator.action_begun",
            Self::Ended => "operator.action_ended",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Done,
    /// Something went wrong. The detail says what, and what was done until then.
    Failed,
}
