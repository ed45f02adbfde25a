//! What analytics answers: counted by hours and by days, of a range.

use serde_json::{Value, json};
use tests::record::Draft;
use tests::services::USER_EVENTS;
use tests::{System, eventually_eq};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

const TIMES: [&str; 5] = [
    "2026-03-01T11:59:59.999999Z",
    "2026-03-01T12:00:00Z",
    "2026-03-01T12:59:59Z",
    "2026-03-01T13:00:00Z",
    "2026-03-02T00:00:00Z",
];

async fn asked(system: &System, query: &str) -> Value {
    system.users.get(ANALYTICS, &format!("/registrations?{query}")).await.unwrap().body
}

fn buckets(buckets: &[(&str, i64)]) -> Value {
    buckets.iter().map(|(start, count)| json!({ "start": start, "registrations": count })).collect()
}

/// Hours and days begin in UTC; `from` belongs to the range, `to` does not; the oldest comes first.
#[tokio::test(flavor = "multi_thread")]
async fn registrations_are_counted_by_hours_and_by_days_of_a_range() {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let at = |time: &&str| {
        Draft::user_event("user.registered", Uuid::now_v7(), 1).replace_header("ce_time", time.as_bytes())
    };
    system.kafka.write_all(USER_EVENTS, &TIMES.iter().map(at).collect::<Vec<_>>()).await;
    eventually_eq("counted", Some(5), async || system.users.registrations().await).await;

    let days = [("2026-03-01T00:00:00Z", 4), ("2026-03-02T00:00:00Z", 1)];
    assert_eq!(asked(&system, "bucket=day").await, buckets(&days));
    let hours = [
        ("2026-03-01T11:00:00Z", 1),
        ("2026-03-01T12:00:00Z", 2),
        ("2026-03-01T13:00:00Z", 1),
        ("2026-03-02T00:00:00Z", 1),
    ];
    assert_eq!(asked(&system, "bucket=hour").await, buckets(&hours));
    let range = "bucket=hour&from=2026-03-01T12:00:00Z&to=2026-03-01T13:00:00Z";
    assert_eq!(asked(&system, range).await, buckets(&hours[1..2]));
    assert_eq!(asked(&system, "bucket=hour&from=2026-03-01T13:00:00Z").await, buckets(&hours[2..]));
    for wrong in ["bucket=week", "bucket=hour&from=yesterday", "bucket=day&limit=7", ""] {
        let answer = system.users.get(ANALYTICS, &format!("/registrations?{wrong}")).await.unwrap();
        let content_type = answer.content_type.as_deref();
        assert_eq!(
            (answer.status.as_u16(), content_type),
            (400, Some("application/problem+json")),
            "{wrong}: {answer:?}"
        );
    }
}
