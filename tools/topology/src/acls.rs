//! What each service may do on Kafka: exactly what the topology says that it does. Nothing is
//! granted by a wildcard or by a prefix.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::{CONSOLE, OPERATOR_ACTIONS, SERVICES, Service, Tool};

/// The name of the only cluster resource.
const CLUSTER: &str = "kafka-cluster";

/// One right of one principal on one resource, from any host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// As Kafka writes it: `User:` and the name with which the service logs in.
    pub principal: String,
    pub resource: Resource,
    /// The name of the resource.
    pub name: String,
    pub operation: Operation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    Cluster,
    Group,
    Topic,
    TransactionalId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Create,
    Describe,
    DescribeConfigs,
    Read,
    Write,
}

/// How the services are configured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Naming<'a> {
    /// The setting TOPIC_PREFIX.
    pub topic_prefix: &'a str,
    /// The setting MANAGE_TOPICS: whether the services create their topics themselves.
    pub manage_topics: bool,
}

/// The rules of every service, and of the console.
pub fn all_rules(naming: Naming<'_>) -> BTreeSet<Rule> {
    let services = SERVICES.into_iter().flat_map(|service| service.rules(naming));
    services.chain(CONSOLE.iter().flat_map(|console| console.rules(naming))).collect()
}

impl Service {
    /// The name with which the service logs in to Kafka.
    pub fn kafka_user(&self) -> String {
        format!("waybill-{}", self.name)
    }

    /// The `transactional.id` of its relay, if it writes topics, without the topic prefix. Its
    /// tables are in the schema `public`, and OUTBOX_NAME is empty.
    pub fn transactional_id(&self) -> Option<String> {
        (!self.writes.is_empty()).then(|| format!("{}.public.relay", self.database()))
    }

    /// What its principal may do.
    ///
    /// - It compares the topics that it owns with their declarations, hence DescribeConfigs.
    /// - It reads its dead letters to count, list and redrive them.
    /// - If operators can act on it, it records their actions, and reads them for the list of actions.
    /// - To create topics it needs Create on each, and reads the brokers'
    ///   `default.replication.factor`.
    pub fn rules(&self, naming: Naming<'_>) -> BTreeSet<Rule> {
        use Operation::{Create, Describe, DescribeConfigs, Read, Write};
        let mut granted: Vec<Grants> = vec![];
        let transactional_id = self.transactional_id();
        for topic in self.writes {
            granted.push((Resource::Topic, topic, &[Describe, DescribeConfigs, Write]));
        }
        if let Some(id) = &transactional_id {
            granted.push((Resource::TransactionalId, id, &[Describe, Write]));
        }
        let dead_letters: Vec<String> = self.groups.iter().map(crate::Group::dead_letters).collect();
        for (group, dead_letters) in self.groups.iter().zip(&dead_letters) {
            granted.push((Resource::Topic, group.topic, &[Describe, Read]));
            granted.push((Resource::Group, group.name, &[Describe, Read]));
            granted.push((Resource::Topic, dead_letters, &[Describe, DescribeConfigs, Read, Write]));
        }
        let actions = self.accepts_actions().then_some(OPERATOR_ACTIONS);
        granted.extend(actions.map(|topic| {
            let operations: &[Operation] = &[Describe, DescribeConfigs, Read, Write];
            (Resource::Topic, topic, operations)
        }));
        if naming.manage_topics {
            let owned = self.writes.iter().copied().chain(dead_letters.iter().map(String::as_str)).chain(actions);
            granted.extend(owned.map(|topic| (Resource::Topic, topic, [Create].as_slice())));
            granted.push((Resource::Cluster, CLUSTER, &[DescribeConfigs]));
        }
        rules(&self.kafka_user(), naming, &granted)
    }
}

impl Tool {
    /// The name with which the tool logs in to Kafka.
    pub fn kafka_user(&self) -> String {
        format!("waybill-{}", self.name)
    }

    /// What its principal may do: read the topics of the services, and ask how far their groups
    /// have read. It writes nothing and joins no group. librdkafka looks for the coordinator of the
    /// group that its readers name, hence the rights on a group of its own.
    pub fn rules(&self, naming: Naming<'_>) -> BTreeSet<Rule> {
        use Operation::{Describe, Read};
        let mut granted: Vec<Grants> = vec![(Resource::Group, self.name, &[Describe])];
        for service in SERVICES {
            granted.extend(service.writes.iter().map(|topic| (Resource::Topic, *topic, [Describe, Read].as_slice())));
            granted.extend(service.groups.iter().map(|group| (Resource::Group, group.name, [Describe].as_slice())));
        }
        rules(&self.kafka_user(), naming, &granted)
    }
}

/// Operations on a resource of this name, without the topic prefix.
type Grants<'a> = (Resource, &'a str, &'a [Operation]);

fn rules(user: &str, naming: Naming<'_>, granted: &[Grants]) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    for (resource, name, operations) in granted {
        let prefix = if *resource == Resource::Cluster { "" } else { naming.topic_prefix };
        for operation in *operations {
            rules.insert(Rule {
                principal: format!("User:{user}"),
                resource: *resource,
                name: format!("{prefix}{name}"),
                operation: *operation,
            });
        }
    }
    rules
}

/// Resources on which one principal may do the same: what one call of Kafka's tool grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub principal: String,
    pub operations: BTreeSet<Operation>,
    pub resources: BTreeSet<(Resource, String)>,
}

