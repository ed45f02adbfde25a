//! Delivery metrics.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use shared::events;
use shared::platform::database::bounded;
use shared::platform::metrics::{Ages, Description, Exemplars, Metrics};
use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::time::{Duration, sleep};
use tracing::Span;

const INTERVAL: Duration = Duration::from_secs(2);
/// The states that are reported. A state without deliveries is reported as 0; otherwise its series
/// would keep the last value.
const OPEN_STATES: [&str; 5] = ["unaddressed", "pending", "sending", "unknown", "held"];
/// Deliveries of a state are counted up to this number, so that a large backlog costs no more than
/// a small one.
const COUNT_LIMIT: i64 = 10_000;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Default)]
pub struct DeliveryMetrics {
    ended: Family<StateLabels, Counter>,
    open: Family<StateLabels, Gauge>,
    oldest_age: Gauge,
    /// From the request to the moment when the mail server accepts the mail.
    mail_age: Ages,
    exemplars: Exemplars,
    /// 1 while sending is paused because of the mail server.
    pub paused: Gauge,
}

impl DeliveryMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self { exemplars: metrics.exemplars, ..Self::default() };
        own.register_deliveries(metrics);
        own.register_mails(metrics);
        own
    }

    fn register_deliveries(&self, metrics: &Metrics) {
        let description = Description {
            name: "deliveries_ended",
            unit: "mails",
            labels: &["state"],
            meaning: "Mails that ended in this process, by final state: sent, failed, or cancelled because the user was erased",
            bad: "`failed` grows fast: [Mails have failed](operations.md#mails-have-failed)",
        };
        for state in ["sent", "failed", "cancelled"] {
            self.count_ended(state, 0);
        }
        metrics.register(description, &self.ended);
        let description = Description {
            name: "deliveries_open",
            unit: "mails",
            labels: &["state"],
            meaning: "Mails that have not ended, by state: unaddressed, pending, sending, unknown or held. Counted up to \
                      10,000 each. Every replica reports the same mails",
            bad: "`held` above 0: [Mails are held](operations.md#mails-are-held). `unknown` above 0 for an hour: \
                  [A mail waits because its answers were lost](operations.md#a-mail-waits-because-its-answers-were-lost). \
                  `unaddressed` grows: [Mails have no address](operations.md#mails-have-no-address). `pending` grows: \
                  [Mails are not sent](operations.md#mails-are-not-sent)",
        };
        metrics.register(description, &self.open);
        let description = Description {
            name: "deliveries_oldest_age_seconds",
            unit: "seconds",
            labels: &[],
            meaning: "Age of the oldest mail that has not ended and is not held. Every replica reports the same mails",
            bad: "above ten minutes: [Mails are not sent](operations.md#mails-are-not-sent)",
        };
        metrics.register(description, &self.oldest_age);
    }

    fn register_mails(&self, metrics: &Metrics) {
        let age = Description {
            name: "mail_age_seconds",
            unit: "seconds",
            labels: &[],
            meaning: "Time from the request that caused a mail to the moment when the mail server accepted it. The \
                      value is the difference between the clocks of two services, for display only. With exemplars",
            bad: "above a minute: [Mails are not sent](operations.md#mails-are-not-sent)",
        };
        let negative = Description {
            name: "mail_age_negative",
            unit: "mails",
            labels: &[],
            meaning: "Mails whose mail_age_seconds was negative and counts as 0, because the clock of the publishing service \
                      is ahead of this one",
            bad: "grows: the clocks differ, so `mail_age_seconds` is wrong. Correct the clocks. Nothing else depends on them",
        };
        metrics.register_ages(age, negative, &self.mail_age);
        let description = Description {
            name: "mail_sending_paused",
            unit: "0 or 1",
            labels: &[],
            meaning: "1 while this process sends only probes, because the mail server fails or refuses our mails",
            bad: "1 for minutes: [Sending is paused](operations.md#sending-is-paused)",
        };
        metrics.register(description, &self.paused);
    }

    /// The mail server has accepted a mail, within this span.
    pub fn observe_accepted(&self, requested_at: OffsetDateTime, span: &Span) {
        let age = events::now() - requested_at;
        self.mail_age.observe(age.as_seconds_f64(), self.exemplars.of(span));
    }

    pub fn count_ended(&self, state: &'static str, deliveries: u64) {
        self.ended.get_or_create(&StateLabels { state }).inc_by(deliveries);
    }

    /// Measures the open deliveries every two seconds: for each state a bounded count and one index
    /// lookup. `held` deliveries wait for an operator. `unaddressed` ones wait for the address of
    /// their user from `user.state.v1`: alert on many or old ones.
    pub async fn measure(self, db: PgPool) -> anyhow::Result<()> {
        let states = OPEN_STATES.map(str::to_owned);
        loop {
            let measured = sqlx::query!(
                r#"select state.name as "state!", counted.deliveries as "deliveries!",
                       coalesce(extract(epoch from now() - oldest.requested_at)::bigint, 0) as "age!"
                   from unnest($1::text[]) as state (name)
                   cross join lateral (
                       select count(*) as deliveries from (
                           select from deliveries where status = state.name
                               and status in ('unaddressed', 'pending', 'sending', 'unknown')
                           limit $2) open) counted
                   left join lateral (
                       select requested_at from deliveries where status = state.name
                           and status in ('unaddressed', 'pending', 'sending', 'unknown')
                       order by requested_at limit 1) oldest on true
                   where state.name <> 'held'
                   union all
                   select 'held', (select count(*) from (select from deliveries where status = 'held' limit $2) open), 0"#,
                &states,
                COUNT_LIMIT,
            );
            match bounded(measured.fetch_all(&db)).await {
                Ok(rows) => {
                    for state in OPEN_STATES {
                        let open = rows.iter().find(|row| row.state == state).map_or(0, |row| row.deliveries);
                        self.open.get_or_create(&StateLabels { state }).set(open);
                    }
                    self.oldest_age.set(rows.iter().map(|row| row.age).max().unwrap_or(0));
                }
                Err(error) => tracing::debug!(%error, "cannot measure the deliveries; will retry"),
            }
            sleep(INTERVAL).await;
        }
    }
}
