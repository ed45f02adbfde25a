//! The swap: one transaction in which the live model cannot change, the rebuilt one gets the rest, both are compared, and the
//! rebuilt tables take the place of the live ones. Either all of it happens or nothing.
//!
//! Unqualified names are those of the live model. The names of the rebuilt tables are made at run time, so their SQL cannot be
//! checked at compile time.

use anyhow::{Context, bail, ensure};
use shared::fault;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{Rebuild, Replays, execute, say};

/// Of each kind of difference so many rows are shown.
const SHOWN: i64 = 5;

/// Rows of a table that the other one does not have.
struct Surplus {
    rows: i64,
    /// Some of them, as Postgres prints a row.
    shown: Vec<String>,
}

/// Consumers and redrives begin each transaction with the inbox, so from the first statement on none of them is inside a
/// transaction and all that come wait: for the commit, or until their own time-out, after which they try again. A statement
/// that has waited looks its tables up anew. Readers wait only for the exchange.
///
/// # Errors
/// [`is_busy`]: somebody holds a lock; everything is as before and may be tried again. Any other: the models may not be
/// exchanged.
pub async fn swap(live: &mut PgConnection, schema: &str, replays: &Replays, options: &Rebuild) -> anyhow::Result<()> {
    let mut tx = live.begin().await?;
    // The first keeps a new release's migrations out: it would find its work undone.
    execute(&mut tx, "lock table _sqlx_migrations, inbox in share row exclusive mode".to_owned()).await?;
    replays.complete(&mut tx).await?;
    fault::point("rebuild.locked");
    require_same_migrations(&mut tx, schema).await?;
    compare_inboxes(&mut tx, schema, options).await?;
    let tables = tables(&mut tx, schema).await?;
    compare_tables(&mut tx, schema, &tables, options).await?;
    exchange(&mut tx, schema, &tables).await?;
    fault::point("rebuild.before_commit");
    tx.commit().await.context("nobody knows whether the swap took place: look for the schema, or rebuild again")?;
    fault::point("rebuild.after_commit");
    say("swapped");
    Ok(())
}

/// A lock was not to be had in time, or not without a deadlock.
pub fn is_busy(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<sqlx::Error>().and_then(|error| error.as_database_error()?.code());
    code.is_some_and(|code| ["55P03", "40P01"].contains(&&*code))
}

async fn require_same_migrations(tx: &mut PgConnection, schema: &str) -> anyhow::Result<()> {
    let migrations = |name: &str| format!("select version, checksum from {name}_sqlx_migrations");
    let (ours, theirs) = (migrations(&format!("{schema}.")), migrations(""));
    for (one, other) in [(&ours, &theirs), (&theirs, &ours)] {
        ensure!(
            surplus(tx, one, other).await?.rows == 0,
            "the live tables have other migrations than this release: rebuild with the release that is running"
        );
    }
    Ok(())
}

/// What the live model has and the rebuilt one lacks would be lost for good: its offset is committed, so nobody would read it
/// again.
async fn compare_inboxes(tx: &mut PgConnection, schema: &str, options: &Rebuild) -> anyhow::Result<()> {
    let rebuilt = format!("table {schema}.inbox");
    let lost = surplus(tx, "table inbox", &rebuilt).await?;
    if lost.rows > 0 {
        ensure!(
            options.accept_lost_history,
            "{} events of the live model could not be found in Kafka, or not be read by this release, for example {}: their \
             effects would be lost. Find out what happened to them; --accept-lost-history gives them up",
            lost.rows,
            lost.shown.join(" ")
        );
        say(&format!("warning: the effects of {} events of the live model are given up", lost.rows));
    }
    let gained = surplus(tx, &rebuilt, "table inbox").await?;
    if gained.rows > 0 {
        say(&format!("{} events are new: the live model had set them aside or skipped them", gained.rows));
    }
    Ok(())
}

/// The model's tables, quoted: all that the migrations make, except their own and the inbox, which has been compared. The inbox
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

/// The same events through the same projections give the same rows, all of them: projections are pure.
async fn compare_tables(
    tx: &mut PgConnection,
    schema: &str,
    tables: &[String],
    options: &Rebuild,
) -> anyhow::Result<()> {
    let mut differences = 0;
    for table in tables.iter().filter(|table| *table != "inbox") {
        let (live, rebuilt) = (format!("table {table}"), format!("table {schema}.{table}"));
        for (whose, one, other) in [("live", &live, &rebuilt), ("rebuilt", &rebuilt, &live)] {
            let surplus = surplus(tx, one, other).await?;
            differences += surplus.rows;
            if surplus.rows > 0 {
                say(&format!("{table}: {} rows only in the {whose} model: {}", surplus.rows, surplus.shown.join(" ")));
            }
        }
    }
    if differences > 0 && !options.accept_differences {
        bail!(
            "the rebuilt model differs from the live one, see above; until the next rebuild it stays in the schema {schema}. If \
             that is why you rebuild (another projection, dead letters that are handled now), run this again with \
             --accept-differences; if not, the live model is wrong: find out why first"
        );
    }
    Ok(())
}

/// The rebuilt tables take the names of the live ones, which are dropped. Whatever depends on a live table, and whatever else the
/// migrations may have made, makes this fail rather than disappear.
async fn exchange(tx: &mut PgConnection, schema: &str, tables: &[String]) -> anyhow::Result<()> {
    let live: String = sqlx::query_scalar("select quote_ident(current_schema())").fetch_one(&mut *tx).await?;
    execute(tx, format!("drop table {}", tables.join(", "))).await?;
    for table in tables {
        execute(tx, format!("alter table {schema}.{table} set schema {live}")).await?;
    }
    execute(tx, format!("drop table {schema}._sqlx_migrations")).await?;
    let emptied = execute(tx, format!("drop schema {schema}")).await;
    emptied.context("the migrations make more than tables, which the swap does not know how to move")
}

/// The rows of the first query that the second does not have, repetitions counted.
async fn surplus(tx: &mut PgConnection, one: &str, other: &str) -> sqlx::Result<Surplus> {
    let rows = format!("select count(*) over (), t::text from ({one} except all {other}) t limit {SHOWN}");
    let rows: Vec<(i64, String)> = sqlx::query_as(AssertSqlSafe(rows)).fetch_all(tx).await?;
    Ok(Surplus {
        rows: rows.first().map_or(0, |(count, _)| *count),
        shown: rows.into_iter().map(|(_, row)| row).collect(),
    })
}
