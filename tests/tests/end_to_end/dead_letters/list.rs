//! The list of the open dead letters.

use serde_json::Value;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, USER_EVENTS};
use topology::ANALYTICS;
use uuid::Uuid;

use super::{SECRET, analytics, listed, redrive};

/// I13: what an operator sees of a letter, as a table and as JSON. Nothing personal, though the record has it in key and value.
#[tokio::test(flavor = "multi_thread")]
async fn letters_are_listed_without_personal_data() {
    let (mut system, _) = analytics().await;
    let id = Uuid::now_v7();
    let bad = |key: &str| Draft {
        key: Some(key.into()),
        ..Draft::user_event("user.registered", id, 1).with_value(format!(r#"["{SECRET}"]"#).as_bytes()).on(0)
    };
    let at = system.kafka.write_all(USER_EVENTS, &[bad(SECRET), bad(&id.to_string())]).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &at).await;
    let sources = [at[0], at[1]].map(|at| system.kafka.letter_key(ANALYTICS_USERS, at));
    let since = |letters: &[Value]| -> Vec<Value> { letters.iter().map(|letter| letter["since"].clone()).collect() };
    let at_first = since(&listed(&system, ANALYTICS).await);
    assert!(at_first.len() == 2 && at_first.iter().all(Value::is_string), "{at_first:?}");
    for _ in 2..=5 {
        redrive(&system, ANALYTICS_USERS, &["--only", &sources[1]]).await;
    }
    let letters = listed(&system, ANALYTICS).await;
    let [first, second] = &letters[..] else { panic!("{letters:?}") };
    let expected = serde_json::json!({
        "group": ANALYTICS_USERS, "source": sources[1], "topic": system.kafka.prefixed(USER_EVENTS), "partition": 0, "offset": at[1].1,
        "key": id.to_string(), "attempts": 5, "parked": true,
        "reason": "data: JSON, but not the shape of its type: a field is missing or has another type",
        "since": second["since"], "age_seconds": second["age_seconds"],
    });
    assert_eq!(second, &expected);
    assert_eq!((&first["key"], &first["parked"], &first["attempts"]), (&Value::Null, &false.into(), &1.into()));
    assert_eq!(since(&letters), at_first, "a redrive does not make a letter younger");

    let table = system.processes.run(ANALYTICS, &["dead-letters"]).await.unwrap();
    assert!(table.contains(&format!("{ANALYTICS_USERS}: 2 open, 1 of them parked")), "{table}");
    assert!(table.contains("analytics.emails: 0 open, 0 of them parked"), "{table}");
    assert!(table.contains(&sources[0]) && !table.contains(SECRET), "{table}");
    let wrong = system.processes.run(ANALYTICS, &["redrive", "--only", "nonsense"]).await.unwrap_err().to_string();
    assert!(wrong.contains("not topic-partition-offset"), "{wrong}");
    system.processes.stop(ANALYTICS).await;
    assert!(system.processes.run(ANALYTICS, &["dead-letters"]).await.is_ok(), "it needs no running service");
}
