//! The effects of registrations, which several tests check.

use tests::System;
use tests::services::groups;
use topology::EMAIL;
use uuid::Uuid;

/// The effects of these registrations and of no others, each once, in every service; and nothing under way any more.
pub async fn assert_effects_once(system: &System, users: &[Uuid]) {
    let count = users.len() as i64;
    for id in users {
        system.users.until_mailed(*id).await;
        system.users.until_cached(*id, 1).await;
    }
    system.users.until_counted(count, count).await;
    system.until_drained().await;
    // What was counted may not be counted once more by what came last.
    system.users.until_counted(count, count).await;
    for id in users {
        one_mail(system, *id).await;
    }
    for group in groups() {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
    }
}

/// One intent; and one copy of its mail, except where a sender was killed with the mail in hand: then all copies are one to a
/// mailbox (I6).
async fn one_mail(system: &System, id: Uuid) {
    let deliveries: Vec<(Uuid, i32)> = sqlx::query_as("select id, attempt from deliveries where user_id = $1")
        .bind(id)
        .fetch_all(&system.stores.database(EMAIL).await)
        .await
        .unwrap();
    let [(delivery, attempts)] = deliveries[..] else { panic!("not one delivery: {deliveries:?}") };
    let address = system.stores.recipient(id).await.unwrap().1.unwrap();
    let mails = system.mail.all();
    let copies: Vec<_> = mails.iter().filter(|mail| mail.to.contains(&address)).collect();
    assert!((1..=attempts as usize).contains(&copies.len()), "{} copies after {attempts} attempts", copies.len());
    for mail in copies {
        assert!(
            mail.message_id.as_ref().unwrap().contains(&delivery.to_string()),
            "{:?} of {delivery}",
            mail.message_id
        );
    }
}
