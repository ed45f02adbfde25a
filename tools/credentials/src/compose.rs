//! The files that compose.secure.yaml mounts: certificates, passwords, URLs, and what is granted on
//! Kafka.
//!
//! The folder is readable by its owner only. The files in it, except `passwords`, are readable by
//! every user: compose mounts single files with the owner and the mode that they have here, and
//! each image runs as another user.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use topology::acls::{Naming, Operation, Resource, Rule, all_rules, grants};
use topology::{CONSOLE, OPERATOR_ACTIONS, SERVICES, Service, Tool, with_database};

use crate::authority::Authority;
use crate::passwords::Passwords;

/// The login of an operator: creates topics, and may do everything else on Kafka and Valkey.
pub const OPERATOR: &str = "operator";
/// The login of the email service at the mail server.
pub const MAIL_USER: &str = "waybill";

/// The login of Kafka UI at Kafka.
const VIEWER: &str = "kafka-ui";

/// The components with a certificate. Each has the host name of its container.
const COMPONENTS: [&str; 6] = ["kafka", "postgres", "valkey", "mailpit", "console", "jaeger"];

/// Writes all files. Keeps the certificates and the passwords that are in the folder already.
pub fn write(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot change the mode of {}", folder.display()))?;
    let files = Files(folder);
    write_certificates(&files)?;
    let passwords = Passwords::in_file(&folder.join("passwords"), names())?;
    write_kafka(&files, &passwords)?;
    write_postgres(&files, &passwords)?;
    let valkey = passwords.of("valkey-cache");
    files.write("valkey-users.acl", &valkey_users(valkey, passwords.of("valkey-operator")))?;
    files.write("cache-valkey-url", &format!("rediss://cache:{valkey}@valkey:6379"))?;
    files.write("mailpit-users", &format!("{MAIL_USER}:{}\n", passwords.of("mail")))?;
    files.write("email-smtp-password", passwords.of("mail"))?;
    files.write("admin-tokens", &format!("{OPERATOR}:{}\n", passwords.of("admin")))?;
    files.write("admin-token", passwords.of("admin"))?;
    files.write("grafana-password", passwords.of("grafana"))?;
    files.write("kafka-ui.yml", &kafka_ui(passwords.of(&format!("kafka-{VIEWER}")), passwords.of("kafka-ui-page")))?;
    files.write("user-idempotency-secret", passwords.of("idempotency"))
}

/// The users of Valkey. That of the cache may not administer the server or delete all keys at once.
/// `default` is any client that does not log in.
pub fn valkey_users(cache: &str, operator: &str) -> String {
    format!(
        "user default off
user cache on >{cache} ~* +@all -@dangerous +info
user {OPERATOR} on >{operator} ~* &* +@all
"
    )
}

/// The users of Kafka: one per service, the console, and the operator.
pub fn kafka_users() -> impl Iterator<Item = String> {
    let services = SERVICES.iter().map(Service::kafka_user);
    services.chain(CONSOLE.iter().map(Tool::kafka_user)).chain([OPERATOR.to_owned()])
}

/// What needs a password.
fn names() -> impl Iterator<Item = String> {
    let kafka = kafka_users().chain([VIEWER.to_owned()]).map(|user| format!("kafka-{user}"));
    let roles = with_database().flat_map(|service| [service.database(), service.owner()]);
    let postgres = roles.chain(["superuser".to_owned()]).map(|role| format!("postgres-{role}"));
    let others = ["valkey-cache", "valkey-operator", "mail", "idempotency", "admin", "grafana", "kafka-ui-page"];
    let others = others.map(str::to_owned);
    kafka.chain(postgres).chain(others)
}

struct Files<'a>(&'a Path);

impl Files<'_> {
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let file = self.0.join(name);
        let written =
            fs::write(&file, text).and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(0o644)));
        written.with_context(|| format!("cannot write {}", file.display()))
    }
}

/// All certificates are made together, because the authority's key is not kept. That of the
/// authority is written last, so an interrupted run makes all of them again. So does a run of a
/// release that has a further component.
fn write_certificates(files: &Files) -> Result<()> {
    let mut names = COMPONENTS.iter().chain(&["authority"]);
    if names.all(|name| files.0.join(format!("{name}.pem")).exists()) {
        return Ok(());
    }
    let authority = Authority::create();
    for component in COMPONENTS {
        let certificate = authority.certificate(&[component, "localhost", "127.0.0.1"]);
        files.write(&format!("{component}.pem"), &certificate.certificate.pem())?;
        files.write(&format!("{component}-key.pem"), &certificate.key.serialize_pem())?;
        // Kafka wants both in one file.
        files.write(&format!("{component}-with-key.pem"), &certificate.pem_with_key())?;
    }
    files.write("authority.pem", &authority.pem())
}

