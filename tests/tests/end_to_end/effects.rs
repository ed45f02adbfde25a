//! The effects of registrations, which several tests check.

use tests::System;
use tests::services::groups;
use topology::EMAIL;
use uuid::Uuid;

/// Checks that every service has the effects of these registrations and of no others, each once,
/// and that no work is left.
pub async fn assert_effects_once(system: &System, users: &[Uuid]) {
    let count = users.len() as i64;
    for id in users {
        system.users.until_mailed(*id).await;
        system.users.until_cached(*id, 1).await;
    }
    system.users.until_counted(count, count).await;
    system.until_drained().await;
    // Checked again, because a copy of the last records may have been counted since.
    system.users.until_counted(count, count).await;
    for id in users {
        assert_one_mail(system, *id).await;
    }
    for group in groups() {
        assert_eq!(system.kafka.dead_letters(group).len(), 0, "dead letters of {group}");
    }
}

/// Checks that the user has one delivery and got one copy of its mail. More copies are allowed if a
/// sender was killed while it sent the mail. All copies have the same Message-ID, so a mailbox can
/// recognise them (I6).
async fn assert_one_mail(system: &System, id: Uuid) {
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
        let message_id = mail.message_id.as_ref().unwrap();
        assert!(message_id.contains(&delivery.to_string()), "the Message-ID of {delivery} is {message_id}");
    }
}
