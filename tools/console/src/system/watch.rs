//! Asks all processes of all services, again and again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use reqwest::Client;
use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use topology::Service;

use super::processes::{Answer, Process, ask, client};
use crate::config::ServiceAddress;

/// How often the processes are asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// How many processes of a service are asked at most.
const MAX_REPLICAS: usize = 32;

/// The answers of all processes at one moment.
#[derive(Clone, Debug)]
pub struct Survey {
    pub at: Instant,
    pub processes: Vec<Process>,
}

impl Survey {
    /// The admin port of a process of this service that answers.
    pub fn address(&self, service: Service) -> Option<SocketAddr> {
        self.answers(service).map(|(address, _)| address).next()
    }

    /// The largest value of a metric that every process of a service reports about the same thing.
    pub fn largest(&self, service: Service, metric: &str) -> Option<f64> {
        self.answers(service).filter_map(|(_, answer)| answer.metrics.max(metric, &[])).reduce(f64::max)
    }

    fn answers(&self, service: Service) -> impl Iterator<Item = (SocketAddr, &Answer)> {
        let of_service = self.processes.iter().filter(move |process| process.service == service.name);
        of_service.filter_map(|process| Some((process.address, process.answer.as_ref()?)))
    }
}

/// Sends the survey of each second. Never ends. `further` are processes that were started later,
/// under addresses of their own.
pub async fn watch(
    services: Vec<ServiceAddress>,
    further: watch::Receiver<Vec<ServiceAddress>>,
    surveys: watch::Sender<Arc<Survey>>,
) -> anyhow::Result<()> {
    let client = client()?;
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let further = further.borrow().clone();
        let all = services.iter().chain(&further);
        let asked = join_all(all.map(|service| replicas(&client, service))).await;
        surveys.send_replace(Arc::new(Survey { at: Instant::now(), processes: asked.concat() }));
    }
}

/// Asks all processes behind the name of a service. If the name has no address, the service is
/// shown as one process that does not answer.
async fn replicas(client: &Client, service: &ServiceAddress) -> Vec<Process> {
    let ServiceAddress { service, host, port } = service;
    let found = lookup_host((host.as_str(), *port)).await;
    let mut addresses: Vec<SocketAddr> = found.map(Iterator::collect).unwrap_or_default();
    addresses.sort();
    addresses.dedup();
    addresses.truncate(MAX_REPLICAS);
    if addresses.is_empty() {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], *port));
        return vec![Process { service: service.clone(), address: nowhere, answer: None }];
    }
    join_all(addresses.into_iter().map(|address| ask(client, service.clone(), address))).await
}
