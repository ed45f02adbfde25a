//! How the deliveries do.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use shared::service;
use sqlx::PgPool;
use tokio::time::{Duration, sleep};

const INTERVAL: Duration = Duration::from_secs(2);
/// Also reported when there are none, so that a series ends at 0 and not at its last value.
const OPEN: [&str; 5] = ["pending", "sending", "unknown", "unaddressed", "held"];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone)]
pub struct Metrics {
    settled: Family<State, Counter>,
    open: Family<State, Gauge>,
    oldest_age: Gauge,
}

impl Metrics {
    pub fn register(metrics: &service::Metrics) -> Self {
        let own = Self { settled: Family::default(), open: Family::default(), oldest_age: Gauge::default() };
        metrics.register("deliveries_settled", "Deliveries that ended, by how", &own.settled);
        metrics.register("deliveries_open", "Deliveries to be made, by state", &own.open);
        let help = "How long the oldest of them has waited, not counting what is held";
        metrics.register("deliveries_oldest_age_seconds", help, &own.oldest_age);
        own
    }

    pub fn settled(&self, state: &'static str, deliveries: u64) {
        self.settled.get_or_create(&State { state }).inc_by(deliveries);
    }

    /// Counts the open deliveries, by the indexes that hold only those. `held` ones wait for an operator's word. `unaddressed`
    /// ones wait for `user.state.v1` to tell where their user can be reached: many of them, or old ones, are worth an alert.
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
            if let Ok(rows) = service::bounded(measured.fetch_all(&db)).await {
                for state in OPEN {
                    let open = rows.iter().find(|row| row.state == state).map_or(0, |row| row.deliveries);
                    self.open.get_or_create(&State { state }).set(open);
                }
                self.oldest_age.set(rows.iter().map(|row| row.age).max().unwrap_or(0));
            }
            sleep(INTERVAL).await;
        }
    }
}
