//! The topology declares every service once. Here it is compared with the code of the services and
//! with the compose file.

use std::collections::{BTreeMap, BTreeSet};

use shared::events::{EmailEvent, Event, Topic, UserEvent, UserState};
use topology::{CONSOLE, SERVICES, Service, Tool, with_database};

use crate::tree::{code, files, read};

/// The topics that `shared` declares, by the name of their constant.
const TOPICS: [(&str, Topic); 4] = [
    ("USER_EVENTS", Topic::USER_EVENTS),
    ("USER_STATE", Topic::USER_STATE),
    ("EMAIL_EVENTS", Topic::EMAIL_EVENTS),
    ("OPERATOR_ACTIONS", Topic::OPERATOR_ACTIONS),
];

/// The topic of each event type that a handler can name.
const EVENTS: [(&str, Topic); 3] =
    [("UserEvent", UserEvent::TOPIC), ("UserState", UserState::TOPIC), ("EmailEvent", EmailEvent::TOPIC)];

#[test]
fn the_topology_lists_the_services_of_the_tree() {
    let manifests = files("services", "/Cargo.toml");
    let in_tree: BTreeSet<&str> = manifests.keys().filter_map(|path| path.split('/').nth(1)).collect();
    let declared: BTreeSet<&str> = SERVICES.iter().map(|service| service.name).collect();
    assert_eq!(declared, in_tree, "services of the topology, and folders below services/");
}

#[test]
fn the_topology_lists_the_topics_of_shared() {
    let constants = read("shared/src/events/topics.rs");
    for name in constants_of_topics(&constants) {
        assert!(TOPICS.iter().any(|(known, _)| *known == name), "Topic::{name} is missing in this test");
    }
    let all: BTreeSet<&str> = Topic::ALL.iter().map(|topic| topic.name).collect();
    let written = SERVICES.iter().flat_map(|service| service.writes).copied();
    let declared: BTreeSet<&str> = written.chain([topology::OPERATOR_ACTIONS]).collect();
    let in_code: BTreeSet<&str> = TOPICS.iter().map(|(_, topic)| topic.name).collect();
    assert_eq!(in_code, all, "topics of shared, and Topic::ALL");
    assert_eq!(declared, in_code, "topics that services of the topology write, and topics of shared");
}

#[test]
fn the_topology_lists_the_topics_that_each_service_owns() {
    for service in SERVICES {
        let main = read(&format!("services/{}/src/main.rs", service.name));
        let owned: BTreeSet<&str> = owned_topics(&main).into_iter().map(topic_named).collect();
        let declared: BTreeSet<&str> = service.writes.iter().copied().collect();
        assert_eq!(declared, owned, "topics that {} writes, and topics in TOPICS of its main.rs", service.name);
    }
}

#[test]
fn the_topology_lists_the_groups_that_each_service_consumes_with() {
    for service in SERVICES {
        let declared =
            service.groups.iter().map(|group| (group.name.to_owned(), group.topic)).collect::<BTreeMap<_, _>>();
        assert_eq!(declared, groups_in_code(service), "groups of {} with their topics", service.name);
    }
}

#[test]
fn the_topology_has_the_ports_of_the_services_and_of_the_compose_file() {
    let compose = read("docker-compose.yml");
    for Service { name, http, admin, .. } in SERVICES {
        let main = read(&format!("services/{name}/src/main.rs"));
        assert_eq!(default_port(&main, "http_addr"), Some(http), "the default of HTTP_ADDR of {name}");
        let stanza = stanza(&compose, name).unwrap_or_else(|| panic!("docker-compose.yml has no service {name}"));
        for line in [
            format!("HTTP_ADDR: 0.0.0.0:{http}"),
            format!("ADMIN_ADDR: 0.0.0.0:{admin}"),
            format!("ports: [\"127.0.0.1:{http}:{http}\", \"127.0.0.1:{admin}:{admin}\"]"),
        ] {
            assert!(stanza.contains(&line), "docker-compose.yml, {name}: no {line}");
        }
    }
    let built = compose.lines().filter(|line| line.trim_start().starts_with("build:")).count();
    let migrations = with_database().count();
    let console = CONSOLE.iter().len();
    assert_eq!(
        built,
        SERVICES.len() + migrations + console,
        "services that docker-compose.yml builds, and the console"
    );
}

