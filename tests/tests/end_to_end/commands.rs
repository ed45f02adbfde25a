//! What a client can say about a command besides its content: an idempotency key and preconditions.

use reqwest::{RequestBuilder, StatusCode};
use serde_json::json;
use tests::http::{Answer, send};
use tests::services::USER_EVENTS;
use tests::users::address;
use tests::{System, eventually_eq};
use topology::{CACHE, USER};
use uuid::Uuid;

/// The three commands on a user, not yet sent. Each has another address or name than the user has.
fn commands(system: &System, id: Uuid) -> [RequestBuilder; 3] {
    let url = system.users.url(USER, &format!("/users/{id}/email"));
    let change_email = reqwest::Client::new().put(url).json(&json!({ "email": address() }));
    [system.users.renaming(id, "Countess"), change_email, system.users.erasure(id)]
}

fn copy(request: &RequestBuilder) -> RequestBuilder {
    request.try_clone().unwrap()
}

async fn answer_of(request: RequestBuilder) -> Answer {
    send(request).await.unwrap()
}

/// T73: a repetition gets the first answer and changes nothing, also if the version that it
/// requires has changed by its own first attempt.
#[tokio::test(flavor = "multi_thread")]
async fn every_command_that_is_repeated_with_its_key_gets_the_first_answer() {
    let mut system = System::start_only(&[USER]).await;
    let judge = system.judge().await;
    let id = system.users.register().await;
    for (version, command) in (1..).zip(commands(&system, id)) {
        let command = command.header("if-match", format!("\"{version}\"")).header("idempotency-key", "same for all");
        let first = answer_of(copy(&command)).await;
        assert!(first.status.is_success(), "{first:?}");
        assert_eq!(answer_of(copy(&command)).await, first);
        let without_condition = copy(&command).header("if-match", "\"9\"");
        assert_eq!(answer_of(without_condition).await.status, StatusCode::UNPROCESSABLE_ENTITY, "another request");
    }
    judge.check(&mut system).await;
    eventually_eq("facts: one per command", 4, async || system.kafka.read(USER_EVENTS).len()).await;
}

/// T73: a key belongs to a method and a route. On the same route it identifies one request, so not
/// that of another user.
#[tokio::test(flavor = "multi_thread")]
async fn one_key_on_two_routes_is_two_keys() {
    let system = System::start_only(&[USER]).await;
    let id = system.users.register().await;
    let other = system.users.register().await;
    let registered = answer_of(system.users.registration(&address(), Some("one key"))).await;
    assert_eq!(registered.status, StatusCode::CREATED);
    for command in commands(&system, id) {
        let answer = answer_of(command.header("idempotency-key", "one key")).await;
        assert!(answer.status.is_success(), "{answer:?}");
    }
    let reused = answer_of(system.users.renaming(other, "Countess").header("idempotency-key", "one key")).await;
    assert_eq!(reused.status, StatusCode::UNPROCESSABLE_ENTITY, "{reused:?}");
    assert_eq!(reused.body["type"], "/problems/idempotency-key-reused");
}

/// Two lines with keys are refused: the service cannot know which one the client means.
#[tokio::test(flavor = "multi_thread")]
async fn two_idempotency_keys_are_refused() {
    let system = System::start_only(&[USER]).await;
    let id = system.users.register().await;
    let registration = system.users.registration(&address(), None);
    for command in commands(&system, id).into_iter().chain([registration]) {
        let answer = answer_of(command.header("idempotency-key", "a").header("idempotency-key", "a")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{answer:?}");
        assert_eq!(answer.body["type"], "/problems/repeated-idempotency-key");
    }
    assert_eq!(system.users.get(USER, &format!("/users/{id}")).await.unwrap().version(), 1);
}

/// Lists and repeated lines are one list. Tags are compared byte by byte, and strongly.
#[tokio::test(flavor = "multi_thread")]
async fn preconditions_follow_the_standard_on_commands() {
    let system = System::start_only(&[USER]).await;
    let id = system.users.register().await;
    let rename = |lines: &[(&str, &str)]| {
        let request = system.users.renaming(id, "Countess");
        lines.iter().fold(request, |request, (name, value)| request.header(*name, *value))
    };
    let refused: [&[(&str, &str)]; 10] = [
        &[("if-match", "W/\"1\"")],
        &[("if-match", "\"001\"")],
        &[("if-match", "\"+1\"")],
        &[("if-match", "\"1 \"")],
        &[("if-match", "1")],
        &[("if-match", "")],
        &[("if-match", "\"77\", \"2\""), ("if-match", "\"3\"")],
        &[("if-none-match", "*")],
        &[("if-none-match", "W/\"1\"")],
        &[("if-match", "\"1\""), ("if-none-match", "\"7\", \"1\"")],
    ];
    for lines in refused {
        let answer = answer_of(rename(lines)).await;
        assert_eq!(answer.status, StatusCode::PRECONDITION_FAILED, "{lines:?}: {answer:?}");
        assert_eq!(answer.body["type"], "/problems/precondition-failed");
    }
    let accepted: [&[(&str, &str)]; 5] = [
        &[("if-match", "\"77\", \"1\"")],
        &[("if-match", "\"77\""), ("if-match", "\"2\"")],
        &[("if-match", "*")],
        &[("if-none-match", "\"3\", W/\"1\"")],
        &[("if-match", "\"a b\", \"\u{e9}\", \"5\"")],
    ];
    for (version, lines) in (2..).zip(accepted) {
        let answer = answer_of(rename(lines)).await;
        assert_eq!((answer.status, answer.body["version"].as_i64()), (StatusCode::OK, Some(version)), "{lines:?}");
    }
    let new = system.users.registration(&address(), None);
    assert_eq!(answer_of(copy(&new).header("if-match", "*")).await.status, StatusCode::PRECONDITION_FAILED);
    assert_eq!(answer_of(new.header("if-none-match", "*")).await.status, StatusCode::CREATED);
}

/// A reader that has the current version already gets 304 and no body, from both services.
#[tokio::test(flavor = "multi_thread")]
async fn reads_answer_304_to_a_known_version_and_412_to_another_required_one() {
    let system = System::start_only(&[USER, CACHE]).await;
    let id = system.users.register().await;
    system.users.until_cached(id, 1).await;
    for url in [system.users.url(USER, &format!("/users/{id}")), system.users.url(CACHE, &format!("/profiles/{id}"))] {
        for (name, value, expected) in [
            ("if-none-match", "\"1\"", 304),
            ("if-none-match", "W/\"1\"", 304),
            ("if-none-match", "\"7\", \"1\"", 304),
            ("if-none-match", "*", 304),
            ("if-none-match", "\"01\"", 200),
            ("if-match", "\"1\"", 200),
            ("if-match", "*", 200),
            ("if-match", "\"2\"", 412),
            ("if-match", "W/\"1\"", 412),
        ] {
            let request = reqwest::Client::new().get(&url).header(name, value);
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status(), expected, "{url} {name}: {value}");
            if expected == 304 {
                assert_eq!(answer.headers()["etag"], "\"1\"");
                assert_eq!(answer.text().await.unwrap(), "");
            }
        }
    }
}
