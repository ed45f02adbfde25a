//! Clients that keep the user service busy, even while it is killed and started again. They record
//! every answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::json;
use tokio::task::JoinSet;
use topology::{CACHE, USER};
use uuid::Uuid;

use crate::checker::{Operation, Outcome, Request};
use crate::http::send;
use crate::system::System;
use crate::users::address;
use crate::waiting::eventually;

/// The pause of a client after each request. It leaves processor time to the services on two cores.
const PAUSE: Duration = Duration::from_millis(10);
/// How long a client waits for an answer. A frozen service sends none, so the outcome is unknown.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How often a registration without an answer is sent, with the same key.
const TRIES: usize = 3;

/// The requests of the clients, with the outcome of each.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    pub operations: Vec<Operation>,
}

impl Answers {
    /// The users whose registration was accepted.
    pub fn accepted(&self) -> Vec<Uuid> {
        let done = self.operations.iter().filter(|operation| matches!(operation.outcome, Outcome::Done(_)));
        let registered = done.filter(|operation| matches!(operation.request, Request::Register { .. }));
        registered.filter_map(|operation| operation.user).collect()
    }

    /// The writes that were answered with a status of 400 to 499. These clients send no bad
    /// requests, so there should be none.
    pub fn refused(&self) -> Vec<&Operation> {
        let refused = self.operations.iter().filter(|operation| matches!(operation.outcome, Outcome::Refused(_)));
        refused.filter(|operation| operation.request != Request::Read).collect()
    }
}

/// Running clients.
pub struct Load {
    clients: JoinSet<()>,
    is_over: Arc<AtomicBool>,
    answers: Arc<Mutex<Answers>>,
}

impl System {
    /// Starts clients that register, change and erase users and read their profiles. Their choices
    /// follow from the seed.
    pub fn load(&self, clients: u64) -> Load {
        let mut load = Load { clients: JoinSet::new(), is_over: Arc::default(), answers: Arc::default() };
        for number in 0..clients {
            let client = OneClient {
                http: Client::builder().timeout(ANSWER_LIMIT).build().unwrap(),
                users: self.users.url(USER, "/users"),
                profiles: self.processes.was_started(CACHE).then(|| self.users.url(CACHE, "/profiles")),
                answers: load.answers.clone(),
            };
            let over = load.is_over.clone();
            let mut random = Rng::with_seed(self.seed.wrapping_add(number));
            load.clients.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    client.one_user(&mut random).await;
                }
            });
        }
        load
    }
}

impl Load {
    /// The number of registrations that were accepted so far.
    pub fn accepted(&self) -> usize {
        self.answers.lock().unwrap().accepted().len()
    }

    /// Waits until this number of further registrations was accepted.
    pub async fn until_accepted(&self, more: usize) {
        let enough = self.accepted() + more;
        eventually("registrations are accepted", async || (self.accepted() >= enough).then_some(())).await;
    }

    /// Waits until every client has finished its user, and returns the answers.
    pub async fn end(mut self) -> Answers {
        self.is_over.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        std::mem::take(&mut self.answers.lock().unwrap())
    }
}

struct OneClient {
    http: Client,
    users: String,
    /// `None` if there is no cache service.
    profiles: Option<String>,
    answers: Arc<Mutex<Answers>>,
}

impl OneClient {
    /// Registers a user, changes it up to three times, and erases it with a probability of one
    /// third.
    async fn one_user(&self, random: &mut Rng) {
        let Some(user) = self.register().await else { return };
        for _ in 0..random.usize(0..4) {
            if random.bool() {
                let display_name = format!("Ada Lovelace {}", random.u32(..));
                let renaming = self.builder(Method::PATCH, user, "").json(&json!({ "display_name": display_name }));
                self.send(user, Request::Rename { display_name }, renaming).await;
            } else {
                let email = address();
                let change = self.builder(Method::PUT, user, "/email").json(&json!({ "email": email }));
                self.send(user, Request::ChangeEmail { email }, change).await;
            }
            self.read(user).await;
        }
        if random.u8(0..3) == 0 {
            self.send(user, Request::Erase, self.builder(Method::DELETE, user, "")).await;
            self.read(user).await;
        }
    }

    /// `None` if no request was answered.
    async fn register(&self) -> Option<Uuid> {
        let email = address();
        let key = Uuid::now_v7().to_string();
        let body = json!({ "email": email, "display_name": "Ada Lovelace" });
        for _ in 0..TRIES {
            let registration = self.http.post(&self.users).header("idempotency-key", &key).json(&body);
            let (outcome, user) = answer(registration).await;
            self.record(Operation { user, request: Request::Register { email: email.clone() }, outcome });
            tokio::time::sleep(PAUSE).await;
            if outcome != Outcome::Unknown {
                return user;
            }
        }
        None
    }

    fn builder(&self, method: Method, user: Uuid, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/{user}{path}", self.users))
    }

    async fn send(&self, user: Uuid, request: Request, builder: RequestBuilder) {
        let (outcome, _) = answer(builder).await;
        self.record(Operation { user: Some(user), request, outcome });
        tokio::time::sleep(PAUSE).await;
    }

    async fn read(&self, user: Uuid) {
        if let Some(profiles) = &self.profiles {
            self.send(user, Request::Read, self.http.get(format!("{profiles}/{user}"))).await;
        }
    }

    fn record(&self, operation: Operation) {
        self.answers.lock().unwrap().operations.push(operation);
    }
}

/// Sends a request. Returns its outcome, and the id in the answer.
async fn answer(request: RequestBuilder) -> (Outcome, Option<Uuid>) {
    let Ok(answer) = send(request).await else { return (Outcome::Unknown, None) };
    let id = answer.body["id"].as_str().and_then(|id| id.parse().ok());
    let outcome = match answer.status.as_u16() {
        200..300 => Outcome::Done(answer.body["version"].as_i64().unwrap_or(0)),
        status @ 400..500 => Outcome::Refused(status),
        _ => Outcome::Unknown,
    };
    (outcome, id)
}