/// The compose file cannot derive the addresses of the services.
#[test]
fn the_console_of_the_compose_file_asks_every_service() {
    let Some(console) = CONSOLE else { return };
    let stanza = stanza(&read("docker-compose.yml"), console.name).expect("docker-compose.yml has the console");
    let addresses = SERVICES.map(|Service { name, admin, .. }| format!("{name}={name}:{admin}")).join(",");
    let public = SERVICES.map(|Service { name, http, .. }| format!("{name}={name}:{http}")).join(",");
    let Tool { http, admin, .. } = console;
    for line in [
        format!("ADMIN_ADDRESSES: {addresses}"),
        format!("PUBLIC_ADDRESSES: {public}"),
        format!("HTTP_ADDR: 0.0.0.0:{http}"),
        format!("ADMIN_ADDR: 0.0.0.0:{admin}"),
        format!("ports: [\"127.0.0.1:{http}:{http}\", \"127.0.0.1:{admin}:{admin}\"]"),
    ] {
        assert!(stanza.contains(&line), "docker-compose.yml, console: no {line}");
    }
    let secured = read("compose.secure.yaml");
    assert!(secured.contains("LABORATORY: !reset null"), "compose.secure.yaml: the laboratory is on");
    assert!(secured.contains(&format!("KAFKA_USER: {}", console.kafka_user())), "compose.secure.yaml: no console");
}

/// The laboratory shows commands for these containers, and for one more process of each service.
#[test]
fn the_compose_files_have_the_containers_that_the_laboratory_names() {
    let compose = read("docker-compose.yml");
    let scaled = read("deploy/compose.scale.yml");
    for name in ["kafka", "postgres", "valkey", "mailpit"].into_iter().chain(SERVICES.map(|service| service.name)) {
        assert!(stanza(&compose, name).is_some(), "docker-compose.yml has no {name}");
    }
    for service in SERVICES {
        assert!(stanza(&scaled, service.name).is_some(), "deploy/compose.scale.yml has no {}", service.name);
    }
    let kafka = stanza(&compose, "kafka").unwrap();
    assert!(kafka.contains("HOST://localhost:9092"), "a tool in the container of Kafka does not reach it");
    assert!(compose.contains("MP_ENABLE_CHAOS: \"true\""), "Mailpit cannot refuse mails");
}

/// The console is a client. Its folder, its entry in the topology and its stanza in the compose
/// file can be deleted.
#[test]
fn nothing_depends_on_the_console() {
    let folders = ["services", "shared", "tests", "tools"];
    for (path, manifest) in folders.into_iter().flat_map(|folder| files(folder, "Cargo.toml")) {
        let is_console = |line: &str| CONSOLE.is_some_and(|console| line.starts_with(&console.package()));
        let is_dependency = manifest.lines().any(is_console);
        assert!(!is_dependency, "{path} depends on the console");
    }
    for (path, text) in files("services", ".rs").into_iter().chain(files("shared", ".rs")) {
        assert!(!text.contains("CONSOLE") && !text.contains("console::"), "{path} knows the console");
    }
}

