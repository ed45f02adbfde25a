//! The facet `mail`: the mail server, and the mails that it accepted.

use std::net::SocketAddr;
use std::sync::Arc;

use testbed::smtp_sink::{Behaviour, Fault, Mail as Accepted, SmtpSink};

use crate::waiting::eventually_eq;

pub struct Mail {
    sink: Arc<SmtpSink>,
}

impl Mail {
    pub(crate) async fn start() -> Self {
        Self::of(Arc::new(SmtpSink::start(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap()))
    }

    /// The sink of a stack.
    pub(crate) fn of(sink: Arc<SmtpSink>) -> Self {
        Self { sink }
    }

    pub fn address(&self) -> SocketAddr {
        self.sink.address()
    }

    /// From now on the server fails in this way: until [`Mail::recover`], or as often as
    /// `Fault::times` says.
    pub fn fail(&self, fault: impl Into<Behaviour>) {
        self.sink.set(fault);
    }

    /// Waits until no sender is connected. A sender keeps its connection for some seconds after a
    /// mail.
    pub async fn until_disconnected(&self) {
        eventually_eq("connections to the mail server", 0, async || self.sink.connections()).await;
    }

    /// From now on the server works.
    pub fn recover(&self) {
        self.sink.set(Fault::None);
    }

    /// How the server behaves now.
    pub fn behaviour(&self) -> Behaviour {
        self.sink.behaviour()
    }

    /// Every mail that the server accepted, each copy.
    pub fn all(&self) -> Vec<Accepted> {
        self.sink.mails()
    }

    /// The number of mails that the server accepted, each copy.
    pub fn count(&self) -> usize {
        self.sink.count()
    }

    /// The recipient of each accepted mail, and when it was accepted, in milliseconds since 1970.
    pub fn arrivals(&self) -> Vec<(String, u64)> {
        let arrivals = self.sink.arrivals().into_iter();
        arrivals.flat_map(|(to, at)| to.into_iter().map(move |to| (to, at))).collect()
    }

    /// The mails to one address.
    pub fn to(&self, email: &str) -> Vec<Accepted> {
        self.sink.mails().into_iter().filter(|mail| mail.to == [email]).collect()
    }

    /// The Message-IDs of the mails to one address, one for each copy.
    pub fn message_ids_to(&self, email: &str) -> Vec<String> {
        self.to(email).into_iter().map(|mail| mail.message_id.expect("a mail has a Message-ID")).collect()
    }
}
