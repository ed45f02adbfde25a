//! Requests that are refused or fail, traces that are lost, and a pause that an operator forgets.

use reqwest::Method;
use tests::alerts::SCRAPES;
use tests::otlp::Otlp;
use tests::{System, eventually};
use tokio::net::TcpStream;
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};
use uuid::Uuid;

use super::{record, until};

/// Requests to each service between two scrapes.
const REQUESTS: usize = 10;

/// I12: the cache has lost its Valkey, callers of analytics occupy all connections, one caller
/// floods the email service, whose consumers an operator has paused, and the collector of traces is
/// gone. Before that, while all is well, no alert fires.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_fail_traces_that_are_lost_and_consumers_that_are_paused() {
    let mut system = System::empty().await;
    let mut valkey = system.own_valkey().await;
    let otlp = Otlp::start().await;
    for (name, value) in [("OTEL_BSP_SCHEDULE_DELAY", "100"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "200")] {
        system.processes.set(name, value);
    }
    system.processes.set_own(USER, &[("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.url())]);
    system.processes.set_own(EMAIL, &[("HTTP_RATE_PER_ADDRESS", "1".to_owned())]);
    let limits = [("HTTP_CONNECTIONS", "4"), ("HTTP_REQUESTS", "4"), ("HTTP_READ_TIMEOUT_MS", "120000")];
    system.processes.set_own(ANALYTICS, &limits.map(|(name, value)| (name, value.to_owned())));
    system.processes.start_all().await;
    let user = system.users.register().await;
    system.users.until_cached(user, 1).await;
    let Some(mut recording) = record(&system, &SERVICES).await else { return };
    for _ in 0..SCRAPES {
        request(&system, USER, "/users").await;
        request(&system, CACHE, "/profiles").await;
        recording.scrapes(1).await;
    }
    recording.fault_begins();

    drop(otlp);
    valkey.component.process.kill();
    let address = system.users.url(ANALYTICS, "").replace("http://", "");
    let mut occupied = vec![];
    for _ in 0..4 {
        occupied.push(TcpStream::connect(&address).await.unwrap());
    }
    system.processes.run(EMAIL, &["pause-consumers", "--reason", "a test"]).await.unwrap();
    until(&system, EMAIL, "consumer_paused", &[], 2.0).await;
    recording.fault_shows();
    for _ in 0..2 * SCRAPES {
        for _ in 0..REQUESTS {
            request(&system, USER, "/users").await;
            request(&system, CACHE, "/profiles").await;
            request(&system, ANALYTICS, "/users").await;
            request(&system, EMAIL, "/users").await;
        }
        recording.scrapes(1).await;
    }
    recording.fault_ends();

    drop(occupied);
    system.processes.run(EMAIL, &["resume-consumers"]).await.unwrap();
    until(&system, EMAIL, "consumer_paused", &[], 0.0).await;
    valkey.component.restart().await.unwrap();
    let otlp = Otlp::start().await;
    system.processes.set_own(USER, &[("OTEL_EXPORTER_OTLP_ENDPOINT", otlp.url())]);
    system.processes.start(&[USER]).await;
    eventually("the cache answers", async || {
        system.users.profile(user, None).await.is_ok_and(|answer| answer.status.is_success()).then_some(())
    })
    .await;
    for _ in 0..SCRAPES {
        request(&system, CACHE, "/profiles").await;
        recording.scrapes(1).await;
    }
    recording.check(&["CallersLimited", "ConnectionsRefused", "ConsumerPaused", "RequestsFail", "TracesLost"]);
}

/// Asks for a user who does not exist. Any answer will do, and none.
async fn request(system: &System, service: Service, path: &str) {
    let _ = system.users.request(Method::GET, service, &format!("{path}/{}", Uuid::now_v7())).send().await;
}