/// The rules in as few grants as possible.
pub fn grants(rules: &BTreeSet<Rule>) -> Vec<Grant> {
    let mut operations: BTreeMap<(&str, Resource, &str), BTreeSet<Operation>> = BTreeMap::new();
    for rule in rules {
        operations.entry((&rule.principal, rule.resource, &rule.name)).or_default().insert(rule.operation);
    }
    let mut grants: Vec<Grant> = vec![];
    for ((principal, resource, name), operations) in operations {
        let resource = (resource, name.to_owned());
        let mut known = grants.iter_mut();
        match known.find(|grant| grant.principal == principal && grant.operations == operations) {
            Some(grant) => {
                grant.resources.insert(resource);
            }
            None => grants.push(Grant { principal: principal.to_owned(), operations, resources: [resource].into() }),
        }
    }
    grants
}

impl Grant {
    /// The arguments of Kafka's tool `kafka-acls.sh`, without the address of the broker.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--add".to_owned(), "--allow-principal".to_owned(), self.principal.clone()];
        for operation in &self.operations {
            arguments.extend(["--operation".to_owned(), format!("{operation:?}")]);
        }
        for (resource, name) in &self.resources {
            arguments.push(resource.flag().to_owned());
            if *resource != Resource::Cluster {
                arguments.push(name.clone());
            }
        }
        arguments
    }
}

impl Resource {
    /// The flag of `kafka-acls.sh`.
    fn flag(self) -> &'static str {
        match self {
            Self::Cluster => "--cluster",
            Self::Group => "--group",
            Self::Topic => "--topic",
            Self::TransactionalId => "--transactional-id",
        }
    }
}

/// As Kafka lists it.
impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cluster => "CLUSTER",
            Self::Group => "GROUP",
            Self::Topic => "TOPIC",
            Self::TransactionalId => "TRANSACTIONAL_ID",
        })
    }
}

/// As Kafka lists it.
impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Create => "CREATE",
            Self::Describe => "DESCRIBE",
            Self::DescribeConfigs => "DESCRIBE_CONFIGS",
            Self::Read => "READ",
            Self::Write => "WRITE",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ANALYTICS, EMAIL, SERVICES, USER};

    /// `RESOURCE name: OPERATION, …` of each resource.
    fn table(rules: &BTreeSet<Rule>) -> Vec<String> {
        let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for rule in rules {
            let resource = format!("{} {}", rule.resource, rule.name);
            lines.entry(resource).or_default().push(rule.operation.to_string());
        }
        lines.into_iter().map(|(resource, operations)| format!("{resource}: {}", operations.join(", "))).collect()
    }

    #[test]
    fn a_service_may_do_what_the_topology_says_and_nothing_else() {
        let expected = [
            "GROUP email.recipients: DESCRIBE, READ",
            "GROUP email.welcome: DESCRIBE, READ",
            "TOPIC email.events.v1: DESCRIBE, DESCRIBE_CONFIGS, WRITE",
            "TOPIC email.recipients.dlq: DESCRIBE, DESCRIBE_CONFIGS, READ, WRITE",
            "TOPIC email.welcome.dlq: DESCRIBE, DESCRIBE_CONFIGS, READ, WRITE",
            "TOPIC operator.actions.v1: DESCRIBE, DESCRIBE_CONFIGS, READ, WRITE",
            "TOPIC user.events.v1: DESCRIBE, READ",
            "TOPIC user.state.v1: DESCRIBE, READ",
            "TRANSACTIONAL_ID waybill_email.public.relay: DESCRIBE, WRITE",
        ];
        assert_eq!(table(&EMAIL.rules(Naming::default())), expected);
    }

    #[test]
    fn a_service_that_creates_its_topics_may_create_those_and_no_others() {
        let without = ANALYTICS.rules(Naming { topic_prefix: "p.", manage_topics: false });
        let with = ANALYTICS.rules(Naming { topic_prefix: "p.", manage_topics: true });
        let further: BTreeSet<Rule> = with.difference(&without).cloned().collect();
        let expected = [
            "CLUSTER kafka-cluster: DESCRIBE_CONFIGS",
            "TOPIC p.analytics.audit.dlq: CREATE",
            "TOPIC p.analytics.emails.dlq: CREATE",
            "TOPIC p.analytics.users.dlq: CREATE",
            "TOPIC p.operator.actions.v1: CREATE",
        ];
        assert_eq!(table(&further), expected);
    }

    #[test]
    fn only_the_owner_writes_a_topic() {
        let rules = all_rules(Naming::default());
        for topic in SERVICES.iter().flat_map(|service| service.writes) {
            let writes = |rule: &&Rule| rule.name == *topic && rule.operation == Operation::Write;
            assert_eq!(rules.iter().filter(writes).count(), 1, "principals that may write {topic}");
        }
        assert!(!rules.iter().any(|rule| rule.name.contains('*')), "a wildcard");
    }

    #[test]
    fn grants_hold_the_same_rules() {
        let rules = all_rules(Naming { topic_prefix: "p.", manage_topics: true });
        let mut granted = BTreeSet::new();
        for Grant { principal, operations, resources } in grants(&rules) {
            for (resource, name) in resources {
                for operation in &operations {
                    let (principal, name) = (principal.clone(), name.clone());
                    granted.insert(Rule { principal, resource, name, operation: *operation });
                }
            }
        }
        assert_eq!(granted, rules);
    }

    #[test]
    fn a_grant_is_one_call_of_kafkas_tool() {
        let arguments: Vec<String> =
            grants(&USER.rules(Naming::default())).iter().map(|grant| grant.arguments().join(" ")).collect();
        let expected = [
            "--add --allow-principal User:waybill-user --operation Describe --operation DescribeConfigs --operation Write \
             --topic user.events.v1 --topic user.state.v1",
            "--add --allow-principal User:waybill-user --operation Describe --operation Write \
             --transactional-id waybill_user.public.relay",
        ];
        assert_eq!(arguments, expected);
    }
}
