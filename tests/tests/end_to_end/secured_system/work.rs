//! Everything that Waybill does, under the rules.

use std::fs;

use reqwest::StatusCode;
use sqlx::{Connection, PgConnection};
use testbed::ports;
use testbed::process::Logs;
use tests::record::Draft;
use tests::services::{
    ANALYTICS_USERS, CACHE_PROFILES, EMAIL_RECIPIENTS, EMAIL_WELCOME, USER_EVENTS, USER_STATE, service_of,
};
use tests::users::address;
use tests::{System, eventually_eq};
use topology::{SERVICES, USER};
use uuid::Uuid;

use crate::analytics_rebuild::rebuild;
use crate::dead_letters::redrive;
use crate::relay_leadership::a_leader_frozen_at;

/// T43: a frozen relay is fenced, registrations and an erasure reach every service, dead letters
/// are redriven, a read model is rebuilt and states are republished, while each service has only
/// the rights that the topology draws. No password is shown anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn everything_works_with_the_rights_that_the_topology_draws() {
    let mut system = System::empty_on_secured_components(&[]).await;
    system.processes.start_all().await;
    let console = system.console().await;
    console.until_shows("/", "all parts work").await;
    a_leader_frozen_at("relay.after_ack", &mut system).await;
    let users = system.users.register_many(3).await;
    for user in &users {
        system.users.until_mailed(*user).await;
        system.users.until_cached(*user, 1).await;
    }
    let registered = async || system.users.funnel().await.0;
    eventually_eq("registrations that analytics has counted", 4, registered).await;
    assert_eq!(system.users.erase(users[0]).await.unwrap().status, StatusCode::NO_CONTENT);
    let gone = async || system.users.profile(users[0], Some(2)).await.unwrap().status.as_u16();
    eventually_eq("the status that the cache answers", 404, gone).await;
    assert_components_refuse_plaintext(&system).await;
    console.until_shows("/events?type=user.deleted", "/events/user.events.v1/").await;

    let rebuilt = rebuild(&system, &[]).await.unwrap();
    assert!(!rebuilt.is_empty());
    let republished = system.processes.run(USER, &["republish"]).await.unwrap();
    assert!(republished.ends_with("republished: 2 states, 2 tombstones\n"), "{republished}");
    system.until_drained().await;

    redrive_letters(&system).await;
    assert_no_password_is_shown(&mut system).await;
}

/// Malformed records become letters of every kind: copies of facts, and pointers to states. A
/// redrive reads them, and for a pointer the record too.
async fn redrive_letters(system: &System) {
    let user = Uuid::now_v7();
    let fact = Draft::user_event("user.registered", user, 1).without_header("ce_id");
    let state = Draft::user_state(user, 1, Some(&address())).without_header("ce_id");
    system.kafka.write(USER_EVENTS, &fact).await;
    system.kafka.write(USER_STATE, &state).await;
    for group in [ANALYTICS_USERS, EMAIL_WELCOME, EMAIL_RECIPIENTS, CACHE_PROFILES] {
        let open = async || system.processes.dead_letters_open(group).await;
        eventually_eq(&format!("open dead letters of {group}"), Some(1.0), open).await;
        let listed = system.processes.run(service_of(group), &["dead-letters"]).await.unwrap();
        assert!(listed.contains(&format!("{group}: 1 open")), "{listed}");
        let result = redrive(system, group, &[]).await;
        assert_eq!(result, "0 settled, 0 superseded, 1 failed again, 0 parked", "{group}");
    }
}

/// The ports of a secured stack do not answer clients that do not encrypt.
async fn assert_components_refuse_plaintext(system: &System) {
    let ports = system.secured().ports();
    assert!(ports::ask(ports.redis, b"PING\r\n", 1).await.is_err(), "Valkey answers without TLS");
    let (without_tls, _) = system.stores.owner_url(USER).split_once('?').unwrap();
    let refused = PgConnection::connect(&format!("{without_tls}?sslmode=disable")).await.unwrap_err().to_string();
    assert!(refused.contains("no encryption"), "Postgres accepts a session without TLS: {refused}");
    let mail = b"EHLO test\r\nMAIL FROM:<a@test>\r\n";
    let answers = ports::ask(ports.smtp, mail, "220 front\r\n250-front\r\n250-STARTTLS\r\n250 HELP\r\n530".len()).await;
    let answers = String::from_utf8(answers.unwrap()).unwrap();
    assert!(answers.ends_with("530"), "the mail server accepts a mail without TLS: {answers}");
}

/// Searches everything that the services print or show for the passwords of the stack.
async fn assert_no_password_is_shown(system: &mut System) {
    let mut shown = system.processes.all_logs();
    for service in SERVICES {
        let name = service.name;
        let pid = system.processes.pid(service);
        shown.push((format!("command line of {name}"), fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap()));
        shown.push((format!("metrics of {name}"), system.processes.admin(service).metrics_page().await.unwrap()));
        let (_, status) = system.processes.status(service).await.unwrap();
        shown.push((format!("status of {name}"), status.to_string()));
        shown.push((format!("help of {name}"), system.processes.run(service, &["--help"]).await.unwrap()));
    }
    let components = system.component_logs();
    shown.extend(logs_in(&components));
    assert!(shown.len() > 4 * SERVICES.len(), "logs are missing");
    for (name, text) in &shown {
        for password in system.secured().passwords() {
            assert!(!text.contains(password), "{name} shows a password");
        }
    }
}

fn logs_in(logs: &Logs) -> Vec<(String, String)> {
    let files = fs::read_dir(logs.folder()).unwrap().map(|entry| entry.unwrap().path());
    files
        .map(|file| (file.display().to_string(), String::from_utf8_lossy(&fs::read(file).unwrap()).into_owned()))
        .collect()
}
