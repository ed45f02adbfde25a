//! The breaker of the mail server. If the server refuses the mails to several recipients in a row,
//! or does not answer, the cause is not the recipients. Then sending pauses, and the process sends
//! one mail from time to time as a probe. Without the breaker, a wrong setting would fail every
//! mail, and a backlog of a million mails would be tried again and again while the server is down.
//!
//! Each process has a breaker of its own. A restarted process tries a few mails and pauses again.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use shared::platform::health::Health;
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use crate::metrics::DeliveryMetrics;
use crate::smtp::Trouble;

/// The breaker opens when the mails to this many recipients failed in a row for a reason that is
/// about us or the server. If it is only one or two, the cause may be the recipient's own domain.
const RECIPIENTS: usize = 3;
/// Time between two probes.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// The component in `/status`.
const COMPONENT: &str = "mail";
const LOCK: &str = "no thread panics while it holds this lock";

#[derive(Clone)]
pub struct Breaker {
    state: Arc<Mutex<State>>,
    health: Health,
    metrics: DeliveryMetrics,
}

#[derive(Default)]
struct State {
    /// The recipients since the last accepted mail, at most [`RECIPIENTS`].
    recipients: BTreeSet<Uuid>,
    /// When the next probe may start. `None`: the breaker is closed.
    next_probe: Option<Instant>,
}

impl Breaker {
    pub fn new(health: Health, metrics: DeliveryMetrics) -> Self {
        Self { state: Arc::default(), health, metrics }
    }

    /// Whether the caller may send a mail now. While the breaker is open, one caller may in each
    /// interval: its mail is the probe.
    pub fn permits(&self) -> bool {
        let mut state = self.state.lock().expect(LOCK);
        let now = Instant::now();
        match state.next_probe {
            None => true,
            Some(next) if next > now => false,
            Some(_) => {
                state.next_probe = Some(now + PROBE_INTERVAL);
                true
            }
        }
    }

    /// The server accepted a mail.
    pub fn succeeded(&self) {
        let mut state = self.state.lock().expect(LOCK);
        state.recipients.clear();
        if state.next_probe.take().is_some() {
            self.metrics.paused.set(0);
            self.health.resolved(COMPONENT);
            tracing::info!("the mail server accepts mails again; sending continues");
        }
    }

    /// The mail to `recipient` failed for a reason that is about us or the server, or may be.
    /// Returns whether sending is paused.
    pub fn failed(&self, recipient: Uuid, trouble: Trouble) -> bool {
        let mut state = self.state.lock().expect(LOCK);
        if state.recipients.len() < RECIPIENTS {
            state.recipients.insert(recipient);
        }
        if state.recipients.len() < RECIPIENTS {
            return false;
        }
        self.health.report(COMPONENT, format!("the mail server to accept mails; the last failure: {trouble}"));
        if state.next_probe.is_none() {
            state.next_probe = Some(Instant::now() + PROBE_INTERVAL);
            self.metrics.paused.set(1);
            tracing::error!(
                failure = %trouble,
                "the mails to several recipients failed in a row, and not because of the recipients; sending pauses and \
                 tries one mail every few seconds"
            );
        }
        true
    }
}
