//! Waiting until the system is idle, or until it has handled certain users.

use std::time::{Duration, Instant};

use sqlx::PgPool;
use topology::{EMAIL, Service, USER};
use uuid::Uuid;

use super::System;
use crate::services::{groups, service_of};
use crate::stores::count;
use crate::waiting::{DEADLINE, POLL};

const OUTBOX: &str = "select count(*) from outbox";
const OPEN_DELIVERIES: &str =
    "select count(*) from deliveries where status in ('unaddressed', 'pending', 'sending', 'unknown')";

/// Work that is not in a topic yet: a description, the service, and the query that counts it.
const UNPUBLISHED: [(&str, Service, &str); 3] = [
    ("rows in the outbox of user", USER, OUTBOX),
    ("rows in the outbox of email", EMAIL, OUTBOX),
    ("open deliveries", EMAIL, OPEN_DELIVERIES),
];

impl System {
    /// Waits until the system is idle: the outboxes are empty, no delivery is open, every lag is 0.
    ///
    /// # Panics
    /// It was not idle within [`DEADLINE`].
    pub async fn until_drained(&self) {
        let left = self.drain(DEADLINE).await;
        assert!(left.is_empty(), "not drained within {DEADLINE:?}: {left:?}");
    }

    /// Waits until all of these users, and no others, are mailed, cached and counted.
    pub async fn until_applied(&self, users: &[Uuid]) {
        for id in users {
            self.users.until_mailed(*id).await;
            self.users.until_cached(*id, 1).await;
        }
        let count = users.len() as i64;
        self.users.until_counted(count, count).await;
        self.until_drained().await;
    }

    /// Waits at most `limit` until the system is idle, and returns the work that is left.
    pub async fn drain(&self, limit: Duration) -> Vec<String> {
        let deadline = Instant::now() + limit;
        let mut databases = vec![];
        for (what, service, question) in UNPUBLISHED {
            if self.processes.was_started(service) {
                databases.push((what, self.stores.database(service).await, question));
            }
        }
        // The system must be idle twice in a row. `work_left` looks at the databases first and at
        // the lags afterwards, and in between a consumer may have created new rows.
        let mut idle = 0;
        loop {
            let left = self.work_left(&databases).await;
            idle = if left.is_empty() { idle + 1 } else { 0 };
            if idle == 2 || Instant::now() > deadline {
                return left;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn work_left(&self, databases: &[(&str, PgPool, &'static str)]) -> Vec<String> {
        let mut left = vec![];
        for (what, db, question) in databases {
            let rows = count(db, question).await;
            left.extend((rows > 0).then(|| format!("{what}: {rows}")));
        }
        if left.is_empty() {
            let running = groups().filter(|group| self.processes.was_started(service_of(group)));
            left = running.flat_map(|group| self.kafka.lag(group)).collect();
        }
        left
    }
}
