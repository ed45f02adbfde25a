//! Sends mails to one mail server. The consequence of a failure depends on the step, so the
//! conversation is explicit here. [Why no library has
//! it](../../../../docs/decisions/own-smtp-client.md).

mod reply;
mod server;
mod session;

pub use server::{Server, SmtpConfig};

use std::fmt;

use lettre::{Address, Message};
use tokio::time::{Duration, Instant};

use reply::{About, Reply};
use session::{Failure, Session};

/// "Service not available, closing the connection". A server also sends this when a connection has
/// reached its limit of mails.
const CLOSING: u16 = 421;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The server accepted the mail: it is responsible for it now.
    Accepted,
    /// The server refused the recipient or this mail permanently.
    Refused { code: u16 },
    /// The server refused the mail permanently, for a reason that is about us or about itself.
    SenderRefused(Trouble),
    /// The server refused the mail permanently, with a code that does not say why: because the
    /// mailbox does not exist, or because it does not relay for us.
    Unexplained(Trouble),
    /// The server does not want the mail now, for a reason that may be about this recipient.
    Deferred { code: u16 },
    /// The server is down, it has a problem, or it does not want any of our mails: the reason is
    /// not about this recipient.
    ServerFailed(Trouble),
    /// The mail was sent and no answer came: the server may have accepted it.
    Unknown(Trouble),
}

/// What went wrong, without any text of the server, which may quote an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The step of the conversation, for example `RCPT`.
    pub step: &'static str,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Reply(Reply),
    NoAnswer(&'static str),
}

/// A connection that is opened on first use. After any failure it is closed, because the server may
/// be in any state.
#[derive(Default)]
pub struct Connection {
    session: Option<Session>,
    /// When the server has accepted the last mail.
    used_at: Option<Instant>,
}

impl Connection {
    /// Opens the connection if necessary, and names the sender and the recipient. May be cancelled
    /// at any time: the server has no mail yet.
    ///
    /// # Errors
    /// How the attempt ended.
    pub async fn prepare(&mut self, server: &Server, to: &Address) -> Result<(), Ending> {
        // Cancelled in the middle, the connection is closed.
        let open = self.session.take();
        let is_reused = open.is_some();
        let mut session = match open {
            Some(session) => session,
            None => connect(server).await?,
        };
        let mail = format!("MAIL FROM:<{}>", server.from());
        match session.command(&mail).await {
            Ok(_) => {}
            // The server has closed a connection that it had accepted a mail over.
            Err(Failure::NoAnswer(_) | Failure::Refused(Reply { code: CLOSING, .. })) if is_reused => {
                session = connect(server).await?;
                session.command(&mail).await.map_err(|failure| before_recipient("MAIL", failure))?;
            }
            Err(failure) => return Err(before_recipient("MAIL", failure)),
        }
        session.command(&format!("RCPT TO:<{to}>")).await.map_err(|failure| after_recipient("RCPT", failure))?;
        self.session = Some(session);
        Ok(())
    }

    /// Announces the mail. May be cancelled at any time: the server has no mail yet.
    ///
    /// # Errors
    /// How the attempt ended.
    pub async fn announce(&mut self) -> Result<(), Ending> {
        let mut session = self.session.take().expect("the connection was prepared");
        session.data().await.map_err(|failure| after_recipient("DATA", failure))?;
        self.session = Some(session);
        Ok(())
    }

    /// Sends the mail, and waits for the server's answer until `give_up` is ready. A caller that
    /// cancels this does not know whether the server has accepted the mail.
    pub async fn send(&mut self, message: &Message, give_up: impl Future<Output = ()>) -> Ending {
        let mut session = self.session.take().expect("the mail was announced");
        if let Err(failure) = session.content(&message.formatted()).await {
            return after_recipient("mail", failure);
        }
        // `give_up` ends only the wait: the dot is sent at once. The connection is dropped
        // afterwards.
        let answer = tokio::select! {
            answer = session.final_dot() => answer,
            () = give_up => Err(Failure::NoAnswer("the process stopped before the answer")),
        };
        match answer {
            Ok(_) => {
                self.session = Some(session);
                self.used_at = Some(Instant::now());
                Ending::Accepted
            }
            Err(Failure::NoAnswer(why)) => Ending::Unknown(Trouble { step: "final dot", what: What::NoAnswer(why) }),
            Err(failure) => after_recipient("final dot", failure),
        }
    }

    /// Closes the connection, so that a mail that was prepared is not sent.
    pub fn close(&mut self) {
        self.session = None;
    }

    /// Closes the connection with QUIT, if it was not used for so long.
    pub async fn quit_if_idle_for(&mut self, limit: Duration) {
        if self.used_at.is_none_or(|used_at| used_at.elapsed() >= limit) {
            self.quit().await;
        }
    }

    /// Closes the connection with QUIT, so that the server does not wait for its time-out.
    pub async fn quit(&mut self) {
        if let Some(session) = self.session.take() {
            session.quit().await;
        }
    }
}

async fn connect(server: &Server) -> Result<Session, Ending> {
    server.connect().await.map_err(|(step, failure)| before_recipient(step, failure))
}

/// The server has not heard of a recipient yet, so no failure is about one: a wrong password, a
/// block list. No mail fails because of it, however often and however permanently the server says
/// so.
fn before_recipient(step: &'static str, failure: Failure) -> Ending {
    Ending::ServerFailed(Trouble::of(step, failure))
}

fn after_recipient(step: &'static str, failure: Failure) -> Ending {
    let Failure::Refused(reply) = failure else { return Ending::ServerFailed(Trouble::of(step, failure)) };
    let trouble = Trouble { step, what: What::Reply(reply) };
    match (reply.is_permanent(), reply.about()) {
        (true, About::Mail) => Ending::Refused { code: reply.code },
        (true, About::Sender) => Ending::SenderRefused(trouble),
        (true, About::Unknown) => Ending::Unexplained(trouble),
        (false, About::Sender) => Ending::ServerFailed(trouble),
        (false, _) if reply.code == CLOSING => Ending::ServerFailed(trouble),
        (false, About::Mail | About::Unknown) => Ending::Deferred { code: reply.code },
    }
}

impl Trouble {
    fn of(step: &'static str, failure: Failure) -> Self {
        let what = match failure {
            Failure::Refused(reply) => What::Reply(reply),
            Failure::NoAnswer(why) => What::NoAnswer(why),
        };
        Self { step, what }
    }

    /// The code of the reply, if there was one.
    pub fn code(self) -> Option<u16> {
        match self.what {
            What::Reply(reply) => Some(reply.code),
            What::NoAnswer(_) => None,
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            What::Reply(reply) => write!(f, "reply {reply} to {}", self.step),
            What::NoAnswer(why) => write!(f, "{why} ({})", self.step),
        }
    }
}
