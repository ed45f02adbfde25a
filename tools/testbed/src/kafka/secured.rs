//! A listener on which clients log in over TLS (SASL_SSL with SCRAM-SHA-512).

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use credentials::compose::OPERATOR;

/// What the listener needs.
pub struct Listener<'a> {
    pub port: u16,
    /// Its key and its certificate in one file, in PEM format.
    pub certificate: &'a Path,
    /// The users that can log in, with their passwords.
    pub users: Vec<(String, String)>,
}

impl Listener<'_> {
    /// Lines of server.properties. They override those of a broker without logins.
    ///
    /// - What no rule allows is refused.
    /// - The plaintext listeners are bound to loopback. Their clients are ANONYMOUS and may do
    ///   everything: the broker itself, its controller, and operators.
    pub(super) fn properties(&self, plaintext: u16, controller: u16) -> String {
        let Self { port, certificate, .. } = self;
        format!(
            "listeners=PLAINTEXT://127.0.0.1:{plaintext},CLIENTS://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{plaintext},CLIENTS://localhost:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CLIENTS:SASL_SSL,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.clients.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.clients.ssl.keystore.type=PEM
listener.name.clients.ssl.keystore.location={}
allow.everyone.if.no.acl.found=false
super.users=User:{OPERATOR};User:ANONYMOUS
",
            certificate.display()
        )
    }
}

/// Writes the arguments of Kafka's formatting tool that create the users, one a line. Only we may
/// read the file.
pub(super) fn write_arguments(file: &Path, users: &[(String, String)]) -> Result<()> {
    let mut text = String::new();
    for (user, password) in users {
        text += &format!("--add-scram\nSCRAM-SHA-512=[name={user},password={password}]\n");
    }
    let opened = File::options().write(true).create(true).truncate(true).mode(0o600).open(file);
    let written = opened.and_then(|mut opened| opened.write_all(text.as_bytes()));
    written.with_context(|| format!("cannot write {}", file.display()))
}
