//! A mail server that delivers nothing: it speaks real SMTP, keeps what it accepts, and fails when told to.
//!
//! The same code serves `cargo xtask up`, told over HTTP (`http`), and the tests, told by calls.

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

/// How the sink treats its clients from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behaviour {
    #[serde(flatten)]
    pub fault: Fault,
    /// After so many faults the sink is well again; without it, it stays as it is.
    #[serde(default)]
    pub times: Option<u32>,
    /// Only mails to this address fail. Ignored where the recipient is not known yet (`refuse`, stages `connect` and `mail`).
    #[serde(default)]
    pub recipient: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case")]
pub enum Fault {
    #[default]
    None,
    /// 421 instead of a greeting, and the end of the connection.
    Refuse,
    Reject {
        stage: Stage,
        code: u16,
    },
    /// The connection breaks inside the mail: nothing is accepted, nothing answered.
    ResetBeforeDot,
    /// The mail is accepted and kept, and the connection breaks before the 250.
    DropAfterDot,
    /// The answer to `stage` comes late. At the dot the mail is kept before the wait.
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
    /// The word DATA.
    Data,
    /// The end of the mail.
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

/// One accepted copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mail {
    pub message_id: Option<String>,
    pub from: String,
    pub to: Vec<String>,
    pub subject: Option<String>,
    pub text: Option<String>,
    pub html: Option<String>,
    /// As it came, without the dots that SMTP stuffs in.
    pub raw: String,
    pub received_at_ms: u64,
    pub outcome: Outcome,
}

/// What the client was told about a mail that was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// 250.
    Answered,
    /// Nothing: the connection broke first.
    Dropped,
}

/// Serves until it is dropped.
pub struct SmtpSink {
    kept: Arc<Kept>,
    address: SocketAddr,
    servers: Mutex<JoinSet<()>>,
}

impl SmtpSink {
    /// Port 0 takes any free port.
    pub async fn start(address: SocketAddr) -> Result<Self> {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("the SMTP sink cannot listen on {address}"))?;
        let sink = Self { kept: Arc::default(), address: listener.local_addr()?, servers: Mutex::default() };
        sink.servers().spawn(accept(listener, sink.kept.clone()));
        Ok(sink)
    }

    /// The list of mails, and the behaviour, for `curl`.
    pub async fn serve_http(&self, address: SocketAddr) -> Result<()> {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("the SMTP sink cannot listen on {address}"))?;
        let router = http::router(self.kept.clone());
        self.servers()
            .spawn(async move { axum::serve(listener, router).await.expect("axum::serve ends with the task alone") });
        Ok(())
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, behaviour: impl Into<Behaviour>) {
        self.kept.set(behaviour.into());
    }

    /// `Fault::None` again after the faults were counted down.
    pub fn behaviour(&self) -> Behaviour {
        self.kept.state().behaviour.clone()
    }

    pub fn mails(&self) -> Vec<Mail> {
        self.kept.state().mails.clone()
    }

    pub fn clear(&self) {
        self.kept.state().mails.clear();
    }

    fn servers(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.servers.lock().expect("nobody panics while holding this lock")
    }
}

async fn accept(listener: TcpListener, kept: Arc<Kept>) {
    // The sessions end with this task.
    let mut sessions = JoinSet::new();
    loop {
        // A client that is gone before it was accepted is its own concern.
        if let Ok((stream, _)) = listener.accept().await {
            sessions.spawn(session::serve(stream, kept.clone()));
        }
        while sessions.try_join_next().is_some() {}
    }
}

/// What the sessions share.
#[derive(Default)]
struct Kept(Mutex<State>);

#[derive(Default)]
struct State {
    behaviour: Behaviour,
    mails: Vec<Mail>,
}

impl Kept {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics while holding this lock")
    }

    fn set(&self, behaviour: Behaviour) {
        self.state().behaviour = behaviour;
    }

    /// The fault in force for these recipients, if it is one that `wanted` asks for; it then counts as having happened.
    fn take(&self, recipients: &[String], wanted: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let mut state = self.state();
        let behaviour = &mut state.behaviour;
        let other = behaviour.recipient.as_ref().filter(|_| !recipients.is_empty());
        if !wanted(&behaviour.fault) || other.is_some_and(|wanted| !recipients.contains(wanted)) {
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
        let part = |text: Option<std::borrow::Cow<'_, str>>| text.map(std::borrow::Cow::into_owned);
        let mail = Mail {
            message_id: parsed.as_ref().and_then(|mail| mail.message_id()).map(str::to_owned),
            from: from.to_owned(),
            to: to.to_vec(),
            subject: parsed.as_ref().and_then(|mail| mail.subject()).map(str::to_owned),
            text: part(parsed.as_ref().and_then(|mail| mail.body_text(0))),
            html: part(parsed.as_ref().and_then(|mail| mail.body_html(0))),
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
