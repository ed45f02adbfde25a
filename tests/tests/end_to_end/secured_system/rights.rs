//! What each login may do on Kafka, tried with real clients.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use testbed::kafka::HeldRule;
use tests::System;
use tests::services::{OPERATOR_ACTIONS, TOPICS, USER_EVENTS, USER_STATE, dead_letters_of, groups, topic_of};
use topology::acls::{Naming, Operation, Resource, Rule, all_rules};
use topology::{CACHE, SERVICES, Service, USER};

const TIMEOUT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);
/// What the tests write.
const PAYLOAD: &str = "written by a test";
/// A program outside Waybill that reads facts.
const READER: &str = "reader";

/// T43: the broker holds the rules of the topology and no others, and each service can do what they
/// allow and nothing else. Every topic, group and `transactional.id` is tried as every service.
/// Connections without TLS, without a login, or with a wrong password are refused. A program
/// outside Waybill reads only what it was granted.
#[tokio::test(flavor = "multi_thread")]
async fn each_service_may_do_what_the_topology_draws_and_nothing_else() {
    let system = System::empty_on_secured_components(&[READER]).await;
    let rules = all_rules(Naming::default());
    let expected: BTreeSet<HeldRule> = rules.iter().map(HeldRule::from).collect();
    assert_eq!(system.held_rules().await, expected, "rules of the broker, and rules of the topology");
    let logins = Logins { system: &system, rules };
    for service in SERVICES {
        let user = service.kafka_user();
        let drawn = Drawn(service);
        let topics = TOPICS.into_iter().chain([OPERATOR_ACTIONS]).map(str::to_owned);
        let topics = topics.chain(groups().map(dead_letters_of));
        for topic in topics {
            drawn.assert_case(drawn.writes(&topic), logins.writes(&user, &topic).await, &format!("write {topic}"));
            drawn.assert_case(drawn.reads(&topic), logins.reads(&user, &topic), &format!("read {topic}"));
            let described = logins.describes_settings(&user, &topic).await;
            drawn.assert_case(drawn.writes(&topic), described, &format!("see the settings of {topic}"));
        }
        for group in groups() {
            let is_own = service.groups.iter().any(|own| own.name == group);
            drawn.assert_case(is_own, logins.joins(&user, group), &format!("join {group}"));
        }
        for id in SERVICES.iter().filter_map(topology::Service::transactional_id) {
            let is_own = service.transactional_id().as_ref() == Some(&id);
            drawn.assert_case(is_own, logins.begins_transactions(&user, &id), &format!("publish as {id}"));
        }
        drawn.assert_case(false, logins.creates(&user, "another.topic.v1").await, "create a topic");
    }
    logins.assert_others_are_refused();
    assert_a_java_client_reads_only_what_it_may(&system).await;
    logins.assert_a_service_that_manages_topics_may_create_its_own().await;
    logins.assert_a_rule_that_is_too_wide_is_removed().await;
}

/// The logins of the services.
struct Logins<'a> {
    system: &'a System,
    rules: BTreeSet<Rule>,
}

type Tried = Result<(), RDKafkaErrorCode>;

/// What the map draws for a service. It is written down here without the rules, which must agree
/// with it.
struct Drawn(Service);

impl Drawn {
    /// Topics of its own: those that it publishes to, and its dead letters. And the actions of
    /// operators, if it consumes anything.
    fn writes(&self, topic: &str) -> bool {
        self.0.writes.contains(&topic)
            || self.0.groups.iter().any(|group| group.dead_letters() == topic)
            || self.records_actions_in(topic)
    }

    fn reads(&self, topic: &str) -> bool {
        self.0.groups.iter().any(|group| group.topic == topic || group.dead_letters() == topic)
            || self.records_actions_in(topic)
    }

    fn records_actions_in(&self, topic: &str) -> bool {
        topic == OPERATOR_ACTIONS && self.0.name != USER.name
    }

    fn assert_case(&self, is_drawn: bool, tried: Tried, what: &str) {
        use RDKafkaErrorCode as Code;
        let name = self.0.name;
        match tried {
            Ok(()) => assert!(is_drawn, "{name} may {what}, which the map does not draw"),
            Err(
                Code::TopicAuthorizationFailed
                | Code::GroupAuthorizationFailed
                | Code::TransactionalIdAuthorizationFailed,
            ) => assert!(!is_drawn, "{name} may not {what}, which the map draws"),
            Err(code) => panic!("{name} cannot {what}: {code}"),
        }
    }
}

