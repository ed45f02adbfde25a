//! Certificates for components with TLS, new ones for each test.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use time::OffsetDateTime;
use time::ext::NumericalDuration;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

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
        parameters.distinguished_name = named("an authority of the tests");
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

    /// Writes the authority's own certificate, in PEM format.
    pub fn write(&self, file: PathBuf) -> PathBuf {
        std::fs::write(&file, self.0.as_ref().pem()).unwrap();
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
    /// Accepts connections with TLS.
    pub fn acceptor(&self) -> TlsAcceptor {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.der().clone()], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    /// Writes the private key and then the certificate into one file, in PEM format.
    pub fn write(&self, file: &Path) {
        std::fs::write(file, self.key.serialize_pem() + &self.certificate.pem()).unwrap();
    }
}
