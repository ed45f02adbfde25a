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
const OPEN_STATES: [&str; 5] = ["pending", "sending", "unknown", "unaddressed", "held"];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone)]
pub struct DeliveryMetrics {
    ended: Family<StateLabels, Counter>,
    open: Family<StateLabels, Gauge>,
    oldest_age: Gauge,
}

impl DeliveryMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self { ended: Family::default(), open: Family::default(), oldest_age: Gauge::default() };
        metrics.register("deliveries_ended", "Deliveries that ended, by final state", &own.ended);
        metrics.register("deliveries_open", "Deliveries that have not ended, by state", &own.open);
        let help = "Age of the oldest delivery that has not ended and is not held";
        metrics.register("deliveries_oldest_age_seconds", help, &own.oldest_age);
        own
    }

    pub fn count_ended(&self, state: &'static str, deliveries: u64) {
        self.ended.get_or_create(&StateLabels { state }).inc_by(deliveries);
    }

    /// Counts the open deliveries every two seconds. The indexes contain only these. `held`
    /// deliveries wait for an operator. `unaddressed` ones wait for the address of their user from
    /// `user.state.v1`: alert on many or old ones.
    pub async fn measure(self, db: PgPool) -> anyhow::Result<()> {
        loop {
            let measured = sqlx::query!(
                r#"select case when r.user_id is null then 'unaddressed' else d.status end as "state!",
                       count(*) as "deliveries!", max(extract(epoch from now() - d.requested_at))::bigint as "age!"
                   from deliveries d left join recipients r using (user_id)
                   where d.status in ('pending', 'unknown', 'sending') group by 1
                   union all
                   select 'held', count(*), 0 from deliveries where status = 'held'"#
            );
            if let Ok(rows) = bounded(measured.fetch_all(&db)).await {
                for state in OPEN_STATES {
                    let open = rows.iter().find(|row| row.state == state).map_or(0, |row| row.deliveries);
                    self.open.get_or_create(&StateLabels { state }).set(open);
                }
                self.oldest_age.set(rows.iter().map(|row| row.age).max().unwrap_or(0));
            }
            sleep(INTERVAL).await;
        }
    }
}
