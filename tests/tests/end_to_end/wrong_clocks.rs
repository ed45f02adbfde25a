//! Services whose clocks are wrong. Ordering, deduplication and leases do not depend on a service's
//! clock.

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

/// Starts a service with this clock, without waiting until it is ready.
fn spawn_with_clock(system: &mut System, service: Service, clock: &Clock) {
    system.processes.spawn_with(service, &borrowed(&clock.settings()));
}

fn borrowed(settings: &[(String, String)]) -> Vec<(&str, &str)> {
    settings.iter().map(|(name, value)| (&**name, &**value)).collect()
}

/// T39, I3 to I6, I8: the clocks of the services are two hours fast or slow and jump to the other
/// side under load. By default Kafka accepts a producer's clock that is up to one hour fast, so the
/// clocks are wrong by more than that.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_and_jumping_clocks_break_no_invariant() {
    let mut system = System::empty().await;
    let fast_and_slow = || [2, -2].into_iter().cycle();
    let clocks: Vec<Clock> = fast_and_slow().take(SERVICES.len()).map(|hours| Clock::off_by(hours * HOUR)).collect();
    for (service, clock) in SERVICES.into_iter().zip(&clocks) {
        spawn_with_clock(&mut system, service, clock);
    }
    system.processes.until_ready(&SERVICES).await;
    let judge = system.judge().await;
    let load = system.load(4);
    load.until_accepted(12).await;
    for (clock, hours) in clocks.iter().zip(fast_and_slow()) {
        clock.jump_to(-hours * HOUR);
    }
    load.until_accepted(12).await;
    let answered = load.end().await;
    assert!(answered.refused().is_empty(), "{:?}", answered.refused());
    judge.check_with(&mut system, &answered).await;
    let errors = clock_errors_of_facts(&system);
    assert!(errors.iter().any(|hours| *hours >= 1), "no fact from a fast clock: {errors:?}");
    assert!(errors.iter().any(|hours| *hours <= -1), "no fact from a slow clock: {errors:?}");
}

/// How many hours the time of each fact is ahead of the test's clock.
fn clock_errors_of_facts(system: &System) -> Vec<i64> {
    let facts = system.kafka.read(USER_EVENTS);
    let times = facts.iter().map(|fact| OffsetDateTime::parse(fact.header("ce_time").unwrap(), &Rfc3339).unwrap());
    times.map(|time| (time - OffsetDateTime::now_utc()).whole_hours()).collect()
}

/// T39: durations are measured by the database's clock. The clocks of the email and the user
/// service jump by two days. A mail in progress keeps its lease, and a stored answer is still
/// returned.
#[tokio::test(flavor = "multi_thread")]
async fn a_jumping_clock_ends_no_lease_and_expires_no_stored_answer() {
    let email_clock = Clock::off_by(0);
    let user_clock = Clock::off_by(0);
    let mut system = System::start_mailing(&borrowed(&email_clock.settings())).await;
    spawn_with_clock(&mut system, USER, &user_clock);
    system.processes.until_ready(&[USER]).await;
    system.mail.fail(Fault::Slow { ms: 5_000, stage: Stage::Rcpt });
    let email = address();
    let first = send_with_retries(|| system.users.registration(&email, Some("a key"))).await;
    assert_eq!(first.status, StatusCode::CREATED);
    system.stores.until_delivery_states(first.id(), "pending sending").await;
    for clock in [&email_clock, &user_clock] {
        clock.jump_to(48 * HOUR);
    }
    let retry = system.users.post(&email, Some("a key")).await.unwrap();
    assert_eq!(retry, first, "the retry must get the stored answer");
    system.users.until_mailed(first.id()).await;
    assert_eq!(system.stores.delivery_states(first.id()).await, "pending sending sent");
}
