//! The list of the open dead letters.

use serde_json::{Value, json};
use tests::record::Draft;
use tests::services::{ANALYTICS_EMAILS, ANALYTICS_USERS, USER_EVENTS};
use topology::ANALYTICS;
use uuid::Uuid;

use super::{SECRET, analytics, listed, redrive};

/// I13: An operator lists the letters as a table and as JSON. The list shows no personal data,
/// although the records have some in their keys and values.
#[tokio::test(flavor = "multi_thread")]
async fn the_list_of_dead_letters_shows_no_personal_data() {
    let (system, _) = analytics().await;
    let id = Uuid::now_v7();
    let bad = |key: &str| Draft {
        key: Some(key.into()),
        ..Draft::user_event("user.registered", id, 1).with_value(format!(r#"["{SECRET}"]"#).as_bytes()).on(0)
    };
    let written = system.kafka.write_all(USER_EVENTS, &[bad(SECRET), bad(&id.to_string())]).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &written).await;
    let [secret_key, id_key] = [written[0], written[1]].map(|record| system.kafka.letter_key(ANALYTICS_USERS, record));
    let since_at_first = since(&listed(&system, ANALYTICS_USERS).await);
    assert_eq!(since_at_first.len(), 2);
    assert!(since_at_first.iter().all(Value::is_string), "{since_at_first:?}");
    for _ in 2..=5 {
        redrive(&system, ANALYTICS_USERS, &["--only", &id_key]).await;
    }
    let letters = listed(&system, ANALYTICS_USERS).await;
    let [first, second] = &letters[..] else { panic!("not two letters: {letters:?}") };
    let expected = json!({
        "group": ANALYTICS_USERS,
        "coordinates": id_key,
        "topic": system.kafka.prefixed(USER_EVENTS),
        "partition": 0,
        "offset": written[1].1,
        "key": id.to_string(),
        "type": "user.registered",
        "attempts": 5,
        "parked": true,
        "reason": "data: JSON that does not match its type: a field is missing or has another type",
        "since": second["since"],
        "age_seconds": second["age_seconds"],
    });
    assert_eq!(second, &expected);
    assert_eq!(first["key"], Value::Null, "the key is not a UUID, so it is not shown");
    assert_eq!(first["parked"], false);
    assert_eq!(first["attempts"], 1);
    assert_eq!(since(&letters), since_at_first, "a redrive changed the time of a letter");

    let table = system.processes.run(ANALYTICS, &["dead-letters"]).await.unwrap();
    assert!(table.contains(&format!("{ANALYTICS_USERS}: 2 open, 1 of them parked")), "{table}");
    assert!(table.contains(&format!("{ANALYTICS_EMAILS}: 0 open, 0 of them parked")), "{table}");
    assert!(table.contains(&secret_key), "{table}");
    assert!(!table.contains(SECRET), "{table}");
    let error = system.processes.run(ANALYTICS, &["redrive", "--only", "nonsense"]).await.unwrap_err().to_string();
    assert!(error.contains("not topic-partition-offset"), "{error}");
}

/// When each letter was first written.
fn since(letters: &[Value]) -> Vec<Value> {
    letters.iter().map(|letter| letter["since"].clone()).collect()
}
