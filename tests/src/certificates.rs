//! Certificates for components with TLS, new ones for each test.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use time::OffsetDateTime;
use time::ext::NumericalDuration;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

/// An authority that signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its private key.
pub struct Certificate {
    pub certificate: rcgen::Certificate,
    pub key: KeyPair,
}

impl Authority {
    pub fn create() -> Self {
        let mut parameters = CertificateParams::new(vec![]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Of two authorities with the same name, a client takes one for a forgery of the other.
        parameters.distinguished_name = named(&format!("authority {}", uuid::Uuid::now_v7()));
        Self(CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate for this host name.
    pub fn certificate(&self, name: &str) -> Certificate {
        self.sign(parameters(name))
    }

    /// A certificate that was valid until yesterday.
    pub fn expired_certificate(&self, name: &str) -> Certificate {
        let mut parameters = parameters(name);
        parameters.not_after = OffsetDateTime::now_utc() - 1.days();
        self.sign(parameters)
    }

    /// The authority's own certificate, in PEM format.
    pub fn pem(&self) -> String {
        self.0.as_ref().pem()
    }

    /// Writes the authority's own certificate, in PEM format.
    pub fn write(&self, file: PathBuf) -> PathBuf {
        std::fs::write(&file, self.pem()).unwrap();
        file
    }

    fn sign(&self, parameters: CertificateParams) -> Certificate {
        let key = KeyPair::generate().unwrap();
        Certificate { certificate: parameters.signed_by(&key, &self.0).unwrap(), key }
    }
}

/// OpenSSL takes a certificate whose subject and issuer have the same name for a self-signed one.
fn parameters(name: &str) -> CertificateParams {
    let mut parameters = CertificateParams::new(vec![name.to_owned()]).unwrap();
    parameters.distinguished_name = named(name);
    parameters
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
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
                roots.add(authority.0.as_ref().der().clone()).unwrap();
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
        std::fs::write(file, self.key.serialize_pem() + &self.certificate.pem()).unwrap();
    }
}