impl Logins<'_> {
    fn client(&self, user: &str) -> ClientConfig {
        let mut client = ClientConfig::new();
        client.set("allow.auto.create.topics", "false").set("socket.timeout.ms", "10000");
        client.set("security.protocol", "sasl_ssl").set("sasl.mechanism", "SCRAM-SHA-512");
        client.set("bootstrap.servers", self.system.secured().kafka_servers());
        client.set("ssl.ca.location", self.system.secured().authority().to_str().unwrap());
        client.set("sasl.username", user).set("sasl.password", self.system.secured().kafka_password(user));
        client
    }

    async fn writes(&self, user: &str, topic: &str) -> Tried {
        let producer: FutureProducer = self.client(user).set("message.timeout.ms", "10000").create().unwrap();
        let sent = producer.send(FutureRecord::to(topic).key("key").payload(PAYLOAD), TIMEOUT).await;
        sent.map(|_| ()).map_err(|(error, _)| error.rdkafka_error_code().unwrap())
    }

    /// Reads a partition without a group.
    fn reads(&self, user: &str, topic: &str) -> Tried {
        let consumer = self.consumer(user, "no-group");
        let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT).unwrap();
        if let Some(error) = metadata.topics()[0].error() {
            return Err(error.into()); // the consumer itself would report nothing
        }
        let mut start = TopicPartitionList::new();
        start.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
        consumer.assign(&start).unwrap();
        until(&format!("{user} reads {topic} or is refused"), || match consumer.poll(POLL)? {
            Ok(_) | Err(KafkaError::PartitionEOF(_)) => Some(Ok(())),
            // Every consumer has a group id, and looks for the coordinator of that group.
            Err(error) => refusal(&error).filter(|code| *code != RDKafkaErrorCode::GroupAuthorizationFailed).map(Err),
        })
    }

    /// Joins a group to read its topic.
    fn joins(&self, user: &str, group: &str) -> Tried {
        let consumer = self.consumer(user, group);
        consumer.subscribe(&[topic_of(group)]).unwrap();
        until(&format!("{user} joins {group} or is refused"), || {
            let refused = consumer.poll(POLL).and_then(|polled| refusal(&polled.err()?));
            let refused = refused.filter(|code| *code == RDKafkaErrorCode::GroupAuthorizationFailed);
            let joined = || (consumer.assignment().unwrap().count() > 0).then_some(Ok(()));
            refused.map(Err).or_else(joined)
        })
    }

    fn consumer(&self, user: &str, group: &str) -> BaseConsumer {
        let mut client = self.client(user);
        client.set("group.id", group).set("enable.auto.commit", "false").set("enable.partition.eof", "true");
        client.set("auto.offset.reset", "earliest").create().unwrap()
    }

    fn begins_transactions(&self, user: &str, id: &str) -> Tried {
        let producer: BaseProducer = self.client(user).set("transactional.id", id).create().unwrap();
        producer.init_transactions(TIMEOUT).map_err(|error| error.rdkafka_error_code().unwrap())
    }

    async fn describes_settings(&self, user: &str, topic: &str) -> Tried {
        let admin: AdminClient<DefaultClientContext> = self.client(user).create().unwrap();
        let described = admin.describe_configs([&ResourceSpecifier::Topic(topic)], &AdminOptions::new()).await;
        let topic = described.unwrap().remove(0)?;
        // rust-rdkafka drops the code of a refusal.
        if topic.entries.is_empty() { Err(RDKafkaErrorCode::TopicAuthorizationFailed) } else { Ok(()) }
    }

    async fn creates(&self, user: &str, topic: &str) -> Tried {
        let admin: AdminClient<DefaultClientContext> = self.client(user).create().unwrap();
        let topic = NewTopic::new(topic, 1, TopicReplication::Fixed(1));
        let created = admin.create_topics([&topic], &AdminOptions::new()).await;
        created.unwrap().remove(0).map(|_| ()).map_err(|(_, code)| code)
    }

    /// A client that does not encrypt, that trusts another authority, or that has the wrong
    /// password gets no metadata. The same client with the right settings does.
    fn assert_others_are_refused(&self) {
        let gets_metadata = |client: &ClientConfig| {
            let consumer: BaseConsumer = client.create().unwrap();
            consumer.fetch_metadata(Some(USER_EVENTS), Duration::from_secs(3)).is_ok()
        };
        let right = self.client(&USER.kafka_user());
        assert!(gets_metadata(&right), "the right login");
        let other = self.system.processes.file("other-authority.pem");
        tests::certificates::Authority::create().write(other.clone());
        for (case, property, value) in [
            ("plaintext", "security.protocol", "plaintext"),
            ("a login without TLS", "security.protocol", "sasl_plaintext"),
            ("TLS without a login", "security.protocol", "ssl"),
            ("a wrong password", "sasl.password", "wrong"),
            ("an unknown user", "sasl.username", "nobody"),
            ("another authority", "ssl.ca.location", other.to_str().unwrap()),
        ] {
            let mut wrong = right.clone();
            wrong.set(property, value);
            assert!(!gets_metadata(&wrong), "Kafka answers a client with {case}");
        }
    }

    /// With MANAGE_TOPICS=true a service may also create its own topics, and see the brokers'
    /// settings.
    async fn assert_a_service_that_manages_topics_may_create_its_own(&self) {
        self.system.grant(&all_rules(Naming { manage_topics: true, topic_prefix: "" })).await;
        let created = self.creates(&USER.kafka_user(), USER_EVENTS).await;
        assert_eq!(created, Err(RDKafkaErrorCode::TopicAlreadyExists), "the owner of the topic");
        let refused = self.creates(&CACHE.kafka_user(), USER_EVENTS).await;
        assert_eq!(refused, Err(RDKafkaErrorCode::TopicAuthorizationFailed), "another service");
        let admin: AdminClient<DefaultClientContext> = self.client(&USER.kafka_user()).create().unwrap();
        let broker = admin.describe_configs([&ResourceSpecifier::Broker(1)], &AdminOptions::new()).await;
        assert!(!broker.unwrap().remove(0).unwrap().entries.is_empty(), "the brokers' settings");
    }

    /// What an operator granted by mistake is removed when the rules are applied again.
    async fn assert_a_rule_that_is_too_wide_is_removed(&self) {
        let principal = format!("User:{}", USER.kafka_user());
        let name = "*".to_owned();
        let wide = Rule { principal, resource: Resource::Topic, name, operation: Operation::Read };
        let with_wide: BTreeSet<Rule> = self.rules.iter().cloned().chain([wide.clone()]).collect();
        self.system.grant(&with_wide).await;
        assert!(self.system.held_rules().await.contains(&HeldRule::from(&wide)), "the rule was granted");
        self.system.grant(&self.rules).await;
        assert!(!self.system.held_rules().await.contains(&HeldRule::from(&wide)), "the rule is still there");
    }
}