/// Docker and the test bed run the same definition of roles and databases. The script that Docker
/// runs has to name the services again.
#[test]
fn the_init_script_of_postgres_has_the_services_of_the_topology() {
    let script = read("deploy/postgres/init.sql");
    let compose = read("docker-compose.yml");
    let variables = |name: &str| -> Vec<String> {
        let prefix = format!("\\set {name} ");
        script.lines().filter_map(|line| line.strip_prefix(&prefix).map(str::to_owned)).collect()
    };
    let databases: Vec<String> = variables("database");
    let mut declared: Vec<String> = with_database().map(|service| service.database()).collect();
    let mut listed = databases.clone();
    declared.sort();
    listed.sort();
    assert_eq!(listed, declared, "databases of the script and of the topology");
    assert_eq!(variables("service"), databases, "each service has the role of its name");
    let owners: Vec<String> = databases.iter().map(|database| format!("{database}_owner")).collect();
    assert_eq!(variables("owner"), owners);
    for file in ["service/roles.sql", "service/database.sql"] {
        let run = script.lines().filter(|line| *line == format!("\\ir {file}")).count();
        assert_eq!(run, declared.len(), "how often the script runs {file}");
    }
    for service in with_database() {
        let name = service.name.to_uppercase();
        for (variable, password) in [("password", "PASSWORD"), ("owner_password", "OWNER_PASSWORD")] {
            let variable = format!("\\getenv {variable} WAYBILL_{name}_{password}");
            assert!(script.contains(&variable), "init.sql: no {variable}");
            let line = format!("WAYBILL_{name}_{password}: ${{WAYBILL_{name}_{password}:-waybill-local}}");
            assert!(compose.contains(&line), "docker-compose.yml: no {line}");
        }
        let list = script.lines().find(|line| line.starts_with("\\set missing ")).unwrap();
        assert!(list.split([' ', ';']).any(|word| word == name), "init.sql does not check the passwords of {name}");
        let owner = format!("postgres://{}:${{WAYBILL_{name}_OWNER_PASSWORD", service.owner());
        let migrate = stanza(&compose, &format!("{}-migrate", service.name)).unwrap();
        assert!(migrate.contains(&owner), "docker-compose.yml: {}-migrate does not use {owner}", service.name);
    }
}

/// Compose cannot derive the services, so compose.secure.yaml names them again.
#[test]
fn the_secured_compose_file_has_the_services_of_the_topology() {
    let compose = read("compose.secure.yaml");
    for service in SERVICES {
        let name = service.name;
        let settings = stanza(&compose, name).unwrap_or_else(|| panic!("compose.secure.yaml has no service {name}"));
        let topics = stanza(&compose, &format!("{name}-topics")).unwrap_or_default();
        for (stanza, line) in [
            (&settings, format!("KAFKA_USER: {}", service.kafka_user())),
            (&settings, format!("{{ source: {name}-kafka-password, target: kafka-password }}")),
            (&settings, format!("{name}-topics: {{ condition: service_completed_successfully }}")),
            (&topics, format!("build: {{ context: ., args: {{ SERVICE: {name} }} }}")),
            (&topics, "KAFKA_USER: operator".to_owned()),
        ] {
            assert!(stanza.contains(&line), "compose.secure.yaml, {name}: no {line}");
        }
        if service.has_database {
            let migrate = stanza(&compose, &format!("{name}-migrate")).unwrap_or_default();
            let variable = service.database_url_setting();
            let line = |file| format!("{variable}: !reset null\n      {variable}_FILE: /run/secrets/{name}-{file}\n");
            assert!(settings.contains(&line("database-url")), "compose.secure.yaml, {name}: the URL of its database");
            assert!(
                migrate.contains(&line("owner-database-url")),
                "compose.secure.yaml, {name}-migrate: the owner's URL"
            );
        }
    }
}

#[test]
fn the_secured_compose_file_mounts_files_that_are_made_for_it() {
    let folder = std::env::temp_dir().join(format!("secured-compose-{}", std::process::id()));
    credentials::compose::write(&folder).unwrap();
    let compose = read("compose.secure.yaml");
    let mounted = compose.split("./target/secure/").skip(1).filter_map(|rest| rest.split([' ', '"']).next());
    let missing: Vec<&str> = mounted.filter(|file| !folder.join(file).is_file()).collect();
    let count = compose.matches("{ file: ./target/secure/").count();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(missing, [""; 0], "files that compose.secure.yaml mounts and that are not made");
    assert!(count > 4 * SERVICES.len(), "the secrets of compose.secure.yaml were not found");
}

fn topic_named(constant: &str) -> &'static str {
    let known = TOPICS.iter().find(|(name, _)| *name == constant);
    known.map(|(_, topic)| topic.name).unwrap_or_else(|| panic!("Topic::{constant} is missing in this test"))
}

/// The names of `pub const NAME: Self = …`.
fn constants_of_topics(text: &str) -> Vec<&str> {
    let constants = code(text).filter_map(|line| line.trim_start().strip_prefix("pub const "));
    constants.filter_map(|line| line.split_once(": Self").map(|(name, _)| name)).collect()
}

