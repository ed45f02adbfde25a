//! Every service, declared once, as plain data without I/O. The test bed, `cargo xtask` and the
//! tests derive their lists from it. The services do not use it: a service declares its own topics
//! and consumer groups.
//!
//! What each service may do on Kafka follows from it, see [`acls`].

pub mod acls;

/// One service of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The name of its folder below `services/`, of its package and of its program.
    pub name: &'static str,
    /// The port of its public API.
    pub http: u16,
    /// The port of `/livez`, `/readyz`, `/status` and `/metrics`.
    pub admin: u16,
    /// Whether it owns a Postgres database and a folder below `migrations/`.
    pub has_database: bool,
    /// The topics that it writes. It also creates them.
    pub writes: &'static [&'static str],
    /// Its consumer groups, each with the topic that the group reads.
    pub groups: &'static [Group],
    /// Where its effects are: databases, stores, and the mail server. The console draws them.
    pub stores: &'static [&'static str],
}

/// A consumer group. Its dead letters are in the topic `<name>.dlq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub name: &'static str,
    pub topic: &'static str,
}

/// The topic in which services record what operators did. Each service that has consumer groups
/// writes it, because only these accept actions, and creates it.
pub const OPERATOR_ACTIONS: &str = "operator.actions.v1";

const USER_EVENTS: &str = "user.events.v1";
const USER_STATE: &str = "user.state.v1";
const EMAIL_EVENTS: &str = "email.events.v1";

pub const USER: Service = Service {
    name: "user",
    http: 8080,
    admin: 9080,
    has_database: true,
    writes: &[USER_EVENTS, USER_STATE],
    groups: &[],
    stores: &["Postgres"],
};

pub const ANALYTICS: Service = Service {
    name: "analytics",
    http: 8081,
    admin: 9081,
    has_database: true,
    writes: &[],
    groups: &[
        Group { name: "analytics.users", topic: USER_EVENTS },
        Group { name: "analytics.emails", topic: EMAIL_EVENTS },
        Group { name: "analytics.audit", topic: USER_EVENTS },
    ],
    stores: &["Postgres"],
};

pub const CACHE: Service = Service {
    name: "cache",
    http: 8082,
    admin: 9082,
    has_database: false,
    writes: &[],
    groups: &[Group { name: "cache.profiles", topic: USER_STATE }],
    stores: &["Valkey"],
};

pub const EMAIL: Service = Service {
    name: "email",
    http: 8083,
    admin: 9083,
    has_database: true,
    writes: &[EMAIL_EVENTS],
    groups: &[
        Group { name: "email.welcome", topic: USER_EVENTS },
        Group { name: "email.recipients", topic: USER_STATE },
    ],
    stores: &["Postgres", "mail server"],
};

pub const SERVICES: [Service; 4] = [USER, ANALYTICS, CACHE, EMAIL];

/// A program for operators, in `tools/`. No service knows it, calls it or needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    /// The name of its folder below `tools/` and of its program. Its package is `waybill-<name>`.
    pub name: &'static str,
    /// The port of its pages.
    pub http: u16,
    /// The port of `/livez`, `/readyz`, `/status` and `/metrics`.
    pub admin: u16,
    /// The port on which it receives traces, by OTLP over gRPC. Not the usual 4317, where a
    /// collector of this machine may be.
    pub otlp: u16,
}

/// The live page. `None`: this system has none, and the folder `tools/console` can be deleted.
pub const CONSOLE: Option<Tool> = Some(Tool { name: "console", http: 8084, admin: 9084, otlp: 14_317 });

impl Tool {
    /// The name of its package.
    pub fn package(&self) -> String {
        format!("waybill-{}", self.name)
    }
}

impl Group {
    /// The topic of its dead letters.
    pub fn dead_letters(&self) -> String {
        format!("{}.dlq", self.name)
    }
}

impl Service {
    /// Whether operators can act on it. Then it writes [`OPERATOR_ACTIONS`].
    pub fn accepts_actions(&self) -> bool {
        !self.groups.is_empty()
    }

    /// The name of its database, and of the role with which the service reads and writes it.
    pub fn database(&self) -> String {
        format!("waybill_{}", self.name)
    }

    /// The role that owns the database and its tables, and that migrates it.
    pub fn owner(&self) -> String {
        format!("{}_owner", self.database())
    }

    /// The setting that holds the URL of its database.
    pub fn database_url_setting(&self) -> String {
        format!("{}_DATABASE_URL", self.name.to_uppercase())
    }
}

/// The services that own a database.
pub fn with_database() -> impl Iterator<Item = Service> {
    SERVICES.into_iter().filter(|service| service.has_database)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn services_have_distinct_names_and_ports() {
        let names: BTreeSet<&str> = SERVICES.iter().map(|service| service.name).collect();
        let ports = SERVICES.iter().flat_map(|service| [service.http, service.admin]);
        let ports_of_tools = CONSOLE.iter().flat_map(|console| [console.http, console.admin, console.otlp]);
        let ports: Vec<u16> = ports.chain(ports_of_tools).collect();
        assert_eq!(names.len(), SERVICES.len());
        let distinct: BTreeSet<&u16> = ports.iter().collect();
        assert_eq!(distinct.len(), ports.len(), "{ports:?}");
    }

    #[test]
    fn one_service_writes_each_topic_that_a_group_reads() {
        for group in SERVICES.iter().flat_map(|service| service.groups) {
            let writers = SERVICES.iter().filter(|service| service.writes.contains(&group.topic)).count();
            assert_eq!(writers, 1, "services that write {}, which {} reads", group.topic, group.name);
        }
    }
}
