//! The sender: claims a delivery, sends the mail to the SMTP server and records the result. It
//! sends one mail after another over one connection. The record of an accepted mail and the claim
//! of the next delivery are one transaction, which the senders of a process [share](Batches).

use std::sync::{Arc, Mutex};

use lettre::Address;
use shared::events::check_address;
use shared::fault;
use shared::messaging::Wake;
use shared::platform::database::bounded;
use shared::platform::telemetry::{self, TraceContext};
use sqlx::PgPool;
use tokio::time::{Duration, Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, field::Empty};

use crate::batches::Batches;
use crate::breaker::Breaker;
use crate::deliveries::{self, Accepted, Claim, Due, Retry, Rules};
use crate::mail;
use crate::metrics::DeliveryMetrics;
use crate::smtp::{Connection, Ending, Server, Trouble};

/// How long an idle sender waits before it looks for a new delivery.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
const DATABASE_RETRY: Duration = Duration::from_millis(500);
/// How long an idle sender keeps its connection. A new connection costs several round trips, with
/// TLS and a login. Servers and firewalls close idle connections, and servers limit their number.
const IDLE_LIMIT: Duration = Duration::from_secs(5);
/// "Mailbox name not allowed" (RFC 5321 §4.2.2): the code that we record for an invalid address.
const BAD_ADDRESS: u16 = 553;
// Why a delivery failed.
const REFUSED: &str = "the mail server refused the mail permanently";
const DEFERRED: &str = "the mail server deferred the mail until it was older than MAX_AGE_HOURS";

#[derive(Clone)]
pub struct Sender {
    pub db: PgPool,
    pub server: Arc<Server>,
    pub rules: Rules,
    pub breaker: Breaker,
    pub batches: Batches,
    pub wake: Wake,
    pub metrics: DeliveryMetrics,
    pub stop: CancellationToken,
    /// How long a stopping sender waits for the server's answer to a mail.
    pub last_answer: Duration,
}

/// How an attempt to send a mail ended.
enum Attempt {
    Ended(Ending),
    /// The mail was not sent: the lease ended, the recipient was erased, or the database did not
    /// answer.
    Superseded,
    /// The mail was not sent, because the process stops.
    Stopped,
}

/// A mail that the server has accepted and that is not recorded yet. A sender has at most one.
struct Unrecorded {
    claim: Claim,
    lease: Lease,
    mail: Accepted,
    span: Span,
}

/// The time until which this process knows that it has the delivery, by its own monotonic clock.
/// The database's clock decides when the lease really ends.
struct Lease(Mutex<Instant>);

impl Sender {
    /// Sends until the process stops. Finishes the mail in progress first.
    pub async fn run(self) -> anyhow::Result<()> {
        let mut connection = Connection::default();
        let mut unrecorded = None;
        while unrecorded.is_some() || !self.stop.is_cancelled() {
            let pause = match self.turn(&mut connection, &mut unrecorded).await {
                Ok(true) => continue,
                Ok(false) => POLL_INTERVAL,
                Err(error) => {
                    tracing::warn!(%error, "the database does not answer; deliveries wait, will retry");
                    DATABASE_RETRY
                }
            };
            connection.quit_if_idle_for(IDLE_LIMIT).await;
            self.stop.run_until_cancelled(sleep(pause)).await;
        }
        connection.quit().await;
        Ok(())
    }

    /// Records the mail that this sender has sent last, and sends the mail of one more delivery, if
    /// one is due. Returns whether one was due.
    async fn turn(&self, connection: &mut Connection, unrecorded: &mut Option<Unrecorded>) -> anyhow::Result<bool> {
        let Some((claim, lease)) = self.next(unrecorded.take()).await? else { return Ok(false) };
        fault::point("email.after_claim");
        let span = tracing::error_span!(
            parent: None, "send", "otel.kind" = "client", delivery.id = %claim.id, template = claim.template, trace.id = Empty
        );
        let cause = TraceContext { traceparent: claim.traceparent.clone(), tracestate: claim.tracestate.clone() };
        telemetry::continue_from(&span, &cause);
        let attempt = async {
            // `keep` never ends by itself: the lease is renewed until the attempt ends.
            let attempt = tokio::select! {
                attempt = self.attempt(connection, &claim, &lease) => attempt,
                never = self.keep(&claim, &lease) => match never {},
            };
            fault::point("email.after_answer");
            if let Attempt::Ended(Ending::Accepted) = attempt {
                self.breaker.succeeded();
                self.metrics.observe_accepted(claim.requested_at, &span);
                return Ok(Some(Accepted::new(&claim)));
            }
            self.until_recorded(&claim, &attempt, &lease).await.map(|()| None)
        };
        if let Some(mail) = attempt.instrument(span.clone()).await? {
            *unrecorded = Some(Unrecorded { claim, lease, mail, span });
        }
        Ok(true)
    }

