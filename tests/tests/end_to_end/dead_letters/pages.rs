//! The list of dead letters over HTTP: filters, pages, and letters that another program wrote.

use reqwest::{Client, StatusCode};
use serde_json::Value;
use tests::System;
use tests::http::{Answer, send};
use tests::record::Draft;
use tests::services::{ANALYTICS_AUDIT, ANALYTICS_USERS, USER_EVENTS, dead_letters_of};
use topology::ANALYTICS;
use uuid::Uuid;

use super::{analytics, listed};

async fn page(system: &System, query: &str) -> Answer {
    let url = system.processes.admin(ANALYTICS).url(&format!("/dead-letters?{query}"));
    send(Client::new().get(url)).await.unwrap()
}

/// The letters of all pages, and the number of pages.
async fn all(system: &System, query: &str) -> (Vec<Value>, usize) {
    let mut letters = vec![];
    let mut pages = 0;
    let mut cursor = String::new();
    loop {
        let answer = page(system, &format!("{query}{cursor}")).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        letters.extend(answer.body["letters"].as_array().unwrap().iter().cloned());
        pages += 1;
        assert!(answer.body["read"].as_i64() <= answer.body["of"].as_i64(), "{:?}", answer.body);
        let Some(next) = answer.body["next"].as_str() else { return (letters, pages) };
        cursor = format!("&cursor={next}");
    }
}

/// I13: the list needs no token. It has pages, and a filter finds letters by group, reason, type,
/// key and age. Each letter is on one page.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_finds_letters_by_filters_in_pages() {
    let (system, _) = analytics().await;
    let users: Vec<Uuid> = (0..25).map(|_| Uuid::now_v7()).collect();
    let fact = |kind: &str, user: &Uuid| Draft::user_event(kind, *user, 1).without_header("ce_id").on(0);
    let mut facts: Vec<Draft> = users[..20].iter().map(|user| fact("user.registered", user)).collect();
    facts.extend(users[20..].iter().map(|user| fact("user.deleted", user)));
    facts.push(Draft::user_event("user.registered", Uuid::now_v7(), 1).with_value(b"?").on(0));
    let written = system.kafka.write_all(USER_EVENTS, &facts).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &written).await;

    let of_group = format!("group={ANALYTICS_USERS}");
    let (letters, pages) = all(&system, &format!("{of_group}&limit=10")).await;
    let found: Vec<&str> = letters.iter().map(|letter| letter["coordinates"].as_str().unwrap()).collect();
    let expected: Vec<String> =
        written.iter().map(|record| system.kafka.letter_key(ANALYTICS_USERS, *record)).collect();
    assert_eq!((found.len(), pages), (26, 3), "{found:?}");
    assert_eq!(found, expected, "letters in the order in which they were written");

    for (filter, count) in [
        ("type=user.deleted".to_owned(), 5),
        (format!("key={}", users[7]), 1),
        ("reason_contains=ce_id".to_owned(), 25),
        ("reason_contains=ce_id&type=user.registered".to_owned(), 20),
        ("older_than_minutes=60".to_owned(), 0),
        ("younger_than_minutes=60".to_owned(), 26),
    ] {
        let (letters, _) = all(&system, &format!("{of_group}&limit=10&{filter}")).await;
        assert_eq!(letters.len(), count, "{filter}");
    }
    let printed = system.processes.run(ANALYTICS, &["dead-letters", "--key", &users[7].to_string()]).await.unwrap();
    assert!(printed.contains(&format!("{ANALYTICS_USERS}  {}", expected[7])), "{printed}");

    for (query, named) in [
        ("group=email.welcome", "group"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("cursor=nonsense", "cursor"),
        ("cursor=analytics.users:-1", "cursor"),
        ("key=ada", "key"),
        ("page=2", "page"),
    ] {
        let answer = page(&system, query).await;
        assert!(answer.status.is_client_error(), "{query}: {answer:?}");
        assert!(answer.body["detail"].as_str().unwrap().contains(named), "{query}: {answer:?}");
    }
}

/// Another program wrote letters with a key that is no record of the group, and with headers that
/// would change a terminal. The list counts only letters, and prints no control characters. An
/// operator can discard them.
#[tokio::test(flavor = "multi_thread")]
async fn letters_of_another_program_are_listed_safely() {
    let (system, _) = analytics().await;
    let topic = dead_letters_of(ANALYTICS_USERS);
    let letter = |key: &[u8], headers: &[(&str, &[u8])]| Draft {
        partition: None,
        key: Some(key.to_vec()),
        value: Some(b"?".to_vec()),
        headers: headers.iter().map(|(name, value)| ((*name).to_owned(), Some(value.to_vec()))).collect(),
    };
    let [first, second] = [0, 1].map(|offset| system.kafka.letter_key(ANALYTICS_USERS, (0, offset)));
    let escape: &[(&str, &[u8])] =
        &[("dlq-reason", b"\x1b[2Jgone\x0d\nline"), ("dlq-attempts", b"4294967295"), ("dlq-key", b"\xff")];
    let drafts = [
        letter(b"\xff\xfe", &[("dlq-reason", b"no text")]),
        letter(system.kafka.letter_key(ANALYTICS_AUDIT, (0, 0)).replace("events", "state").as_bytes(), escape),
        letter(first.as_bytes(), escape),
        letter(second.as_bytes(), &[("dlq-reason", b"\xff"), ("dlq-attempts", b"many"), ("dlq-since", b"x")]),
    ];
    system.kafka.write_all(&topic, &drafts).await;
    let letters = listed(&system, ANALYTICS_USERS).await;
    assert_eq!(letters.len(), 2, "{letters:?}");
    assert_eq!((&letters[0]["parked"], &letters[0]["key"]), (&true.into(), &Value::Null));
    assert_eq!((&letters[1]["attempts"], &letters[1]["parked"]), (&0.into(), &false.into()));
    assert!(letters[1]["reason"].as_str().unwrap().contains("another program"), "{letters:?}");
    let table = system.processes.run(ANALYTICS, &["dead-letters"]).await.unwrap();
    assert!(table.contains("gone") && !table.contains('\u{1b}') && !table.contains('\r'), "{table:?}");
    for key in [&first, &second] {
        let discard = ["discard", key, "--reason", "another program wrote it"];
        system.processes.run(ANALYTICS, &discard).await.unwrap();
    }
    assert_eq!(listed(&system, ANALYTICS_USERS).await.len(), 0);
}
