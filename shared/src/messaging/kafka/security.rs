//! How clients prove to Kafka who they are, and check that they talk to Kafka.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use rdkafka::ClientConfig;
use tokio_rustls::rustls::ClientConfig as TlsClient;

use crate::platform::secret::{OptionalSecret, SecretSetting};
use crate::platform::tls;

/// The values have the names of Kafka's own documentation.
#[derive(Args, Clone, Debug)]
pub(super) struct SecurityConfig {
    /// How connections to Kafka are encrypted (`ssl`) and how the service logs in (`sasl`). With
    /// `ssl` and `sasl_ssl` the certificate of a broker must be valid for its host name.
    #[arg(long, env, value_enum, default_value_t = Protocol::Plaintext)]
    kafka_security_protocol: Protocol,
    /// How the password is proved. Default with `sasl_plaintext` and `sasl_ssl`: SCRAM-SHA-512.
    #[arg(long, env, value_enum)]
    kafka_sasl_mechanism: Option<Mechanism>,
    /// User name, with `sasl_plaintext` and `sasl_ssl`.
    #[arg(long, env)]
    kafka_user: Option<String>,
    #[command(flatten)]
    kafka_password: OptionalSecret<KafkaPassword>,
    /// A file with the certificates of the authorities that may sign the brokers' certificates, in
    /// PEM format. Default: those of the operating system.
    #[arg(long, env)]
    kafka_ca_file: Option<PathBuf>,
    /// A file with the certificate of this service, in PEM format, if the brokers ask for one.
    #[arg(long, env)]
    kafka_certificate_file: Option<PathBuf>,
    /// A file with the private key of this certificate, in PEM format, not encrypted.
    #[arg(long, env)]
    kafka_key_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Protocol {
    Plaintext,
    Ssl,
    SaslPlaintext,
    SaslSsl,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mechanism {
    #[value(name = "PLAIN")]
    Plain,
    #[value(name = "SCRAM-SHA-256")]
    ScramSha256,
    #[value(name = "SCRAM-SHA-512")]
    ScramSha512,
}

#[derive(Clone)]
struct KafkaPassword;

impl SecretSetting for KafkaPassword {
    const NAME: &'static str = "KAFKA_PASSWORD";
    const HELP: &'static str = "Password of KAFKA_USER.";
}

impl Protocol {
    fn has_tls(self) -> bool {
        matches!(self, Self::Ssl | Self::SaslSsl)
    }

    fn has_login(self) -> bool {
        matches!(self, Self::SaslPlaintext | Self::SaslSsl)
    }
}

impl SecurityConfig {
    /// # Errors
    /// Two settings contradict each other, or a file cannot be read.
    pub fn check(&self) -> anyhow::Result<()> {
        let protocol = self.kafka_security_protocol;
        if protocol.has_login() {
            ensure!(self.kafka_user.is_some(), "KAFKA_SECURITY_PROTOCOL={protocol} needs KAFKA_USER");
            let has_password = self.kafka_password.get().is_some();
            ensure!(has_password, "KAFKA_SECURITY_PROTOCOL={protocol} needs KAFKA_PASSWORD or KAFKA_PASSWORD_FILE");
        } else if self.kafka_user.is_some()
            || self.kafka_password.get().is_some()
            || self.kafka_sasl_mechanism.is_some()
        {
            bail!(
                "KAFKA_USER, KAFKA_PASSWORD and KAFKA_SASL_MECHANISM need KAFKA_SECURITY_PROTOCOL=sasl_ssl or sasl_plaintext"
            );
        }
        ensure!(
            protocol.has_tls() || self.files().next().is_none(),
            "KAFKA_CA_FILE, KAFKA_CERTIFICATE_FILE and KAFKA_KEY_FILE need KAFKA_SECURITY_PROTOCOL=ssl or sasl_ssl"
        );
        ensure!(
            self.kafka_certificate_file.is_some() == self.kafka_key_file.is_some(),
            "KAFKA_CERTIFICATE_FILE and KAFKA_KEY_FILE need each other: set both or none"
        );
        for (setting, file) in self.files() {
            File::open(file).with_context(|| format!("{setting}: cannot read {}", file.display()))?;
        }
        Ok(())
    }

    pub fn apply(&self, client: &mut ClientConfig) {
        let protocol = self.kafka_security_protocol;
        client.set("security.protocol", protocol.to_string());
        // The default of librdkafka; written down so that no property switches it off.
        client.set("ssl.endpoint.identification.algorithm", "https");
        client.set("enable.ssl.certificate.verification", "true");
        for (property, file) in [
            ("ssl.ca.location", &self.kafka_ca_file),
            ("ssl.certificate.location", &self.kafka_certificate_file),
            ("ssl.key.location", &self.kafka_key_file),
        ] {
            if let Some(file) = file {
                client.set(property, file.display().to_string());
            }
        }
        if protocol.has_login() {
            client.set("sasl.mechanism", self.kafka_sasl_mechanism.unwrap_or(Mechanism::ScramSha512).to_string());
            client.set("sasl.username", self.kafka_user.as_deref().unwrap_or_default());
            client.set("sasl.password", self.kafka_password.get().map_or("", |password| password.expose()));
        }
    }

    pub fn has_tls(&self) -> bool {
        self.kafka_security_protocol.has_tls()
    }

    /// A client with the same files, to find out why librdkafka cannot connect.
    pub fn tls_client(&self) -> anyhow::Result<TlsClient> {
        let identity = self.kafka_certificate_file.as_deref().zip(self.kafka_key_file.as_deref());
        let identity = identity.map(|(one, other)| (("KAFKA_CERTIFICATE_FILE", one), ("KAFKA_KEY_FILE", other)));
        tls::client_with("KAFKA_CA_FILE", self.kafka_ca_file.as_deref(), identity)
    }

    /// The files that librdkafka reads when a client is created, with the names of their settings.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let files = [
            ("KAFKA_CA_FILE", &self.kafka_ca_file),
            ("KAFKA_CERTIFICATE_FILE", &self.kafka_certificate_file),
            ("KAFKA_KEY_FILE", &self.kafka_key_file),
        ];
        files.into_iter().filter_map(|(setting, file)| Some((setting, file.as_deref()?)))
    }

    /// The file that holds the password, if there is one.
    pub fn password_file(&self) -> Option<PathBuf> {
        OptionalSecret::<KafkaPassword>::file()
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_value(self, f)
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_value(self, f)
    }
}

fn write_value(value: &impl ValueEnum, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let value = value.to_possible_value().expect("every value has a name");
    f.write_str(value.get_name())
}
