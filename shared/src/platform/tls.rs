//! TLS connections that a service opens. One provider of cryptography (ring) everywhere: two in one
//! program panic at the first handshake.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{CertificateError, ClientConfig, Error, RootCertStore};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a server may take to refuse a client's certificate. One that accepts it says nothing.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(500);

/// A file, with the name of its setting for errors.
pub(crate) type NamedFile<'a> = (&'a str, &'a Path);

/// The settings of a client that trusts the authorities in a file, or the well-known public ones.
/// `setting` is the name of the file's setting, for errors.
///
/// # Errors
/// The file cannot be read, or contains no certificate.
pub fn client(setting: &str, ca_file: Option<&Path>) -> anyhow::Result<ClientConfig> {
    client_with(setting, ca_file, None)
}

/// As [`client`], with the client's own certificate and its private key.
///
/// # Errors
/// A file cannot be used, or the key belongs to another certificate.
pub(crate) fn client_with(
    setting: &str,
    ca_file: Option<&Path>,
    identity: Option<(NamedFile<'_>, NamedFile<'_>)>,
) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(file) => {
            for certificate in certificates((setting, file))? {
                roots.add(certificate).with_context(|| format!("cannot use {setting} {}", file.display()))?;
            }
        }
    }
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let builder = builder.with_root_certificates(roots);
    let Some((certificate, key)) = identity else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(certificate)?;
    let private = PrivateKeyDer::from_pem_file(key.1).with_context(|| cannot_read(key))?;
    builder.with_client_auth_cert(chain, private).with_context(|| {
        format!("the key {} {} does not fit the certificate {}", key.0, key.1.display(), certificate.0)
    })
}

fn certificates(file: NamedFile<'_>) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_file_iter(file.1).with_context(|| cannot_read(file))?;
    let certificates: Vec<_> = certificates.collect::<Result<_, _>>().with_context(|| cannot_read(file))?;
    ensure!(!certificates.is_empty(), "{} {} contains no certificate in PEM format", file.0, file.1.display());
    Ok(certificates)
}

fn cannot_read((setting, file): NamedFile<'_>) -> String {
    format!("cannot read {setting} {}", file.display())
}

/// What went wrong in a handshake.
pub(crate) enum HandshakeFault {
    /// The certificate of the server is signed by an authority that the client does not know.
    UnknownAuthority(String),
    /// The certificate of the server is for another host.
    OtherHost(String),
    Expired(String),
    /// The server has ended the handshake. The client's certificate is the usual cause.
    Refused(String),
    Other(String),
}

impl HandshakeFault {
    /// What rustls says.
    pub fn text(&self) -> &str {
        match self {
            Self::UnknownAuthority(text)
            | Self::OtherHost(text)
            | Self::Expired(text)
            | Self::Refused(text)
            | Self::Other(text) => text,
        }
    }

    /// `None`: the error is not about TLS.
    pub fn of(error: &io::Error) -> Option<Self> {
        let error: &Error = error.get_ref()?.downcast_ref()?;
        let text = error.to_string();
        Some(match error {
            Error::InvalidCertificate(fault) => match fault {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::UnknownAuthority(text),
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    Self::OtherHost(text)
                }
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired(text),
                _ => Self::Other(text),
            },
            Error::AlertReceived(_) => Self::Refused(text),
            _ => Self::Other(text),
        })
    }
}

/// Why a TLS handshake with this server fails. `None`: it does not fail, or there is no connection.
pub(crate) async fn handshake_fault(client: ClientConfig, host: &str, port: u16) -> Option<HandshakeFault> {
    let name = ServerName::try_from(host.to_owned()).ok()?;
    let handshake = async {
        let stream = TcpStream::connect((host, port)).await.ok()?;
        let failed = match TlsConnector::from(Arc::new(client)).connect(name, stream).await {
            // The refusal of a client's certificate comes after the handshake (TLS 1.3).
            Ok(mut stream) => timeout(REFUSAL_TIMEOUT, stream.read(&mut [0])).await.ok()?.err()?,
            Err(error) => error,
        };
        Some(HandshakeFault::of(&failed).unwrap_or_else(|| HandshakeFault::Other(failed.to_string())))
    };
    timeout(HANDSHAKE_TIMEOUT, handshake).await.ok()?
}
