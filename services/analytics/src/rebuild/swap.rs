//! The swap: one transaction that locks the live model, completes the rebuilt one, compares both,
//! and replaces the live tables by the rebuilt ones. Either all of it happens or nothing.
//!
//! Unqualified names are those of the live model. The names of the rebuilt tables are known only at
//! run time, so their SQL cannot be checked at compile time.

use anyhow::{Context, bail, ensure};
use shared::fault;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::options::{Rebuild, print_line};
use super::replays::Replays;

/// How many rows of each kind of difference are printed.
const SHOWN: i64 = 5;

/// Rows of a table that the other table lacks.
struct Surplus {
    rows: i64,
    /// Some of them, as Postgres prints a row.
    shown: Vec<String>,
}

/// Swaps the models in one transaction.
///
/// Consumers and redrives start each transaction with the inbox. So after the first statement here
/// none of them is inside a transaction. New transactions wait for the commit, or until their own
/// time-out, after which they retry. A statement that has waited resolves its table names again.
/// Readers wait only while the tables are replaced.
///
/// # Errors
/// [`is_busy`]: another session holds a lock; nothing has changed, and the swap may be retried. Any
/// other error: the models must not be swapped.
pub async fn swap(live: &mut PgConnection, schema: &str, replays: &Replays, options: &Rebuild) -> anyhow::Result<()> {
    let mut tx = live.begin().await?;
    // The lock on the first table keeps a new release from migrating until the swap is committed.
    // Otherwise the swap would undo its migrations.
    execute(&mut tx, "lock table _sqlx_migrations, inbox in share row exclusive mode".to_owned()).await?;
    replays.complete(&mut tx).await?;
    fault::point("rebuild.locked");
    require_same_migrations(&mut tx, schema).await?;
    compare_inboxes(&mut tx, schema, options).await?;
    let tables = tables(&mut tx, schema).await?;
    compare_tables(&mut tx, schema, &tables, options).await?;
    replace_tables(&mut tx, schema, &tables).await?;
    fault::point("rebuild.before_commit");
    tx.commit().await.context(
        "the outcome of the commit is unknown: check whether the rebuild schema still exists, or run the rebuild again",
    )?;
    fault::point("rebuild.after_commit");
    print_line("swapped");
    Ok(())
}

/// Whether the cause is another session's lock: a lock time-out or a deadlock.
pub fn is_busy(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<sqlx::Error>().and_then(|error| error.as_database_error()?.code());
    code.is_some_and(|code| ["55P03", "40P01"].contains(&&*code))
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

/// An event that the live model contains and the rebuilt one lacks would be lost: its offset is
/// committed, so no process would read it again.
async fn compare_inboxes(tx: &mut PgConnection, schema: &str, options: &Rebuild) -> anyhow::Result<()> {
    let rebuilt = format!("table {schema}.inbox");
    let lost = surplus(tx, "table inbox", &rebuilt).await?;
    if lost.rows > 0 {
        ensure!(
            options.accept_lost_history,
            "{} events of the live model are not in Kafka, or this release cannot read them, for example {}: their effects would \
             be lost. Find out what happened to them. --accept-lost-history swaps without them",
            lost.rows,
            lost.shown.join(" ")
        );
        print_line(&format!("warning: the effects of {} events of the live model are lost", lost.rows));
    }
    let gained = surplus(tx, &rebuilt, "table inbox").await?;
    if gained.rows > 0 {
        print_line(&format!("{} events are new: the live model had dead-lettered or skipped them", gained.rows));
    }
    Ok(())
}

/// The quoted names of all tables that the migrations create, except the migrations' own. The inbox
/// comes first, as in every transaction.
async fn tables(tx: &mut PgConnection, schema: &str) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar(
        "select quote_ident(tablename) from pg_tables where schemaname = $1 and tablename <> '_sqlx_migrations'
         order by tablename <> 'inbox', tablename",
    )
    .bind(schema)
    .fetch_all(tx)
    .await
}

/// The same events through the same projections give the same rows, because projections are pure.
async fn compare_tables(
    tx: &mut PgConnection,
    schema: &str,
    tables: &[String],
    options: &Rebuild,
) -> anyhow::Result<()> {
    let mut differences = 0;
    for table in tables.iter().filter(|table| *table != "inbox") {
        let live = format!("table {table}");
        let rebuilt = format!("table {schema}.{table}");
        for (whose, one, other) in [("live", &live, &rebuilt), ("rebuilt", &rebuilt, &live)] {
            let surplus = surplus(tx, one, other).await?;
            differences += surplus.rows;
            if surplus.rows > 0 {
                print_line(&format!(
                    "{table}: {} rows only in the {whose} model: {}",
                    surplus.rows,
                    surplus.shown.join(" ")
                ));
            }
        }
    }
    if differences > 0 && !options.accept_differences {
        bail!(
            "the rebuilt model differs from the live one, as printed above. It stays in the schema {schema} until the next \
             rebuild. If you expect the differences (a changed projection, dead letters that are handled now), run this again \
             with --accept-differences. If not, the live model is wrong: find out why first"
        );
    }
    Ok(())
}

/// Drops the live tables and moves the rebuilt ones in their place. Fails if another object depends
/// on a live table, or if the migrations create anything else than tables.
async fn replace_tables(tx: &mut PgConnection, schema: &str, tables: &[String]) -> anyhow::Result<()> {
    let live: String = sqlx::query_scalar("select quote_ident(current_schema())").fetch_one(&mut *tx).await?;
    execute(tx, format!("drop table {}", tables.join(", "))).await?;
    for table in tables {
        execute(tx, format!("alter table {schema}.{table} set schema {live}")).await?;
    }
    execute(tx, format!("drop table {schema}._sqlx_migrations")).await?;
    let emptied = execute(tx, format!("drop schema {schema}")).await;
    emptied.context("the migrations create more than tables, and the swap can move only tables")
}

/// The rows of the first query that the second lacks. Repeated rows count.
async fn surplus(tx: &mut PgConnection, one: &str, other: &str) -> sqlx::Result<Surplus> {
    let rows = format!("select count(*) over (), t::text from ({one} except all {other}) t limit {SHOWN}");
    let rows: Vec<(i64, String)> = sqlx::query_as(AssertSqlSafe(rows)).fetch_all(tx).await?;
    Ok(Surplus {
        rows: rows.first().map_or(0, |(count, _)| *count),
        shown: rows.into_iter().map(|(_, row)| row).collect(),
    })
}

/// Runs a statement that contains names, for which SQL has no parameters. All names are our own or
/// quoted by Postgres.
pub async fn execute(db: &mut PgConnection, statement: String) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(db).await.map(drop)
}
