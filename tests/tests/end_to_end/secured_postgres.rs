//! A Postgres that accepts only TLS with a client certificate, and what a service says when a
//! certificate or a rule is wrong.

use std::path::PathBuf;

use sqlx::{Connection, PgConnection};
use testbed::postgres::{Database, Postgres, Tls};
use tests::certificates::{Authority, Certificate};
use tests::system::Own;
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, EMAIL, SERVICES, Service, USER, with_database};

/// Only TLS, and only with a certificate that our authority has signed.
const STRICT: &str = "hostssl all all 127.0.0.1/32 scram-sha-256 clientcert=verify-ca";
const TLS_ONLY: &str = "hostssl all all 127.0.0.1/32 scram-sha-256";
const ANY: &str = "host all all 127.0.0.1/32 scram-sha-256";

struct Secured {
    system: System,
    postgres: Own<Postgres>,
    authority: Authority,
    /// Files: the authority, and the certificate and key of the services.
    authority_file: PathBuf,
    client: (PathBuf, PathBuf),
}

impl Secured {
    async fn start() -> Self {
        let mut system = System::empty().await;
        let postgres = system.own_postgres().await;
        let authority = Authority::create();
        let file = |name: &str| system.processes.file(name);
        let authority_file = authority.write(file("authority.pem"));
        let client = authority.certificate("waybill").write_apart(file("client.pem"), file("client-key.pem"));
        let secured = Self { system, postgres, authority, authority_file, client };
        secured.set_certificate(&secured.authority.certificate("localhost")).await;
        secured.postgres.component.set_rules(STRICT).await.unwrap();
        secured
    }

    /// Gives the server this certificate.
    async fn set_certificate(&self, certificate: &Certificate) {
        let tls = Tls {
            certificate: &certificate.certificate.pem(),
            key: &certificate.key.serialize_pem(),
            client_authority: &self.authority.pem(),
        };
        self.postgres.component.set_tls(Some(tls)).await.unwrap();
    }

    /// The right parameters of a URL.
    fn parameters(&self) -> String {
        let (certificate, key) = &self.client;
        format!(
            "sslmode=verify-full&sslrootcert={}&sslcert={}&sslkey={}",
            self.authority_file.display(),
            certificate.display(),
            key.display()
        )
    }

    fn url(&self, service: Service, parameters: &str) -> String {
        secured_url(&self.postgres.component.database(service).url, parameters)
    }

    /// Starts the user service with these parameters in its URL.
    fn spawn(&mut self, parameters: &str) {
        let url = self.url(USER, parameters);
        self.system.processes.spawn_with(USER, &[("USER_DATABASE_URL", &url)]);
    }

    /// Waits until `/status` gives a reason for `database` that contains this text.
    async fn until_reason(&mut self, text: &str) {
        let processes = &self.system.processes;
        eventually(&format!("/status says {text:?} about database"), async || {
            let (_, body) = processes.status(USER).await?;
            body["waiting_for"]["database"].as_str()?.contains(text).then_some(())
        })
        .await;
        assert!(!self.system.processes.has_ended(USER), "the fault must not end the process");
    }

    async fn superuser(&self) -> PgConnection {
        PgConnection::connect(&self.postgres.component.url()).await.unwrap()
    }
}

/// The certificate of the server is for its name, not for its address.
fn secured_url(url: &str, parameters: &str) -> String {
    format!("{}?{parameters}", url.replace("127.0.0.1", "localhost"))
}

/// All sessions of all services are encrypted and have presented the certificate: those of the
/// pool, those of the relay, and those of subcommands.
#[tokio::test(flavor = "multi_thread")]
async fn every_session_uses_tls_with_a_client_certificate() {
    let mut secured = Secured::start().await;
    let parameters = secured.parameters();
    for service in with_database() {
        let database = secured.postgres.component.database(service);
        let [url, owner_url] = [&database.url, &database.owner_url].map(|url| secured_url(url, &parameters));
        secured.system.processes.set(&service.database_url_setting(), &url);
        secured.system.stores.set_database(service, Database { url, owner_url });
    }
    secured.system.processes.start(&SERVICES).await;
    let system = &secured.system;
    let user = system.users.register().await;
    system.until_applied(&[user]).await;

    let mut superuser = secured.superuser().await;
    let sessions = "select distinct application_name from pg_stat_activity join pg_stat_ssl using (pid)
                    where usename like 'waybill%' and ssl and client_dn = '/CN=waybill' order by 1";
    let encrypted: Vec<String> = sqlx::query_scalar(sessions).fetch_all(&mut superuser).await.unwrap();
    assert_eq!(encrypted, ["", "relay", "relay listener"], "names of encrypted sessions");
    let plain = "select count(*) from pg_stat_activity join pg_stat_ssl using (pid)
                 where usename like 'waybill%' and client_dn is distinct from '/CN=waybill'";
    assert_eq!(sqlx::query_scalar::<_, i64>(plain).fetch_one(&mut superuser).await.unwrap(), 0, "other sessions");

    for (service, arguments) in [
        (USER, &["migrate"][..]),
        (USER, &["republish"]),
        (EMAIL, &["send-held", "--younger-than-hours", "1"]),
        (ANALYTICS, &["rebuild"]),
    ] {
        let settings = [(&*service.database_url_setting(), system.stores.owner_url(service))];
        system.processes.run_with(service, arguments, &settings).await.unwrap();
    }
}

