//! The rules on the source tree that code can check. They need no running component.
//!
//! The invariants that the tests name are in `docs/architecture.md`.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod compose;
mod declared;
mod imports;
mod observability;
mod problems;
mod settings;
mod tree;

use std::path::PathBuf;

use imports::{Files, cycles, imports, upward};
use shared::events::{Event, UserEvent, mint_id};
use topology::SERVICES;
use tree::{code, files, mentioning, read, root};

/// The layers of `shared`. A file imports only from its own layer and from those before it.
const LAYERS: [&str; 5] = ["fault", "events", "platform", "messaging", "service"];

/// Invariant 1.
#[test]
fn services_share_nothing_but_topics() {
    const HTTP_CLIENTS: [&str; 5] = ["reqwest", "hyper", "hyper-util", "ureq", "tonic"];
    for service in SERVICES.map(|service| service.name) {
        let manifest = read(&format!("services/{service}/Cargo.toml"));
        let dependencies = dependencies(&manifest);
        assert!(dependencies.contains(&"shared"), "{service}: no dependencies were read");
        for other in SERVICES.map(|service| service.name).into_iter().chain(HTTP_CLIENTS) {
            let depends = dependencies.contains(&other);
            assert!(!depends, "services/{service} depends on {other}: services communicate through topics only");
        }
    }
}

/// Invariant 2: only the relay writes records, from an outbox. Dead letters and the actions of
/// operators are the exception.
#[test]
fn only_the_relay_and_the_writer_of_single_records_produce() {
    let producing = mentioning(&["BaseProducer", "FutureProducer", "ThreadedProducer"]);
    let allowed = ["shared/src/messaging/acknowledged.rs", "shared/src/messaging/relay/transaction.rs"];
    assert_eq!(producing, allowed, "files that create a Kafka producer");
    let writing = mentioning(&["AcknowledgedWriter::new("]);
    let allowed = ["shared/src/messaging/actions.rs", "shared/src/messaging/dead_letters/letter.rs"];
    assert_eq!(writing, allowed, "files that write single records");
}

/// Invariant 2: events are written where the state changes, in one file per service.
#[test]
fn only_the_files_that_change_state_publish() {
    let publishing = mentioning(&["outbox::publish(", "outbox::publish_all("]);
    assert_eq!(publishing, ["services/email/src/deliveries.rs", "services/user/src/commands.rs"], "files that publish");
}

/// Invariant 5: facts about users are kept permanently, so they carry the user's id and nothing
/// else.
#[test]
fn facts_about_users_carry_only_the_id() {
    for fact in UserEvent::samples(mint_id()) {
        let (kind, data) = fact.encode();
        let data: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&data.unwrap()).unwrap();
        assert_eq!(data.keys().collect::<Vec<_>>(), ["user_id"], "{kind}");
    }
}

/// Invariant 8.
#[test]
fn shared_imports_only_from_earlier_layers() {
    let upward = upward(&imports(&crate_in("shared")), &LAYERS);
    assert!(upward.is_empty(), "{}", upward.join("\n"));
}