/// The users with their passwords, and the arguments of `kafka-acls.sh` for each call.
fn write_kafka(files: &Files, passwords: &Passwords) -> Result<()> {
    let mut users = String::new();
    for user in kafka_users().chain([VIEWER.to_owned()]) {
        let password = passwords.of(&format!("kafka-{user}"));
        users += &format!("{user} {password}\n");
    }
    files.write("kafka-users", &users)?;
    for service in SERVICES {
        let password = passwords.of(&format!("kafka-{}", service.kafka_user()));
        files.write(&format!("{}-kafka-password", service.name), password)?;
    }
    if let Some(console) = CONSOLE {
        let password = passwords.of(&format!("kafka-{}", console.kafka_user()));
        files.write(&format!("{}-kafka-password", console.name), password)?;
    }
    files.write("kafka-operator-password", passwords.of("kafka-operator"))?;
    let mut rules = all_rules(Naming::default());
    rules.extend(viewer_rules());
    let calls = grants(&rules);
    let calls: String = calls.iter().map(|call| call.arguments().join(" ") + "\n").collect();
    files.write("kafka-acls", &calls)
}

/// Kafka UI shows topics, groups and their lags. It may read no record, because some have
/// addresses.
fn viewer_rules() -> Vec<Rule> {
    use Operation::{Describe, DescribeConfigs};
    let groups = SERVICES.iter().flat_map(|service| service.groups);
    let written = SERVICES.iter().flat_map(|service| service.writes).map(|topic| (*topic).to_owned());
    let topics = written.chain(groups.clone().map(topology::Group::dead_letters));
    let topics = topics.chain([OPERATOR_ACTIONS.to_owned()]);
    let mut granted: Vec<(Resource, String, Operation)> = vec![];
    for operation in [Describe, DescribeConfigs] {
        granted.push((Resource::Cluster, "kafka-cluster".to_owned(), operation));
        granted.extend(topics.clone().map(|topic| (Resource::Topic, topic, operation)));
    }
    granted.extend(groups.map(|group| (Resource::Group, group.name.to_owned(), Describe)));
    let principal = format!("User:{VIEWER}");
    let rule = |(resource, name, operation)| Rule { principal: principal.clone(), resource, name, operation };
    granted.into_iter().map(rule).collect()
}

/// The settings of Kafka UI: its login at Kafka, and the login at its page.
fn kafka_ui(password: &str, page: &str) -> String {
    format!(
        r#"auth: {{ type: LOGIN_FORM }}
spring: {{ security: {{ user: {{ name: {OPERATOR}, password: "{page}" }} }} }}
kafka:
  clusters:
    - name: waybill
      bootstrapServers: kafka:19092
      readOnly: true
      properties:
        security.protocol: SASL_SSL
        sasl.mechanism: SCRAM-SHA-512
        sasl.jaas.config: org.apache.kafka.common.security.scram.ScramLoginModule required username="{VIEWER}" password="{password}";
        ssl.truststore.type: PEM
        ssl.truststore.location: /run/secrets/authority
"#
    )
}

/// The variables that deploy/postgres/init.sql reads, and the URLs of the services.
fn write_postgres(files: &Files, passwords: &Passwords) -> Result<()> {
    let mut variables = format!("POSTGRES_PASSWORD={}\n", passwords.of("postgres-superuser"));
    for service in with_database() {
        let name = service.name.to_uppercase();
        for (role, variable, file) in [
            (service.database(), "PASSWORD", "database-url"),
            (service.owner(), "OWNER_PASSWORD", "owner-database-url"),
        ] {
            let password = passwords.of(&format!("postgres-{role}"));
            variables += &format!("WAYBILL_{name}_{variable}={password}\n");
            let url = format!(
                "postgres://{role}:{password}@postgres:5432/{}?sslmode=verify-full&sslrootcert=/run/secrets/authority",
                service.database()
            );
            files.write(&format!("{}-{file}", service.name), &url)?;
        }
    }
    files.write("postgres-passwords", &variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_run_changes_nothing() {
        let folder = std::env::temp_dir().join(format!("compose-files-{}", std::process::id()));
        let contents = || {
            let files = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
            let mut contents: Vec<_> = files.map(|file| (file.clone(), fs::read_to_string(file).unwrap())).collect();
            contents.sort();
            contents
        };
        write(&folder).unwrap();
        let first = contents();
        write(&folder).unwrap();
        let second = contents();
        let mode = fs::metadata(&folder).unwrap().permissions().mode();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(first, second);
        assert_eq!(mode & 0o777, 0o700, "other users must not enter the folder");
        let text = |name: &str| {
            let found = first.iter().find(|(file, _)| file.ends_with(name));
            found.unwrap_or_else(|| panic!("{name} is missing")).1.clone()
        };
        assert!(text("kafka-acls").contains("--allow-principal User:waybill-email"), "{}", text("kafka-acls"));
        let viewer = text("kafka-acls");
        let mut viewer = viewer.lines().filter(|line| line.contains("User:kafka-ui"));
        assert!(viewer.clone().count() > 0 && viewer.all(|line| !line.contains("--operation Read")), "{viewer:?}");
        assert!(text("user-database-url").contains("sslmode=verify-full"));
        let password = text("user-kafka-password");
        assert!(text("kafka-users").contains(&format!("waybill-user {password}\n")));
    }
}
