//! Limits on how often one caller may do something, per address and per principal. Each process
//! counts by itself, so with three replicas a caller gets up to three times as much.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use clap::Args;
use governor::clock::{Clock, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::StateStore;
use governor::state::keyed::ShrinkableKeyedStateStore;
use governor::{Quota, RateLimiter};
use ipnet::IpNet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio::time::{Duration, Instant};
use uuid::Uuid;

use super::addresses::network;
use super::caller::{Caller, Principal};
use crate::platform::metrics::{LimitLabels, Metrics};
use crate::platform::problem::{Kind, problem};
use crate::platform::settings::number;

const TOO_MANY_REQUESTS: Kind = Kind::new("too-many-requests", StatusCode::TOO_MANY_REQUESTS);
/// A caller that was quiet for long may send the requests of this time at once, in seconds.
const BURST: NonZeroU32 = NonZeroU32::new(10).expect("10 is not 0");
/// How many callers one limit knows. Each needs about 50 bytes. Further ones share one count.
const CALLERS: usize = 100_000;
/// How often callers that were quiet for long are forgotten.
const CLEANING_INTERVAL: Duration = Duration::from_secs(10);

/// How often one caller may send requests.
#[derive(Args, Clone, Debug)]
pub struct RateConfig {
    /// How many requests per second one address may send, to each process of the service. It may
    /// send those of ten seconds at once. Further ones are answered with 429. IPv6 addresses with
    /// the same first 64 bits count as one. 0: no limit. If a proxy is in front of the service, set
    /// TRUSTED_PROXIES too, because all requests come from its address.
    #[arg(long, env, default_value_t = 0, value_parser = number::<u32>(0..=1_000_000))]
    pub http_rate_per_address: u32,
    /// The same, for the bearer of a token. 0: no limit. Administrators have none.
    #[arg(long, env, default_value_t = 50, value_parser = number::<u32>(0..=1_000_000))]
    pub http_rate_per_principal: u32,
    /// The addresses or networks of the proxies in front of the service, separated by commas, for
    /// example 10.0.0.0/8. The header X-Forwarded-For counts only in requests from them.
    #[arg(long, env, value_delimiter = ',', value_parser = proxy)]
    pub trusted_proxies: Vec<IpNet>,
}

fn proxy(text: &str) -> Result<IpNet, String> {
    let address = || text.parse().map(|address: IpAddr| IpNet::from(address)).ok();
    let network = text.parse().ok().or_else(address);
    network.ok_or_else(|| "it must be an address or a network, for example 10.0.0.0/8".to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    Address(IpAddr),
    Principal(Uuid),
}

/// The limits of one kind of request.
#[derive(Clone)]
pub struct Rates {
    /// The kind of request, for the metric.
    limit: &'static str,
    /// `None`: no limit.
    per_address: Option<Arc<Limiter<MonotonicClock>>>,
    per_principal: Option<Arc<Limiter<MonotonicClock>>>,
    refused: Family<LimitLabels, Counter>,
}

impl Rates {
    /// The limits of all requests.
    pub(crate) fn of_requests(config: &RateConfig, metrics: &Metrics) -> Self {
        let quota = |rate: NonZeroU32| Quota::per_second(rate).allow_burst(rate.saturating_mul(BURST));
        let limiter = |rate| Some(Arc::new(Limiter::new(quota(NonZeroU32::new(rate)?), MonotonicClock)));
        Self {
            limit: "requests",
            per_address: limiter(config.http_rate_per_address),
            per_principal: limiter(config.http_rate_per_principal),
            refused: metrics.http_requests_limited.clone(),
        }
    }

    /// Further limits: how many requests of this kind one address and one principal may send per
    /// hour. 0: no limit.
    pub fn per_hour(limit: &'static str, per_address: u32, per_principal: u32, metrics: &Metrics) -> Self {
        let limiter = |rate| Some(Arc::new(Limiter::new(Quota::per_hour(NonZeroU32::new(rate)?), MonotonicClock)));
        let refused = metrics.http_requests_limited.clone();
        Self { limit, per_address: limiter(per_address), per_principal: limiter(per_principal), refused }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// It is one too many.
    pub fn check(&self, caller: &Caller) -> Result<(), TooMany> {
        self.check_address(caller.address)?;
        caller.principal().map_or(Ok(()), |principal| self.check_principal(principal))
    }

    pub(super) fn check_address(&self, address: IpAddr) -> Result<(), TooMany> {
        self.check_key(self.per_address.as_deref(), "address", Key::Address(network(address)))
    }

    pub(super) fn check_principal(&self, principal: Principal) -> Result<(), TooMany> {
        if principal.is_admin {
            return Ok(());
        }
        self.check_key(self.per_principal.as_deref(), "principal", Key::Principal(principal.id))
    }

    fn check_key(&self, limiter: Option<&Limiter<MonotonicClock>>, per: &'static str, key: Key) -> Result<(), TooMany> {
        let Some(limiter) = limiter else { return Ok(()) };
        limiter.check(key).inspect_err(|_| {
            let labels = LimitLabels { limit: self.limit, per };
            self.refused.get_or_create(&labels).inc();
        })
    }
}

/// The caller has sent too many requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many requests")]
pub struct TooMany {
    /// When the next request is accepted.
    retry_after: Duration,
}

impl IntoResponse for TooMany {
    fn into_response(self) -> Response {
        let seconds = self.retry_after.as_millis().div_ceil(1_000).max(1);
        let detail = format!("this caller has sent too many requests; retry in {seconds} s");
        let retry_after = HeaderValue::try_from(seconds.to_string()).expect("digits are a valid header");
        ([(header::RETRY_AFTER, retry_after)], problem(TOO_MANY_REQUESTS, detail)).into_response()
    }
}

/// One limit for many callers.
struct Limiter<C: Clock> {
    limiter: RateLimiter<Key, Callers, C, NoOpMiddleware<C::Instant>>,
    cleaned_at: Mutex<Instant>,
}

impl<C: Clock> Limiter<C> {
    fn new(quota: Quota, clock: C) -> Self {
        let limiter = RateLimiter::new(quota, Callers::default(), clock);
        Self { limiter, cleaned_at: Mutex::new(Instant::now()) }
    }

    fn check(&self, key: Key) -> Result<(), TooMany> {
        self.clean();
        let checked = self.limiter.check_key(&key);
        checked.map_err(|refused| TooMany { retry_after: refused.wait_time_from(self.limiter.clock().now()) })
    }

    /// Forgets the callers that have not used anything of their limit.
    fn clean(&self) {
        let Ok(mut cleaned_at) = self.cleaned_at.try_lock() else { return };
        if cleaned_at.elapsed() >= CLEANING_INTERVAL {
            *cleaned_at = Instant::now();
            self.limiter.retain_recent();
        }
    }
}

/// The counts of the callers, in a bounded memory.
#[derive(Default)]
struct Callers(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    of_callers: HashMap<Key, Nanos>,
    /// The count that all further callers share.
    of_others: Option<Nanos>,
}

impl Callers {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().expect("no thread panics while it holds the lock")
    }
}

impl StateStore for Callers {
    type Key = Key;

    fn measure_and_replace<T, F, E>(&self, key: &Key, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut counts = self.lock();
        let known = counts.of_callers.get(key).copied();
        let has_place = known.is_some() || counts.of_callers.len() < CALLERS;
        let (result, count) = measure(if has_place { known } else { counts.of_others })?;
        if has_place {
            counts.of_callers.insert(*key, count);
        } else {
            counts.of_others = Some(count);
        }
        Ok(result)
    }
}

impl ShrinkableKeyedStateStore<Key> for Callers {
    fn retain_recent(&self, drop_below: Nanos) {
        self.lock().of_callers.retain(|_, count| *count > drop_below);
    }

    fn len(&self) -> usize {
        self.lock().of_callers.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use governor::clock::FakeRelativeClock;

    use super::*;

    fn key(number: usize) -> Key {
        Key::Address(Ipv4Addr::from_bits(u32::try_from(number).unwrap()).into())
    }

    fn limiter(quota: Quota) -> (Limiter<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        (Limiter::new(quota, clock.clone()), clock)
    }

    /// How many requests of a caller are accepted at once.
    fn accepted(limiter: &Limiter<FakeRelativeClock>, key: Key) -> usize {
        (0..1_000).take_while(|_| limiter.check(key).is_ok()).count()
    }

    #[test]
    fn a_caller_gets_its_rate_and_does_not_take_that_of_another() {
        let (limiter, clock) = limiter(Quota::per_hour(NonZeroU32::new(20).unwrap()));
        assert_eq!(accepted(&limiter, key(1)), 20);
        let refused = limiter.check(key(1)).unwrap_err();
        assert_eq!(refused, TooMany { retry_after: Duration::from_secs(180) });
        assert_eq!(accepted(&limiter, key(2)), 20);
        clock.advance(refused.retry_after);
        assert_eq!(accepted(&limiter, key(1)), 1);
    }

    #[test]
    fn the_memory_is_bounded_and_quiet_callers_are_forgotten() {
        let (limiter, clock) = limiter(Quota::per_second(NonZeroU32::new(2).unwrap()));
        for number in 0..CALLERS + 3 {
            let accepted = limiter.check(key(number)).is_ok();
            assert_eq!(accepted, number < CALLERS + 2, "caller {number}");
        }
        assert_eq!(limiter.limiter.len(), CALLERS);
        assert_eq!(accepted(&limiter, key(0)), 1, "a known caller keeps its own count");
        clock.advance(Duration::from_secs(3));
        limiter.limiter.retain_recent();
        assert_eq!(limiter.limiter.len(), 0);
    }

    #[test]
    fn a_proxy_is_an_address_or_a_network() {
        assert_eq!(proxy("10.0.0.0/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(proxy("10.0.0.1").unwrap().to_string(), "10.0.0.1/32");
        assert_eq!(proxy("fd00::1").unwrap().to_string(), "fd00::1/128");
        for text in ["", "10.0.0.0/33", "proxy.example.com", "10.0.0.0/8 "] {
            assert!(proxy(text).unwrap_err().contains("for example 10.0.0.0/8"), "{text}");
        }
    }
}
