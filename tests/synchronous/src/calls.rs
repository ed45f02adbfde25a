//! The calls of a registration: the mail, analytics and the cache.

use clap::{Args, ValueEnum};
use futures::future::join_all;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use reqwest::{Client, Method};
use serde_json::{Value, json};
use tokio::time::{Duration, sleep, timeout};

use crate::breaker::Breaker;
use crate::mailer::Mailer;
use crate::receiver::Receiver;
use crate::registrations::User;
use crate::waybill::smtp::SmtpConfig;

/// How long a call may take without `resilient`. All of them, one after another, take less than the
/// time-out of a request.
const CALL_LIMIT: Duration = Duration::from_secs(2);
/// How long an attempt may take with `resilient`.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(1);
/// The pauses before the first and the second retry. Half of each pause is random, so that requests
/// that failed together are not repeated together.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(300)];
/// Connections per receiver that stay open between calls.
const IDLE_CONNECTIONS: usize = 64;

#[derive(Args)]
pub struct CallsConfig {
    /// How the receivers are called.
    #[arg(long, env, value_enum)]
    variant: Variant,
    /// URL of the role `analytics`.
    #[arg(long, env)]
    analytics_url: String,
    /// URL of the role `cache`.
    #[arg(long, env)]
    cache_url: String,
    #[command(flatten)]
    smtp: SmtpConfig,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Variant {
    /// One call after another.
    Sequential,
    /// All calls at the same time.
    Parallel,
    /// All calls at the same time, with short time-outs, two retries and a circuit breaker.
    Resilient,
    /// As `resilient`. Missing calls are made again after the answer.
    Background,
}

impl Variant {
    fn is_resilient(self) -> bool {
        matches!(self, Self::Resilient | Self::Background)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    receiver: Receiver,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Succeeded,
    /// The last attempt failed.
    Failed,
    /// An attempt failed, and another one followed.
    Retried,
    /// The breaker was open.
    Refused,
}

pub struct Calls {
    variant: Variant,
    client: Client,
    mailer: Mailer,
    analytics: String,
    cache: String,
    /// One for each receiver, in the order of [`Receiver::ALL`].
    breakers: [Breaker; Receiver::ALL.len()],
    counts: Family<Labels, Counter>,
}

impl Calls {
    pub fn new(config: &CallsConfig, metrics: &mut Registry) -> anyhow::Result<Self> {
        let counts = Family::<Labels, Counter>::default();
        metrics.register("calls", "Calls of receivers, by their outcome", counts.clone());
        Ok(Self {
            variant: config.variant,
            client: Client::builder().no_proxy().pool_max_idle_per_host(IDLE_CONNECTIONS).build()?,
            mailer: Mailer::new(&config.smtp)?,
            analytics: config.analytics_url.clone(),
            cache: config.cache_url.clone(),
            breakers: Default::default(),
            counts,
        })
    }

    /// Whether missing calls are made again after the answer.
    pub fn continue_after_the_answer(&self) -> bool {
        self.variant == Variant::Background
    }

    /// Whether calls of all these receivers would be refused now.
    pub fn refuses(&self, receivers: &[Receiver]) -> bool {
        receivers.iter().all(|receiver| self.breakers[*receiver as usize].refuses())
    }

    /// Calls these receivers. Returns those that are not known to have the registration.
    pub async fn make(&self, user: &User, receivers: &[Receiver]) -> Vec<Receiver> {
        let mut missing = vec![];
        if self.variant == Variant::Sequential {
            for receiver in receivers {
                let succeeded = self.call(user, *receiver).await;
                missing.extend((!succeeded).then_some(*receiver));
            }
            return missing;
        }
        let outcomes = join_all(receivers.iter().map(|receiver| self.call(user, *receiver))).await;
        for (receiver, succeeded) in receivers.iter().zip(outcomes) {
            missing.extend((!succeeded).then_some(*receiver));
        }
        missing
    }

    /// Calls a receiver, with retries if the variant has them. Returns whether it has the
    /// registration.
    async fn call(&self, user: &User, receiver: Receiver) -> bool {
        let is_resilient = self.variant.is_resilient();
        let (limit, pauses) = if is_resilient { (ATTEMPT_LIMIT, &PAUSES[..]) } else { (CALL_LIMIT, &[][..]) };
        let breaker = is_resilient.then(|| &self.breakers[receiver as usize]);
        let mut pauses = pauses.iter();
        loop {
            if breaker.is_some_and(|breaker| !breaker.permits()) {
                self.count(receiver, Outcome::Refused);
                return false;
            }
            let attempt = timeout(limit, self.attempt(user, receiver)).await;
            let attempt = attempt.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")));
            let Err(reason) = attempt else {
                breaker.inspect(|breaker| breaker.succeeded());
                self.count(receiver, Outcome::Succeeded);
                return true;
            };
            breaker.inspect(|breaker| breaker.failed());
            let Some(pause) = pauses.next() else {
                self.count(receiver, Outcome::Failed);
                tracing::warn!(user.id = %user.id, receiver = receiver.name(), reason, "cannot call a receiver");
                return false;
            };
            self.count(receiver, Outcome::Retried);
            sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        }
    }

    async fn attempt(&self, user: &User, receiver: Receiver) -> Result<(), String> {
        let User { id, version, email, display_name } = user;
        match receiver {
            Receiver::Mail => self.mailer.send(user).await,
            Receiver::Analytics => {
                self.send(Method::PUT, format!("{}/registrations/{id}", self.analytics), json!({})).await
            }
            Receiver::Cache => {
                let profile = json!({ "version": version, "email": email, "display_name": display_name });
                self.send(Method::PUT, format!("{}/profiles/{id}", self.cache), profile).await
            }
        }
    }

    async fn send(&self, method: Method, url: String, body: Value) -> Result<(), String> {
        let answer = self.client.request(method, url).json(&body).send().await;
        // The text of an error contains the URL, and no personal data.
        let answer = answer.map_err(|error| error.to_string())?;
        let status = answer.status();
        if status.is_success() { Ok(()) } else { Err(format!("status {status}")) }
    }

    fn count(&self, receiver: Receiver, outcome: Outcome) {
        self.counts.get_or_create(&Labels { receiver, outcome }).inc();
    }
}
