//! The state that the pages share.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::http::HeaderMap;
use secrecy::ExposeSecret;
use shared::platform::secret::Secret;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use topology::Service;

use super::view::View;
use crate::config::AdminToken;
use crate::kafka::{Offsets, Reader, Recent};
use crate::laboratory::Laboratory;
use crate::sessions::Sessions;
use crate::source::SourceUrl;
use crate::system::{Operations, Survey, Users};
use crate::traces::{Forward, Traces};

/// What the pages read.
#[derive(Clone)]
pub struct App {
    pub views: watch::Receiver<Arc<View>>,
    pub surveys: watch::Receiver<Arc<Survey>>,
    pub offsets: watch::Receiver<Arc<Offsets>>,
    pub recent: Recent,
    pub reader: Reader,
    pub operations: Operations,
    pub sessions: Sessions,
    pub users: Users,
    pub traces: Traces,
    /// The setting FORWARD_OTLP.
    pub forward: Option<Forward>,
    /// The setting SOURCE_URL.
    pub source: Option<Arc<SourceUrl>>,
    /// The setting TOPIC_PREFIX.
    pub prefix: Arc<str>,
    /// The setting ADMIN_TOKEN.
    pub admin_token: Option<Secret<AdminToken>>,
    /// A form that changes something contains it. Only pages of this process know it.
    pub page_token: Arc<str>,
    /// `None`: it is off.
    pub laboratory: Option<Laboratory>,
    /// Ends the live updates: otherwise open pages would delay the end of the process.
    pub stop: CancellationToken,
}

impl App {
    /// The token of an action: the operator's, or the setting. Empty: there is none.
    pub fn token(&self, headers: &HeaderMap) -> String {
        match (self.sessions.of(headers), &self.admin_token) {
            (Some(session), _) => session.token.expose_secret().to_owned(),
            (None, Some(token)) => token.expose().to_owned(),
            (None, None) => String::new(),
        }
    }

    /// The name of the operator who is logged in.
    pub fn operator(&self, headers: &HeaderMap) -> Option<String> {
        self.sessions.of(headers).map(|session| session.operator)
    }

    /// The admin port of a process of this service that answers.
    pub fn address(&self, service: Service) -> Option<SocketAddr> {
        self.surveys.borrow().address(service)
    }
}
