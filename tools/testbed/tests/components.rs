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
use testbed::services::{EMAIL, USER};

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
    let url = server.create_database("kept", &USER.database()).await.unwrap();
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

#[tokio::test]
async fn a_role_cannot_connect_to_the_database_of_another_service() {
    let scratch = Scratch::create("roles").unwrap();
    let logs = Logs::to_files("testbed-tests/roles").unwrap();
    let fetched = fetch().await.unwrap();
    let start = Postgres::start(&fetched, scratch.path(), ports::free(), Durability::Process, &logs);
    let server = start.await.unwrap();
    let url = server.service_url(USER);
    assert!(PgConnection::connect(&url).await.is_ok());
    let (_, address) = url.split_once('@').unwrap();
    let other = format!("postgres://{}:{}@{address}", EMAIL.database(), postgres::PASSWORD);
    let error = PgConnection::connect(&other).await.unwrap_err();
    assert!(error.to_string().contains("permission denied for database"), "{error}");
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
