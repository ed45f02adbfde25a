//! A Kafka with TLS and a login (SASL_SSL), and what a service says when the login or a certificate
//! is wrong.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use testbed::kafka::Kafka;
use testbed::testing::free_port;
use tests::certificates::Authority;
use tests::services::{CACHE_PROFILES, DEFAULT_CONSUMERS, USER_EVENTS};
use tests::system::Own;
use tests::tap::Tap;
use tests::{System, eventually, eventually_eq};
use topology::{CACHE, USER};

/// Longer than a rebalance of two members.
const QUIET: Duration = Duration::from_secs(3);
const NAME: &str = "waybill";
const PASSWORD: &str = "correct horse";

/// A broker with three listeners for services: one with a valid certificate for `localhost`, one
/// whose certificate has expired, and one that asks for a client certificate instead of a login.
struct Secured {
    system: System,
    kafka: Own<Kafka>,
    brokers: String,
    expired: String,
    mutual: String,
    signs: Authority,
    authority: PathBuf,
}

impl Secured {
    async fn start() -> Self {
        let mut system = System::empty().await;
        let authority = Authority::create();
        let folder = system.processes.folder().to_owned();
        let [valid, expired] = ["valid.pem", "expired.pem"].map(|file| folder.join(file));
        authority.certificate("localhost").write(&valid);
        authority.expired_certificate("localhost").write(&expired);
        let authority_file = authority.write(folder.join("authority.pem"));
        let [secure, outdated, mutual, plain, controller] = [(); 5].map(|()| free_port());
        let listener = |name: &str, keystore: &PathBuf| {
            format!(
                "listener.name.{name}.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.{name}.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.{name}.ssl.keystore.type=PEM
listener.name.{name}.ssl.keystore.location={}",
                keystore.display()
            )
        };
        let settings = format!(
            "listeners=PLAINTEXT://127.0.0.1:{plain},SECURE://127.0.0.1:{secure},OUTDATED://127.0.0.1:{outdated},\
             MUTUAL://127.0.0.1:{mutual},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain},SECURE://localhost:{secure},OUTDATED://localhost:{outdated},\
             MUTUAL://localhost:{mutual}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL,OUTDATED:SASL_SSL,MUTUAL:SSL,CONTROLLER:PLAINTEXT
listener.name.mutual.ssl.keystore.type=PEM
listener.name.mutual.ssl.keystore.location={}
listener.name.mutual.ssl.truststore.type=PEM
listener.name.mutual.ssl.truststore.location={}
listener.name.mutual.ssl.client.auth=required
inter.broker.listener.name=PLAINTEXT
controller.quorum.voters=1@127.0.0.1:{controller}
sasl.enabled.mechanisms=SCRAM-SHA-512
{}
{}",
            valid.display(),
            authority_file.display(),
            listener("secure", &valid),
            listener("outdated", &expired)
        );
        let kafka = system.own_kafka_on(plain, &settings).await;
        let [brokers, expired, mutual] = [secure, outdated, mutual].map(|port| format!("localhost:{port}"));
        Self { system, kafka, brokers, expired, mutual, signs: authority, authority: authority_file }
    }

    /// Lets the user log in with this password.
    async fn set_password(&self, password: &str) {
        let password = format!("SCRAM-SHA-512=[password={password}]");
        let user = ["--entity-type", "users", "--entity-name", NAME];
        let change = [&["--alter", "--add-config", &password][..], &user[..]].concat();
        self.kafka.component.tool("kafka.admin.ConfigCommand", &change).await.unwrap();
    }

    /// Starts the user service with the right settings, except these. An empty one is left out.
    fn spawn(&mut self, different: &[(&str, &str)]) {
        let authority = self.authority.display().to_string();
        let right = [
            ("KAFKA_BROKERS", &*self.brokers),
            ("KAFKA_SECURITY_PROTOCOL", "sasl_ssl"),
            ("KAFKA_SASL_MECHANISM", "SCRAM-SHA-512"),
            ("KAFKA_USER", NAME),
            ("KAFKA_PASSWORD", PASSWORD),
            ("KAFKA_CA_FILE", &*authority),
        ];
        let kept = right.into_iter().filter(|(name, _)| different.iter().all(|(other, _)| other != name));
        let given = different.iter().copied().filter(|(_, value)| !value.is_empty());
        let settings: Vec<(&str, &str)> = kept.chain(given).collect();
        self.system.processes.spawn_with(USER, &settings);
    }