/// Invariant 8.
#[test]
fn no_files_import_each_other() {
    let mut found = vec![];
    for (path, _) in manifests() {
        let folder = path.strip_suffix("/Cargo.toml").unwrap();
        found.extend(cycles(&imports(&crate_in(folder))).into_iter().map(|cycle| format!("{folder}/src: {cycle}")));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Invariant 9. The events are the contract between the services, so they name what they are about.
#[test]
fn shared_names_no_business_of_a_service() {
    let business = ["deliveries", "recipients", "funnel", "registrations", "profiles", "\"users", " users ", "/users"];
    for (path, text) in files("shared/src", ".rs") {
        if path.starts_with("shared/src/events/") {
            continue;
        }
        for line in code(&text) {
            let named = business.iter().find(|word| line.contains(*word));
            assert_eq!(named, None, "{path}: {line}");
        }
    }
}

/// `shared` owns two tables. Each service that has one keeps a copy of its migration, and the
/// copies are equal.
#[test]
fn copied_tables_are_equal() {
    for (table, holders) in [("outbox", 2), ("inbox", 1)] {
        let marker = format!("create table {table} (");
        let migrations = files("migrations", ".sql").into_iter().filter(|(_, text)| text.contains(&marker));
        let copies: Vec<(String, String)> = migrations.collect();
        assert!(copies.len() >= holders, "{table}: {copies:?}");
        for (path, text) in &copies {
            assert_eq!(text, &copies[0].1, "{path} differs from {}", copies[0].0);
            assert!(path.ends_with(&format!("_{table}.sql")), "{path}: a shared table has its own file");
        }
    }
}

/// Every version and every lint is in the root manifest.
#[test]
fn members_take_versions_and_lints_from_the_workspace() {
    for (path, manifest) in manifests() {
        assert!(manifest.contains("[lints]\nworkspace = true"), "{path}: it does not use the lints of the workspace");
        for line in manifest.lines() {
            let own = line.contains("version = ")
                || line.contains("= \"") && !line.starts_with("name") && !line.contains("path = ");
            assert!(!own, "{path}: this version belongs into the root manifest: {line}");
        }
    }
}

/// rustls takes its cryptography from one crate. With two of them in a program it panics at the
/// first handshake.
#[test]
fn rustls_has_one_provider_of_cryptography() {
    let lock = read("Cargo.lock");
    let has = |name: &str| lock.contains(&format!("name = \"{name}\"\n"));
    assert!(has("ring") && has("rustls"), "the names were not found: the rule checks nothing");
    assert!(!has("aws-lc-rs"), "a dependency enables aws-lc-rs: choose its feature for ring");
}

/// Kafka's metrics cannot tell `_` from `.`.
#[test]
fn topics_and_groups_have_no_underscore() {
    let topics = SERVICES.iter().flat_map(|service| service.writes).copied();
    let groups = SERVICES.iter().flat_map(|service| service.groups).map(|group| group.name);
    for name in topics.chain(groups) {
        assert!(!name.contains('_'), "{name}");
    }
}

/// The comparison builds both sides with a fourth receiver. A patch that does not apply any more is
/// written again for the current code.
#[test]
fn the_patches_that_add_a_receiver_apply() {
    let patches = files("tests/compare", ".patch");
    assert_eq!(patches.len(), 2, "one for each side");
    for patch in patches.keys() {
        let mut git = std::process::Command::new("git");
        git.args(["apply", "--check", "--whitespace=nowarn", patch]).current_dir(root());
        // Otherwise git does not look at files that a repository around this one ignores.
        git.env("GIT_CEILING_DIRECTORIES", root().parent().unwrap());
        let checked = git.output().expect("git is installed");
        assert!(checked.status.success(), "{patch}: {}", String::from_utf8_lossy(&checked.stderr));
    }
}

/// Every relative link in the README and in the documentation names an existing file.
#[test]
fn links_in_documents_resolve() {
    let documents = files("docs", ".md").into_iter().chain([("README.md".to_owned(), read("README.md"))]);
    let mut missing = vec![];
    for (path, text) in documents {
        let folder = root().join(&path).parent().unwrap().to_owned();
        let targets = links(&text).into_iter().filter(|link| !folder.join(link).exists());
        missing.extend(targets.map(|link| format!("{path}: {}", link.display())));
    }
    assert!(missing.is_empty(), "links to files that do not exist:\n{}", missing.join("\n"));
}

/// The manifest of each member of the workspace, by its path.
fn manifests() -> impl Iterator<Item = (String, String)> {
    let folders = ["services", "shared", "tests", "tools"];
    folders.into_iter().flat_map(|folder| files(folder, "/Cargo.toml"))
}

/// The sources of a crate, by their path below its `src/`.
fn crate_in(folder: &str) -> Files {
    let src = format!("{folder}/src");
    let sources = files(&src, ".rs").into_iter();
    sources.map(|(path, text)| (path[src.len() + 1..].to_owned(), text)).collect()
}

/// The names of a manifest's dependencies of every kind.
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

/// The relative targets of the links `[text](target#part)`.
fn links(text: &str) -> Vec<PathBuf> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let targets = targets.filter(|target| !target.contains("://") && !target.starts_with(['#', '/']));
    targets.filter_map(|target| target.split('#').next()).map(PathBuf::from).collect()
}
