//! The certificates and passwords of a secured stack. They are stored with its data, because the
//! components keep the passwords too.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use credentials::compose::{MAIL_USER, OPERATOR, kafka_users, valkey_users};
use credentials::{Authority, Passwords};
use topology::Service;

use crate::ports::Ports;
use crate::postgres::Database;
use crate::tls;

/// The files of one stack.
#[derive(Clone)]
pub struct Secured {
    folder: PathBuf,
    ports: Ports,
    passwords: Passwords,
    further_users: Vec<String>,
}

impl Secured {
    /// For a stack on these ports. Takes the certificates and passwords in `folder`, and makes
    /// those that are missing. `further_users` can log in to Kafka too, and may do nothing there by
    /// themselves.
    pub fn create(folder: &Path, ports: Ports, further_users: &[&str]) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let further_users: Vec<String> = further_users.iter().map(|user| (*user).to_owned()).collect();
        let kafka = kafka_users().chain(further_users.clone()).map(|user| format!("kafka-{user}"));
        let others = ["valkey-cache", "valkey-operator", "mail"].map(str::to_owned);
        let passwords = Passwords::in_file(&folder.join("passwords"), kafka.chain(others))?;
        let secured = Self { folder: folder.to_owned(), ports, passwords, further_users };
        if !secured.authority().exists() {
            let authority = Authority::create();
            let server = authority.certificate(&["localhost", "127.0.0.1"]);
            fs::write(secured.certificate(), server.certificate.pem())?;
            fs::write(secured.key(), server.key.serialize_pem())?;
            fs::write(secured.certificate_with_key(), server.pem_with_key())?;
            fs::write(secured.authority(), authority.pem())?;
        }
        let users = valkey_users(secured.passwords.of("valkey-cache"), secured.passwords.of("valkey-operator"));
        fs::write(secured.valkey_users(), users)?;
        let cache = secured.passwords.of("valkey-cache");
        fs::write(secured.valkey_url(), format!("rediss://cache:{cache}@localhost:{}", ports.redis))?;
        for (name, password) in secured.passwords.iter() {
            fs::write(secured.password_file(name), password)?;
        }
        Ok(secured)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The certificate of the authority.
    pub fn authority(&self) -> PathBuf {
        self.folder.join("authority.pem")
    }

    /// The certificate of every component.
    pub fn certificate(&self) -> PathBuf {
        self.folder.join("server.pem")
    }

    pub fn key(&self) -> PathBuf {
        self.folder.join("server-key.pem")
    }

    /// The key and the certificate in one file, as Kafka wants them.
    pub fn certificate_with_key(&self) -> PathBuf {
        self.folder.join("server-with-key.pem")
    }

    /// The users of Valkey, as its setting `aclfile` wants them.
    pub fn valkey_users(&self) -> PathBuf {
        self.folder.join("valkey-users.acl")
    }

    /// The users that can log in to Kafka, with their passwords.
    pub fn kafka_users(&self) -> Vec<(String, String)> {
        let users = kafka_users().chain(self.further_users.clone());
        users.map(|user| (user.clone(), self.kafka_password(&user).to_owned())).collect()
    }

    pub fn kafka_password(&self, user: &str) -> &str {
        self.passwords.of(&format!("kafka-{user}"))
    }

    /// Bootstrap servers for clients that log in.
    pub fn kafka_servers(&self) -> String {
        format!("localhost:{}", self.ports.kafka)
    }

    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Every password.
    pub fn passwords(&self) -> impl Iterator<Item = &str> {
        self.passwords.iter().map(|(_, password)| password)
    }

    pub fn mail_password(&self) -> &str {
        self.passwords.of("mail")
    }

    /// The URL with which an operator may do everything on Valkey.
    pub fn valkey_operator_url(&self) -> String {
        format!("rediss://{OPERATOR}:{}@localhost:{}", self.passwords.of("valkey-operator"), self.ports.redis)
    }

    /// A server's side of TLS.
    pub fn acceptor(&self) -> Result<tokio_rustls::TlsAcceptor> {
        tls::acceptor(&fs::read_to_string(self.certificate())?, &fs::read_to_string(self.key())?)
    }

    /// The settings of a service for the secured components, without its database.
    pub fn settings(&self, service: Service) -> Vec<(&'static str, String)> {
        let authority = self.authority().display().to_string();
        let mut settings = self.kafka_login(&service.kafka_user());
        settings.extend([
            ("MANAGE_TOPICS", "false".to_owned()),
            ("VALKEY_URL_FILE", self.valkey_url().display().to_string()),
            ("VALKEY_CA_FILE", authority.clone()),
            ("SMTP_HOST", "localhost".to_owned()),
            ("SMTP_PORT", self.ports.smtp.to_string()),
            ("SMTP_TLS", "starttls".to_owned()),
            ("SMTP_CA_FILE", authority),
            ("SMTP_USER", MAIL_USER.to_owned()),
            ("SMTP_PASSWORD_FILE", self.password_file("mail").display().to_string()),
        ]);
        settings
    }

    /// The settings with which a program logs in to Kafka as this user.
    pub fn kafka_login(&self, user: &str) -> Vec<(&'static str, String)> {
        vec![
            ("KAFKA_BROKERS", self.kafka_servers()),
            ("KAFKA_SECURITY_PROTOCOL", "sasl_ssl".to_owned()),
            ("KAFKA_USER", user.to_owned()),
            ("KAFKA_PASSWORD_FILE", self.password_file(&format!("kafka-{user}")).display().to_string()),
            ("KAFKA_CA_FILE", self.authority().display().to_string()),
        ]
    }

    /// The URLs of a database with TLS.
    pub fn over_tls(&self, database: Database) -> Database {
        let parameters = format!("?sslmode=verify-full&sslrootcert={}", self.authority().display());
        Database { url: database.url + &parameters, owner_url: database.owner_url + &parameters }
    }

    fn valkey_url(&self) -> PathBuf {
        self.folder.join("valkey-url")
    }

    fn password_file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.password"))
    }
}
