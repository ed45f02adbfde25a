//! Tokens for actions on the admin port.

use reqwest::{Client, Method, StatusCode};
use serde_json::json;
use tests::http::{Answer, send};
use tests::{System, eventually};
use topology::ANALYTICS;

const ON_CALL: &str = "on-call-0123456789abcdef0123456789";
const ROBOT: &str = "robot-fedcba9876543210fedcba9876543";
/// A record that blocks nothing: an accepted action on it is answered with 404.
const RECORD: &str = "user.events.v1-0-0";

/// Starts analytics and waits until its admin port answers. It need not do anything else.
async fn start(system: &mut System, settings: &[(&str, &str)]) {
    system.processes.spawn_with(ANALYTICS, settings);
    eventually("the admin port answers", async || system.processes.admin(ANALYTICS).is_alive().await.then_some(()))
        .await;
}

/// Sends an action to the admin port of analytics.
async fn act(system: &System, method: Method, path: &str, token: Option<&str>) -> Answer {
    let url = system.processes.admin(ANALYTICS).url(path);
    let body = json!({ "coordinates": RECORD, "reason": "a test" });
    let mut request = Client::new().request(method, url).json(&body);
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    send(request).await.unwrap()
}

async fn dead_letter(system: &System, token: Option<&str>) -> (StatusCode, String) {
    let answer = act(system, Method::POST, "/dead-letters", token).await;
    (answer.status, answer.body["type"].as_str().unwrap().trim_start_matches("/problems/").to_owned())
}

fn refused() -> (StatusCode, String) {
    (StatusCode::UNAUTHORIZED, "admin-token-required".to_owned())
}

/// The answer to an action that was allowed.
fn allowed() -> (StatusCode, String) {
    (StatusCode::NOT_FOUND, "record-not-blocked".to_owned())
}

/// T63: every action needs a known token, also on routes that only answer reads. Reading needs
/// none. The file is read again for each action, so a token can be replaced without a restart.
#[tokio::test(flavor = "multi_thread")]
async fn an_action_needs_a_token_and_its_name_is_logged() {
    let mut system = System::empty().await;
    let file = system.processes.file("tokens");
    std::fs::write(&file, format!("# operators\non-call:{ON_CALL}\n")).unwrap();
    start(&mut system, &[("ADMIN_TOKENS_FILE", file.to_str().unwrap())]).await;
    for token in [None, Some(ROBOT), Some(""), Some(&ON_CALL[1..])] {
        assert_eq!(dead_letter(&system, token).await, refused(), "{token:?}");
    }
    for (method, path) in [
        (Method::POST, "/status"),
        (Method::PUT, "/metrics"),
        (Method::DELETE, "/dead-letters"),
        (Method::PATCH, "/"),
        (Method::OPTIONS, "/dead-letters"),
    ] {
        let answer = act(&system, method.clone(), path, None).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
    }
    for path in ["/livez", "/readyz", "/status", "/metrics"] {
        let url = system.processes.admin(ANALYTICS).url(path);
        let status = Client::new().get(url).send().await.unwrap().status();
        assert_ne!(status, StatusCode::UNAUTHORIZED, "{path}");
    }
    assert_eq!(dead_letter(&system, Some(ON_CALL)).await, allowed());
    eventually("the action is logged with its name and its route", async || {
        let log = system.processes.log(ANALYTICS);
        let mut actions = log.lines().filter(|line| line.contains("\"action on the admin port\""));
        actions.any(|line| line.contains("\"on-call\"") && line.contains("\"/dead-letters\"")).then_some(())
    })
    .await;

    std::fs::write(&file, format!("robot:{ROBOT}\n")).unwrap();
    assert_eq!(dead_letter(&system, Some(ON_CALL)).await, refused(), "the token was removed");
    assert_eq!(dead_letter(&system, Some(ROBOT)).await, allowed(), "the token was added");
    std::fs::remove_file(&file).unwrap();
    let unusable = (StatusCode::SERVICE_UNAVAILABLE, "admin-tokens-unusable".to_owned());
    assert_eq!(dead_letter(&system, Some(ROBOT)).await, unusable);
    system.processes.until_logged(ANALYTICS, "cannot read ADMIN_TOKENS_FILE").await;
    let log = system.processes.log(ANALYTICS);
    assert!(!log.contains(ON_CALL) && !log.contains(ROBOT), "a token is in the log");
}

/// T63: the subcommand sends its token, from the environment or from a file, and explains a
/// refusal.
#[tokio::test(flavor = "multi_thread")]
async fn the_subcommand_dead_letter_sends_its_token() {
    let mut system = System::empty().await;
    start(&mut system, &[("ADMIN_TOKENS", &format!("on-call:{ON_CALL}"))]).await;
    let file = system.processes.file("token");
    std::fs::write(&file, format!("{ON_CALL}\n")).unwrap();
    let arguments = ["dead-letter", RECORD, "--reason", "a test"];
    for (settings, answer) in [
        (&[][..], "set ADMIN_TOKEN or ADMIN_TOKEN_FILE"),
        (&[("ADMIN_TOKEN", ROBOT)], "the service does not know this token"),
        (&[("ADMIN_TOKEN", "hunter2")], "ADMIN_TOKEN is not a token"),
        (&[("ADMIN_TOKEN", ON_CALL)], "no consumer of this process waits at"),
        (&[("ADMIN_TOKEN_FILE", file.to_str().unwrap())], "no consumer of this process waits at"),
    ] {
        let error = system.processes.run_with(ANALYTICS, &arguments, settings).await.unwrap_err().to_string();
        assert!(error.contains(answer), "{settings:?}: {error}");
        assert!(!error.contains("hunter2") && !error.contains(ON_CALL), "{settings:?}: {error}");
    }
}

/// T63: a port that other machines may reach accepts no action without tokens. Reading works.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_not_on_loopback_accepts_no_action_without_tokens() {
    let mut system = System::empty().await;
    let url = system.processes.admin(ANALYTICS).url("");
    let (_, port) = url.rsplit_once(':').unwrap();
    start(&mut system, &[("ADMIN_ADDR", &format!("0.0.0.0:{port}"))]).await;
    let disabled = (StatusCode::FORBIDDEN, "admin-actions-disabled".to_owned());
    assert_eq!(dead_letter(&system, None).await, disabled);
    assert_eq!(dead_letter(&system, Some(ON_CALL)).await, disabled);
    assert!(system.processes.admin(ANALYTICS).is_alive().await);

    // On loopback only processes of the same machine reach the port.
    start(&mut system, &[]).await;
    assert_eq!(dead_letter(&system, None).await, allowed());
}

/// Malformed tokens are an error at the start, which names the line and shows no token.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_tokens_are_an_error_at_the_start() {
    let mut system = System::empty().await;
    for (tokens, error) in [
        ("on-call:hunter2".to_owned(), "ADMIN_TOKENS: line 1 is not name:token"),
        (format!("on-call:{ON_CALL}\nrobot:{ON_CALL}"), "the token in line 2 is in an earlier line"),
        ("# nobody".to_owned(), "ADMIN_TOKENS has no line name:token"),
    ] {
        system.processes.spawn_with(ANALYTICS, &[("ADMIN_TOKENS", &tokens)]);
        system.processes.until_ended(ANALYTICS).await;
        let log = system.processes.log(ANALYTICS);
        assert!(log.contains(error), "{tokens}: {log}");
        assert!(!log.contains("hunter2") && !log.contains(ON_CALL), "{tokens}: {log}");
    }
}
