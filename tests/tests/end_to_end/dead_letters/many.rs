//! A million open letters: the process still fits into the memory of a small container, and its
//! answers take a limited time.

use std::time::{Duration, Instant};

use reqwest::Client;
use tests::http::send;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, dead_letters_of};
use tests::{System, eventually_reaches};
use topology::ANALYTICS;

use super::analytics;

const LETTERS: usize = 1_000_000;
/// Letters that the test writes at once.
const SLICE: usize = 20_000;
/// Bytes that the process may grow by: what `docs/sizing.md` says.
const GROWTH: u64 = 64 * 1024 * 1024;

/// Resident memory of analytics, in bytes.
fn resident(system: &mut System) -> u64 {
    let pid = system.processes.pid(ANALYTICS);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// T92: the process grows by at most 64 MiB, and a page with a filter that matches nothing comes in
/// a limited time, and says how far it has read.
#[tokio::test(flavor = "multi_thread")]
async fn a_million_open_letters_take_little_memory() {
    let (mut system, _) = analytics().await;
    let before = resident(&mut system);
    let topic = dead_letters_of(ANALYTICS_USERS);
    for slice in 0..LETTERS / SLICE {
        let letter = |number: usize| {
            let place = ((number % 6) as i32, number as i64);
            let headers = [("dlq-reason", "SQLSTATE 23514"), ("dlq-attempts", "1")];
            Draft {
                partition: None,
                key: Some(system.kafka.letter_key(ANALYTICS_USERS, place).into_bytes()),
                value: Some(vec![]),
                headers: headers.map(|(name, value)| (name.to_owned(), Some(value.into()))).into(),
            }
        };
        let letters: Vec<Draft> = (slice * SLICE..(slice + 1) * SLICE).map(letter).collect();
        system.kafka.write_all(&topic, &letters).await;
    }
    eventually_reaches("open dead letters", LETTERS as i64, async || {
        system.processes.dead_letters_open(ANALYTICS_USERS).await.unwrap_or(0.0) as i64
    })
    .await;
    let growth = resident(&mut system).saturating_sub(before);
    println!("a million letters: the process grew by {} KiB", growth / 1024);

    let url = |query: &str| system.processes.admin(ANALYTICS).url(&format!("/dead-letters?{query}"));
    let started = Instant::now();
    let page = send(Client::new().get(url("reason_contains=nothing+has+this"))).await.unwrap().body;
    assert!(started.elapsed() < Duration::from_secs(10), "one page took {:?}", started.elapsed());
    assert_eq!(page["letters"].as_array().unwrap().len(), 0);
    let (read, of) = (page["read"].as_i64().unwrap(), page["of"].as_i64().unwrap());
    assert!(0 < read && read < of && of == LETTERS as i64, "{page}");
    assert!(page["next"].is_string(), "{page}");
    assert!(growth <= GROWTH, "the process grew by {growth} bytes");
}
