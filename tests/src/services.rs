//! The topics and consumer groups by name, derived from `topology`.

use topology::{ANALYTICS, CACHE, EMAIL, Group, SERVICES, Service, USER};

pub use topology::OPERATOR_ACTIONS;

pub const USER_EVENTS: &str = USER.writes[0];
pub const USER_STATE: &str = USER.writes[1];
pub const EMAIL_EVENTS: &str = EMAIL.writes[0];
/// The topics with facts and states. Dead letters and the actions of operators have topics of their
/// own.
pub const TOPICS: [&str; 3] = [USER_EVENTS, USER_STATE, EMAIL_EVENTS];

/// Groups of the analytics service.
pub const ANALYTICS_USERS: &str = ANALYTICS.groups[0].name;
pub const ANALYTICS_EMAILS: &str = ANALYTICS.groups[1].name;
pub const ANALYTICS_AUDIT: &str = ANALYTICS.groups[2].name;
/// Groups of the email service.
pub const EMAIL_WELCOME: &str = EMAIL.groups[0].name;
pub const EMAIL_RECIPIENTS: &str = EMAIL.groups[1].name;
/// Group of the cache service.
pub const CACHE_PROFILES: &str = CACHE.groups[0].name;

/// The services that consume topics.
pub const CONSUMERS: [Service; 3] = [EMAIL, ANALYTICS, CACHE];

/// The default settings of consumers. For tests that count members or batches: they are also run
/// with `WAYBILL_TEST_SETTINGS` that have others.
pub const DEFAULT_CONSUMERS: [(&str, &str); 2] = [("CONSUMERS", "1"), ("BATCH_RECORDS", "2000")];

/// The names of all consumer groups.
pub fn groups() -> impl Iterator<Item = &'static str> {
    declared().map(|group| group.name)
}

/// The service that runs a consumer group.
pub fn service_of(group: &str) -> Service {
    let runs = |service: &Service| service.groups.iter().any(|known| known.name == group);
    SERVICES.into_iter().find(runs).unwrap_or_else(|| panic!("no service runs the group {group}"))
}

/// The topic that a consumer group reads.
pub fn topic_of(group: &str) -> &'static str {
    let known = declared().find(|known| known.name == group);
    known.unwrap_or_else(|| panic!("no service runs the group {group}")).topic
}

/// The topic of a consumer group's dead letters.
pub fn dead_letters_of(group: &str) -> String {
    let known = declared().find(|known| known.name == group);
    known.unwrap_or_else(|| panic!("no service runs the group {group}")).dead_letters()
}

fn declared() -> impl Iterator<Item = Group> {
    SERVICES.into_iter().flat_map(|service| service.groups.iter().copied())
}