    /// Starts the user service without a login and with this client certificate. It takes the
    /// listener that asks for one.
    fn spawn_with_certificate(&mut self, certificate: Option<&(PathBuf, PathBuf)>) {
        let mutual = self.mutual.clone();
        let mut settings = vec![
            ("KAFKA_BROKERS", &*mutual),
            ("KAFKA_SECURITY_PROTOCOL", "ssl"),
            ("KAFKA_SASL_MECHANISM", ""),
            ("KAFKA_USER", ""),
            ("KAFKA_PASSWORD", ""),
        ];
        if let Some((certificate, key)) = certificate {
            settings.push(("KAFKA_CERTIFICATE_FILE", certificate.to_str().unwrap()));
            settings.push(("KAFKA_KEY_FILE", key.to_str().unwrap()));
        }
        self.spawn(&settings);
    }

    /// Waits until `/status` gives a reason for `kafka` that contains this text.
    async fn until_reason(&self, text: &str) {
        eventually(&format!("/status says {text:?} about kafka"), async || {
            let (_, body) = self.system.processes.status(USER).await?;
            body["waiting_for"]["kafka"].as_str()?.contains(text).then_some(())
        })
        .await;
        assert!(!self.system.processes.log(USER).contains(PASSWORD), "the password is in the log");
    }

    async fn assert_events_are_published(&self) {
        let user = self.system.users.register().await;
        let published = async || self.system.kafka.read_key(USER_EVENTS, user).len();
        eventually_eq("facts about the user", 1, published).await;
    }
}

/// T61: the user does not exist in Kafka yet, so the login is refused. The service says so, keeps
/// running, and continues without a restart when the user exists.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_whose_login_is_refused_says_so_and_continues_when_it_is_accepted() {
    let mut secured = Secured::start().await;
    secured.spawn(&[]);
    secured.until_reason("KAFKA_PASSWORD").await;
    assert!(!secured.system.processes.has_ended(USER), "a refused login must not end the process");
    secured.set_password(PASSWORD).await;
    secured.system.processes.until_ready(&[USER]).await;
    secured.assert_events_are_published().await;
}

/// T61: each fault of a certificate has a reason of its own in `/status`.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_says_what_is_wrong_with_the_certificate_of_a_broker() {
    let mut secured = Secured::start().await;
    secured.set_password(PASSWORD).await;
    let other = Authority::create().write(secured.system.processes.file("other-authority.pem"));
    let by_address = secured.brokers.replace("localhost", "127.0.0.1");
    let expired = secured.expired.clone();
    for (different, reason) in [
        (("KAFKA_CA_FILE", other.to_str().unwrap()), "invalid peer certificate"),
        (("KAFKA_BROKERS", &by_address), "not valid for name"),
        (("KAFKA_BROKERS", &expired), "expired"),
        (("KAFKA_SECURITY_PROTOCOL", "sasl_plaintext"), "KAFKA_SECURITY_PROTOCOL fits the port"),
    ] {
        let mut all = vec![different];
        if different.1 == "sasl_plaintext" {
            all.push(("KAFKA_CA_FILE", ""));
        }
        secured.spawn(&all);
        secured.until_reason(reason).await;
        assert!(!secured.system.processes.has_ended(USER), "a wrong certificate must not end the process");
        secured.system.processes.stop(USER).await;
    }
}

/// T61: a service logs in with a certificate. Without one, or with one of an unknown authority,
/// `/status` says what to check.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_proves_itself_to_kafka_with_a_certificate() {
    let mut secured = Secured::start().await;
    let write = |authority: &Authority, name: &str| {
        let file = |end: &str| secured.system.processes.file(&format!("{name}{end}"));
        authority.certificate("waybill").write_apart(file(".pem"), file("-key.pem"))
    };
    let known = write(&secured.signs, "known");
    let unknown = write(&Authority::create(), "unknown");
    for certificate in [None, Some(&unknown)] {
        secured.spawn_with_certificate(certificate);
        secured.until_reason("check KAFKA_CERTIFICATE_FILE and KAFKA_KEY_FILE").await;
        assert!(!secured.system.processes.has_ended(USER), "a refused certificate must not end the process");
        secured.system.processes.stop(USER).await;
    }
    secured.spawn_with_certificate(Some(&known));
    secured.system.processes.until_ready(&[USER]).await;
    secured.assert_events_are_published().await;
}

/// The rack is in the requests for records, so that a broker can name a replica in the same zone.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_names_its_rack() {
    const RACK: &str = "zone-of-the-test";
    let mut system = System::empty().await;
    let (_kafka, proxy) = system.own_kafka().await;
    let tap = Tap::before(proxy.target()).await;
    proxy.redirect(tap.address());
    system.processes.start(&[USER]).await;
    let address = proxy.address();
    system.processes.start_with(CACHE, &[("KAFKA_BROKERS", &*address), ("KAFKA_CLIENT_RACK", RACK)]).await;
    eventually("the rack is sent", async || tap.has_seen(RACK).then_some(())).await;
}

