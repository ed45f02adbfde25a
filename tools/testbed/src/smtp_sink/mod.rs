//! A mail server that delivers nothing. It speaks SMTP, keeps the mails that it accepts, and fails
//! on request.
//!
//! `cargo xtask up` and the tests use the same code: a user of `up` controls it over HTTP (see
//! `http`), a test by function calls.

mod http;
mod session;
mod state;

pub use state::{Behaviour, Fault, Mail, Outcome, Stage};

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use state::Shared;

/// Runs until it is dropped.
pub struct SmtpSink {
    shared: Arc<Shared>,
    address: SocketAddr,
    servers: Mutex<JoinSet<()>>,
}

impl SmtpSink {
    /// With port 0 it listens on any free port.
    pub async fn start(address: SocketAddr) -> Result<Self> {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("the SMTP sink cannot listen on {address}"))?;
        let sink = Self { shared: Arc::default(), address: listener.local_addr()?, servers: Mutex::default() };
        sink.servers().spawn(accept(listener, sink.shared.clone()));
        Ok(sink)
    }

    /// Serves the HTTP API.
    pub async fn serve_http(&self, address: SocketAddr) -> Result<()> {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("the SMTP sink cannot listen on {address}"))?;
        let router = http::router(self.shared.clone());
        self.servers().spawn(async move { axum::serve(listener, router).await.expect("axum::serve never returns") });
        Ok(())
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, behaviour: impl Into<Behaviour>) {
        self.shared.set(behaviour.into());
    }

    /// `Fault::None` after the last of a limited number of faults.
    pub fn behaviour(&self) -> Behaviour {
        self.shared.state().behaviour.clone()
    }

    pub fn mails(&self) -> Vec<Mail> {
        self.shared.state().mails.clone()
    }

    /// The number of mails, without copying them.
    pub fn count(&self) -> usize {
        self.shared.state().mails.len()
    }

    /// The recipients of each mail and when it was received, in milliseconds since 1970, without
    /// copying the mails.
    pub fn arrivals(&self) -> Vec<(Vec<String>, u64)> {
        self.shared.state().mails.iter().map(|mail| (mail.to.clone(), mail.received_at_ms)).collect()
    }

    /// The recipients of the newest mails, at most `limit`, and whether the client got an answer.
    pub fn recipients(&self, limit: usize) -> Vec<(String, Outcome)> {
        let state = self.shared.state();
        let newest = state.mails.iter().rev().take(limit);
        newest.flat_map(|mail| mail.to.iter().map(|to| (to.clone(), mail.outcome))).collect()
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.shared.state().connections
    }

    pub fn clear(&self) {
        self.shared.state().mails.clear();
    }

    fn servers(&self) -> MutexGuard<'_, JoinSet<()>> {
        self.servers.lock().expect("no thread panics while it holds this lock")
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Dropping the set ends the sessions with this task.
    let mut sessions = JoinSet::new();
    loop {
        // An error means that the client closed the connection before it was accepted.
        if let Ok((stream, _)) = listener.accept().await {
            sessions.spawn(session::serve(stream, shared.clone()));
        }
        while sessions.try_join_next().is_some() {}
    }
}
