//! Recognises a pooler in transaction mode. It gives each transaction any server process, so
//! nothing that belongs to a session works behind it: the advisory lock of a relay, prepared
//! statements, the limits of a session. A pooler in session mode works.

use sqlx::{PgConnection, Row};

use super::faults::Refused;

/// How often the processes are compared. A pooler without other clients is recognised the first
/// time: it reuses the process that became free last. On a busy one a process may by chance serve
/// the same session twice.
const ROUNDS: usize = 4;

/// Compares the server processes of two sessions that are both open.
///
/// A session without a pooler, or behind one in session mode, has one process of its own from its
/// begin to its end. So the session may not be used when its process changes, or when both sessions
/// have the same one. Equal process ids prove nothing, because one address may lead to several
/// servers: a process is identified by its id and its start, in microseconds.
///
/// # Errors
/// [`Refused`], or an error of the database.
pub(super) async fn require_own_processes(session: &mut PgConnection, other: &mut PgConnection) -> anyhow::Result<()> {
    let one = process(session).await?;
    for _ in 0..ROUNDS {
        let two = process(other).await?;
        if two == one || process(session).await? != one {
            return Err(Refused(TRANSACTION_MODE.to_owned()).into());
        }
    }
    Ok(())
}

const TRANSACTION_MODE: &str = "sessions of its own: the database URL leads to a pooler in transaction mode, where \
     sessions share a server process; set `pool_mode = session` in the pooler for this database, or connect to Postgres itself";

/// The server process that serves this session now. As simple query: a pooler in transaction mode
/// would mix up the prepared statements of the two sessions.
async fn process(db: &mut PgConnection) -> sqlx::Result<String> {
    let query = "select concat(pid, ' ', backend_start) from pg_stat_get_activity(pg_backend_pid())";
    sqlx::raw_sql(query).fetch_one(db).await?.try_get(0)
}
