//! The SMTP dialogue, step by step. The consequence of a failure depends on the step, which
//! lettre's pooled transport would hide.

use std::time::Duration;

use lettre::message::Mailbox;
use lettre::transport::smtp::Error;
use lettre::transport::smtp::client::{AsyncSmtpConnection, TlsParameters};
use lettre::transport::smtp::commands::{Data, Mail, Rcpt};
use lettre::transport::smtp::extension::ClientId;
use lettre::{Address, Message};
use tokio::time::timeout;

/// Time for each step. RFC 5321 §4.5.3.2 allows minutes, but the lease must be longer than all
/// steps together.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(clap::Args, Clone)]
pub struct SmtpConfig {
    /// Host name of the mail server.
    #[arg(long, env, default_value = "localhost")]
    smtp_host: String,
    /// Port of the mail server.
    #[arg(long, env, default_value_t = 1025)]
    smtp_port: u16,
    /// Whether to use STARTTLS. Then the server's certificate must be valid.
    #[arg(long, env, default_value_t = false, action = clap::ArgAction::Set)]
    smtp_tls: bool,
    /// Sender of the mails. Its domain is also the domain of the Message-IDs.
    #[arg(long, env, default_value = "Waybill <waybill@waybill.example>")]
    pub mail_from: Mailbox,
}

/// How an attempt ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The server answered 250 after the mail: it is responsible for the mail now.
    Accepted,
    /// The server refused this mail permanently.
    Refused { code: u16 },
    /// The server deferred the mail, or did not answer before the mail was sent.
    Later { code: Option<u16> },
    /// The mail was sent and no answer came: the server may have accepted it.
    Unknown,
    /// The check immediately before the mail was negative, so the mail was not sent.
    Superseded,
}

/// A connection that is opened on first use and closed after any error.
#[derive(Default)]
pub struct Connection(Option<AsyncSmtpConnection>);

/// A failed step, with the code of the reply if there was one.
struct Failed {
    code: Option<u16>,
    permanent: bool,
}

impl Connection {
    /// Sends `message` to the server. Calls `check` immediately before the mail is sent.
    pub async fn transmit(
        &mut self,
        config: &SmtpConfig,
        to: Address,
        message: &Message,
        check: impl Future<Output = bool>,
    ) -> Ending {
        let ending = self.dialogue(config, to, message, check).await;
        if ending != Ending::Accepted {
            // The connection may be in any state; a new one is cheap.
            self.0 = None;
        }
        ending
    }

    /// Closes the connection with QUIT, so that the server does not wait for its time-out.
    pub async fn quit(&mut self) {
        if let Some(mut connection) = self.0.take() {
            let _ = timeout(STEP_TIMEOUT, connection.quit()).await; // the result does not matter
        }
    }

    async fn dialogue(
        &mut self,
        config: &SmtpConfig,
        to: Address,
        message: &Message,
        check: impl Future<Output = bool>,
    ) -> Ending {
        // A permanent refusal before RCPT is about this client and not about the mail: a wrong
        // setting must not fail every mail.
        let connection = match self.open(config).await {
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
            // Without a reply it is unknown whether the server received the final dot.
            Err(Failed { code: None, .. }) => Ending::Unknown,
            Err(failed) => failed.ending(),
        }
    }

    async fn open(&mut self, config: &SmtpConfig) -> Result<&mut AsyncSmtpConnection, Failed> {
        if self.0.is_none() {
            let hello = ClientId::Domain(config.mail_from.email.domain().to_owned());
            let server = (config.smtp_host.as_str(), config.smtp_port);
            let connecting = AsyncSmtpConnection::connect_tokio1(server, Some(STEP_TIMEOUT), &hello, None, None);
            let mut connection = timeout(STEP_TIMEOUT, connecting).await.map_err(|_| Failed::NO_ANSWER)??;
            if config.smtp_tls {
                let parameters = TlsParameters::new(config.smtp_host.clone())?;
                step(connection.starttls(parameters, &hello)).await?;
            }
            self.0 = Some(connection);
        }
        Ok(self.0.as_mut().expect("the connection was opened above"))
    }
}

async fn step<T>(step: impl Future<Output = Result<T, Error>>) -> Result<(), Failed> {
    timeout(STEP_TIMEOUT, step).await.map_err(|_| Failed::NO_ANSWER)??;
    Ok(())
}

impl Failed {
    const NO_ANSWER: Self = Self { code: None, permanent: false };

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
