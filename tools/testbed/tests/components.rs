//! Each component as a real process: started, broken, and started again on what it had.

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

#[tokio::test]
async fn kafka_comes_back_on_its_port_and_data() {
    let (scratch, logs) = (Scratch::create("kafka").unwrap(), Logs::fresh("testbed-tests/kafka", false).unwrap());
    let fetched = fetch().await.unwrap();
    let mut kafka = Kafka::start(&fetched, scratch.path(), ports::free(), "", &logs).await.unwrap();
    let address = kafka.address();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        kafka.process.stop(signal, Duration::from_secs(30)).await;
        kafka.restart().await.unwrap();
        assert_eq!(kafka.address(), address);
    }
    kafka.stop().await;
    assert!(kafka.process.ended().is_some());
}

/// They outlive their server by a moment, in which its data is not free, and each says that it ends.
const SESSIONS: usize = 60;

#[tokio::test]
async fn postgres_keeps_what_was_committed_over_kill_9() {
    let (scratch, logs) = (Scratch::create("postgres").unwrap(), Logs::fresh("testbed-tests/postgres", false).unwrap());
    let fetched = fetch().await.unwrap();
    let mut server =
        Postgres::start(&fetched, scratch.path(), ports::free(), Durability::Process, &logs).await.unwrap();
    let url = server.create_database("kept", &postgres::role("user")).await.unwrap();
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
    let strangers = format!("postgres://waybill_email:{}@{}", postgres::PASSWORD, url.split_once('@').unwrap().1);
    assert!(PgConnection::connect(&strangers).await.is_err(), "another service's role may connect");
}

#[tokio::test]
async fn redis_comes_back_empty() {
    let (scratch, logs) = (Scratch::create("redis").unwrap(), Logs::fresh("testbed-tests/redis", false).unwrap());
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
