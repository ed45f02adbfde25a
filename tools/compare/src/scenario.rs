//! What happens to a side while clients register users.

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Scenario {
    Light,
    Heavy,
    Burst,
    SlowMail,
    MailDown,
    AnalyticsDown,
    StoreDown,
    Killed,
}

impl Scenario {
    pub const ALL: [Self; 8] = [
        Self::Light,
        Self::Heavy,
        Self::Burst,
        Self::SlowMail,
        Self::MailDown,
        Self::AnalyticsDown,
        Self::StoreDown,
        Self::Killed,
    ];
    /// Those whose outcome the page states as a relation.
    pub const CLAIMED: [Self; 5] = [Self::Light, Self::SlowMail, Self::MailDown, Self::AnalyticsDown, Self::Killed];
    /// Those without a fault, in which CPU and memory are measured.
    pub const MEASURED: [Self; 3] = [Self::Light, Self::Heavy, Self::Burst];
}
