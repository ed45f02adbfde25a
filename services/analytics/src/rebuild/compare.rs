//! The comparison of the two models, before the swap. It may read them completely, because it locks
//! nothing while it does.
//!
//! Unqualified names are those of the live model.

use anyhow::{bail, ensure};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::options::{Rebuild, print_line};
use super::replays::Replays;
use super::session::{LOCK_LIVE, connect, execute};
use crate::projections::SUMS;

/// How many rows of each kind of difference are printed.
const SHOWN: i64 = 5;
/// The table in the schema of the rebuild with the events that the live model got since the
/// snapshot.
const RECORDED: &str = "recorded";
/// The tables that say which events a model contains, and the group and the event of their rows.
const INBOXES: [(&str, &str); 2] = [("inbox", "handler, event_id"), ("audit", "'analytics.audit', event_id")];

/// Rows of a table that the other table lacks.
pub struct Surplus {
    pub rows: i64,
    /// Some of them, as Postgres prints a row.
    shown: Vec<String>,
}

/// Compares the models as they are at one moment.
///
/// A second session locks the live model for a moment, so that both models have the same events,
/// and `live` takes a snapshot of that moment. Triggers record every event that the live model gets
/// from then on: the swap looks at nothing else. Then the lock ends, and `live` compares.
///
/// Crash afterwards: the triggers stay until the next rebuild drops the schema. It costs one more
/// row per event.
///
/// # Errors
/// Another session holds a lock ([`is_busy`](super::session::is_busy)), or the models differ.
pub async fn compare(
    live: &mut PgConnection,
    server: &PgConnectOptions,
    schema: &str,
    replays: &Replays,
    options: &Rebuild,
) -> anyhow::Result<()> {
    let mut other = connect(server).await?;
    let mut lock = other.begin().await?;
    execute(&mut lock, LOCK_LIVE.to_owned()).await?;
    replays.complete(&mut lock).await?;
    record(&mut lock, schema).await?;
    let mut snapshot = live.begin_with("begin isolation level repeatable read read only").await?;
    // The first statement takes the snapshot.
    execute(&mut snapshot, "set local statement_timeout = 0; select 1".to_owned()).await?;
    lock.commit().await?;
    compare_inboxes(&mut snapshot, schema, options).await?;
    let tables = tables(&mut snapshot, schema).await?;
    compare_tables(&mut snapshot, schema, &tables, options).await?;
    snapshot.commit().await?;
    Ok(())
}

/// Records the events that the live model gets, by triggers in the transactions that insert their
/// ids. The functions run with the rights of their owner, because the role of the service may not
/// write to the schema of a rebuild.
async fn record(lock: &mut PgConnection, schema: &str) -> sqlx::Result<()> {
    let table =
        format!("create table if not exists {schema}.{RECORDED} (handler text not null, event_id uuid not null)");
    execute(lock, table).await?;
    for (inbox, columns) in INBOXES {
        let statements = format!(
            "create or replace function {schema}.record_{inbox}() returns trigger language plpgsql security definer
                 set search_path = pg_catalog as $$ begin
                     insert into {schema}.{RECORDED} select {columns} from fresh;
                     return null;
                 end $$;
             create or replace trigger {RECORDED} after insert on {inbox}
                 referencing new table as fresh for each statement execute function {schema}.record_{inbox}()"
        );
        execute(lock, statements).await?;
    }
    Ok(())
}

/// Drops the recorded events, after the live tables were dropped, and the triggers with them.
pub async fn drop_recording(tx: &mut PgConnection, schema: &str) -> sqlx::Result<()> {
    for (inbox, _) in INBOXES {
        execute(tx, format!("drop function {schema}.record_{inbox}()")).await?;
    }
    execute(tx, format!("drop table {schema}.{RECORDED}")).await
}

/// Stops the recording when the rebuild gives up. If this fails too, the next rebuild drops the
/// triggers.
pub async fn stop_recording(live: &mut PgConnection) {
    for (inbox, _) in INBOXES {
        if let Err(error) = execute(live, format!("drop trigger if exists {RECORDED} on {inbox}")).await {
            print_line(&format!("warning: a trigger on the live table {inbox} stays until the next rebuild: {error}"));
        }
    }
}

