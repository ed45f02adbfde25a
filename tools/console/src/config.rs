//! The settings. Doc comments are the manual: `--help` prints them.

use std::net::SocketAddr;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use shared::messaging::KafkaConfig;
use shared::platform::secret::{OptionalSecret, Secret, SecretSetting};
use shared::platform::telemetry::TelemetryConfig;
use topology::SERVICES;

use crate::source::SourceUrl;
use crate::traces::TracesConfig;

/// Shows where events are, what waits, and the records as they arrive.
#[derive(Parser)]
pub struct Cli {
    #[command(flatten)]
    pub config: Config,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand, Clone, Copy, Debug)]
pub enum Command {
    /// Serve the pages (the default).
    Serve,
    /// Ask the running console whether it serves. Exits with status 0 if it does.
    Healthcheck,
}

#[derive(Args)]
pub struct Config {
    /// Address of the pages. Keep it off the public network.
    #[arg(long, env, default_value = "127.0.0.1:8084")]
    pub http_addr: SocketAddr,
    /// Address of the admin port: /livez, /readyz, /status, /metrics.
    #[arg(long, env, default_value = "127.0.0.1:9084")]
    pub admin_addr: SocketAddr,
    /// Host names under which browsers reach the pages, separated by commas. The console refuses
    /// requests for any other name, so that a website cannot reach it through a host name of its
    /// own that points to this machine.
    #[arg(long, env, value_delimiter = ',', default_value = "localhost,127.0.0.1")]
    pub console_hosts: Vec<String>,
    /// The admin port of each service, as name=host:port, separated by commas. The console asks all
    /// addresses of a host, so that it shows each replica. Default of each service: its published
    /// port on this machine.
    #[arg(long, env, value_delimiter = ',')]
    pub admin_addresses: Vec<ServiceAddress>,
    /// The public API of each service, as name=host:port, separated by commas. The pages register
    /// and erase users there, and check the effects. Default of each service: its published port on
    /// this machine.
    #[arg(long, env, value_delimiter = ',')]
    pub public_addresses: Vec<ServiceAddress>,
    /// URL pattern of a line of code, with {file} and {line} in it, for example
    /// https://git.example.com/waybill/blob/main/{file}#L{line}. If it is set, the steps of a story
    /// link to the code.
    #[arg(long, env)]
    pub source_url: Option<SourceUrl>,
    #[command(flatten)]
    pub admin_token: OptionalSecret<AdminToken>,
    #[command(flatten)]
    pub laboratory: LaboratoryConfig,
    #[command(flatten)]
    pub kafka: KafkaConfig,
    #[command(flatten)]
    pub traces: TracesConfig,
    #[command(flatten)]
    pub telemetry: TelemetryConfig,
}

impl Config {
    /// The admin port of each service.
    ///
    /// # Errors
    /// ADMIN_ADDRESSES names a service that does not exist.
    pub fn services(&self) -> anyhow::Result<Vec<ServiceAddress>> {
        addresses("ADMIN_ADDRESSES", &self.admin_addresses, |service| service.admin)
    }

    /// The public API of each service.
    ///
    /// # Errors
    /// PUBLIC_ADDRESSES names a service that does not exist.
    pub fn public_services(&self) -> anyhow::Result<Vec<ServiceAddress>> {
        addresses("PUBLIC_ADDRESSES", &self.public_addresses, |service| service.http)
    }
}

/// The address of each service: the given one, or the published port on this machine.
fn addresses(
    setting: &str,
    given: &[ServiceAddress],
    published: impl Fn(topology::Service) -> u16,
) -> anyhow::Result<Vec<ServiceAddress>> {
    for ServiceAddress { service, .. } in given {
        let names = SERVICES.map(|service| service.name);
        anyhow::ensure!(
            names.contains(&service.as_str()),
            "{setting} names the service {service}, which does not exist: the services are {}",
            names.join(", ")
        );
    }
    let addresses = SERVICES.map(|service| {
        let address = given.iter().find(|address| address.service == service.name).cloned();
        address.unwrap_or_else(|| ServiceAddress {
            service: service.name.to_owned(),
            host: "127.0.0.1".to_owned(),
            port: published(service),
        })
    });
    Ok(addresses.into())
}

/// The page that breaks parts of the system, for development.
#[derive(Args)]
pub struct LaboratoryConfig {
    /// Offer the page Laboratory, which breaks parts of the system on purpose and registers users.
    /// Only for development: every visitor may use it.
    #[arg(long, env)]
    pub laboratory: bool,
    /// The control port of `cargo xtask up`, through which the Laboratory acts. Without it the page
    /// shows the commands of Docker Compose.
    #[arg(long, env)]
    pub control_addr: Option<SocketAddr>,
    #[command(flatten)]
    pub control_token: OptionalSecret<ControlToken>,
    /// URL of Mailpit, for example http://localhost:8025. The Laboratory lets it refuse mails, and
    /// counts the copies of a mail. Mailpit must run with MP_ENABLE_CHAOS=true.
    #[arg(long, env)]
    pub mailpit_url: Option<String>,
}

impl LaboratoryConfig {
    /// The control port and its token.
    ///
    /// # Errors
    /// One of both is missing, or the port is not on loopback.
    pub fn control(&self) -> anyhow::Result<Option<(SocketAddr, Secret<ControlToken>)>> {
        match (self.control_addr, self.control_token.get()) {
            (None, None) => Ok(None),
            (Some(address), Some(token)) => {
                anyhow::ensure!(address.ip().is_loopback(), "CONTROL_ADDR must be on loopback, as the control port is");
                Ok(Some((address, token.clone())))
            }
            (Some(_), None) => anyhow::bail!("CONTROL_TOKEN is missing: `cargo xtask up` sets it with CONTROL_ADDR"),
            (None, Some(_)) => anyhow::bail!("CONTROL_ADDR is missing: `cargo xtask up` sets it with CONTROL_TOKEN"),
        }
    }
}

/// The token of the control port.
#[derive(Clone)]
pub struct ControlToken;

impl SecretSetting for ControlToken {
    const NAME: &'static str = "CONTROL_TOKEN";
    const HELP: &'static str = "The token of the control port. `cargo xtask up` makes one at its start. It never reaches \
                                a browser.";
}

/// The token that the console sends for visitors who are not logged in.
#[derive(Clone)]
pub struct AdminToken;

impl SecretSetting for AdminToken {
    const NAME: &'static str = "ADMIN_TOKEN";
    const HELP: &'static str = "A token that the services accept (their ADMIN_TOKENS), without its name. The console \
                                sends it for every visitor who is not logged in. So every visitor can act on dead \
                                letters and see personal data, under this token's name: for development only. \
                                Without it each operator logs in with a token of their own.";
}

/// Where a port of a service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAddress {
    pub service: String,
    pub host: String,
    pub port: u16,
}

impl FromStr for ServiceAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('=').and_then(|(service, address)| {
            let (host, port) = address.rsplit_once(':')?;
            let port = port.parse().ok()?;
            (!service.is_empty() && !host.is_empty()).then(|| Self {
                service: service.to_owned(),
                host: host.to_owned(),
                port,
            })
        });
        parsed.ok_or("not name=host:port, for example user=user.internal:9080")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_name_a_host_and_a_port() {
        let address = ServiceAddress { service: "user".to_owned(), host: "user.internal".to_owned(), port: 9080 };
        assert_eq!("user=user.internal:9080".parse(), Ok(address));
        for wrong in ["", "user", "user=", "user=host", "user=host:x", "=host:1", "user=:1"] {
            assert!(wrong.parse::<ServiceAddress>().is_err(), "{wrong}");
        }
    }
}
