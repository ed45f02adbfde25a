//! `cargo xtask size`: whether the cost of a statement depends on the number of users. The
//! databases are filled with 100,000 users and then with a million. Each time the real services run
//! on them, every endpoint is called, and Postgres logs the plan of each statement that it executes
//! (`auto_explain`). So the tool knows no statement of the services, and misses none that runs.

mod drive;
mod plans;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use testbed::fetch::fetch;
use testbed::postgres::Durability;
use testbed::process::{Logs, Scratch};
use testbed::say::{say, timed};
use testbed::services::{self, Instance, RunningService, SERVICES};
use testbed::stack::{Access, Ports, Stack};
use testbed::system::start_stack;
use tokio::time::sleep;
use topology::{ANALYTICS, EMAIL, Service, USER};

use drive::Drive;
use plans::{Cost, Statement};

const SIZES: [i64; 2] = [100_000, 1_000_000];
/// How much more a statement may read with ten times the users. An index grows by a level.
const GROWTH: f64 = 1.5;
/// Smaller numbers are not compared: they are a few lookups, or pages of an index that were split.
const SMALL_ROWS: f64 = 20.0;
const SMALL_BUFFERS: f64 = 50.0;
/// How many requests of each kind are sent.
const REQUESTS: usize = 10;
/// The loops of the services repeat within two seconds, with the settings below.
const LOOPS: Duration = Duration::from_secs(12);
/// The loops that would otherwise run once an hour or a day.
const SETTINGS: [(&str, &str); 1] = [("HEARTBEAT_INTERVAL_MS", "1000")];
/// What fills the database of each service.
const FILL: [(Service, &str); 3] =
    [(USER, include_str!("user.sql")), (EMAIL, include_str!("email.sql")), (ANALYTICS, include_str!("analytics.sql"))];
/// Makes every later session log the plans of its statements, with the rows and buffers that they
/// read.
const EXPLAIN: [&str; 11] = [
    "load 'auto_explain'",
    "alter system set session_preload_libraries = 'auto_explain'",
    "alter system set auto_explain.log_min_duration = 0",
    "alter system set auto_explain.log_analyze = on",
    "alter system set auto_explain.log_buffers = on",
    "alter system set auto_explain.log_timing = off",
    "alter system set auto_explain.log_format = 'json'",
    "alter system set auto_explain.log_parameter_max_length = 0",
    // The user, by which the sessions of the services are recognised, and the database.
    "alter system set log_line_prefix = '%u %d '",
    "alter system set max_wal_size = '8GB'",
    "select pg_reload_conf()",
];

