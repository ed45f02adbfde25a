//! The swap: one transaction that locks the live model, completes the rebuilt one, and replaces the
//! live tables by the rebuilt ones. Either all of it happens or nothing. Under the lock it reads
//! only what was added since the [comparison](super::compare).
//!
//! Unqualified names are those of the live model. The names of the rebuilt tables are known only at
//! run time, so their SQL cannot be checked at compile time.

use anyhow::{Context, ensure};
use shared::fault;
use sqlx::{Connection, PgConnection};

use super::compare::{self, surplus, tables};
use super::options::{Rebuild, print_line};
use super::replays::Replays;
use super::session::{LOCK_LIVE, execute};

/// Swaps the models in one transaction.
///
/// Consumers and redrives start each transaction with the inbox. So after the first statement here
/// none of them is inside a transaction. New transactions wait for the commit, or until their own
/// time-out, after which they retry. A statement that has waited resolves its table names again.
/// Readers wait only while the tables are replaced.
///
/// # Errors
/// [`is_busy`](super::session::is_busy): another session holds a lock. Nothing has changed, and the
/// swap may be retried. Any other error: the models must not be swapped.
pub async fn swap(live: &mut PgConnection, schema: &str, replays: &Replays, options: &Rebuild) -> anyhow::Result<()> {
    let mut tx = live.begin().await?;
    execute(&mut tx, LOCK_LIVE.to_owned()).await?;
    replays.complete(&mut tx).await?;
    fault::point("rebuild.locked");
    require_same_migrations(&mut tx, schema).await?;
    compare::require_recorded(&mut tx, schema, options).await?;
    replace_tables(&mut tx, schema).await?;
    fault::point("rebuild.before_commit");
    tx.commit().await.context(
        "the outcome of the commit is unknown: check whether the rebuild schema still exists, or run the rebuild again",
    )?;
    fault::point("rebuild.after_commit");
    print_line("swapped");
    Ok(())
}

async fn require_same_migrations(tx: &mut PgConnection, schema: &str) -> anyhow::Result<()> {
    let migrations = |name: &str| format!("select version, checksum from {name}_sqlx_migrations");
    let rebuilt = migrations(&format!("{schema}."));
    let live = migrations("");
    for (one, other) in [(&rebuilt, &live), (&live, &rebuilt)] {
        ensure!(
            surplus(tx, one, other).await?.rows == 0,
            "the live tables have other migrations than this release: rebuild with the release that the service runs"
        );
    }
    Ok(())
}

/// Drops the live tables and moves the rebuilt ones in their place. Fails if another object depends
/// on a live table, or if the migrations create anything else than tables.
async fn replace_tables(tx: &mut PgConnection, schema: &str) -> anyhow::Result<()> {
    let tables = tables(tx, schema).await?;
    let live: String = sqlx::query_scalar("select quote_ident(current_schema())").fetch_one(&mut *tx).await?;
    execute(tx, format!("drop table {}", tables.join(", "))).await?;
    compare::drop_recording(tx, schema).await?;
    for table in tables {
        execute(tx, format!("alter table {schema}.{table} set schema {live}")).await?;
    }
    execute(tx, format!("drop table {schema}._sqlx_migrations")).await?;
    let emptied = execute(tx, format!("drop schema {schema}")).await;
    emptied.context("the migrations create more than tables, and the swap can move only tables")
}