    /// Records an accepted mail and claims the next delivery that may be sent. It passes over
    /// deliveries that the claim holds or cancels, because the breaker may have permitted one probe
    /// only: if each of them used one up, a backlog of them would delay the first mail by hours.
    async fn next(&self, mut unrecorded: Option<Unrecorded>) -> anyhow::Result<Option<(Claim, Lease)>> {
        let may_claim = self.breaker.permits();
        let mut held = 0_u64;
        let claimed = loop {
            let claims = may_claim && !self.stop.is_cancelled();
            if !claims && unrecorded.is_none() {
                break Ok(None);
            }
            let mail = unrecorded.as_ref().map(|unrecorded| unrecorded.mail.clone());
            match (self.batches.record_and_claim(mail, claims).await, unrecorded.take()) {
                (Ok((changed, due)), recorded) => {
                    if let Some(Unrecorded { claim, span, .. }) = recorded {
                        span.in_scope(|| self.note_sent(&claim, changed));
                    }
                    match due {
                        Some((Due::Claimed(claim), until)) => break Ok(Some((*claim, Lease::until(until)))),
                        Some((Due::Held, _)) => held += 1,
                        Some((Due::Cancelled, _)) => self.metrics.count_ended("cancelled", 1),
                        None => break Ok(None),
                    }
                }
                // The mail of another sender may be the cause, so this one is recorded alone.
                (Err(_), Some(Unrecorded { claim, lease, span, .. })) => {
                    let attempt = Attempt::Ended(Ending::Accepted);
                    self.until_recorded(&claim, &attempt, &lease).instrument(span).await?;
                }
                (Err(error), None) => break Err(error),
            }
        };
        if held > 0 {
            tracing::warn!(
                deliveries = held,
                "deliveries are held: their events are older than MAX_AGE_HOURS; see `email send-held --help`"
            );
        }
        claimed
    }

    /// Retries until the lease ends. If the result is not recorded by then, another sender sends
    /// the mail again.
    async fn until_recorded(&self, claim: &Claim, attempt: &Attempt, lease: &Lease) -> sqlx::Result<()> {
        while let Err(error) = bounded(self.record(claim, attempt)).await {
            if lease.has_ended() {
                return Err(error);
            }
            sleep(DATABASE_RETRY).await;
        }
        Ok(())
    }

    /// Renews the lease for as long as the attempt takes. A mail server may take minutes, and the
    /// lease is short so that the deliveries of a dead sender do not wait for long.
    async fn keep(&self, claim: &Claim, lease: &Lease) -> std::convert::Infallible {
        loop {
            sleep(self.rules.lease / 3).await;
            self.renew(claim, lease).await;
        }
    }

    /// Renews the lease. Returns whether the mail may still be sent. If the database does not
    /// answer, the delivery may belong to another sender.
    async fn renew(&self, claim: &Claim, lease: &Lease) -> bool {
        let until = Instant::now() + self.rules.lease;
        let renewed = bounded(deliveries::renew(&self.db, claim, &self.rules)).await;
        match renewed {
            Ok(true) => lease.extend(until),
            Ok(false) => lease.end(),
            Err(_) => {}
        }
        renewed.unwrap_or(false)
    }

    /// Sends the mail, and returns how the attempt ended.
    ///
    /// Crash before the server's 250: the lease ends, and another attempt sends the mail. The
    /// server accepts it once. Crash after the 250 and before [`Sender::record`]: the mail is sent
    /// a second time, with the same Message-ID. This window cannot be closed, because SMTP has no
    /// transaction that spans both sides.
    async fn attempt(&self, connection: &mut Connection, claim: &Claim, lease: &Lease) -> Attempt {
        let address: Option<Address> = check_address(&claim.email).ok().and_then(|()| claim.email.parse().ok());
        let Some(to) = address else { return Attempt::Ended(Ending::Refused { code: BAD_ADDRESS }) };
        let template = mail::template(&claim.template).expect("only known templates are claimed");
        let message = template.build(claim.id, self.server.sender(), &to);
        // Nothing here has an effect that matters, so the process can stop at any time.
        let ready = async {
            connection.prepare(&self.server, &to).await.map_err(Attempt::Ended)?;
            telemetry::note("the mail server accepts the recipient");
            fault::point("email.before_check");
            if !self.batches.check(claim).await && !self.renew(claim, lease).await {
                return Err(Attempt::Superseded);
            }
            telemetry::note("the delivery is still claimed, and the recipient is not erased");
            connection.announce().await.map_err(Attempt::Ended)?;
            telemetry::note("the mail server waits for the mail");
            // The server may have taken minutes.
            if lease.has_ended() { Err(Attempt::Superseded) } else { Ok(()) }
        };
        match self.stop.run_until_cancelled(ready).await {
            Some(Ok(())) => {}
            Some(Err(attempt)) => {
                connection.close();
                return attempt;
            }
            None => return Attempt::Stopped,
        }
        let give_up = async {
            self.stop.cancelled().await;
            sleep(self.last_answer).await;
        };
        let ending = connection.send(&message, give_up).await;
        telemetry::note("the dialogue about the mail has ended");
        Attempt::Ended(ending)
    }

