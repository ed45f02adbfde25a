//! Clients that keep the user service busy, also while it is killed and started again, and remember what they were answered.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::json;
use tokio::task::JoinSet;
use topology::{CACHE, USER};
use uuid::Uuid;

use crate::checker::{Asked, Operation, Outcome};
use crate::http::send;
use crate::system::System;
use crate::users::address;
use crate::waiting::eventually;

/// The pace of a client: it leaves the two cores of a small machine to those who are tested.
const PAUSE: Duration = Duration::from_millis(10);
/// A frozen service answers nobody; then the outcome of the request is unknown.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a registration without an answer is sent again, under the same key.
const TRIES: usize = 3;

/// What the clients asked for and were answered.
#[derive(Clone, Debug, Default)]
pub struct Answered {
    pub operations: Vec<Operation>,
}

impl Answered {
    /// Who was registered.
    pub fn accepted(&self) -> Vec<Uuid> {
        let done = self.operations.iter().filter(|operation| matches!(operation.outcome, Outcome::Done(_)));
        let registered = done.filter(|operation| matches!(operation.asked, Asked::Register { .. }));
        registered.filter_map(|operation| operation.user).collect()
    }

    /// The writes that were answered with a client's error, of which these clients make none.
    pub fn refused(&self) -> Vec<&Operation> {
        let refused = self.operations.iter().filter(|operation| matches!(operation.outcome, Outcome::Refused(_)));
        refused.filter(|operation| operation.asked != Asked::Read).collect()
    }
}

/// Running clients.
pub struct Load {
    clients: JoinSet<()>,
    over: Arc<AtomicBool>,
    answered: Arc<Mutex<Answered>>,
}

impl System {
    /// Clients that register users, change and erase them as the system's seed has it, and read their profiles.
    pub fn load(&self, clients: u64) -> Load {
        let mut load = Load { clients: JoinSet::new(), over: Arc::default(), answered: Arc::default() };
        for number in 0..clients {
            let client = OneClient {
                http: Client::builder().timeout(PATIENCE).build().unwrap(),
                users: self.users.url(USER, "/users"),
                profiles: self.processes.was_started(CACHE).then(|| self.users.url(CACHE, "/profiles")),
                answered: load.answered.clone(),
            };
            let (over, mut random) = (load.over.clone(), Rng::with_seed(self.seed.wrapping_add(number)));
            load.clients.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    client.live_a_life(&mut random).await;
                }
            });
        }
        load
    }
}

impl Load {
    /// How many registrations were accepted so far.
    pub fn accepted(&self) -> usize {
        self.answered.lock().unwrap().accepted().len()
    }

    /// Waits until so many more registrations were accepted.
    pub async fn until_accepted(&self, more: usize) {
        let enough = self.accepted() + more;
        eventually("registrations are accepted", async || (self.accepted() >= enough).then_some(())).await;
    }

    /// Lets every client finish what it has begun.
    pub async fn end(mut self) -> Answered {
        self.over.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        std::mem::take(&mut self.answered.lock().unwrap())
    }
}

struct OneClient {
    http: Client,
    users: String,
    /// `None`: there is no cache to read.
    profiles: Option<String>,
    answered: Arc<Mutex<Answered>>,
}

impl OneClient {
    /// Somebody registers, changes now and then, and may be erased.
    async fn live_a_life(&self, random: &mut Rng) {
        let Some(user) = self.register().await else { return };
        for _ in 0..random.usize(0..4) {
            if random.bool() {
                let display_name = format!("Ada Lovelace {}", random.u32(..));
                let renaming = self.request(Method::PATCH, user, "").json(&json!({ "display_name": display_name }));
                self.write(user, Asked::Rename { display_name }, renaming).await;
            } else {
                let email = address();
                let moving = self.request(Method::PUT, user, "/email").json(&json!({ "email": email }));
                self.write(user, Asked::Move { email }, moving).await;
            }
            self.read(user).await;
        }
        if random.u8(0..3) == 0 {
            self.write(user, Asked::Erase, self.request(Method::DELETE, user, "")).await;
            self.read(user).await;
        }
    }

    /// `None`: not answered, however often the same request was sent.
    async fn register(&self) -> Option<Uuid> {
        let (email, key) = (address(), Uuid::now_v7().to_string());
        let body = json!({ "email": email, "display_name": "Ada Lovelace" });
        for _ in 0..TRIES {
            let request = self.http.post(&self.users).header("idempotency-key", &key).json(&body);
            let (outcome, user) = ask(request).await;
            self.remember(Operation { user, asked: Asked::Register { email: email.clone() }, outcome });
            tokio::time::sleep(PAUSE).await;
            if outcome != Outcome::Unknown {
                return user;
            }
        }
        None
    }

    fn request(&self, method: Method, user: Uuid, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/{user}{path}", self.users))
    }

    async fn write(&self, user: Uuid, asked: Asked, request: RequestBuilder) {
        let (outcome, _) = ask(request).await;
        self.remember(Operation { user: Some(user), asked, outcome });
        tokio::time::sleep(PAUSE).await;
    }

    async fn read(&self, user: Uuid) {
        if let Some(profiles) = &self.profiles {
            self.write(user, Asked::Read, self.http.get(format!("{profiles}/{user}"))).await;
        }
    }

    fn remember(&self, operation: Operation) {
        self.answered.lock().unwrap().operations.push(operation);
    }
}

/// What came of a request, and the id in the answer.
async fn ask(request: RequestBuilder) -> (Outcome, Option<Uuid>) {
    let Ok(answer) = send(request).await else { return (Outcome::Unknown, None) };
    let id = answer.body["id"].as_str().and_then(|id| id.parse().ok());
    let outcome = match answer.status.as_u16() {
        200..300 => Outcome::Done(answer.body["version"].as_i64().unwrap_or(0)),
        status @ 400..500 => Outcome::Refused(status),
        _ => Outcome::Unknown,
    };
    (outcome, id)
}
