//! Clients that keep the user service busy, also while it is killed and started again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Client;
use serde_json::json;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::api::{Answer, address, send};
use crate::{Part, System};

/// The pace of a client: it leaves the two cores of a small machine to those who are tested.
const PAUSE: Duration = Duration::from_millis(10);
/// A frozen service answers nobody; then the outcome of the request is unknown.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the clients were answered.
#[derive(Default)]
pub struct Answered {
    /// Registrations answered with 201.
    pub accepted: Vec<Uuid>,
    /// Registrations answered with anything else.
    pub refused: Vec<Answer>,
    /// Registrations that were not answered at all: nobody knows whether they took effect.
    pub unknown: usize,
}

/// Running clients.
pub struct Load {
    clients: JoinSet<()>,
    over: Arc<AtomicBool>,
    answered: Arc<Mutex<Answered>>,
}

impl System {
    /// Clients that register users, change each twice and erase every third.
    pub fn load(&self, clients: usize) -> Load {
        let mut load = Load { clients: JoinSet::new(), over: Arc::default(), answered: Arc::default() };
        for _ in 0..clients {
            let (url, over, answered) = (self.url(Part::User, "/users"), load.over.clone(), load.answered.clone());
            load.clients.spawn(async move {
                let client = Client::builder().timeout(PATIENCE).build().unwrap();
                for turn in 0.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    live_a_life(&client, &url, turn % 3 == 0, &answered).await;
                }
            });
        }
        load
    }
}

impl Load {
    /// How many registrations were accepted so far.
    pub fn accepted(&self) -> usize {
        self.answered.lock().unwrap().accepted.len()
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

async fn live_a_life(client: &Client, url: &str, erased: bool, answered: &Mutex<Answered>) {
    let body = json!({ "email": address(), "display_name": "Ada Lovelace" });
    let registration = send(client.post(url).json(&body)).await;
    tokio::time::sleep(PAUSE).await;
    let id = {
        let mut answered = answered.lock().unwrap();
        match registration {
            Ok(answer) if answer.status == 201 => answer.id(),
            Ok(answer) => return answered.refused.push(answer),
            Err(_) => return answered.unknown += 1,
        }
    };
    answered.lock().unwrap().accepted.push(id);
    for name in ["Countess", "Countess of Lovelace"] {
        let _ = send(client.patch(format!("{url}/{id}")).json(&json!({ "display_name": name }))).await;
        tokio::time::sleep(PAUSE).await;
    }
    if erased {
        let _ = send(client.delete(format!("{url}/{id}"))).await;
    }
}
