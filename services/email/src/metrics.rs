//! Delivery metrics.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use shared::platform::database::bounded;
use shared::platform::metrics::Metrics;
use sqlx::PgPool;
use tokio::time::{Duration, sleep};

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
    /// 1 while sending is paused because of the mail server.
    pub paused: Gauge,
}

impl DeliveryMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        metrics.register("deliveries_ended", "Deliveries that ended, by final state", &own.ended);
        metrics.register("deliveries_open", "Deliveries that have not ended, by state, up to 10000 each", &own.open);
        let help = "Age of the oldest delivery that has not ended and is not held";
        metrics.register("deliveries_oldest_age_seconds", help, &own.oldest_age);
        let help = "1 while this process sends only probes, because the mail server fails or refuses our mails";
        metrics.register("mail_sending_paused", help, &own.paused);
        own
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
