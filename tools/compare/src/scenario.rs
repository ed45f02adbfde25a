//! What happens to a side while clients register users.

use serde::{Deserialize, Serialize};

use crate::subject::Side;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Scenario {
    Light,
    Heavy,
    Burst,
    SlowMail,
    MailDown,
    AnalyticsDown,
    StoreDown,
    KafkaDown,
    Killed,
}

impl Scenario {
    pub const ALL: [Self; 9] = [
        Self::Light,
        Self::Heavy,
        Self::Burst,
        Self::SlowMail,
        Self::MailDown,
        Self::AnalyticsDown,
        Self::StoreDown,
        Self::KafkaDown,
        Self::Killed,
    ];
    /// Those whose outcome the page states as a relation.
    pub const CLAIMED: [Self; 5] = [Self::Light, Self::SlowMail, Self::MailDown, Self::AnalyticsDown, Self::Killed];
    /// Those without a fault, in which CPU and memory are measured.
    pub const MEASURED: [Self; 3] = [Self::Light, Self::Heavy, Self::Burst];

    /// Whether the scenario can tell something about a side. Without a fault `background` does the
    /// same as `resilient`, and no synchronous variant uses Kafka.
    pub fn is_for(self, side: Side) -> bool {
        match self {
            Self::KafkaDown => side == Side::Waybill,
            _ => side != Side::Background || !Self::MEASURED.contains(&self),
        }
    }
}
