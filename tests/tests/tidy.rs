//! The rules of the tree that a reader of code can check. It needs nothing that runs.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use shared::events::{Event, Topic, UserEvent, UserRef, mint_id};

const SERVICES: [&str; 4] = ["user", "email", "analytics", "cache"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Every file below a folder of the checkout whose name ends so: its path from the root, and its text.
fn files(folder: &str, ending: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_str().unwrap().ends_with(ending) {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(!found.is_empty(), "no {ending} in {folder}: the rule looks at nothing");
    found
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The part of a file that is not its tests, which stand at its end.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap()
}

/// Production code: what is compiled into the services.
fn sources() -> impl Iterator<Item = (String, String)> {
    files("services", ".rs").into_iter().chain(files("shared", ".rs"))
}

/// The files, among those that production is made of, that mention any of `words` outside comments and tests.
fn mentioning(words: &[&str]) -> Vec<String> {
    let mentions = |text: &str| code(without_tests(text)).any(|line| words.iter().any(|word| line.contains(word)));
    sources().filter(|(_, text)| mentions(text)).map(|(path, _)| path).collect()
}

/// The lines without their comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.split("// ").next()).filter(|line| !line.trim_start().starts_with("//"))
}

/// A member's dependencies of every kind, by name.
fn dependencies(manifest: &str) -> Vec<&str> {
    let mut section = "";
    let mut names = vec![];
    for line in manifest.lines() {
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_end_matches(']');
        } else if let Some((name, _)) = line.split_once('=').filter(|_| section.ends_with("dependencies")) {
            names.push(name.trim().trim_end_matches(".workspace"));
        }
    }
    names
}

/// Architecture §1, rule 1.
#[test]
fn services_share_nothing_but_topics() {
    for service in SERVICES {
        let manifest = read(&format!("services/{service}/Cargo.toml"));
        let dependencies = dependencies(&manifest);
        assert!(dependencies.contains(&"shared"), "{service}: no dependencies were read");
        for other in SERVICES.into_iter().chain(["reqwest", "hyper", "hyper-util", "ureq", "tonic"]) {
            assert!(
                !dependencies.contains(&other),
                "services/{service} depends on {other}: services meet in topics only"
            );
        }
    }
}

/// Architecture §1, rule 2: a record is written by the relay, from an outbox, or it is a dead letter.
#[test]
fn only_the_relay_and_the_dead_letters_produce() {
    let producing = mentioning(&["BaseProducer", "FutureProducer", "ThreadedProducer"]);
    let allowed = ["shared/src/messaging/dead_letters.rs", "shared/src/messaging/relay/transaction.rs"];
    assert_eq!(producing, allowed, "files that make a Kafka producer");
}

/// Architecture §1, rule 2: events are written where the state changes, which is one file per service.
#[test]
fn only_the_files_that_change_state_publish() {
    let publishing = mentioning(&["outbox::publish("]);
    assert_eq!(publishing, ["services/email/src/deliveries.rs", "services/user/src/commands.rs"], "files that publish");
}

/// `shared` owns two tables; their copies in the services' migrations are one text.
#[test]
fn copied_tables_are_equal() {
    for (table, holders) in [("outbox", 2), ("inbox", 1)] {
        let marker = format!("create table {table} (");
        let migrations = files("migrations", ".sql").into_iter().filter(|(_, text)| text.contains(&marker));
        let copies: Vec<(String, String)> = migrations.collect();
        assert!(copies.len() >= holders, "{table}: {copies:?}");
        for (path, text) in &copies {
            assert_eq!(text, &copies[0].1, "{path} differs from {}", copies[0].0);
            assert!(path.ends_with(&format!("_{table}.sql")), "{path}: a shared table has a file of its own");
        }
    }
}

