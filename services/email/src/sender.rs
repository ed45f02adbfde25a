//! The sender: claims a delivery, hands the mail to the SMTP server, records what came of it; one after another, over one
//! connection.

use shared::fault;
use shared::messaging::Wake;
use shared::service::bounded;
use shared::service::telemetry::{self, TraceContext};
use sqlx::PgPool;
use tokio::time::{Duration, Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, field::Empty};

use crate::deliveries::{self, Claim, Rules};
use crate::mail;
use crate::metrics::Metrics;
use crate::smtp::{Connection, Ending, SmtpConfig};

/// New intents are found after this time at the latest.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Intents of erased users are cancelled after this time at the latest.
const CANCEL_INTERVAL: Duration = Duration::from_secs(1);
const DATABASE_RETRY: Duration = Duration::from_millis(500);
/// "Mailbox name not allowed" (RFC 5321 §4.2.2): what we answer ourselves to an address that is none.
const BAD_ADDRESS: u16 = 553;

pub struct Sender {
    pub db: PgPool,
    pub smtp: SmtpConfig,
    pub rules: Rules,
    pub wake: Wake,
    pub metrics: Metrics,
}

impl Sender {
    /// Sends until told to stop; the mail in hand is finished first.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut connection = Connection::default();
        let mut cancel_at = Instant::now();
        while !stop.is_cancelled() {
            let pause = match self.send_next(&mut connection, &mut cancel_at).await {
                Ok(true) => continue,
                Ok(false) => POLL_INTERVAL,
                Err(error) => {
                    tracing::warn!(%error, "the database does not answer; deliveries wait");
                    DATABASE_RETRY
                }
            };
            connection.quit().await;
            stop.run_until_cancelled(sleep(pause)).await;
        }
        Ok(())
    }

    /// One delivery, if one is due; whether there was one.
    async fn send_next(&self, connection: &mut Connection, cancel_at: &mut Instant) -> sqlx::Result<bool> {
        // Not before each mail: it looks at all that is open. Nobody claims what is meant for an erased recipient.
        if *cancel_at <= Instant::now() {
            let cancelled = bounded(deliveries::cancel_erased(&self.db)).await?;
            self.metrics.settled("cancelled", cancelled);
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
            // Worth some patience: what is not recorded before the lease ends is sent again.
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

    /// Crash before the server's 250: the lease ends and the mail is sent again, for the first time. Crash after it and before
    /// [`Sender::record`]: it is sent a second time, with the same Message-ID. That window cannot be closed from here: SMTP has
    /// no transaction that spans both sides.
    async fn attempt(&self, connection: &mut Connection, claim: &Claim) -> Ending {
        let written = mail::write(claim, &self.smtp.mail_from).ok();
        let Some((message, to)) = written.zip(claim.email.parse().ok()) else {
            return Ending::Refused { code: BAD_ADDRESS };
        };
        let check = async {
            fault::point("email.before_check");
            // A database that does not answer cannot say that the mail is still ours.
            bounded(deliveries::still_ours(&self.db, claim)).await.unwrap_or(false)
        };
        connection.transmit(&self.smtp, to, &message, check).await
    }

    async fn record(&self, claim: &Claim, ending: &Ending) -> sqlx::Result<()> {
        match *ending {
            Ending::Accepted => {
                if deliveries::sent(&self.db, claim).await? {
                    self.metrics.settled("sent", 1);
                }
                tracing::info!(attempt = claim.attempt, "sent");
            }
            Ending::Refused { code } => {
                if deliveries::failed(&self.db, claim, code).await? {
                    self.metrics.settled("failed", 1);
                }
                tracing::warn!(attempt = claim.attempt, smtp.code = code, "refused for good");
            }
            Ending::Later { code } => {
                deliveries::put_off(&self.db, claim, &self.rules, false, code).await?;
                tracing::warn!(attempt = claim.attempt, smtp.code = code, "not now");
            }
            Ending::Unknown => {
                deliveries::put_off(&self.db, claim, &self.rules, true, None).await?;
                tracing::warn!(attempt = claim.attempt, "no answer to the mail: it may arrive twice");
            }
            // Another's by now: then this changes nothing. Or the recipient was erased, or the database did not say.
            Ending::Superseded => {
                deliveries::put_off(&self.db, claim, &self.rules, false, None).await?;
                tracing::warn!(attempt = claim.attempt, "not sent: no longer ours, or nobody to send it to");
            }
        }
        self.wake.notify();
        Ok(())
    }
}
