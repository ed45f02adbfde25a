//! What the sink keeps: how it treats its clients, and the mails that it has accepted.

use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use mail_parser::MessageParser;
use serde::{Deserialize, Serialize};

/// How the sink treats its clients.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behaviour {
    #[serde(flatten)]
    pub fault: Fault,
    /// The number of faults after which the sink works normally again. `None`: it keeps failing.
    #[serde(default)]
    pub times: Option<u32>,
    /// Only mails to this address fail. Ignored by faults that happen before the recipient is
    /// known: `refuse`, and the stages `connect` and `mail`.
    #[serde(default)]
    pub recipient: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case")]
pub enum Fault {
    #[default]
    None,
    /// The sink answers 421 and closes the connection: a new one instead of the greeting, and one
    /// that was open before at its next mail.
    Refuse,
    /// The sink answers `stage` with `code`.
    Reject { stage: Stage, code: u16 },
    /// The sink answers `stage` with this text, whose first digit says whether it accepts the step.
    /// Each character is sent as one byte (ISO 8859-1), so any bytes can be sent.
    Reply { stage: Stage, text: String },
    /// The sink resets the connection within the mail. The mail is neither accepted nor answered.
    ResetBeforeDot,
    /// The sink accepts and keeps the mail and resets the connection before it answers 250.
    DropAfterDot,
    /// The sink answers `stage` late. At the stage `dot` it keeps the mail before it waits.
    Slow {
        ms: u64,
        #[serde(default)]
        stage: Stage,
    },
}

/// What the client has sent last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Connect,
    Mail,
    Rcpt,
    /// The command DATA.
    Data,
    /// The dot that ends the mail.
    #[default]
    Dot,
}

impl From<Fault> for Behaviour {
    fn from(fault: Fault) -> Self {
        Self { fault, times: None, recipient: None }
    }
}

impl Fault {
    pub fn times(self, times: u32) -> Behaviour {
        Behaviour { times: Some(times), ..self.into() }
    }
}

/// One accepted mail. A mail that is sent twice is kept twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mail {
    pub message_id: Option<String>,
    pub from: String,
    pub to: Vec<String>,
    pub subject: Option<String>,
    pub text: Option<String>,
    pub html: Option<String>,
    /// The mail as it was received, without SMTP's dot-stuffing.
    pub raw: String,
    pub received_at_ms: u64,
    pub outcome: Outcome,
}

/// Whether the client got an answer to a mail that was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The sink answered 250.
    Answered,
    /// The connection was reset before the answer.
    Dropped,
}

/// State shared by all sessions.
#[derive(Default)]
pub struct Shared(Mutex<State>);

#[derive(Default)]
pub struct State {
    pub behaviour: Behaviour,
    pub mails: Vec<Mail>,
    /// Open connections.
    pub connections: usize,
}

impl Shared {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no thread panics while it holds this lock")
    }

    pub fn set(&self, behaviour: Behaviour) {
        self.state().behaviour = behaviour;
    }

    /// The current fault, if it matches and applies to these recipients. It is then counted as
    /// happened.
    pub fn take(&self, recipients: &[String], matches: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let mut state = self.state();
        let behaviour = &mut state.behaviour;
        let only_for = behaviour.recipient.as_ref().filter(|_| !recipients.is_empty());
        if !matches(&behaviour.fault) || only_for.is_some_and(|recipient| !recipients.contains(recipient)) {
            return None;
        }
        let fault = behaviour.fault.clone();
        if let Some(times) = &mut behaviour.times {
            *times = times.saturating_sub(1);
            if *times == 0 {
                *behaviour = Behaviour::default();
            }
        }
        Some(fault)
    }

    pub fn keep(&self, from: &str, to: &[String], raw: &[u8], outcome: Outcome) {
        let parsed = MessageParser::default().parse(raw);
        let owned = |text: Option<std::borrow::Cow<'_, str>>| text.map(std::borrow::Cow::into_owned);
        let mail = Mail {
            message_id: parsed.as_ref().and_then(|mail| mail.message_id()).map(str::to_owned),
            from: from.to_owned(),
            to: to.to_vec(),
            subject: parsed.as_ref().and_then(|mail| mail.subject()).map(str::to_owned),
            text: owned(parsed.as_ref().and_then(|mail| mail.body_text(0))),
            html: owned(parsed.as_ref().and_then(|mail| mail.body_html(0))),
            raw: String::from_utf8_lossy(raw).into_owned(),
            received_at_ms: now_ms(),
            outcome,
        };
        self.state().mails.push(mail);
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    u64::try_from(since.as_millis()).expect("the clock is before the year 500,000,000")
}
