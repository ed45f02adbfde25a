//! The identity provider of the tests: keys, the document with the public ones, and tokens.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::processes::Processes;

pub const ISSUER: &str = "https://identity.example.com/";
pub const AUDIENCE: &str = "waybill";
/// The role of administrators.
pub const ADMIN: &str = "waybill:admin";

/// A key that signs tokens.
pub struct SigningKey {
    pub id: String,
    pair: Pair,
}

enum Pair {
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl SigningKey {
    /// For ES256.
    pub fn ecdsa(id: &str) -> Self {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref(), &random).unwrap();
        Self { id: id.to_owned(), pair: Pair::Ecdsa(pair) }
    }

    /// For EdDSA.
    pub fn ed25519(id: &str) -> Self {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let pair = Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap();
        Self { id: id.to_owned(), pair: Pair::Ed25519(pair) }
    }

    pub fn algorithm(&self) -> &'static str {
        match self.pair {
            Pair::Ecdsa(_) => "ES256",
            Pair::Ed25519(_) => "EdDSA",
        }
    }

    pub fn public_key(&self) -> &[u8] {
        match &self.pair {
            Pair::Ecdsa(pair) => pair.public_key().as_ref(),
            Pair::Ed25519(pair) => pair.public_key().as_ref(),
        }
    }

    /// The public key as a JWK.
    pub fn jwk(&self) -> Value {
        let key = self.public_key();
        match self.pair {
            // 0x04, then the two coordinates.
            Pair::Ecdsa(_) => {
                let (x, y) = key[1..].split_at(32);
                json!({ "kty": "EC", "crv": "P-256", "use": "sig", "kid": self.id, "x": encode(x), "y": encode(y) })
            }
            Pair::Ed25519(_) => json!({ "kty": "OKP", "crv": "Ed25519", "kid": self.id, "x": encode(key) }),
        }
    }

    fn sign(&self, text: &str) -> Vec<u8> {
        match &self.pair {
            Pair::Ecdsa(pair) => pair.sign(&SystemRandom::new(), text.as_bytes()).unwrap().as_ref().to_vec(),
            Pair::Ed25519(pair) => pair.sign(text.as_bytes()).as_ref().to_vec(),
        }
    }

    /// A token with these claims, and the usual header.
    pub fn token(&self, claims: &Value) -> String {
        self.token_with(&json!({ "typ": "JWT", "alg": self.algorithm(), "kid": self.id }), claims)
    }

    /// A token with this header.
    pub fn token_with(&self, header: &Value, claims: &Value) -> String {
        let text = unsigned(header, claims);
        let signature = self.sign(&text);
        format!("{text}.{}", encode(&signature))
    }
}

/// A token whose signature is a keyed hash with this secret (HS256), or with a public key.
pub fn token_by_secret(header: &Value, claims: &Value, secret: &[u8]) -> String {
    let text = unsigned(header, claims);
    let hash = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), text.as_bytes());
    format!("{text}.{}", encode(hash.as_ref()))
}

/// Header and claims of a token.
pub fn unsigned(header: &Value, claims: &Value) -> String {
    format!("{}.{}", encode(header.to_string().as_bytes()), encode(claims.to_string().as_bytes()))
}

fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The claims of a token that is valid for an hour.
pub fn claims(subject: &str) -> Value {
    json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": subject, "exp": in_seconds(3600), "roles": [] })
}

/// The time as it is written in a claim.
pub fn in_seconds(seconds: i64) -> i64 {
    OffsetDateTime::now_utc().unix_timestamp() + seconds
}

/// The document with public keys.
pub fn key_set(keys: &[&SigningKey]) -> String {
    json!({ "keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>() }).to_string()
}

/// The identity provider, and the file with its public key.
pub struct Identities {
    pub key: SigningKey,
    pub file: PathBuf,
}

impl Identities {
    /// Makes every service that is started from now on require tokens.
    pub fn required_by(processes: &mut Processes) -> Self {
        let key = SigningKey::ecdsa("first key");
        let file = processes.file("jwks.json");
        publish(&file, &[&key]);
        require(processes);
        processes.set("AUTH_JWKS_FILE", file.to_str().unwrap());
        Self { key, file }
    }

    /// A token of this subject.
    pub fn token_of(&self, subject: &str) -> String {
        self.key.token(&claims(subject))
    }

    /// A token of an administrator.
    pub fn admin(&self) -> String {
        let mut claims = claims("the operator");
        claims["roles"] = json!(["another role", ADMIN]);
        self.key.token(&claims)
    }
}

/// The settings without the source of the keys.
pub fn require(processes: &mut Processes) {
    processes.set("AUTH_ISSUER", ISSUER);
    processes.set("AUTH_AUDIENCE", AUDIENCE);
    processes.set("AUTH_PRINCIPAL_SECRET", "a secret of the tests that stands for callers");
}

/// Writes the document with these keys, at once: the service may read it at any time.
pub fn publish(file: &Path, keys: &[&SigningKey]) {
    let new = file.with_extension("new");
    std::fs::write(&new, key_set(keys)).unwrap();
    std::fs::rename(new, file).unwrap();
}