pub async fn run() -> Result<ExitCode> {
    let logs = Logs::to_files("size")?;
    let fetched = fetch().await?;
    let programs = services::build(&logs).await?;
    let scratch = Scratch::create("size")?;
    let stack = start_stack(&fetched, scratch.path(), Ports::free(), Durability::Process, Access::Open, &logs).await?;
    services::migrate(&programs, &stack, &logs).await?;
    let mut superuser = PgConnection::connect(&stack.postgres.url()).await?;
    for statement in EXPLAIN {
        sqlx::raw_sql(statement)
            .execute(&mut superuser)
            .await
            .with_context(|| format!("Postgres rejects {statement}"))?;
    }
    let mut measured = vec![];
    let mut filled = 0;
    for users in SIZES {
        let fill = fill(&stack, filled + 1, users);
        timed(&format!("Filling the databases up to {users} users (about {} s) …", users / 20_000), fill).await?;
        filled = users;
        let logged_before = fs::metadata(logs.file("postgres"))?.len();
        timed("Running the services (about a minute) …", exercise(&stack, &programs, &logs)).await?;
        measured.push(plans::read(&logs.file("postgres"), logged_before)?);
    }
    report_tables(&stack).await?;
    report_topics(scratch.path())?;
    let grown = report(&measured[0], &measured[1]);
    stack.stop().await;
    say(format_args!("\n{grown} statements read more than {GROWTH} times as much with ten times the users."));
    Ok(if grown == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Adds users to all databases, in one transaction each.
async fn fill(stack: &Stack, from: i64, to: i64) -> Result<()> {
    for (service, sql) in FILL {
        let mut owner = PgConnection::connect(&stack.postgres.database(service).owner_url).await?;
        let sql = sql.replace(":from", &from.to_string()).replace(":to", &to.to_string());
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut owner)
            .await
            .with_context(|| format!("cannot fill {}", service.name))?;
        sqlx::raw_sql("vacuum analyze").execute(&mut owner).await?;
    }
    Ok(())
}

/// Runs the services until every loop has run and every endpoint was called.
async fn exercise(stack: &Stack, programs: &Path, logs: &Logs) -> Result<()> {
    // The same for every service, because the stack is open.
    let mut environment = services::environment(stack, USER);
    environment.extend(SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let instances = SERVICES.map(Instance::on_free_ports);
    let spawned = instances.iter().map(|instance| instance.spawn(programs, &environment, logs));
    let mut running = spawned.collect::<Result<Vec<RunningService>>>()?;
    for service in &mut running {
        service.until_ready().await?;
    }
    let drive = Drive::new(&instances, stack);
    for _ in 0..REQUESTS {
        drive.a_new_user().await?;
    }
    for id in drive.some_users(REQUESTS).await? {
        drive.an_existing_user(id).await?;
    }
    drive.subcommands(programs, &environment).await?;
    sleep(LOOPS).await;
    for service in &mut running {
        service.stop().await;
    }
    Ok(())
}

/// Prints the statements that both measurements have, and returns how many of them grew.
fn report(small: &BTreeMap<Statement, Cost>, large: &BTreeMap<Statement, Cost>) -> usize {
    say(format_args!(
        "\nThe most that one execution reads, with {} and with {} users:\n\n{:<10} {:>5}  {:>7} {:>7}  {:>8} {:>8}  statement",
        SIZES[0], SIZES[1], "database", "runs", "rows", "rows", "buffers", "buffers"
    ));
    let mut grown = 0;
    for (statement, large) in large {
        let Some(small) = small.get(statement) else {
            say(format_args!("{:<10} only with {} users: {}", statement.database, SIZES[1], statement.text));
            continue;
        };
        let fails = large.rows > SMALL_ROWS.max(GROWTH * small.rows)
            || large.buffers > SMALL_BUFFERS.max(GROWTH * small.buffers);
        grown += usize::from(fails);
        say(format_args!(
            "{:<10} {:>5}  {:>7} {:>7}  {:>8} {:>8}  {}{}",
            statement.database,
            small.runs + large.runs,
            small.rows,
            large.rows,
            small.buffers,
            large.buffers,
            if fails { "GROWS: " } else { "" },
            statement.text.chars().take(110).collect::<String>(),
        ));
    }
    grown
}

/// The size of each table, for `docs/sizing.md`.
async fn report_tables(stack: &Stack) -> Result<()> {
    say(format_args!(
        "\n{:<10} {:<20} {:>9}  {:>9} {:>9}  bytes per row",
        "database", "table", "rows", "table MB", "index MB"
    ));
    for (service, _) in FILL {
        let mut owner = PgConnection::connect(&stack.postgres.database(service).owner_url).await?;
        let sizes = "select relname::text, reltuples::bigint, pg_table_size(oid), pg_indexes_size(oid) from pg_class
                     where relkind = 'r' and relnamespace = 'public'::regnamespace and reltuples > 0 order by relname";
        sqlx::raw_sql("vacuum analyze").execute(&mut owner).await?;
        let sizes: Vec<(String, i64, i64, i64)> = sqlx::query_as(sizes).fetch_all(&mut owner).await?;
        for (table, rows, heap, index) in sizes {
            say(format_args!(
                "{:<10} {table:<20} {rows:>9}  {:>9.1} {:>9.1}  {}",
                service.name,
                heap as f64 / 1e6,
                index as f64 / 1e6,
                (heap + index) / rows.max(1)
            ));
        }
    }
    Ok(())
}

/// The bytes of each topic.
fn report_topics(scratch: &Path) -> Result<()> {
    let mut topics: BTreeMap<String, u64> = BTreeMap::new();
    let mut folders = vec![scratch.join("kafka")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "log")
                && let Some(partition) = path.parent().and_then(Path::file_name).and_then(|name| name.to_str())
                && let Some((topic, _)) = partition.rsplit_once('-')
            {
                *topics.entry(topic.to_owned()).or_default() += fs::metadata(&path)?.len();
            }
        }
    }
    say("");
    let written = SERVICES.iter().flat_map(|service| service.writes);
    for topic in written {
        let bytes = topics.get(*topic).copied().unwrap_or(0);
        ensure!(bytes > 0, "the topic {topic} is empty");
        say(format_args!("{topic:<20} {bytes} bytes"));
    }
    Ok(())
}
