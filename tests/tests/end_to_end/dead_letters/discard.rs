//! An operator discards a dead letter: it is settled without an effect, and who did it is recorded
//! before.

use tests::System;
use tests::record::Draft;
use tests::services::{ANALYTICS_AUDIT, ANALYTICS_USERS, USER_EVENTS};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

use super::{actions, analytics, malformed_facts, summary};

const REASON: &str = "duplicate of an import";

fn discard(key: &str) -> [&str; 6] {
    ["discard", key, "--reason", REASON, "--group", ANALYTICS_USERS]
}

fn discarded(key: &str, outcome: Option<&str>) -> (String, String, Option<String>) {
    ("discard".to_owned(), key.to_owned(), outcome.map(str::to_owned))
}

/// T91, I11: the process dies between the record of the action and the tombstone. The letter is
/// still open, and the action has no outcome. The second discard settles the letter. The process
/// dies between the tombstone and the second record: the letter is settled, and the list shows who
/// asked for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_discard_is_recorded_before_the_letter_is_settled() {
    let mut system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let judge = system.judge().await;
    let keys = malformed_facts(&system, 2).await;
    let begun = [("FAULT_AT", "actions.begun:1:kill")];
    system.processes.start_with(ANALYTICS, &begun).await;
    system.processes.run(ANALYTICS, &discard(&keys[0])).await.unwrap_err();
    system.processes.until_ended(ANALYTICS).await;
    assert!(system.kafka.dead_letters(ANALYTICS_USERS).contains_key(&keys[0]), "settled before it was recorded");

    system.processes.start_with(ANALYTICS, &[("FAULT_AT", "discard.after_tombstone:2:kill")]).await;
    let found: Vec<_> = actions(&system, ANALYTICS).await.iter().map(summary).collect();
    assert_eq!(found, [discarded(&keys[0], None)]);
    let printed = system.processes.run(ANALYTICS, &discard(&keys[0])).await.unwrap();
    assert!(printed.contains(&keys[0]), "{printed}");
    system.processes.run(ANALYTICS, &discard(&keys[1])).await.unwrap_err();
    system.processes.until_ended(ANALYTICS).await;
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);

    system.processes.start(&[ANALYTICS]).await;
    let listed = actions(&system, ANALYTICS).await;
    let found: Vec<_> = listed.iter().map(summary).collect();
    let expected = [discarded(&keys[1], None), discarded(&keys[0], Some("done")), discarded(&keys[0], None)];
    assert_eq!(found, expected);
    assert!(listed.iter().all(|action| action["reason"] == REASON), "{listed:?}");
    let table = system.processes.run(ANALYTICS, &["actions", "--target", &keys[1]]).await.unwrap();
    assert!(table.contains("none") && table.lines().count() == 2, "{table}");
    let again = system.processes.run(ANALYTICS, &discard(&keys[0])).await.unwrap_err().to_string();
    assert!(again.contains("/problems/letter-not-open"), "{again}");
    judge.check(&mut system).await;
}

/// A reason is required and is one line. A record that is a dead letter of two groups is discarded
/// in the one that is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_discard_names_one_letter_and_a_reason() {
    let (system, _) = analytics().await;
    let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).without_header("ce_id").on(0);
    let written = system.kafka.write(USER_EVENTS, &fact).await;
    for group in [ANALYTICS_USERS, ANALYTICS_AUDIT] {
        system.kafka.until_dead_letters(group, &[written]).await;
    }
    let key = system.kafka.letter_key(ANALYTICS_USERS, written);
    for reason in ["", "two\nlines", "\u{1b}[2J"] {
        let error = system.processes.run(ANALYTICS, &["discard", &key, "--reason", reason]).await.unwrap_err();
        assert!(error.to_string().contains("reason"), "{error}");
    }
    let error = system.processes.run(ANALYTICS, &["discard", &key, "--reason", REASON]).await.unwrap_err().to_string();
    assert!(error.contains("/problems/letter-of-several-groups") && error.contains(ANALYTICS_AUDIT), "{error}");
    assert_eq!(actions(&system, ANALYTICS).await.len(), 0, "a refused action was recorded");
    system.processes.run(ANALYTICS, &discard(&key)).await.unwrap();
    assert_eq!(system.kafka.dead_letters(ANALYTICS_USERS).len(), 0);
    assert_eq!(system.kafka.dead_letters(ANALYTICS_AUDIT).len(), 1, "another group's letter");
}
