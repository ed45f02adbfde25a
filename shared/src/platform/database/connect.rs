//! How a session begins. Its settings, such as time limits, are set after connecting: a pooler does
//! not pass on startup options, and PgBouncer refuses them.

use std::io;
use std::path::Path;

use anyhow::{Context, ensure};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};
use tokio::time::{Duration, timeout};

use super::faults::{Refused, refusal};
use super::pooler;
use crate::platform::tls;

/// Time to open a session.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
/// A commit of the outbox or the inbox must survive a crash of the server. A database or a role may
/// have another default. Stronger values stay.
const DURABLE: &str =
    "select set_config('synchronous_commit', 'on', false) where current_setting('synchronous_commit') = 'off'";
/// How sqlx prints a certificate that is in a file.
const FILE: &str = "file: ";

/// How to connect to the database of this URL.
///
/// # Errors
/// The URL is malformed, two of its parameters contradict each other, or one of the files that it
/// names cannot be used. The message does not show the URL.
pub fn options(url: &str) -> anyhow::Result<PgConnectOptions> {
    let options: PgConnectOptions =
        url.parse().context("the database URL is not postgres://user:password@host:port/name")?;
    check_tls(&options)?;
    // A startup option that PgBouncer refuses. It would change only how numbers are sent as text, and
    // sqlx receives them in binary form.
    Ok(options.extra_float_digits(None))
}

fn check_tls(options: &PgConnectOptions) -> anyhow::Result<()> {
    // Only this URL shows the files. Its other parts could contain characters that it does not quote.
    let url = options.clone().username("user").host("localhost").to_url_lossy();
    let given = |name: &str| url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
    let [authority, certificate, key] = ["sslrootcert", "sslcert", "sslkey"].map(given);
    let mode = options.get_ssl_mode();
    let verifies = matches!(mode, PgSslMode::VerifyCa | PgSslMode::VerifyFull);
    ensure!(
        authority.is_none() || verifies,
        "`sslrootcert` in the database URL needs `sslmode=verify-full`: no other mode checks the server's certificate and its \
         host name"
    );
    ensure!(
        certificate.is_some() == key.is_some(),
        "`sslcert` and `sslkey` in the database URL need each other: set both or none"
    );
    ensure!(
        certificate.is_none() || !matches!(mode, PgSslMode::Disable | PgSslMode::Allow),
        "`sslcert` and `sslkey` in the database URL need TLS: set `sslmode=verify-full`"
    );
    // The other values are certificates themselves.
    let file = |value: &Option<String>| value.as_deref().and_then(|value| value.strip_prefix(FILE)).map(str::to_owned);
    let [authority, certificate, key] = [&authority, &certificate, &key].map(file);
    let authority = authority.as_deref().map(Path::new);
    let identity = certificate.as_deref().zip(key.as_deref());
    let identity = identity.map(|(one, other)| (("`sslcert`", Path::new(one)), ("`sslkey`", Path::new(other))));
    tls::client_with("`sslrootcert`", authority, identity)?;
    Ok(())
}

/// Opens a session of its own, outside a pool, for what belongs to a session: an advisory lock, or
/// limits other than those of the pool. `name` is its name in `pg_stat_activity`.
///
/// It first makes sure that the session has a server process of its own, before it takes a lock there
/// and before it sets limits that would stay in a process of others.
///
/// # Errors
/// [`Refused`], or the database does not answer in time.
pub async fn session(
    options: &PgConnectOptions,
    name: &str,
    settings: &[(&str, &str)],
) -> anyhow::Result<PgConnection> {
    let options = options.clone().application_name(name);
    let opened = timeout(CONNECT_TIMEOUT, async {
        let mut session = connect(&options).await?;
        let mut other = connect(&options).await?;
        pooler::require_own_processes(&mut session, &mut other).await?;
        // Without it Postgres logs a broken connection. Its failure changes nothing.
        let _ = other.close().await;
        apply(&mut session, settings_statement(settings)).await.context("cannot set the limits of the session")?;
        Ok(session)
    });
    let Ok(opened) = opened.await else {
        let error = io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {CONNECT_TIMEOUT:?}"));
        return Err(anyhow::Error::new(sqlx::Error::Io(error)).context(CANNOT_CONNECT));
    };
    opened
}

const CANNOT_CONNECT: &str = "cannot connect to the database";

async fn connect(options: &PgConnectOptions) -> anyhow::Result<PgConnection> {
    options.connect().await.map_err(|error| match refusal(&error) {
        Some(reason) => anyhow::Error::new(Refused(reason)),
        None => anyhow::Error::new(error).context(CANNOT_CONNECT),
    })
}

/// The statement that gives a session these settings.
pub(super) fn settings_statement(settings: &[(&str, &str)]) -> String {
    let quoted = |value: &str| value.replace('\'', "''");
    settings.iter().map(|(name, value)| format!("set {name} = '{}';", quoted(value))).collect()
}

/// Runs [`settings_statement`], and makes the commits of the session durable. If it fails, drop the
/// session: it has no limits.
pub(super) async fn apply(session: &mut PgConnection, statement: String) -> sqlx::Result<()> {
    // The names and values are constants of the program, or made by it.
    sqlx::raw_sql(AssertSqlSafe(statement + DURABLE)).execute(session).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str) -> String {
        options(url).unwrap_err().to_string()
    }

    #[test]
    fn parameters_of_the_url_that_contradict_each_other_are_refused() {
        let url = "postgres://a:hunter2@localhost/a";
        assert!(options(url).is_ok());
        assert!(options(&format!("{url}?sslmode=verify-full")).is_ok());
        for (parameters, error) in [
            ("sslrootcert=/ca.pem", "needs `sslmode=verify-full`"),
            ("sslmode=require&sslrootcert=/ca.pem", "needs `sslmode=verify-full`"),
            ("sslmode=verify-full&sslcert=/a.pem", "need each other"),
            ("sslmode=disable&sslcert=/a.pem&sslkey=/b.pem", "need TLS"),
            ("sslmode=verify-full&sslrootcert=/no/ca.pem", "cannot read `sslrootcert` /no/ca.pem"),
            ("sslmode=verify-full&sslcert=/no/a.pem&sslkey=/no/b.pem", "cannot read `sslcert` /no/a.pem"),
        ] {
            let refused = refused(&format!("{url}?{parameters}"));
            assert!(refused.contains(error) && !refused.contains("hunter2"), "{parameters}: {refused}");
        }
        let refused = refused("postgres://a@b:hunter2@localhost:port/a");
        assert!(!refused.contains("hunter2"), "{refused}");
    }

    #[test]
    fn settings_become_one_statement() {
        assert_eq!(settings_statement(&[]), "");
        let settings = [("lock_timeout", "2s"), ("search_path", "it's")];
        assert_eq!(settings_statement(&settings), "set lock_timeout = '2s';set search_path = 'it''s';");
    }
}