    async fn record(&self, claim: &Claim, attempt: &Attempt) -> sqlx::Result<()> {
        let retry = async |why, code| deliveries::retry(&self.db, claim, &self.rules, why, code).await;
        let attempt_number = claim.attempt;
        match *attempt {
            Attempt::Ended(Ending::Accepted) => {
                let (changed, _) =
                    deliveries::record_and_claim(&self.db, &[Accepted::new(claim)], &self.rules, &[], 0).await?;
                self.note_sent(claim, changed[0]);
            }
            Attempt::Ended(Ending::Refused { code }) => self.fail(claim, code, REFUSED).await?,
            Attempt::Ended(Ending::Deferred { code }) if claim.is_last_deferral(&self.rules) => {
                self.fail(claim, code, DEFERRED).await?;
            }
            Attempt::Ended(Ending::Deferred { code }) => {
                retry(Retry::Later, Some(code)).await?;
                tracing::warn!(attempt = attempt_number, smtp.code = code, "mail server deferred the mail; will retry");
            }
            Attempt::Ended(Ending::SenderRefused(trouble)) => {
                self.record_refusal(claim, trouble, claim.is_last_refusal()).await?;
            }
            Attempt::Ended(Ending::Unexplained(trouble)) => self.record_refusal(claim, trouble, true).await?,
            Attempt::Ended(Ending::ServerFailed(trouble)) => {
                self.breaker.failed(claim.user_id, trouble);
                retry(Retry::Later, trouble.code()).await?;
                tracing::warn!(attempt = attempt_number, failure = %trouble, "mail not sent; will retry");
            }
            Attempt::Ended(Ending::Unknown(trouble)) => self.record_unknown(claim, trouble).await?,
            // If another sender has the delivery, the statement changes nothing. If the recipient
            // was erased or the database did not answer, it schedules another attempt.
            Attempt::Superseded => {
                retry(Retry::Later, None).await?;
                tracing::warn!(
                    attempt = attempt_number,
                    "mail not sent: the lease ended, the recipient was erased, or the database did not answer"
                );
            }
            Attempt::Stopped => {
                retry(Retry::Stopped, None).await?;
                tracing::info!(attempt = attempt_number, "mail not sent: the process stops; another sender takes it");
            }
        }
        self.wake.notify();
        Ok(())
    }

    fn note_sent(&self, claim: &Claim, changed: bool) {
        if changed {
            self.metrics.count_ended("sent", 1);
        }
        tracing::info!(attempt = claim.attempt, "mail accepted by the SMTP server");
        self.wake.notify();
    }

    /// The server refused the mail permanently, for a reason that is about us or may be. If it
    /// refuses the mails to several recipients, the breaker opens, and no mail fails. If this
    /// recipient alone gets the refusal, and this was its last attempt, its mail fails.
    async fn record_refusal(&self, claim: &Claim, trouble: Trouble, is_last: bool) -> sqlx::Result<()> {
        let paused = self.breaker.failed(claim.user_id, trouble);
        if let Some(code) = trouble.code().filter(|_| !paused && is_last) {
            return self.fail(claim, code, REFUSED).await;
        }
        let why = if paused { Retry::Later } else { Retry::Refused };
        deliveries::retry(&self.db, claim, &self.rules, why, trouble.code()).await?;
        tracing::warn!(
            attempt = claim.attempt,
            failure = %trouble,
            "mail server refused the mail, and most likely not because of the recipient; will retry"
        );
        Ok(())
    }

    async fn record_unknown(&self, claim: &Claim, trouble: Trouble) -> sqlx::Result<()> {
        self.breaker.failed(claim.user_id, trouble);
        deliveries::retry(&self.db, claim, &self.rules, Retry::Unknown, None).await?;
        if claim.is_last_unknown() {
            tracing::error!(
                attempt = claim.attempt,
                failure = %trouble,
                "no answer after the mail was sent, several times; the delivery waits for an operator, see \
                 `email retry-unknown --help`"
            );
        } else {
            tracing::warn!(
                attempt = claim.attempt,
                failure = %trouble,
                "no answer after the mail was sent; will retry, so the recipient may get two copies"
            );
        }
        Ok(())
    }

    async fn fail(&self, claim: &Claim, code: u16, why: &'static str) -> sqlx::Result<()> {
        if deliveries::failed(&self.db, claim, code).await? {
            self.metrics.count_ended("failed", 1);
        }
        tracing::warn!(attempt = claim.attempt, smtp.code = code, "delivery failed: {why}");
        Ok(())
    }
}

impl Lease {
    fn until(end: Instant) -> Self {
        Self(Mutex::new(end))
    }

    fn extend(&self, end: Instant) {
        *self.0.lock().expect("no thread panics while it holds this lock") = end;
    }

    /// Another sender may have the delivery.
    fn end(&self) {
        self.extend(Instant::now());
    }

    fn has_ended(&self) -> bool {
        *self.0.lock().expect("no thread panics while it holds this lock") <= Instant::now()
    }
}