/// The constants in `const TOPICS: &[Topic] = &[Topic::…]`.
fn owned_topics(main: &str) -> Vec<&str> {
    let Some((_, list)) = main.split_once("const TOPICS: &[Topic] = &[") else { return vec![] };
    let list = list.split(']').next().unwrap_or_default();
    list.split(',').filter_map(|topic| topic.trim().strip_prefix("Topic::")).collect()
}

/// The consumer groups of a service, each with the topic of its handler's events.
fn groups_in_code(service: Service) -> BTreeMap<String, &'static str> {
    let mut groups = BTreeMap::new();
    for (path, text) in files(&format!("services/{}/src", service.name), ".rs") {
        for (group, event) in handlers(&text) {
            let known = EVENTS.iter().find(|(name, _)| *name == event);
            let (_, topic) = known.unwrap_or_else(|| panic!("{path}: {event} is missing in this test"));
            groups.insert(group, topic.name);
        }
    }
    groups
}

/// Group and event type of each implementation of a handler: `const GROUP: &'static str = "…";` and
/// `type Event = …;`, in any order.
fn handlers(text: &str) -> Vec<(String, String)> {
    let mut found = vec![];
    let mut group = None;
    let mut event = None;
    for line in code(text) {
        if line.starts_with("impl") {
            group = None;
            event = None;
        }
        let line = line.trim();
        if let Some(value) =
            line.strip_prefix("const GROUP: &'static str = \"").and_then(|rest| rest.strip_suffix("\";"))
        {
            group = Some(value.to_owned());
        }
        if let Some(value) = line.strip_prefix("type Event = ").and_then(|rest| rest.strip_suffix(';')) {
            event = Some(value.to_owned());
        }
        if let (Some(name), Some(kind)) = (&group, &event) {
            found.push((name.clone(), kind.clone()));
            group = None;
            event = None;
        }
    }
    found
}

/// The port in the `default_value` of a setting.
fn default_port(main: &str, field: &str) -> Option<u16> {
    let lines: Vec<&str> = main.lines().map(str::trim).collect();
    let at = lines.iter().position(|line| line.starts_with(&format!("{field}: ")))?;
    let attribute = lines[..at].iter().rev().find(|line| line.starts_with("#[arg("))?;
    let (_, value) = attribute.split_once("default_value = \"")?;
    value.split('"').next()?.rsplit(':').next()?.parse().ok()
}

/// The lines of one service in a compose file.
fn stanza(compose: &str, service: &str) -> Option<String> {
    let (_, rest) = compose.split_once(&format!("\n  {service}:\n"))?;
    let lines = rest.lines().take_while(|line| line.is_empty() || line.starts_with("    "));
    Some(lines.collect::<Vec<_>>().join("\n"))
}

#[test]
fn handlers_are_read_with_their_group_and_their_event() {
    let text = "
impl Handler for Welcome {
    type Event = UserEvent;
    const GROUP: &'static str = \"email.welcome\";
}
impl Projection for Emails {
    const GROUP: &'static str = \"analytics.emails\";
    type Event = EmailEvent;
}
impl Other for Nothing {
    type Event = UserState;
}
#[cfg(test)]
mod tests { const GROUP: &'static str = \"no.group\"; }
";
    let found = handlers(text);
    let found: Vec<(&str, &str)> = found.iter().map(|(group, event)| (group.as_str(), event.as_str())).collect();
    assert_eq!(found, [("email.welcome", "UserEvent"), ("analytics.emails", "EmailEvent")]);
}

#[test]
fn ports_topics_and_stanzas_are_read() {
    let main = "    #[arg(long, env, default_value = \"127.0.0.1:8081\")]\n    http_addr: SocketAddr,\n";
    assert_eq!(default_port(main, "http_addr"), Some(8081));
    assert_eq!(default_port(main, "admin_addr"), None);
    assert_eq!(
        owned_topics("const TOPICS: &[Topic] = &[Topic::USER_EVENTS, Topic::USER_STATE];"),
        ["USER_EVENTS", "USER_STATE"]
    );
    let compose = "services:\n  user:\n    a: 1\n      b: 2\n\n  email:\n    c: 3\n";
    assert_eq!(stanza(compose, "user").unwrap(), "    a: 1\n      b: 2\n");
    assert_eq!(stanza(compose, "cache"), None);
}
