//! The queries of the analytics service.

use serde_json::{Value, json};
use tests::record::Draft;
use tests::services::USER_EVENTS;
use tests::{System, eventually_eq};
use topology::{ANALYTICS, EMAIL, USER};
use uuid::Uuid;

/// Times of registrations, just before and after the beginning of an hour and of a day.
const TIMES: [&str; 5] = [
    "2026-03-01T11:59:59.999999Z",
    "2026-03-01T12:00:00Z",
    "2026-03-01T12:59:59Z",
    "2026-03-01T13:00:00Z",
    "2026-03-02T00:00:00Z",
];

async fn query_registrations(system: &System, query: &str) -> Value {
    system.users.get(ANALYTICS, &format!("/registrations?{query}")).await.unwrap().body
}

fn buckets(buckets: &[(&str, i64)]) -> Value {
    buckets.iter().map(|(start, count)| json!({ "start": start, "registrations": count })).collect()
}

/// Hours and days begin in UTC. `from` is inclusive, `to` is exclusive. The oldest bucket comes
/// first. A malformed query gets status 400.
#[tokio::test(flavor = "multi_thread")]
async fn analytics_counts_registrations_per_hour_and_per_day_within_a_range() {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let registered_at = |time: &&str| {
        Draft::user_event("user.registered", Uuid::now_v7(), 1).replace_header("ce_time", time.as_bytes())
    };
    let facts: Vec<Draft> = TIMES.iter().map(registered_at).collect();
    system.kafka.write_all(USER_EVENTS, &facts).await;
    eventually_eq("the number of registrations", Some(5), async || system.users.registrations().await).await;

    let days = [("2026-03-01T00:00:00Z", 4), ("2026-03-02T00:00:00Z", 1)];
    assert_eq!(query_registrations(&system, "bucket=day").await, buckets(&days));
    let hours = [
        ("2026-03-01T11:00:00Z", 1),
        ("2026-03-01T12:00:00Z", 2),
        ("2026-03-01T13:00:00Z", 1),
        ("2026-03-02T00:00:00Z", 1),
    ];
    assert_eq!(query_registrations(&system, "bucket=hour").await, buckets(&hours));
    let one_hour = "bucket=hour&from=2026-03-01T12:00:00Z&to=2026-03-01T13:00:00Z";
    assert_eq!(query_registrations(&system, one_hour).await, buckets(&hours[1..2]));
    let without_end = "bucket=hour&from=2026-03-01T13:00:00Z";
    assert_eq!(query_registrations(&system, without_end).await, buckets(&hours[2..]));
    for malformed in ["bucket=week", "bucket=hour&from=yesterday", "bucket=day&limit=7", ""] {
        let answer = system.users.get(ANALYTICS, &format!("/registrations?{malformed}")).await.unwrap();
        assert_eq!(answer.status.as_u16(), 400, "{malformed}: {answer:?}");
        assert_eq!(answer.content_type.as_deref(), Some("application/problem+json"), "{malformed}: {answer:?}");
    }
    // In UTC the first three are in the years 10000 and 0.
    for time in ["9999-12-31T23:59:59.9999999-05:00", "0001-01-01T00:00:00%2B01:00", "0000-06-01T00:00:00Z", "x", ""] {
        for field in ["from", "to"] {
            let answer =
                system.users.get(ANALYTICS, &format!("/registrations?bucket=day&{field}={time}")).await.unwrap();
            assert_eq!(answer.status.as_u16(), 400, "{field}={time}: {answer:?}");
            let detail = answer.body["detail"].as_str().unwrap();
            assert!(detail.starts_with(&format!("{field}: ")), "{field}={time}: {detail}");
        }
    }
    let widest = "bucket=day&from=0001-01-01T00:00:00Z&to=9999-12-31T23:59:59.9999999Z";
    assert_eq!(query_registrations(&system, widest).await, buckets(&days));
}
