//! Certificates for components with TLS, new ones for each test.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::KeyPair;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

/// An authority that signs certificates.
pub struct Authority(credentials::Authority);

/// A certificate with its private key.
pub struct Certificate {
    pub certificate: rcgen::Certificate,
    pub key: KeyPair,
}

impl Authority {
    pub fn create() -> Self {
        Self(credentials::Authority::create())
    }

    /// A certificate for this host name.
    pub fn certificate(&self, name: &str) -> Certificate {
        self.0.certificate(&[name]).into()
    }

    /// A certificate that was valid until yesterday.
    pub fn expired_certificate(&self, name: &str) -> Certificate {
        self.0.expired_certificate(&[name]).into()
    }

    /// The authority's own certificate, in PEM format.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Writes the authority's own certificate, in PEM format.
    pub fn write(&self, file: PathBuf) -> PathBuf {
        std::fs::write(&file, self.pem()).unwrap();
        file
    }
}

impl From<credentials::Certificate> for Certificate {
    fn from(credentials::Certificate { certificate, key }: credentials::Certificate) -> Self {
        Self { certificate, key }
    }
}

impl Certificate {
    /// Writes the certificate and the private key into two files, in PEM format.
    pub fn write_apart(&self, certificate: PathBuf, key: PathBuf) -> (PathBuf, PathBuf) {
        std::fs::write(&certificate, self.certificate.pem()).unwrap();
        std::fs::write(&key, self.key.serialize_pem()).unwrap();
        (certificate, key)
    }

    /// The settings of a server with this certificate. With an authority, a client needs a
    /// certificate that the authority has signed.
    pub fn server(&self, clients: Option<&Authority>) -> ServerConfig {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).unwrap();
        builder.with_single_cert(vec![self.certificate.der().clone()], key).unwrap()
    }

    /// Accepts connections with TLS.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::new(self.server(None)))
    }

    /// Writes the private key and then the certificate into one file, in PEM format.
    pub fn write(&self, file: &Path) {
        std::fs::write(file, format!("{}{}", self.key.serialize_pem(), self.certificate.pem())).unwrap();
    }
}
