//! `read`: `GET /profiles/{id}` over 32 connections. The limit is a program with the same HTTP
//! stack that answers with what the store has, without asking whether the view is complete or the
//! store has become a replica.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use redis::Client;
use redis::aio::MultiplexedConnection;
use serde_json::json;
use shared::events::{Profile, Topic, mint_id};
use testbed::ports;
use testbed::process::{Logs, Process, command};
use testbed::services::RunningService;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use topology::CACHE;
use uuid::Uuid;

use super::view::{profile, state};
use crate::bed::{Bed, Lab};
use crate::checks;
use crate::http::Connection;
use crate::kafka::Writer;
use crate::meter::{Meter, Slice};
use crate::report::Report;
use crate::slices::{Contest, measure};

const CONNECTIONS: usize = 32;
const USERS: usize = 10_000;
/// Requests of a slice.
const REQUESTS: u64 = 100_000;
const GOAL: f64 = 0.6;
const POLL: Duration = Duration::from_millis(20);
/// How long the cache may take to fill, and the limit to start.
const LIMIT: Duration = Duration::from_secs(60);

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: the HTTP layers (limits, spans, metrics, the check of the caller), and the transaction that reads the marks of
the partitions and the role of the server. Reads that come together share this transaction. A profile of the service: the
kernel takes 34 % of its CPU, and copying and the allocator 21 %. No other function of the service has more than 1 %.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("read").await?;
    let mut read = Read::start(&lab).await?;
    let slices = measure(bed, &mut read).await?;
    read.service.stop().await;
    let what = ["GET /profiles/{id} over 32 connections", "the store's answer through the same HTTP stack"];
    Ok(Report::of_slices("read", "requests", what, slices, GOAL).limited_by(LIMITED_BY))
}

struct Read<'a> {
    lab: &'a Lab<'a>,
    service: RunningService,
    limit: Process,
    users: Vec<Uuid>,
    ours_port: u16,
    limit_port: u16,
    requests: u64,
}

impl<'a> Read<'a> {
    /// Fills the cache and waits until both sides answer.
    async fn start(lab: &'a Lab<'a>) -> Result<Self> {
        lab.create_topics().await?;
        let service = lab.start(CACHE, &[]).await?;
        let writer = Writer::new(lab.bed)?;
        let users: Vec<Uuid> = (0..USERS).map(|_| mint_id()).collect();
        for user in &users {
            let (envelope, event) = state(*user, 1);
            writer.send_event(&lab.prefixed(Topic::USER_STATE.name), &envelope, &event)?;
        }
        writer.wait()?;
        let limit_port = ports::free();
        let mut program = command(&lab.bed.program);
        program.args(["serve-profiles", &limit_port.to_string(), &lab.bed.stack.redis.url(), &lab.prefixed("")]);
        let limit = Process::spawn("serve-profiles", program, &Logs::to_files("bench-read")?)?;
        let ours_port = service.instance.http;
        let requests = lab.bed.size().of(REQUESTS);
        let read = Self { lab, service, limit, users, ours_port, limit_port, requests };
        for port in [ours_port, limit_port] {
            read.until_filled(port).await?;
        }
        Ok(read)
    }

    async fn until_filled(&self, port: u16) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        for user in &self.users {
            let path = format!("/profiles/{user}");
            loop {
                let answered = async { Connection::open(port).await?.get(&path).await };
                match answered.await {
                    Ok((StatusCode::OK, _)) => break,
                    other => ensure!(Instant::now() < deadline, "no profile of {user}: {other:?}"),
                }
                sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Reads profiles of random users over all connections. Each answer is checked.
    async fn load(&self, port: u16, meter: Meter) -> Result<Slice> {
        let share = self.requests.div_ceil(CONNECTIONS as u64);
        let mut tasks = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let users = self.users.clone();
            let mut client = Connection::open(port).await?;
            tasks.spawn(async move {
                for _ in 0..share {
                    let user = users[fastrand::usize(..users.len())];
                    let (status, body) = client.get(&format!("/profiles/{user}")).await?;
                    let address = profile(user).email;
                    let has_address = body.windows(address.len()).any(|part| part == address.as_bytes());
                    ensure!(status == StatusCode::OK && has_address, "a wrong answer: {status}");
                }
                Ok(share)
            });
        }
        let mut answered = 0;
        while let Some(share) = tasks.join_next().await {
            answered += share??;
        }
        checks::require_equal("answers", answered, share * CONNECTIONS as u64)?;
        meter.stop(answered)
    }
}

impl Contest for Read<'_> {
    async fn ours(&mut self) -> Result<Slice> {
        self.load(self.ours_port, self.lab.bed.meter(&[&self.service])?).await
    }

    async fn limit(&mut self) -> Result<Slice> {
        self.load(self.limit_port, Meter::start(self.lab.bed.components(), &[self.limit.pid()])?).await
    }
}

/// The limit. One connection to the store, as the cache has it.
pub async fn serve_profiles(port: u16, valkey: String, prefix: String) -> Result<()> {
    let store = Client::open(valkey)?.get_multiplexed_async_connection().await?;
    let router = Router::new().route("/profiles/{id}", routing::get(answer)).with_state((store, prefix));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    axum::serve(listener, router).await.context("the server ended")
}

async fn answer(State((mut store, prefix)): State<(MultiplexedConnection, String)>, Path(id): Path<Uuid>) -> Response {
    let mut read = redis::cmd("HMGET");
    read.arg(format!("{prefix}profile:{id}")).arg("version").arg("profile");
    let found: redis::RedisResult<(Option<i64>, Option<String>)> = read.query_async(&mut store).await;
    let Ok((Some(version), Some(profile))) = found else { return StatusCode::NOT_FOUND.into_response() };
    let Ok(Profile { email, display_name, .. }) = serde_json::from_str(&profile) else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    Json(json!({ "id": id, "version": version, "email": email, "display_name": display_name })).into_response()
}
