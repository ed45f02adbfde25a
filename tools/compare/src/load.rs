//! The clients. They send registrations at intended times, however late earlier answers come (an
//! open loop), and read the profiles of some of the users.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::tests::checker::{Operation, Outcome, Request};
use ::tests::users::address;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

/// How long a client waits for one answer. Both sides end a request after 10 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(12);
/// The pause of a client that repeats its request.
const REPEAT_PAUSE: Duration = Duration::from_secs(1);
/// One of so many users is read without `min_version`, and another one with it.
const READ_ONE_IN: usize = 10;
/// How long a reader waits for a profile.
const READ_LIMIT: Duration = Duration::from_secs(5);
const READ_PAUSE: Duration = Duration::from_millis(5);

#[derive(Clone, Debug)]
pub struct Target {
    /// `POST` registers a user.
    pub users: String,
    /// `GET` with an id reads a profile.
    pub profiles: String,
}

/// One registration, as its client saw it.
#[derive(Clone, Debug)]
pub struct Registration {
    pub email: String,
    /// Whether the client repeats its request while it has no answer, or one that names a missing
    /// effect. Every other client gives up.
    pub repeats: bool,
    /// Seconds from the start of the load to the intended start of the request.
    pub intended: f64,
    /// Seconds from the intended start to the answer 201. `None`: it never came.
    pub answered: Option<f64>,
    /// When it came, in milliseconds since 1970.
    pub answered_at: Option<u64>,
    pub user: Option<Uuid>,
    /// Whether an answer said that an effect is missing.
    pub told_missing: bool,
    /// What the checker of the fault tests has to know.
    pub operations: Vec<Operation>,
    pub read: Option<Read>,
}

/// What the reader of a new user's profile saw.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    pub with_version: bool,
    /// Whether the first read returned the profile.
    pub found_at_once: bool,
    /// Milliseconds from the answer to the registration until a read returned the profile.
    pub readable: Option<f64>,
}

/// Sends registrations in the background: so many per second for so long, one part after another.
/// Every second client repeats its request while it has no answer, or one that names a missing
/// effect, for the time `repeat`.
pub fn start(target: Target, parts: &[(f64, Duration)], repeat: Duration) -> JoinHandle<Vec<Registration>> {
    let target = Arc::new(target);
    let times = times(parts);
    tokio::spawn(async move {
        let client = Client::builder().no_proxy().timeout(ANSWER_LIMIT).build().expect("the settings are valid");
        let start = Instant::now();
        let mut requests = JoinSet::new();
        for (number, intended) in times.into_iter().enumerate() {
            let at = start + intended;
            sleep_until(at).await;
            let one = One { client: client.clone(), target: Arc::clone(&target), number, at, repeat };
            requests.spawn(one.run(intended.as_secs_f64()));
        }
        requests.join_all().await
    })
}

/// Sends registrations one after another from each of so many clients (a closed loop), and returns
/// how many were answered.
pub async fn saturate(target: &Target, clients: usize, lasting: Duration) -> usize {
    let client = Client::builder().no_proxy().timeout(ANSWER_LIMIT).build().expect("the settings are valid");
    let end = Instant::now() + lasting;
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let client = client.clone();
        let users = target.users.clone();
        tasks.spawn(async move {
            let mut answered = 0;
            while Instant::now() < end {
                answered += usize::from(matches!(
                    post(&client, &users, &address(), &key()).await,
                    Ok((StatusCode::CREATED, _))
                ));
            }
            answered
        });
    }
    tasks.join_all().await.into_iter().sum()
}

fn times(parts: &[(f64, Duration)]) -> Vec<Duration> {
    let mut times = vec![];
    let mut begin = 0.0;
    for (rate, lasting) in parts {
        let requests = (rate * lasting.as_secs_f64()) as u32;
        times.extend((0..requests).map(|number| Duration::from_secs_f64(begin + f64::from(number) / rate)));
        begin += lasting.as_secs_f64();
    }
    times
}

