//! The Laboratory: it registers users, breaks parts of the system on purpose, and watches what
//! becomes of its registrations. It is off outside development.
//!
//! Reading order: `registrations` (what it has registered), `fates` (what has become of each),
//! `totals`, `indicators`, `apis`, `control` and `mailpit` (whom it asks), `jobs` and `watch` (what
//! runs), `commands` (what a visitor types under Docker Compose).

mod apis;
mod commands;
mod control;
mod fates;
mod indicators;
mod jobs;
mod mailpit;
mod registrations;
mod totals;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tokio::sync::{mpsc, watch as channel};
use tokio::time::Instant;

use crate::config::{LaboratoryConfig, ServiceAddress};

pub use commands::{MALFORMED, of_component, of_service};
pub use control::{Condition, State};
pub use indicators::{Indicator, Verdict};
pub use jobs::{Job, run_jobs};
pub use registrations::Note;
pub use watch::{Findings, Sources, watch};

use apis::Apis;
use control::Control;
use mailpit::Mailpit;
use registrations::Registrations;

/// Jobs that wait for the one in progress.
const WAITING_JOBS: usize = 4;
/// Users that one burst registers at most.
pub const BURST_MAX: u32 = 200;

/// What the pages and the tasks share. Clones are the same Laboratory.
#[derive(Clone)]
pub struct Laboratory {
    apis: Apis,
    control: Option<Control>,
    mailpit: Option<Mailpit>,
    registrations: Arc<Mutex<Registrations>>,
    jobs: mpsc::Sender<Job>,
    /// When the page was last open. Without a visitor the Laboratory checks no registrations.
    visited: channel::Sender<Option<Instant>>,
    /// What the control port says. `None`: there is none, or it does not answer.
    state: channel::Sender<Option<State>>,
    pub findings: channel::Receiver<Arc<Findings>>,
}

/// The other ends of its channels, for its tasks.
pub struct Ends {
    pub jobs: mpsc::Receiver<Job>,
    pub findings: channel::Sender<Arc<Findings>>,
}

/// The form of a button.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Wanted {
    pub act: String,
    pub target: String,
    pub count: String,
    pub page_token: String,
}

impl Laboratory {
    /// # Errors
    /// A setting is wrong.
    pub fn new(config: &LaboratoryConfig, services: Vec<ServiceAddress>) -> Result<(Self, Ends)> {
        let control = config.control()?.map(|(address, token)| Control::new(address, token)).transpose()?;
        let mailpit = config.mailpit_url.as_deref().map(Mailpit::new).transpose()?;
        let (jobs, waiting) = mpsc::channel(WAITING_JOBS);
        let (sender, findings) = channel::channel(Arc::default());
        let laboratory = Self {
            apis: Apis::new(services)?,
            control,
            mailpit,
            registrations: Arc::default(),
            jobs,
            visited: channel::Sender::new(None),
            state: channel::Sender::new(None),
            findings,
        };
        Ok((laboratory, Ends { jobs: waiting, findings: sender }))
    }

    /// Whether it acts by itself on processes. Otherwise the page shows commands.
    pub fn has_control(&self) -> bool {
        self.control.is_some()
    }

    pub fn has_mailpit(&self) -> bool {
        self.mailpit.is_some()
    }

    /// A visitor looks at the page.
    pub fn visit(&self) {
        self.visited.send_replace(Some(Instant::now()));
    }

    /// Does what a button says, and notes it. Returns what was done.
    ///
    /// # Errors
    /// The form is wrong, or what it asks for was refused or failed.
    pub async fn act(&self, wanted: &Wanted) -> Result<String> {
        self.visit();
        let done = self.try_act(wanted).await;
        let note = match &done {
            Ok(text) => text.clone(),
            Err(error) => format!("failed: {error:#}"),
        };
        self.registrations().note(note);
        done
    }

    async fn try_act(&self, Wanted { act, target, count, .. }: &Wanted) -> Result<String> {
        let job = match act.as_str() {
            "burst" => {
                let users = count.trim().parse().ok().filter(|users| (1..=BURST_MAX).contains(users));
                Job::Burst(users.with_context(|| format!("count: must be a number from 1 to {BURST_MAX}"))?)
            }
            "again" => Job::Again,
            "old" => Job::OldState,
            "mail" => return self.set_mail(target).await,
            _ => return self.order(act, target).await,
        };
        let begun = job.begun();
        self.jobs.try_send(job).ok().context("too many jobs wait; try again when one has ended")?;
        Ok(begun)
    }

    async fn order(&self, act: &str, target: &str) -> Result<String> {
        let control = self.control.as_ref().context("CONTROL_ADDR is not set: type the command that the page shows")?;
        let done = control.order(act, target).await;
        self.ask_state().await;
        done
    }

    /// Asks what runs now.
    async fn ask_state(&self) {
        if let Some(control) = &self.control {
            self.state.send_replace(control.state().await.ok());
        }
    }

    async fn set_mail(&self, target: &str) -> Result<String> {
        match (&self.control, &self.mailpit) {
            (Some(_), _) => self.order("mail", target).await,
            (None, Some(mailpit)) => mailpit.set(target).await,
            (None, None) => bail!("neither CONTROL_ADDR nor MAILPIT_URL is set: the mail server cannot be changed"),
        }
    }

    pub fn state(&self) -> Option<State> {
        self.state.borrow().clone()
    }

    /// What the Laboratory did, the newest first.
    pub fn notes(&self) -> Vec<Note> {
        self.registrations().notes().cloned().collect()
    }

    fn registrations(&self) -> MutexGuard<'_, Registrations> {
        self.registrations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
