//! The settings. Doc comments are the manual: `--help` prints them.

use std::net::SocketAddr;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use shared::messaging::KafkaConfig;
use shared::platform::secret::{OptionalSecret, SecretSetting};
use shared::platform::telemetry::TelemetryConfig;
use topology::SERVICES;

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
    /// requests for any other name, so that a website cannot reach it through a host name of its own
    /// that points to this machine.
    #[arg(long, env, value_delimiter = ',', default_value = "localhost,127.0.0.1")]
    pub console_hosts: Vec<String>,
    /// The admin port of each service, as name=host:port, separated by commas. The console asks all
    /// addresses of a host, so that it shows each replica. Default of each service: its published
    /// port on this machine.
    #[arg(long, env, value_delimiter = ',')]
    pub admin_addresses: Vec<AdminAddress>,
    #[command(flatten)]
    pub admin_token: OptionalSecret<AdminToken>,
    #[command(flatten)]
    pub kafka: KafkaConfig,
    #[command(flatten)]
    pub telemetry: TelemetryConfig,
}

impl Config {
    /// The admin port of each service.
    ///
    /// # Errors
    /// ADMIN_ADDRESSES names a service that does not exist.
    pub fn services(&self) -> anyhow::Result<Vec<AdminAddress>> {
        for AdminAddress { service, .. } in &self.admin_addresses {
            let names = SERVICES.map(|service| service.name);
            anyhow::ensure!(
                names.contains(&service.as_str()),
                "ADMIN_ADDRESSES names the service {service}, which does not exist: the services are {}",
                names.join(", ")
            );
        }
        let given = |name: &str| self.admin_addresses.iter().find(|address| address.service == name).cloned();
        let published = |service: topology::Service| AdminAddress {
            service: service.name.to_owned(),
            host: "127.0.0.1".to_owned(),
            port: service.admin,
        };
        Ok(SERVICES.map(|service| given(service.name).unwrap_or_else(|| published(service))).into())
    }
}

/// The token of operators who give none.
#[derive(Clone)]
pub struct AdminToken;

impl SecretSetting for AdminToken {
    const NAME: &'static str = "ADMIN_TOKEN";
    const HELP: &'static str = "A token that the services accept (their ADMIN_TOKENS), without its name. With it every \
                                visitor of the page can act on dead letters, under this token's name: for development \
                                only. Without it each operator types a token of their own.";
}

/// Where the admin port of a service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminAddress {
    pub service: String,
    pub host: String,
    pub port: u16,
}

impl FromStr for AdminAddress {
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
    fn an_admin_address_is_a_name_a_host_and_a_port() {
        let address = AdminAddress { service: "user".to_owned(), host: "user.internal".to_owned(), port: 9080 };
        assert_eq!("user=user.internal:9080".parse(), Ok(address));
        for wrong in ["", "user", "user=", "user=host", "user=host:x", "=host:1", "user=:1"] {
            assert!(wrong.parse::<AdminAddress>().is_err(), "{wrong}");
        }
    }
}
