//! A mail server that delivers nothing. It speaks SMTP, keeps the mails that it accepts, and fails
//! on request.
//!
//! `cargo xtask up` and the tests use the same code: a user of `up` controls it over HTTP (see
//! `http`), a test by function calls.

mod http;
mod session;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use mail_parser::MessageParser;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

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
    /// The sink answers 421 instead of a greeting and closes the connection.
    Refuse,
    /// The sink answers `stage` with `code`.
    Reject { stage: Stage, code: u16 },
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

/// Runs until it is dropped.
pub struct SmtpSink {
    shared: Arc<Shared>,
    address: SocketAddr,
    servers: Mutex<JoinSet<()>>,
}

impl SmtpSink {
    /// With port 0 it listens on any free port.
    pub async fn start(address: SocketAddr) -> Result<Self> {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("the SMTP sink cannot listen on {address}"))?;
        let sink = Self { shared: Arc::default(), address: listener.local_addr()?, servers: Mutex::default() };
        sink.servers().spawn(accept(listener, sink.shared.clone()));
        Ok(sink)
    }

    /// Serves the HTTP API.
    pub async fn serve_http(&self, address: SocketAddr) -> Result<()> {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("the SMTP sink cannot listen on {address}"))?;
        let router = http::router(self.shared.clone());
        self.servers().spawn(async move { axum::serve(listener, router).await.expect("axum::serve never returns") });
        Ok(())
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, behaviour: impl Into<Behaviour>) {
        self.shared.set(behaviour.into());
    }

    /// `Fault::None` after the last of a limited number of faults.
    pub fn behaviour(&self) -> Behaviour {
        self.shared.state().behaviour.clone()
    }

    pub fn mails(&self) -> Vec<Mail> {
        self.shared.state().mails.clone()
    }

    pub fn clear(&self) {
        self.shared.state().mails.clear();
    }

    fn servers(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.servers.lock().expect("no thread panics while it holds this lock")
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Dropping the set ends the sessions with this task.
    let mut sessions = JoinSet::new();
    loop {
        // An error means that the client closed the connection before it was accepted.
        if let Ok((stream, _)) = listener.accept().await {
            sessions.spawn(session::serve(stream, shared.clone()));
        }
        while sessions.try_join_next().is_some() {}
    }
}

/// State shared by all sessions.
#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    behaviour: Behaviour,
    mails: Vec<Mail>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no thread panics while it holds this lock")
    }

    fn set(&self, behaviour: Behaviour) {
        self.state().behaviour = behaviour;
    }

    /// The current fault, if it matches and applies to these recipients. It is then counted as
    /// happened.
    fn take(&self, recipients: &[String], matches: impl Fn(&Fault) -> bool) -> Option<Fault> {
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

    fn keep(&self, from: &str, to: &[String], raw: &[u8], outcome: Outcome) {
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
