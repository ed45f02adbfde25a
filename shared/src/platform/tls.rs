//! TLS connections that a service opens. One provider of cryptography (ring) everywhere: two in one
//! program panic at the first handshake.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// The settings of a client that trusts the authorities in a file, or the well-known public ones.
/// `setting` is the name of the file's setting, for errors.
///
/// # Errors
/// The file cannot be read, or contains no certificate.
pub fn client(setting: &str, ca_file: Option<&Path>) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(file) => {
            let reading = || format!("cannot read {setting} {}", file.display());
            for certificate in CertificateDer::pem_file_iter(file).with_context(reading)? {
                roots.add(certificate.with_context(reading)?).with_context(reading)?;
            }
            ensure!(!roots.is_empty(), "{setting} {} contains no certificate in PEM format", file.display());
        }
    }
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Why a TLS handshake with this server fails. `None`: it does not fail, or there is no connection.
pub(crate) async fn handshake_fault(setting: &str, ca_file: Option<&Path>, host: &str, port: u16) -> Option<String> {
    let config = match client(setting, ca_file) {
        Ok(config) => config,
        Err(error) => return Some(format!("{error:#}")),
    };
    let name = ServerName::try_from(host.to_owned()).ok()?;
    let handshake = async {
        let stream = TcpStream::connect((host, port)).await.ok()?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.err().map(|error| error.to_string())
    };
    timeout(HANDSHAKE_TIMEOUT, handshake).await.ok()?
}
