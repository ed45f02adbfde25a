//! Sends the welcome mail within the request, over connections that are kept open.

use std::sync::{Mutex, MutexGuard};

use futures::future;
use lettre::Address;
use tokio::sync::Semaphore;
use tokio::time::Duration;

use crate::registrations::User;
use crate::waybill::mail::WELCOME;
use crate::waybill::smtp::{Connection, Ending, Server, SmtpConfig};

/// Connections at the same time. Postfix accepts 50 of one client by default
/// (`smtpd_client_connection_count_limit`).
const CONNECTIONS: usize = 50;
/// A connection that was idle for longer is opened again, as in the email service.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

pub struct Mailer {
    server: Server,
    places: Semaphore,
    idle: Mutex<Vec<Connection>>,
}

impl Mailer {
    pub fn new(config: &SmtpConfig) -> anyhow::Result<Self> {
        Ok(Self { server: Server::new(config)?, places: Semaphore::new(CONNECTIONS), idle: Mutex::default() })
    }

    /// Sends the mail. The Message-ID is made from the user's id, so a mailbox recognises a second
    /// copy. A mail that the server refuses permanently is not retried, as in Waybill.
    ///
    /// A caller that cancels this does not know whether the server has accepted the mail. The
    /// connection is closed then.
    pub async fn send(&self, user: &User) -> Result<(), String> {
        let to: Address = user.email.parse().map_err(|_| "not an address".to_owned())?;
        let message = WELCOME.build(user.id, self.server.sender(), &to);
        let _place = self.places.acquire().await.map_err(|error| error.to_string())?;
        let mut connection = self.idle().pop().unwrap_or_default();
        connection.quit_if_idle_for(IDLE_LIMIT).await;
        match self.send_over(&mut connection, &to, &message).await {
            Ending::Accepted => {
                self.idle().push(connection);
                Ok(())
            }
            Ending::Refused { code } => {
                tracing::warn!(user.id = %user.id, smtp.code = code, "the mail server refused the mail permanently");
                Ok(())
            }
            Ending::Deferred { code } => Err(format!("reply {code}")),
            Ending::SenderRefused(trouble)
            | Ending::Unexplained(trouble)
            | Ending::ServerFailed(trouble)
            | Ending::Unknown(trouble) => Err(trouble.to_string()),
        }
    }

    async fn send_over(&self, connection: &mut Connection, to: &Address, message: &lettre::Message) -> Ending {
        let prepared = async {
            connection.prepare(&self.server, to).await?;
            connection.announce().await
        };
        match prepared.await {
            Ok(()) => connection.send(message, future::pending()).await,
            Err(ending) => ending,
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().expect("no thread panics while it holds this lock")
    }
}
