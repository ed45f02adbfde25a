//! The receivers of a registration.

use prometheus_client::encoding::EncodeLabelValue;

/// What a registration must reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Receiver {
    Mail,
    Analytics,
    Cache,
}

impl Receiver {
    pub const ALL: [Self; 3] = [Self::Mail, Self::Analytics, Self::Cache];

    pub fn name(self) -> &'static str {
        match self {
            Self::Mail => "mail",
            Self::Analytics => "analytics",
            Self::Cache => "cache",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|receiver| receiver.name() == name)
    }
}
