//! The state that the pages share.

use std::net::SocketAddr;
use std::sync::Arc;

use shared::platform::secret::Secret;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use topology::Service;

use super::view::View;
use crate::config::AdminToken;
use crate::kafka::{Reader, Recent};
use crate::system::{Operations, Survey};

/// What the pages read.
#[derive(Clone)]
pub struct App {
    pub views: watch::Receiver<Arc<View>>,
    pub surveys: watch::Receiver<Arc<Survey>>,
    pub recent: Recent,
    pub reader: Reader,
    pub operations: Operations,
    /// The setting ADMIN_TOKEN.
    pub admin_token: Option<Secret<AdminToken>>,
    /// A form that changes something contains it. Only pages of this process know it.
    pub page_token: Arc<str>,
    /// Ends the live updates: otherwise open pages would delay the end of the process.
    pub stop: CancellationToken,
}

impl App {
    /// The admin port of a process of this service that answers.
    pub fn address(&self, service: Service) -> Option<SocketAddr> {
        let survey = self.surveys.borrow();
        let of_service = survey.processes.iter().filter(|process| process.service == service.name);
        of_service.filter(|process| process.answer.is_some()).map(|process| process.address).next()
    }
}