/// Every version and every lint stands in the root manifest.
#[test]
fn members_take_versions_and_lints_from_the_workspace() {
    let members = files("services", "Cargo.toml").into_iter();
    for (path, manifest) in
        members.chain(["shared", "tests", "tools/testbed", "tools/topology", "tools/xtask"].map(|member| {
            let path = format!("{member}/Cargo.toml");
            (path.clone(), read(&path))
        }))
    {
        assert!(manifest.contains("[lints]\nworkspace = true"), "{path}: the workspace's lints do not hold there");
        for line in manifest.lines() {
            let own = line.contains("version = ")
                || line.contains("= \"") && !line.starts_with("name") && !line.contains("path = ");
            assert!(!own, "{path}: a version of its own: {line}");
        }
    }
}

/// A file that is longer does more than one thing. Tests are not counted, and have a bound of their own.
#[test]
fn files_are_short() {
    let xtask = files("tools", ".rs").into_iter();
    for (path, text) in sources().chain(xtask).chain(files("tests", ".rs")) {
        let bound = if path.starts_with("tests/") || path.contains("/tests/") { 500 } else { 300 };
        let lines = without_tests(&text).lines().count();
        assert!(lines <= bound, "{path}: {lines} lines, {bound} are the bound");
    }
}

/// Kafka's metrics cannot tell `_` from `.`.
#[test]
fn topics_and_groups_have_no_underscore() {
    let topics = [Topic::USER_EVENTS, Topic::USER_STATE, Topic::EMAIL_EVENTS].map(|topic| topic.name.to_owned());
    let groups = SERVICES.into_iter().flat_map(|service| groups(&read(&format!("services/{service}/src/main.rs"))));
    let names: Vec<String> = topics.into_iter().chain(groups).collect();
    assert!(names.len() >= 8, "three topics and five groups at least: {names:?}");
    for name in names {
        assert!(!name.contains('_'), "{name}");
    }
}

/// The values of `const …: &str = "…";`, which in a main.rs are the groups.
fn groups(main: &str) -> Vec<String> {
    let constants = main.lines().filter(|line| line.starts_with("const "));
    constants.filter_map(|line| Some(line.split_once(": &str = \"")?.1.trim_end_matches("\";").to_owned())).collect()
}

/// Architecture §1, rule 5: facts about users are kept for ever, so the id is all they may say.
#[test]
fn facts_about_users_carry_the_id_alone() {
    let user = UserRef { user_id: mint_id() };
    let facts = [
        UserEvent::Registered(user),
        UserEvent::ProfileChanged(user),
        UserEvent::EmailChanged(user),
        UserEvent::Deleted(user),
    ];
    for fact in facts {
        let (kind, data) = fact.encode();
        let data: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&data.unwrap()).unwrap();
        assert_eq!(data.keys().collect::<Vec<_>>(), ["user_id"], "{kind}");
    }
}

/// `shared` knows that events travel; what they mean to whom is the services' own.
#[test]
fn shared_names_no_business() {
    let business = ["deliveries", "recipients", "funnel", "registrations", "profiles", "\"users", " users ", "/users"];
    for (path, text) in files("shared/src", ".rs") {
        // The contract is the one place that names what the events are about.
        if path.starts_with("shared/src/events/") {
            continue;
        }
        for line in code(without_tests(&text)) {
            let named = business.iter().find(|word| line.contains(*word));
            assert_eq!(named, None, "{path}: {line}");
        }
    }
}

/// A link in the README or the documentation leads to a file that is there.
#[test]
fn links_in_documents_resolve() {
    let documents = files("docs", ".md").into_iter().chain([("README.md".to_owned(), read("README.md"))]);
    for (path, text) in documents {
        let folder = root().join(&path).parent().unwrap().to_owned();
        for link in links(&text) {
            assert!(folder.join(&link).exists(), "{path}: {} leads nowhere", link.display());
        }
    }
}

/// The relative targets of `[text](target#part)`.
fn links(text: &str) -> Vec<PathBuf> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let targets = targets.filter(|target| !target.contains("://") && !target.starts_with(['#', '/']));
    targets.filter_map(|target| target.split('#').next()).map(PathBuf::from).collect()
}