/// Checks that the rebuilt model has every event that the live model got since the snapshot. The
/// tables need no second comparison: both models got these events by the same handlers.
pub async fn require_recorded(tx: &mut PgConnection, schema: &str, options: &Rebuild) -> anyhow::Result<()> {
    let recorded = format!("table {schema}.{RECORDED}");
    let rebuilt = format!(
        "select handler, event_id from {schema}.{RECORDED} join ({}) events using (handler, event_id)",
        events(&format!("{schema}."))
    );
    require_no_loss(surplus(tx, &recorded, &rebuilt).await?, options)
}

/// The query for the events that a model contains. `schema` is a prefix of table names.
fn events(schema: &str) -> String {
    let [inbox, audit] = INBOXES.map(|(inbox, columns)| format!("select {columns} from {schema}{inbox}"));
    format!("select * from ({inbox} union all {audit}) events (handler, event_id)")
}

/// An event that the live model contains and the rebuilt one lacks would be lost: its offset is
/// committed, so no process would read it again.
async fn compare_inboxes(tx: &mut PgConnection, schema: &str, options: &Rebuild) -> anyhow::Result<()> {
    let live = events("");
    let rebuilt = events(&format!("{schema}."));
    require_no_loss(surplus(tx, &live, &rebuilt).await?, options)?;
    let gained = surplus(tx, &rebuilt, &live).await?;
    if gained.rows > 0 {
        print_line(&format!(
            "{} effects are new: the live model had dead-lettered or skipped their events",
            gained.rows
        ));
    }
    Ok(())
}

fn require_no_loss(lost: Surplus, options: &Rebuild) -> anyhow::Result<()> {
    if lost.rows > 0 {
        ensure!(
            options.accept_lost_history,
            "{} effects of the live model come from events that are not in Kafka, or that this release cannot read, for example \
             {}: they would be lost. Find out what happened to these events. --accept-lost-history swaps without them",
            lost.rows,
            lost.shown.join(" ")
        );
        print_line(&format!("warning: {} effects of the live model are lost", lost.rows));
    }
    Ok(())
}

/// The quoted names of all tables that the migrations create, except the table of the migrations
/// and that of the recorded events. The inbox comes first, as in every transaction.
pub async fn tables(tx: &mut PgConnection, schema: &str) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar(
        "select quote_ident(tablename) from pg_tables where schemaname = $1 and tablename <> all ($2)
         order by tablename <> 'inbox', tablename",
    )
    .bind(schema)
    .bind(["_sqlx_migrations", RECORDED])
    .fetch_all(tx)
    .await
}

/// The same events through the same projections give the same rows, because projections are pure.
pub async fn compare_tables(
    tx: &mut PgConnection,
    schema: &str,
    tables: &[String],
    options: &Rebuild,
) -> anyhow::Result<()> {
    let mut differences = 0;
    for table in tables.iter().filter(|table| *table != "inbox") {
        let live = content(table, table);
        let rebuilt = content(table, &format!("{schema}.{table}"));
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

/// The query whose rows are compared for a table: all rows, or only their sums if the same events
/// may give other rows ([`SUMS`]).
fn content(table: &str, qualified: &str) -> String {
    match SUMS.iter().find(|(sums, _)| *sums == table) {
        Some((_, sums)) => format!("select {}", sums.replace("{table}", qualified)),
        None => format!("table {qualified}"),
    }
}

/// The rows of the first query that the second lacks. Repeated rows count.
pub async fn surplus(tx: &mut PgConnection, one: &str, other: &str) -> sqlx::Result<Surplus> {
    let rows = format!("select count(*) over (), t::text from ({one} except all {other}) t limit {SHOWN}");
    let rows: Vec<(i64, String)> = sqlx::query_as(AssertSqlSafe(rows)).fetch_all(tx).await?;
    Ok(Surplus {
        rows: rows.first().map_or(0, |(count, _)| *count),
        shown: rows.into_iter().map(|(_, row)| row).collect(),
    })
}