fn key() -> String {
    Uuid::now_v7().to_string()
}

struct One {
    client: Client,
    target: Arc<Target>,
    number: usize,
    /// The intended start.
    at: Instant,
    repeat: Duration,
}

impl One {
    async fn run(self, intended: f64) -> Registration {
        let mut registration = Registration {
            email: address(),
            repeats: self.number.is_multiple_of(2),
            intended,
            answered: None,
            answered_at: None,
            user: None,
            told_missing: false,
            operations: vec![],
            read: None,
        };
        let key = key();
        loop {
            let answer = post(&self.client, &self.target.users, &registration.email, &key).await;
            let (outcome, user) = self.note(&answer, &mut registration);
            let is_complete = registration.answered.is_some() && !names_missing(&answer);
            let request = Request::Register { email: registration.email.clone() };
            registration.operations.push(Operation { user, request, outcome });
            // Before any repetition: also a client that repeats its request may read at once.
            if let Some(user) = registration.user
                && registration.read.is_none()
            {
                registration.read = self.read(user).await;
            }
            if is_complete || !registration.repeats || self.at.elapsed() > self.repeat {
                break;
            }
            sleep(REPEAT_PAUSE).await;
        }
        registration
    }

    fn note(
        &self,
        answer: &reqwest::Result<(StatusCode, Value)>,
        registration: &mut Registration,
    ) -> (Outcome, Option<Uuid>) {
        match answer {
            Ok((StatusCode::CREATED, body)) => {
                registration.answered.get_or_insert(self.at.elapsed().as_secs_f64());
                registration.answered_at.get_or_insert(now());
                registration.user = body["id"].as_str().and_then(|id| id.parse().ok());
                registration.told_missing |= names_missing(answer);
                (Outcome::Done(body["version"].as_i64().unwrap_or(0)), registration.user)
            }
            Ok((status, _)) if status.is_client_error() => (Outcome::Refused(status.as_u16()), None),
            _ => (Outcome::Unknown, None),
        }
    }

    /// Reads the profile as soon as the registration is answered.
    async fn read(&self, user: Uuid) -> Option<Read> {
        // An odd step, so that clients of both kinds read.
        let with_version = match self.number % (READ_ONE_IN + 1) {
            0 => false,
            5 => true,
            _ => return None,
        };
        let query = if with_version { "?min_version=1" } else { "" };
        let url = format!("{}/{user}{query}", self.target.profiles);
        let answered = Instant::now();
        let mut first = None;
        loop {
            let found = self.client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success());
            let found_at_once = *first.get_or_insert(found);
            let milliseconds = answered.elapsed().as_secs_f64() * 1000.0;
            if found || answered.elapsed() > READ_LIMIT {
                return Some(Read { with_version, found_at_once, readable: found.then_some(milliseconds) });
            }
            sleep(READ_PAUSE).await;
        }
    }
}

fn names_missing(answer: &reqwest::Result<(StatusCode, Value)>) -> bool {
    let missing = answer.as_ref().ok().and_then(|(_, body)| body["missing"].as_array());
    missing.is_some_and(|missing| !missing.is_empty())
}

async fn post(client: &Client, users: &str, email: &str, key: &str) -> reqwest::Result<(StatusCode, Value)> {
    let body = json!({ "email": email, "display_name": "Ada Lovelace" });
    let answer = client.post(users).header("idempotency-key", key).json(&body).send().await?;
    let status = answer.status();
    Ok((status, serde_json::from_slice(&answer.bytes().await?).unwrap_or(Value::Null)))
}

/// Milliseconds since 1970, as the mail server and Postgres note times on this machine.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    since.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_load_follow_each_other() {
        let seconds = Duration::from_secs_f64;
        let times = times(&[(2.0, seconds(1.0)), (4.0, seconds(0.5))]);
        assert_eq!(times, [0.0, 0.5, 1.0, 1.25].map(seconds));
    }
}
