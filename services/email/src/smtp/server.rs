//! The mail server: its settings, and how a connection to it begins.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::ValueEnum;
use lettre::Address;
use lettre::message::Mailbox;
use rustls_pki_types::ServerName;
use shared::events::check_address;
use shared::platform::secret::{OptionalSecret, Secret, SecretSetting};
use shared::platform::settings::number;
use shared::platform::tls;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::session::{Extensions, Failure, Limits, Session, handshake};

/// Time to connect to one of the server's addresses.
const CONNECT: Duration = Duration::from_secs(30);

#[derive(clap::Args, Clone)]
pub struct SmtpConfig {
    /// Host name of the mail server.
    #[arg(long, env, default_value = "localhost")]
    smtp_host: String,
    /// Port of the mail server. Usually 587 with `starttls`, 465 with `implicit`, 25 with `none`.
    #[arg(long, env, default_value_t = 1025, value_parser = number::<u16>(1..=65_535))]
    smtp_port: u16,
    /// How the connection is encrypted. With `starttls` and `implicit` the server's certificate
    /// must be valid for SMTP_HOST, and no mail is sent without encryption.
    #[arg(long, env, value_enum, default_value_t = SmtpTls::None)]
    smtp_tls: SmtpTls,
    /// A file with the certificates of the authorities that may sign the server's certificate, in
    /// PEM format. Without it, the well-known public authorities may.
    #[arg(long, env)]
    smtp_ca_file: Option<PathBuf>,
    /// User name, if the server requires a login (AUTH PLAIN or LOGIN).
    #[arg(long, env)]
    smtp_user: Option<String>,
    #[command(flatten)]
    smtp_password: OptionalSecret<SmtpPassword>,
    /// Sender of the mails. Its domain is also the domain of the Message-IDs.
    #[arg(long, env, default_value = "Waybill <waybill@waybill.example>", value_parser = sender)]
    pub mail_from: Mailbox,
}

/// The same rule as for recipients: MAIL and EHLO contain the address and its domain as they are.
fn sender(text: &str) -> Result<Mailbox, String> {
    let malformed = |_| "not a sender, for example Waybill <waybill@example.com>".to_owned();
    let sender: Mailbox = text.parse().map_err(malformed)?;
    check_address(sender.email.as_ref()).map_err(|rule| format!("the address of the sender: {rule}"))?;
    Ok(sender)
}

#[derive(Clone)]
pub struct SmtpPassword;

impl SecretSetting for SmtpPassword {
    const NAME: &'static str = "SMTP_PASSWORD";
    const HELP: &'static str = "Password of SMTP_USER.";
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SmtpTls {
    /// Not at all.
    None,
    /// The connection begins in plain text and is encrypted by STARTTLS.
    Starttls,
    /// From the first byte.
    Implicit,
}

/// A mail server that mails can be sent to.
pub struct Server {
    config: SmtpConfig,
    login: Option<Login>,
    tls: Option<Tls>,
}

struct Login {
    user: String,
    password: Secret<SmtpPassword>,
}

struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
    /// Whether the connection is encrypted from the first byte.
    implicit: bool,
}

impl Server {
    /// Reads the certificates.
    ///
    /// # Errors
    /// SMTP_CA_FILE cannot be read, SMTP_HOST cannot be the name in a certificate, or one of
    /// SMTP_USER and SMTP_PASSWORD is missing.
    pub fn new(config: &SmtpConfig) -> anyhow::Result<Self> {
        let login = match (&config.smtp_user, config.smtp_password.get()) {
            (Some(user), Some(password)) => Some(Login { user: user.clone(), password: password.clone() }),
            (Some(_), None) => bail!("SMTP_USER is set: set SMTP_PASSWORD or SMTP_PASSWORD_FILE too"),
            (None, Some(_)) => bail!("SMTP_PASSWORD is set: set SMTP_USER too"),
            (None, None) => None,
        };
        let tls = match config.smtp_tls {
            SmtpTls::None => None,
            tls => Some(Tls::new(config, tls == SmtpTls::Implicit)?),
        };
        if login.is_some() && tls.is_none() {
            tracing::warn!("SMTP_USER is set and SMTP_TLS is none: the password is sent unencrypted");
        }
        Ok(Self { config: config.clone(), login, tls })
    }

