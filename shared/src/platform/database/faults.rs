//! Why Postgres and this process do not accept each other. None of these faults ends by waiting
//! alone: an operator corrects a certificate, a login or a rule. The service continues without a
//! restart when it is corrected at the server.

use sqlx::error::DatabaseError;

use crate::platform::tls::HandshakeFault;

/// What the process waits for, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// The reason, if the error of a connection attempt is such a fault. It is a continuation of
/// "waiting for", as `/status` shows it.
pub(super) fn refusal(error: &sqlx::Error) -> Option<String> {
    match error {
        sqlx::Error::Io(error) => HandshakeFault::of(error).map(handshake),
        // sqlx reports so that the server does not offer TLS, and that a file of the URL changed.
        sqlx::Error::Tls(error) => Some(format!(
            "a TLS connection to Postgres: {error}; the server needs `ssl = on`, and the files of the database URL must be usable"
        )),
        sqlx::Error::Database(error) => login(&**error),
        _ => None,
    }
}

fn handshake(fault: HandshakeFault) -> String {
    match fault {
        HandshakeFault::UnknownAuthority(text) => {
            format!(
                "Postgres to have a certificate of a known authority: {text}; check `sslrootcert` in the database URL"
            )
        }
        HandshakeFault::OtherHost(text) => format!(
            "Postgres to have a certificate for the host name in the database URL: {text}; connect by a name of the certificate, \
             or give the server another certificate"
        ),
        HandshakeFault::Expired(text) => {
            format!("Postgres to have a valid certificate: {text}; renew the certificate of the server")
        }
        HandshakeFault::Refused(text) => format!(
            "Postgres to accept the client certificate: {text}; check `sslcert` and `sslkey` in the database URL, and \
             `ssl_ca_file` of the server"
        ),
        HandshakeFault::Other(text) => {
            format!("a TLS connection to Postgres: {text}; check the certificate of the server")
        }
    }
}

/// By the SQLSTATE. The text of Postgres' messages depends on its language.
fn login(error: &dyn DatabaseError) -> Option<String> {
    let message = error.message();
    match error.code()?.as_ref() {
        "28P01" => Some("Postgres to accept the login: check user and password in the database URL".to_owned()),
        "28000" => Some(format!(
            "Postgres to accept the connection: {message}; check `sslmode`, `sslcert` and `sslkey` in the database URL, and \
             pg_hba.conf of the server"
        )),
        "3D000" => Some(format!("the database of the URL to be created: {message}")),
        // The right to connect: no statement was sent yet.
        "42501" => Some(format!("Postgres to let this role connect to the database: {message}")),
        _ => None,
    }
}