/// A Java program outside Waybill, with a login of its own, reads the facts that it may read. It is
/// refused the states, which contain personal data.
async fn assert_a_java_client_reads_only_what_it_may(system: &System) {
    let rule = |resource, name: &str, operation| Rule {
        principal: format!("User:{READER}"),
        resource,
        name: name.to_owned(),
        operation,
    };
    let granted = [
        rule(Resource::Topic, USER_EVENTS, Operation::Describe),
        rule(Resource::Topic, USER_EVENTS, Operation::Read),
        rule(Resource::Group, READER, Operation::Read),
    ];
    system.grant(&granted.into()).await;
    let client = system.processes.file("reader.properties");
    let login = format!(
        "org.apache.kafka.common.security.scram.ScramLoginModule required username=\"{READER}\" password=\"{}\";",
        system.secured().kafka_password(READER)
    );
    let authority = system.secured().authority();
    let properties = format!(
        "security.protocol=SASL_SSL
sasl.mechanism=SCRAM-SHA-512
sasl.jaas.config={login}
ssl.truststore.type=PEM
ssl.truststore.location={}
",
        authority.display()
    );
    std::fs::write(&client, properties).unwrap();
    let read = async |topic: &str| {
        let servers = system.secured().kafka_servers();
        let client = client.to_str().unwrap();
        let arguments = [
            &["--bootstrap-server", &servers, "--command-config", client][..],
            &["--topic", topic, "--group", READER],
            &["--from-beginning", "--max-messages", "1", "--timeout-ms=20000"],
        ];
        system.run_java("java-reader", "org.apache.kafka.tools.consumer.ConsoleConsumer", &arguments.concat()).await
    };
    let (done, printed) = read(USER_EVENTS).await;
    assert!(done && printed.contains(PAYLOAD), "a Java client may read {USER_EVENTS}: {printed}");
    let (_, printed) = read(USER_STATE).await;
    assert!(printed.contains("TopicAuthorizationException"), "a Java client may not read {USER_STATE}: {printed}");
    assert!(!printed.contains(PAYLOAD), "{printed}");
}

/// The code with which a broker refuses a request for lack of rights.
fn refusal(error: &KafkaError) -> Option<RDKafkaErrorCode> {
    use RDKafkaErrorCode::{GroupAuthorizationFailed, TopicAuthorizationFailed};
    let code = error.rdkafka_error_code()?;
    matches!(code, GroupAuthorizationFailed | TopicAuthorizationFailed).then_some(code)
}

/// Calls `try_once` until it returns something. Each call takes a moment.
fn until<T>(what: &str, mut try_once: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(found) = try_once() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: neither within {TIMEOUT:?}");
    }
}