    pub fn sender(&self) -> &Mailbox {
        &self.config.mail_from
    }

    pub fn from(&self) -> &Address {
        &self.config.mail_from.email
    }

    /// Connects, encrypts the connection and logs in. Returns the step that failed.
    pub(super) async fn connect(&self) -> Result<Session, (&'static str, Failure)> {
        let stream = self.tcp().await.map_err(|failure| ("connect", failure))?;
        let mut session = match &self.tls {
            Some(tls) if tls.implicit => {
                let stream = handshake(&tls.connector, tls.name.clone(), stream).await;
                Session::greeted(stream.map_err(|failure| ("TLS", failure))?, Limits::RFC_5321).await
            }
            _ => Session::greeted(stream, Limits::RFC_5321).await,
        }
        .map_err(|failure| ("greeting", failure))?;
        // Our name for EHLO. The domain of the sender is one that we own.
        let hello = self.from().domain();
        let mut extensions = session.hello(hello).await.map_err(|failure| ("EHLO", failure))?;
        if let Some(tls) = self.tls.as_ref().filter(|tls| !tls.implicit) {
            if !extensions.starttls {
                return Err(("STARTTLS", Failure::NoAnswer("the server does not offer STARTTLS")));
            }
            let encrypted = session.starttls(&tls.connector, tls.name.clone()).await;
            session = encrypted.map_err(|failure| ("STARTTLS", failure))?;
            // What was said before the encryption does not count (RFC 3207 §4.2).
            extensions = session.hello(hello).await.map_err(|failure| ("EHLO", failure))?;
        }
        if let Some(login) = &self.login {
            login.authenticate(&mut session, &extensions).await.map_err(|failure| ("AUTH", failure))?;
        }
        Ok(session)
    }

    /// Tries the addresses of the host one after another.
    async fn tcp(&self) -> Result<TcpStream, Failure> {
        let host = (self.config.smtp_host.as_str(), self.config.smtp_port);
        let resolved = timeout(CONNECT, tokio::net::lookup_host(host)).await;
        let Ok(Ok(addresses)) = resolved else {
            return Err(Failure::NoAnswer("the name SMTP_HOST cannot be resolved"));
        };
        let mut last = Failure::NoAnswer("the name SMTP_HOST has no address");
        for address in addresses {
            match timeout(CONNECT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    // The dot that ends a mail is a small packet after others. Without this option
                    // the system keeps it back until the server has acknowledged them, which takes
                    // 40 ms.
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Ok(Err(error)) => last = error.into(),
                Err(_) => last = Failure::NoAnswer("the server did not accept the connection in time"),
            }
        }
        Err(last)
    }
}

impl Login {
    /// RFC 4616 and the older LOGIN. The first one that the server offers is used.
    async fn authenticate(&self, session: &mut Session, extensions: &Extensions) -> Result<(), Failure> {
        let password = self.password.expose();
        if extensions.auth_plain {
            let credentials = STANDARD.encode(format!("\0{}\0{password}", self.user));
            session.command(&format!("AUTH PLAIN {credentials}")).await?;
        } else if extensions.auth_login {
            session.challenge("AUTH LOGIN").await?;
            session.challenge(&STANDARD.encode(&self.user)).await?;
            session.command(&STANDARD.encode(password)).await?;
        } else {
            return Err(Failure::NoAnswer("the server offers neither AUTH PLAIN nor AUTH LOGIN"));
        }
        Ok(())
    }
}

impl Tls {
    fn new(config: &SmtpConfig, implicit: bool) -> anyhow::Result<Self> {
        let client = tls::client("SMTP_CA_FILE", config.smtp_ca_file.as_deref())?;
        let name = ServerName::try_from(config.smtp_host.clone());
        let name = name.with_context(|| format!("SMTP_HOST is not a host name: {:?}", config.smtp_host))?;
        Ok(Self { connector: TlsConnector::from(Arc::new(client)), name, implicit })
    }
}
