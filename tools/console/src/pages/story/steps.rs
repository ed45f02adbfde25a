//! What happens if the process dies at a step. The tables in docs/architecture.md ("When a process
//! dies") say more.

/// A step of a story.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Request,
    Transaction,
    /// The events wait for the relay.
    Outbox,
    Round,
    /// Kafka has the record.
    Record,
    /// A consumer of this service handles the record.
    Handling(Effect),
    /// The consumer waits before it tries the record again.
    Pause,
    Mail,
    /// The delivery waits for its next attempt.
    MailPause,
    DeadLetter,
    /// A span that the console does not know.
    Other,
}

/// How a consumer makes its effect durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// email: rows with a unique key or a version.
    Intents,
    /// analytics: the inbox, or rows with the event's id.
    ReadModels,
    /// cache: profiles and position in one script.
    View,
    Unknown,
}

impl Effect {
    pub fn of(service: &str) -> Self {
        match service {
            "email" => Self::Intents,
            "analytics" => Self::ReadModels,
            "cache" => Self::View,
            _ => Self::Unknown,
        }
    }
}

impl Step {
    /// What would have followed if the process had died at this step.
    pub fn if_it_died(self) -> &'static str {
        match self {
            Self::Request => {
                "Before the commit: Postgres rolls back, and the client repeats the request. After it: a retry with the \
                 same Idempotency-Key gets the stored answer."
            }
            Self::Transaction => {
                "Before the commit nothing exists. After it the change, both events and the stored answer exist, and any \
                 relay of this database publishes the events."
            }
            Self::Outbox => {
                "Nothing is lost: the rows are committed. The relay of another process publishes them, or that of this \
                 one after its restart."
            }
            Self::Round => {
                "Before Kafka's commit no reader sees the records, and the rows are still in the outbox. After it the \
                 next leader publishes the rows again, with the same event ids, and every consumer recognises the copies."
            }
            Self::Record => {
                "The record is in Kafka and does not depend on the process that wrote it. Each group reads it when one \
                 of its processes runs."
            }
            Self::Handling(Effect::Intents) => {
                "The record is delivered again. After the handler's commit it changes nothing: the unique key of the \
                 intent exists, and the version of the recipient is not newer."
            }
            Self::Handling(Effect::ReadModels) => {
                "The record is delivered again. After the handler's commit nothing is applied twice: the event is in the \
                 inbox, or its row of the audit exists."
            }
            Self::Handling(Effect::View) => {
                "Before the script in Valkey the record is delivered again. After it the next consumer starts at the \
                 position that the script stored with the profile."
            }
            Self::Handling(Effect::Unknown) => "The record is delivered again, because its offset is not committed.",
            Self::Pause => {
                "The offset of the record is not committed, so another consumer of the group gets and retries it."
            }
            Self::Mail => {
                "Before the server accepts the mail: when the lease ends, another sender sends it. After that, until \
                 the answer is stored: the mail is sent a second time, with the same Message-ID."
            }
            Self::MailPause => {
                "The delivery is stored with the time of its next attempt. Any sender of the service claims it then."
            }
            Self::DeadLetter => {
                "The record is delivered and rejected again, because its offset is not committed. The new letter \
                 has the same key and replaces the first one."
            }
            Self::Other => "The console does not know this step.",
        }
    }
}
