//! Clocks that are wrong. Nothing is ordered, deduplicated or leased by the clock of a service.

use reqwest::StatusCode;
use testbed::smtp_sink::{Fault, Stage};
use tests::System;
use tests::clock::Clock;
use tests::http::send_with_retries;
use tests::services::USER_EVENTS;
use tests::users::address;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use topology::{SERVICES, Service, USER};

const HOUR: i64 = 3600;

/// Starts a service that has this clock, without waiting.
fn start(system: &mut System, service: Service, clock: &Clock) {
    system.processes.spawn_with(service, &borrowed(&clock.settings()));
}

fn borrowed(settings: &[(String, String)]) -> Vec<(&str, &str)> {
    settings.iter().map(|(name, value)| (&**name, &**value)).collect()
}

/// T39, I3 to I6, I8: the clocks of all services are wrong, each in its own direction, and leap to the other side under load.
/// More than an hour, because that is what Kafka by default lets a producer's clock be fast by.
#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_are_wrong_and_leap_change_nothing() {
    let mut system = System::empty().await;
    let clocks = [2, -2, 2, -2].map(|hours| Clock::off_by(hours * HOUR));
    for (service, clock) in SERVICES.into_iter().zip(&clocks) {
        start(&mut system, service, clock);
    }
    system.processes.until_ready(&SERVICES).await;
    let judge = system.judge().await;
    let load = system.load(4);
    load.until_accepted(12).await;
    for (clock, hours) in clocks.iter().zip([-2, 2, -2, 2]) {
        clock.jump_to(hours * HOUR);
    }
    load.until_accepted(12).await;
    let answers = load.end().await;
    assert!(answers.refused().is_empty(), "{:?}", answers.refused());
    judge.check_with(&mut system, &answers).await;
    let (fast, slow) = hours_off(&system);
    assert!(fast && slow, "the user service's clock was fast: {fast}, and slow: {slow}");
}

/// Whether there are facts that bear a time of at least an hour ahead, and such of an hour ago.
fn hours_off(system: &System) -> (bool, bool) {
    let facts = system.kafka.read(USER_EVENTS);
    let times = facts.iter().map(|fact| OffsetDateTime::parse(fact.header("ce_time").unwrap(), &Rfc3339).unwrap());
    let off: Vec<i64> = times.map(|time| (time - OffsetDateTime::now_utc()).whole_hours()).collect();
    (off.iter().any(|hours| *hours >= 1), off.iter().any(|hours| *hours <= -1))
}

/// T39: what lasts a time lasts it by the database's clock. A mail that is in hand keeps its lease, though the clocks of its
/// service's two senders say that two days have passed; and an answer is kept for a retry, though its day is over by the
/// service's clock.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_leaps_ends_no_lease_and_forgets_no_answer() {
    let clocks = [Clock::off_by(0), Clock::off_by(0)];
    let settings = clocks[0].settings();
    let mut system = System::start_mailing(&borrowed(&settings)).await;
    start(&mut system, USER, &clocks[1]);
    system.processes.until_ready(&[USER]).await;
    system.mail.fail(Fault::Slow { ms: 5_000, stage: Stage::Rcpt });
    let email = address();
    let first = send_with_retries(|| system.users.registration(&email, Some("a key"))).await;
    assert_eq!(first.status, StatusCode::CREATED);
    system.stores.until_delivery_states(first.id(), "pending sending").await;
    for clock in &clocks {
        clock.jump_to(48 * HOUR);
    }
    assert_eq!(system.users.post(&email, Some("a key")).await.unwrap(), first, "the stored answer");
    system.users.until_mailed(first.id()).await;
    assert_eq!(system.stores.delivery_states(first.id()).await, "pending sending sent");
}
