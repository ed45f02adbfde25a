//! The SMTP dialogue, step by step: what a failure means depends on the step. lettre's pooled transport would hide it.

use std::time::Duration;

use lettre::message::Mailbox;
use lettre::transport::smtp::Error;
use lettre::transport::smtp::client::{AsyncSmtpConnection, TlsParameters};
use lettre::transport::smtp::commands::{Data, Mail, Rcpt};
use lettre::transport::smtp::extension::ClientId;
use lettre::{Address, Message};
use tokio::time::timeout;

/// For each step (RFC 5321 §4.5.3.2 allows minutes; a lease must outlast them all).
const STEP_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(clap::Args, Clone)]
pub struct SmtpConfig {
    /// The mail server that takes mails over from us.
    #[arg(long, env, default_value = "localhost")]
    smtp_host: String,
    #[arg(long, env, default_value_t = 1025)]
    smtp_port: u16,
    /// Whether to ask for STARTTLS, and then insist on a valid certificate.
    #[arg(long, env, default_value_t = false, action = clap::ArgAction::Set)]
    smtp_tls: bool,
    /// Who the mails are from; its domain is also that of their Message-IDs.
    #[arg(long, env, default_value = "Waybill <waybill@waybill.example>")]
    pub mail_from: Mailbox,
}

/// How an attempt ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The server answered 250 to the mail: it is the server's now.
    Accepted,
    /// The server will never take this mail.
    Refused { code: u16 },
    /// Not now.
    Later { code: Option<u16> },
    /// The mail went out and the answer to it did not come: it may or may not be the server's.
    Unknown,
    /// The check before the mail said no.
    Superseded,
}

/// A connection that is opened when needed and dropped after any error.
#[derive(Default)]
pub struct Connection(Option<AsyncSmtpConnection>);

/// A step's failure: the reply's code if there was a reply.
struct Failed {
    code: Option<u16>,
    permanent: bool,
}

impl Connection {
    /// Hands `message` over to the server. `check` is asked just before the mail itself goes out.
    pub async fn transmit(
        &mut self,
        config: &SmtpConfig,
        to: Address,
        message: &Message,
        check: impl Future<Output = bool>,
    ) -> Ending {
        let ending = self.dialogue(config, to, message, check).await;
        if ending != Ending::Accepted {
            // In an unknown state; a fresh one costs little.
            self.0 = None;
        }
        ending
    }

    /// Says goodbye, so that the server need not wait for us.
    pub async fn quit(&mut self) {
        if let Some(mut connection) = self.0.take() {
            let _ = timeout(STEP_TIMEOUT, connection.quit()).await; // nothing depends on it
        }
    }

    async fn dialogue(
        &mut self,
        config: &SmtpConfig,
        to: Address,
        message: &Message,
        check: impl Future<Output = bool>,
    ) -> Ending {
        // What is refused for good up to here is not about this mail but about us: a wrong setting must not fail every mail.
        let connection = match self.greeted(config).await {
            Ok(connection) => connection,
            Err(failed) => return Ending::Later { code: failed.code },
        };
        let mail = Mail::new(Some(config.mail_from.email.clone()), vec![]);
        if let Err(failed) = step(connection.command(mail)).await {
            return Ending::Later { code: failed.code };
        }
        if let Err(failed) = step(connection.command(Rcpt::new(to, vec![]))).await {
            return failed.ending();
        }
        if !check.await {
            return Ending::Superseded;
        }
        if let Err(failed) = step(connection.command(Data)).await {
            return failed.ending();
        }
        match step(connection.message(&message.formatted())).await {
            Ok(()) => Ending::Accepted,
            // No reply: nobody can tell whether the final dot arrived.
            Err(Failed { code: None, .. }) => Ending::Unknown,
            Err(failed) => failed.ending(),
        }
    }

    async fn greeted(&mut self, config: &SmtpConfig) -> Result<&mut AsyncSmtpConnection, Failed> {
        if self.0.is_none() {
            let hello = ClientId::Domain(config.mail_from.email.domain().to_owned());
            let server = (config.smtp_host.as_str(), config.smtp_port);
            let connecting = AsyncSmtpConnection::connect_tokio1(server, Some(STEP_TIMEOUT), &hello, None, None);
            let mut connection = timeout(STEP_TIMEOUT, connecting).await.map_err(|_| Failed::SILENCE)??;
            if config.smtp_tls {
                let parameters = TlsParameters::new(config.smtp_host.clone())?;
                step(connection.starttls(parameters, &hello)).await?;
            }
            self.0 = Some(connection);
        }
        Ok(self.0.as_mut().expect("it was just made"))
    }
}

async fn step<T>(step: impl Future<Output = Result<T, Error>>) -> Result<(), Failed> {
    timeout(STEP_TIMEOUT, step).await.map_err(|_| Failed::SILENCE)??;
    Ok(())
}

impl Failed {
    const SILENCE: Self = Self { code: None, permanent: false };

    fn ending(&self) -> Ending {
        match self {
            Self { code: Some(code), permanent: true } => Ending::Refused { code: *code },
            Self { code, .. } => Ending::Later { code: *code },
        }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { code: error.status().map(u16::from), permanent: error.is_permanent() }
    }
}
