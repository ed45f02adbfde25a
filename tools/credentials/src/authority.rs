//! An authority of our own, and the certificates that it signs.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use time::OffsetDateTime;
use time::ext::NumericalDuration;
use uuid::Uuid;

/// Signs certificates. Its key is kept in memory only, so no further certificate can be signed
/// later.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its private key.
pub struct Certificate {
    pub certificate: rcgen::Certificate,
    pub key: KeyPair,
}

impl Authority {
    pub fn create() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Of two authorities with the same name, a client takes one for a forgery of the other.
        parameters.distinguished_name = named(&format!("Waybill development authority {}", Uuid::new_v4()));
        Self(CertifiedIssuer::self_signed(parameters, key()).expect(VALID))
    }

    /// A certificate for these host names and addresses.
    pub fn certificate(&self, names: &[&str]) -> Certificate {
        self.sign(parameters(names))
    }

    /// A certificate that was valid until yesterday.
    pub fn expired_certificate(&self, names: &[&str]) -> Certificate {
        let mut parameters = parameters(names);
        parameters.not_after = OffsetDateTime::now_utc() - 1.days();
        self.sign(parameters)
    }

    /// The authority's own certificate, in PEM format.
    pub fn pem(&self) -> String {
        self.0.as_ref().pem()
    }

    fn sign(&self, parameters: CertificateParams) -> Certificate {
        let key = key();
        Certificate { certificate: parameters.signed_by(&key, &self.0).expect(VALID), key }
    }
}

impl Certificate {
    /// The private key and then the certificate, in PEM format.
    pub fn pem_with_key(&self) -> String {
        self.key.serialize_pem() + &self.certificate.pem()
    }
}

const VALID: &str = "names in ASCII make a valid certificate";

fn key() -> KeyPair {
    KeyPair::generate().expect("the system has random numbers")
}

/// OpenSSL takes a certificate whose subject and issuer have the same name for a self-signed one.
fn parameters(names: &[&str]) -> CertificateParams {
    let mut parameters =
        CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).expect(VALID);
    parameters.distinguished_name = named(names[0]);
    parameters
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}
