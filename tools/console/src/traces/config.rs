//! The settings of the receiver and of the forwarding.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::Args;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::forward::{ANSWER_LIMIT, CONNECT_LIMIT};

#[derive(Args, Clone, Debug)]
pub struct TracesConfig {
    /// Address on which the console receives the services' traces, by OTLP over gRPC. It requires
    /// no login. Set OTEL_EXPORTER_OTLP_ENDPOINT of the services to its URL.
    #[arg(long, env, default_value = "127.0.0.1:14317")]
    pub otlp_addr: SocketAddr,
    /// A file with the certificate of this address and its chain, in PEM format. With it the
    /// console receives traces over TLS only.
    #[arg(long, env)]
    otlp_certificate: Option<PathBuf>,
    /// A file with the private key of this certificate, in PEM format.
    #[arg(long, env)]
    otlp_key: Option<PathBuf>,
    /// Another collector that gets each request unchanged, by OTLP over gRPC, for example
    /// http://jaeger:4317. Traces that it does not accept in time are lost for it, and counted.
    #[arg(long, env)]
    forward_otlp: Option<String>,
    /// A file with the certificates of the authorities that may sign the certificate of
    /// FORWARD_OTLP, in PEM format. Without it, the well-known public authorities may.
    #[arg(long, env)]
    forward_otlp_certificate: Option<PathBuf>,
}

impl TracesConfig {
    /// The acceptor of TLS connections. `None`: TLS is off.
    ///
    /// # Errors
    /// A file cannot be used, or one of the two settings is missing.
    pub fn tls(&self) -> anyhow::Result<Option<TlsAcceptor>> {
        let (certificate, key) = match (&self.otlp_certificate, &self.otlp_key) {
            (None, None) => return Ok(None),
            (Some(certificate), Some(key)) => (certificate, key),
            _ => anyhow::bail!("OTLP_CERTIFICATE and OTLP_KEY need each other: set both or none"),
        };
        let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let chain = chain.with_context(|| format!("cannot read OTLP_CERTIFICATE {}", certificate.display()))?;
        ensure!(!chain.is_empty(), "OTLP_CERTIFICATE {} contains no certificate in PEM format", certificate.display());
        let private = PrivateKeyDer::from_pem_file(key);
        let private = private.with_context(|| format!("cannot read OTLP_KEY {}", key.display()))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let mut tls = builder
            .with_no_client_auth()
            .with_single_cert(chain, private)
            .context("OTLP_KEY is not the private key of OTLP_CERTIFICATE")?;
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Some(TlsAcceptor::from(Arc::new(tls))))
    }

    /// The other collector, if there is one.
    ///
    /// # Errors
    /// FORWARD_OTLP is not a URL, or its certificate cannot be used.
    pub fn target(&self) -> anyhow::Result<Option<Endpoint>> {
        // An empty setting switches the forwarding off, as in a compose file.
        let Some(url) = self.forward_otlp.as_ref().filter(|url| !url.is_empty()) else { return Ok(None) };
        let wrong = "FORWARD_OTLP is not a URL such as http://jaeger:4317";
        let endpoint = Endpoint::from_shared(url.clone()).context(wrong)?;
        let endpoint = endpoint.connect_timeout(CONNECT_LIMIT).timeout(ANSWER_LIMIT);
        let scheme = endpoint.uri().scheme_str().unwrap_or_default().to_owned();
        ensure!(["http", "https"].contains(&&*scheme), wrong);
        if scheme == "http" {
            ensure!(
                self.forward_otlp_certificate.is_none(),
                "FORWARD_OTLP_CERTIFICATE needs a FORWARD_OTLP with https://"
            );
            return Ok(Some(endpoint));
        }
        let tls = match &self.forward_otlp_certificate {
            None => ClientTlsConfig::new().with_webpki_roots(),
            Some(file) => {
                let authorities = std::fs::read(file)
                    .with_context(|| format!("cannot read FORWARD_OTLP_CERTIFICATE {}", file.display()))?;
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities))
            }
        };
        Ok(Some(endpoint.tls_config(tls).context("cannot use FORWARD_OTLP_CERTIFICATE")?))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        traces: TracesConfig,
    }

    fn config(arguments: &[&str]) -> TracesConfig {
        Cli::parse_from([&["console"], arguments].concat()).traces
    }

    #[test]
    fn settings_that_contradict_each_other_are_named() {
        let fault = |arguments: &[&str]| {
            let config = config(arguments);
            let fault = config.tls().err().or_else(|| config.target().err());
            format!("{:#}", fault.unwrap_or_else(|| panic!("{arguments:?} were accepted")))
        };
        assert!(fault(&["--otlp-key", "/nothing"]).contains("need each other"));
        assert!(fault(&["--otlp-key", "/no", "--otlp-certificate", "/no"]).contains("cannot read OTLP_CERTIFICATE"));
        for url in ["jaeger", "jaeger:4317", "ftp://jaeger", "http://"] {
            assert!(fault(&["--forward-otlp", url]).contains("FORWARD_OTLP is not a URL"), "{url}");
        }
        let unused = ["--forward-otlp", "http://jaeger:4317", "--forward-otlp-certificate", "/nothing"];
        assert!(fault(&unused).contains("needs a FORWARD_OTLP with https://"));
        assert!(config(&["--forward-otlp", ""]).target().unwrap().is_none());
        assert!(config(&["--forward-otlp", "http://jaeger:4317"]).target().unwrap().is_some());
    }
}
