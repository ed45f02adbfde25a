//! Each component as a real process: started, stopped or killed, and started again.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use nix::sys::signal::Signal;
use sqlx::{Connection, PgConnection};
use testbed::fetch::fetch;
use testbed::kafka::Kafka;
use testbed::ports;
use testbed::postgres::{self, Durability, Postgres};
use testbed::process::{Logs, Scratch};
use testbed::redis::Redis;
use testbed::services::{Service, USER};

const KAFKA_STOP_LIMIT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn kafka_restarts_on_the_same_port_and_data() {
    let scratch = Scratch::create("kafka").unwrap();
    let logs = Logs::to_files("testbed-tests/kafka").unwrap();
    let fetched = fetch().await.unwrap();
    let mut kafka = Kafka::start(&fetched, scratch.path(), ports::free(), "", &logs).await.unwrap();
    let address = kafka.address();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        kafka.process.stop(signal, KAFKA_STOP_LIMIT).await;
        kafka.restart().await.unwrap();
        assert_eq!(kafka.address(), address);
    }
    kafka.stop().await;
    assert!(kafka.process.ended().is_some());
}

/// Open sessions when the server is killed. Each outlives the server for a moment, in which no
/// other server can use the data, and each writes a last line to the log.
const SESSIONS: usize = 60;

#[tokio::test]
async fn postgres_keeps_committed_rows_when_it_is_killed() {
    let scratch = Scratch::create("postgres").unwrap();
    let logs = Logs::to_files("testbed-tests/postgres").unwrap();
    let fetched = fetch().await.unwrap();
    let start = Postgres::start(&fetched, scratch.path(), ports::free(), Durability::Process, &logs);
    let mut server = start.await.unwrap();
    let url = postgres::create_database(&server.url(), "kept", USER).await.unwrap().owner_url;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sqlx::query("create table kept (number int)").execute(&mut connection).await.unwrap();
    sqlx::query("insert into kept values (1)").execute(&mut connection).await.unwrap();
    let mut sessions = vec![];
    for _ in 0..SESSIONS {
        sessions.push(PgConnection::connect(&url).await.unwrap());
    }
    server.process.kill();
    server.restart().await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let number: i32 = sqlx::query_scalar("select number from kept").fetch_one(&mut connection).await.unwrap();
    assert_eq!(number, 1);
}

/// Invariant 1: the two roles of a service connect to its own database and to no other one. The
/// service's role reads and writes rows and owns nothing.
#[tokio::test]
async fn the_roles_of_a_service_reach_its_own_database_only() {
    let scratch = Scratch::create("roles").unwrap();
    let logs = Logs::to_files("testbed-tests/roles").unwrap();
    let fetched = fetch().await.unwrap();
    let start = Postgres::start(&fetched, scratch.path(), ports::free(), Durability::Process, &logs);
    let server = start.await.unwrap();
    let services: Vec<_> = topology::with_database().collect();
    let mut databases: Vec<String> = services.iter().map(|service| service.database()).collect();
    databases.extend(["postgres", "template1"].map(str::to_owned));
    let (_, address) =
        server.url().split_once('@').map(|(user, address)| (user.to_owned(), address.to_owned())).unwrap();
    let address = address.split('/').next().unwrap();
    for service in services {
        for role in [service.database(), service.owner()] {
            for database in &databases {
                let url = format!("postgres://{role}:{}@{address}/{database}", postgres::PASSWORD);
                let connected = PgConnection::connect(&url).await;
                if *database == service.database() {
                    connected.unwrap();
                } else {
                    let error = connected.err().unwrap_or_else(|| panic!("{role} connects to {database}")).to_string();
                    assert!(error.contains("permission denied for database"), "{role} to {database}: {error}");
                }
            }
        }
        reads_and_writes_rows_of_the_owner(&server, service).await;
    }
}

async fn reads_and_writes_rows_of_the_owner(server: &Postgres, service: Service) {
    let database = server.database(service);
    let mut owner = PgConnection::connect(&database.owner_url).await.unwrap();
    // Schemas and tables of later, as those of a rebuild.
    sqlx::raw_sql("create table early (number int generated always as identity)").execute(&mut owner).await.unwrap();
    let mut runtime = PgConnection::connect(&database.url).await.unwrap();
    sqlx::raw_sql("insert into early default values; update early set number = default; delete from early")
        .execute(&mut runtime)
        .await
        .unwrap();
    for forbidden in [
        "create table own (number int)",
        "create schema own",
        "create temporary table own (number int)",
        "alter table early add column more int",
        "truncate early",
        "drop table early",
        "set role postgres",
    ] {
        let error = sqlx::raw_sql(forbidden).execute(&mut runtime).await.err();
        let error = error.unwrap_or_else(|| panic!("{} may: {forbidden}", service.database()));
        assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("42501"), "{forbidden}: {error}");
    }
}

#[tokio::test]
async fn redis_restarts_empty() {
    let scratch = Scratch::create("redis").unwrap();
    let logs = Logs::to_files("testbed-tests/redis").unwrap();
    let fetched = fetch().await.unwrap();
    let port = ports::free();
    let mut redis = Redis::start(&fetched, scratch.path(), port, &logs).await.unwrap();
    assert_eq!(ports::ask(port, b"SET a b\r\n", 5).await.unwrap(), b"+OK\r\n");
    redis.process.freeze();
    assert!(ports::ask(port, b"PING\r\n", 7).await.is_err());
    redis.process.thaw();
    assert_eq!(ports::ask(port, b"GET a\r\n", 7).await.unwrap(), b"$1\r\nb\r\n");
    redis.process.kill();
    redis.restart().await.unwrap();
    assert_eq!(ports::ask(port, b"GET a\r\n", 5).await.unwrap(), b"$-1\r\n");
}
