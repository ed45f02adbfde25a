//! The sender: claims a delivery, sends the mail to the SMTP server and records the result. It
//! sends one mail after another over one connection.

use shared::fault;
use shared::messaging::Wake;
use shared::platform::database::bounded;
use shared::platform::telemetry::{self, TraceContext};
use sqlx::PgPool;
use tokio::time::{Duration, Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, field::Empty};

use crate::deliveries::{self, Claim, RetryAs, Rules};
use crate::mail;
use crate::metrics::DeliveryMetrics;
use crate::smtp::{Connection, Ending, SmtpConfig};

/// How long an idle sender waits before it looks for a new delivery.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How often deliveries to erased users are cancelled.
const CANCEL_INTERVAL: Duration = Duration::from_secs(1);
const DATABASE_RETRY: Duration = Duration::from_millis(500);
/// "Mailbox name not allowed" (RFC 5321 §4.2.2): the code that we record for an invalid address.
const BAD_ADDRESS: u16 = 553;

pub struct Sender {
    pub db: PgPool,
    pub smtp: SmtpConfig,
    pub rules: Rules,
    pub wake: Wake,
    pub metrics: DeliveryMetrics,
}

impl Sender {
    /// Sends until the process stops. Finishes the mail in progress first.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut connection = Connection::default();
        let mut cancel_at = Instant::now();
        while !stop.is_cancelled() {
            let pause = match self.send_next(&mut connection, &mut cancel_at).await {
                Ok(true) => continue,
                Ok(false) => POLL_INTERVAL,
                Err(error) => {
                    tracing::warn!(%error, "the database does not answer; deliveries wait, will retry");
                    DATABASE_RETRY
                }
            };
            connection.quit().await;
            stop.run_until_cancelled(sleep(pause)).await;
        }
        Ok(())
    }

    /// Sends the mail of one delivery, if one is due. Returns whether one was due.
    async fn send_next(&self, connection: &mut Connection, cancel_at: &mut Instant) -> sqlx::Result<bool> {
        // Not before each mail, because the query reads all open deliveries. Nor is it needed: a
        // claim skips erased recipients.
        if *cancel_at <= Instant::now() {
            let cancelled = bounded(deliveries::cancel_erased(&self.db)).await?;
            self.metrics.count_ended("cancelled", cancelled);
            *cancel_at = Instant::now() + CANCEL_INTERVAL;
        }
        let Some(claim) = bounded(deliveries::claim(&self.db, &self.rules)).await? else { return Ok(false) };
        fault::point("email.after_claim");
        let span = tracing::error_span!(
            parent: None, "send", "otel.kind" = "client", delivery.id = %claim.id, template = claim.template, trace.id = Empty
        );
        let cause = TraceContext { traceparent: claim.traceparent.clone(), tracestate: claim.tracestate.clone() };
        telemetry::continue_from(&span, &cause);
        async {
            let claimed_at = Instant::now();
            let ending = self.attempt(connection, &claim).await;
            fault::point("email.after_answer");
            // Retries until the lease ends: a result that is not recorded by then means that the
            // mail is sent again.
            while let Err(error) = bounded(self.record(&claim, &ending)).await {
                if claimed_at.elapsed() > self.rules.lease {
                    return Err(error);
                }
                sleep(DATABASE_RETRY).await;
            }
            Ok(())
        }
        .instrument(span)
        .await?;
        Ok(true)
    }

    /// Sends the mail, and returns how the attempt ended.
    ///
    /// Crash before the server's 250: the lease ends, and another attempt sends the mail. The
    /// server accepts it once. Crash after the 250 and before [`Sender::record`]: the mail is sent
    /// a second time, with the same Message-ID. This window cannot be closed, because SMTP has no
    /// transaction that spans both sides.
    async fn attempt(&self, connection: &mut Connection, claim: &Claim) -> Ending {
        let message = mail::build(claim, &self.smtp.mail_from).ok();
        let Some((message, to)) = message.zip(claim.email.parse().ok()) else {
            return Ending::Refused { code: BAD_ADDRESS };
        };
        let check = async {
            fault::point("email.before_check");
            // If the database does not answer, the delivery may belong to another sender.
            bounded(deliveries::still_ours(&self.db, claim)).await.unwrap_or(false)
        };
        connection.transmit(&self.smtp, to, &message, check).await
    }

    async fn record(&self, claim: &Claim, ending: &Ending) -> sqlx::Result<()> {
        match *ending {
            Ending::Accepted => {
                if deliveries::sent(&self.db, claim).await? {
                    self.metrics.count_ended("sent", 1);
                }
                tracing::info!(attempt = claim.attempt, "mail accepted by the SMTP server");
            }
            Ending::Refused { code } => {
                if deliveries::failed(&self.db, claim, code).await? {
                    self.metrics.count_ended("failed", 1);
                }
                tracing::warn!(
                    attempt = claim.attempt,
                    smtp.code = code,
                    "mail server refused the mail permanently; delivery failed"
                );
            }
            Ending::Later { code } => {
                deliveries::retry_later(&self.db, claim, &self.rules, RetryAs::Pending, code).await?;
                tracing::warn!(attempt = claim.attempt, smtp.code = code, "mail server deferred the mail; will retry");
            }
            Ending::Unknown => {
                deliveries::retry_later(&self.db, claim, &self.rules, RetryAs::Unknown, None).await?;
                tracing::warn!(
                    attempt = claim.attempt,
                    "no answer after the mail was sent; will retry, so the recipient may get two copies"
                );
            }
            // If another sender has the delivery, the statement changes nothing. If the recipient
            // was erased or the database did not answer, it schedules another attempt.
            Ending::Superseded => {
                deliveries::retry_later(&self.db, claim, &self.rules, RetryAs::Pending, None).await?;
                tracing::warn!(
                    attempt = claim.attempt,
                    "mail not sent: the lease ended, the recipient was erased, or the database did not answer"
                );
            }
        }
        self.wake.notify();
        Ok(())
    }
}