/// Static members keep their partitions when they restart, and the other members notice nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_a_static_member_causes_no_rebalance() {
    let mut system = System::empty().await;
    system.processes.set_all(&DEFAULT_CONSUMERS);
    system.processes.start(&[USER]).await;
    system.processes.start_with(CACHE, &[("KAFKA_GROUP_INSTANCE_ID", "one")]).await;
    let mut other = system.processes.spawn_another_with(CACHE, &[("KAFKA_GROUP_INSTANCE_ID", "two")]);
    other.until_ready().await;
    let members = async || system.kafka.members(CACHE_PROFILES);
    let both =
        |members: &[String]| members.len() == 2 && members[0].starts_with("one-0") && members[1].starts_with("two-0");
    eventually("two static members", async || both(&members().await).then_some(())).await;
    // With cooperative rebalancing a second rebalance follows, and the members notice it at
    // different times.
    let mut last = (0, Instant::now());
    let before = eventually("no rebalance for a while", async || {
        let rebalances = system.processes.rebalances(CACHE);
        if rebalances != last.0 {
            last = (rebalances, Instant::now());
        }
        (last.1.elapsed() > QUIET).then_some(rebalances)
    })
    .await;
    other.kill();
    let mut other = system.processes.spawn_another_with(CACHE, &[("KAFKA_GROUP_INSTANCE_ID", "two")]);
    other.until_ready().await;
    assert_eq!(system.processes.rebalances(CACHE), before, "rebalances of the member that kept running");
}

/// librdkafka reads a password only when a client is created. When its file changes, the process
/// ends with an error that says so, and the next one uses the new password.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_file_ends_the_process_with_an_error() {
    let mut secured = Secured::start().await;
    secured.set_password(PASSWORD).await;
    let file = secured.system.processes.file("password");
    std::fs::write(&file, PASSWORD).unwrap();
    let settings = [("KAFKA_PASSWORD", ""), ("KAFKA_PASSWORD_FILE", file.to_str().unwrap())];
    secured.spawn(&settings);
    secured.system.processes.until_ready(&[USER]).await;
    secured.assert_events_are_published().await;

    std::fs::write(&file, "battery staple").unwrap();
    secured.system.processes.until_ended(USER).await;
    assert!(secured.system.processes.log(USER).contains("KAFKA_PASSWORD_FILE names was changed"));
    secured.set_password("battery staple").await;
    secured.spawn(&settings);
    secured.system.processes.until_ready(&[USER]).await;
    secured.assert_events_are_published().await;
}

/// A service does not start with settings of Kafka that contradict each other or that librdkafka
/// does not know. The error names the setting.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_settings_of_kafka_are_errors_at_the_start() {
    let mut system = System::empty().await;
    for (settings, error) in [
        (&[("KAFKA_SECURITY_PROTOCOL", "sasl_ssl")][..], "needs KAFKA_USER"),
        (
            &[("KAFKA_SECURITY_PROTOCOL", "sasl_ssl"), ("KAFKA_USER", "a")],
            "needs KAFKA_PASSWORD or KAFKA_PASSWORD_FILE",
        ),
        (&[("KAFKA_USER", "a")], "need KAFKA_SECURITY_PROTOCOL=sasl_ssl"),
        (&[("KAFKA_CA_FILE", "/ca.pem")], "need KAFKA_SECURITY_PROTOCOL=ssl"),
        (
            &[("KAFKA_SECURITY_PROTOCOL", "ssl"), ("KAFKA_CA_FILE", "/no/ca.pem")],
            "KAFKA_CA_FILE: cannot read /no/ca.pem",
        ),
        (&[("KAFKA_SECURITY_PROTOCOL", "tls")], "sasl_plaintext"),
        (&[("KAFKA_PROPERTY", "no.such.property=1")], "no.such.property"),
        (&[("KAFKA_PROPERTY", "socket.keepalive.enable=true\nacks=1\n")], "acks is refused"),
        (&[("KAFKA_PROPERTY", "plugin.library.paths=x.so")], "plugin.library.paths is refused"),
        (&[("KAFKA_PROPERTY", "acks")], "name=value"),
    ] {
        system.processes.spawn_with(USER, settings);
        system.processes.until_ended(USER).await;
        let log = system.processes.log(USER);
        assert!(log.contains(error), "{settings:?}: {log}");
    }
}