/// T61: each fault has a reason of its own in `/status`, which says what to do. The process keeps
/// running, and continues without a restart when the fault is corrected at the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_says_why_postgres_is_not_usable_and_continues_when_it_is() {
    let mut secured = Secured::start().await;
    let right = secured.parameters();
    let good = secured.authority.certificate("localhost");
    let other = Authority::create();

    secured.set_certificate(&other.certificate("localhost")).await;
    secured.spawn(&right);
    secured.until_reason("UnknownIssuer; check `sslrootcert`").await;
    secured.set_certificate(&good).await;
    secured.system.processes.until_ready(&[USER]).await;

    secured.set_certificate(&secured.authority.certificate("db.example.com")).await;
    secured.spawn(&right);
    secured.until_reason("certificate for the host name in the database URL").await;
    secured.set_certificate(&good).await;
    secured.system.processes.until_ready(&[USER]).await;

    secured.set_certificate(&secured.authority.expired_certificate("localhost")).await;
    secured.spawn(&right);
    secured.until_reason("renew the certificate of the server").await;
    secured.set_certificate(&good).await;
    secured.system.processes.until_ready(&[USER]).await;

    secured.postgres.component.set_rules(TLS_ONLY).await.unwrap();
    secured.spawn("sslmode=disable");
    secured.until_reason("no encryption; check `sslmode`").await;
    secured.postgres.component.set_rules(ANY).await.unwrap();
    secured.system.processes.until_ready(&[USER]).await;

    secured.postgres.component.set_rules(STRICT).await.unwrap();
    let without_certificate = format!("sslmode=verify-full&sslrootcert={}", secured.authority_file.display());
    secured.spawn(&without_certificate);
    secured.until_reason("requires a valid client certificate; check `sslmode`, `sslcert` and `sslkey`").await;
    secured.postgres.component.set_rules(TLS_ONLY).await.unwrap();
    secured.system.processes.until_ready(&[USER]).await;

    secured.postgres.component.set_tls(None).await.unwrap();
    secured.spawn(&right);
    secured.until_reason("the server needs `ssl = on`").await;
    secured.set_certificate(&good).await;
    secured.system.processes.until_ready(&[USER]).await;

    let mut superuser = secured.superuser().await;
    sqlx::raw_sql("alter role waybill_user password 'another'").execute(&mut superuser).await.unwrap();
    secured.spawn(&right);
    secured.until_reason("check user and password").await;
    let restored = format!("alter role waybill_user password '{}'", testbed::postgres::PASSWORD);
    sqlx::raw_sql(sqlx::AssertSqlSafe(restored)).execute(&mut superuser).await.unwrap();
    secured.system.processes.until_ready(&[USER]).await;
}

/// T61: the certificate of the server expires while a service runs. Its sessions stay, so it
/// notices when it opens new ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_service_survives_an_expired_certificate_of_postgres() {
    let mut secured = Secured::start().await;
    let right = secured.parameters();
    secured.spawn(&right);
    secured.system.processes.until_ready(&[USER]).await;
    secured.set_certificate(&secured.authority.expired_certificate("localhost")).await;
    let mut superuser = secured.superuser().await;
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = 'waybill_user'";
    sqlx::raw_sql(end).execute(&mut superuser).await.unwrap();
    secured.until_reason("renew the certificate of the server").await;
    secured.set_certificate(&secured.authority.certificate("localhost")).await;
    secured.system.processes.until_ready(&[USER]).await;
    let user = secured.system.users.register().await;
    let published = async || secured.system.kafka.read_key(tests::services::USER_EVENTS, user).len();
    eventually_eq("facts about the user", 1, published).await;
}

/// A subcommand ends with the reason instead of waiting for an operator.
#[tokio::test(flavor = "multi_thread")]
async fn a_subcommand_ends_with_the_reason() {
    let secured = Secured::start().await;
    secured.set_certificate(&Authority::create().certificate("localhost")).await;
    let url = secured.url(USER, &secured.parameters());
    for arguments in [&["migrate"][..], &["republish"]] {
        let run = secured.system.processes.run_with(USER, arguments, &[("USER_DATABASE_URL", &url)]).await;
        let error = run.unwrap_err().to_string();
        assert!(error.contains("check `sslrootcert`"), "{arguments:?}: {error}");
    }
}

/// Files that cannot be used are errors at the start, which name the parameter and the file.
#[tokio::test(flavor = "multi_thread")]
async fn files_of_the_database_url_that_cannot_be_used_are_errors_at_the_start() {
    let mut secured = Secured::start().await;
    let file = |name: &str| secured.system.processes.file(name);
    let empty = file("empty.pem");
    std::fs::write(&empty, "no certificate").unwrap();
    let (_, other_key) = secured.authority.certificate("other").write_apart(file("other.pem"), file("other-key.pem"));
    let certificate = secured.client.0.display().to_string();
    for (parameters, error) in [
        (format!("sslrootcert={}", empty.display()), "empty.pem contains no certificate in PEM format"),
        ("sslrootcert=/no/ca.pem".to_owned(), "cannot read `sslrootcert` /no/ca.pem"),
        (format!("sslcert={certificate}&sslkey={}", other_key.display()), "does not fit the certificate"),
        (format!("sslcert={certificate}"), "need each other"),
    ] {
        secured.spawn(&format!("sslmode=verify-full&{parameters}"));
        secured.system.processes.until_ended(USER).await;
        let log = secured.system.processes.log(USER);
        assert!(log.contains(error), "{parameters}: {log}");
    }
}
