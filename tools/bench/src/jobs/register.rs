//! `register`: `POST /users` over 32 connections, while the relay of the same process publishes the
//! events. The limit is the load generator itself: it executes the same inserts in transactions on
//! 32 connections to Postgres, while the same relay publishes the rows.

use std::time::Duration;

use anyhow::{Result, ensure};
use http::StatusCode;
use serde_json::json;
use shared::events::{Cause, Profile, Topic, UserEvent, UserRef, UserState, mint_id};
use shared::messaging::outbox::{self, Draft};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool, query_scalar};
use testbed::services::RunningService;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use topology::USER;

use crate::bed::{Bed, Lab};
use crate::http::Connection;
use crate::meter::Slice;
use crate::report::{Bound, Report};
use crate::slices::{Contest, measure};
use crate::{checks, kafka, statements};

const CONNECTIONS: usize = 32;
/// Requests of a slice.
const REQUESTS: u64 = 20_000;
const GOAL: f64 = 0.75;
/// Microseconds of the service's CPU per registration.
const CPU_GOAL: f64 = 120.0;
const POLL: Duration = Duration::from_millis(20);
/// How long the relay may take to publish the rows of a slice.
const LIMIT: Duration = Duration::from_secs(300);

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: two cores for the load generator, the service, Postgres and Kafka. A profile of the service under this load:
44 % of its CPU is the kernel's, of which sending to Postgres and Kafka takes 21 %, sending answers 6 %, and sleeping and
waking most of the rest. The allocator takes 10 %. The relay and its Kafka client take 12 %, since rows gather between two
rounds; without that the service needs a fifth more CPU. The rest is spread over parsing, spans, limits and metrics: no
function has more than 1 %. A registration is three round trips to Postgres. To join the insert and the
outbox in one statement would save one of them, and the outbox would no longer be a part that every service can use.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("register").await?;
    let mut register = Register::start(&lab).await?;
    let slices = measure(bed, &mut register).await?;
    register.check().await?;
    let what = ["POST /users over 32 connections", "the same inserts on 32 connections to Postgres, the same relay"];
    let report = Report::of_slices("register", "registrations", what, slices, GOAL);
    // CPU seconds per 100,000 are tens of microseconds each.
    let cpu = report.service_cpu() * 10.0;
    Ok(report
        .with_goal("CPU of the service per registration", cpu, "us", Bound::AtMost(CPU_GOAL))
        .limited_by(LIMITED_BY))
}

struct Register<'a> {
    lab: &'a Lab<'a>,
    service: RunningService,
    db: PgPool,
    sessions: Vec<PgConnection>,
    insert: String,
    requests: u64,
    registered: u64,
}

impl<'a> Register<'a> {
    async fn start(lab: &'a Lab<'a>) -> Result<Self> {
        let service = lab.start(USER, &[]).await?;
        let mut sessions = vec![];
        for _ in 0..CONNECTIONS {
            sessions.push(lab.connect(USER).await?);
        }
        Ok(Self {
            lab,
            service,
            db: lab.owner(USER).await?,
            sessions,
            insert: statements::of(USER, "insert into users")?,
            requests: lab.bed.size().of(REQUESTS),
            registered: 0,
        })
    }

    /// The number of requests of each connection.
    fn share(&self) -> u64 {
        self.requests.div_ceil(CONNECTIONS as u64)
    }

    /// Both sides end a slice when the relay has published their rows.
    async fn until_published(&self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while query_scalar("select exists (select from outbox)").fetch_one(&self.db).await? {
            ensure!(Instant::now() < deadline, "the relay does not publish the rows");
            sleep(POLL).await;
        }
        Ok(())
    }

    async fn check(&mut self) -> Result<()> {
        let users: i64 = query_scalar("select count(*) from users").fetch_one(&self.db).await?;
        checks::require_equal("users", users as u64, self.registered)?;
        for topic in [Topic::USER_EVENTS, Topic::USER_STATE] {
            let topic = self.lab.prefixed(topic.name);
            let starts = kafka::ends(self.lab.bed, &topic)?.into_keys().map(|partition| (partition, 0)).collect();
            checks::require_events(self.lab.bed, &topic, &starts, self.registered)?;
        }
        self.service.stop().await;
        Ok(())
    }
}

/// An address that no other user has.
fn address() -> String {
    format!("{}@example.com", mint_id().simple())
}

async fn send(mut client: Connection, requests: u64) -> Result<()> {
    for _ in 0..requests {
        let body = json!({ "email": address(), "display_name": "Ada Lovelace" });
        let (status, body) = client.post("/users", body.to_string()).await?;
        ensure!(status == StatusCode::CREATED, "{status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(())
}

async fn insert(mut session: PgConnection, insert: String, requests: u64) -> Result<PgConnection> {
    for _ in 0..requests {
        let profile = Profile { email: address(), display_name: "Ada Lovelace".to_owned(), owner: None };
        let user = mint_id();
        let cause = Cause::command(None);
        let mut tx = session.begin().await?;
        let inserted = sqlx::query(AssertSqlSafe(insert.as_str()));
        let inserted = inserted.bind(user).bind(1_i64).bind(&profile.email).bind(&profile.display_name);
        inserted.bind(profile.owner).execute(&mut *tx).await?;
        let registered = Draft::new(cause, user, &UserEvent::Registered(UserRef { user_id: user }));
        let state = Draft::new(cause, user, &UserState::Current(profile));
        outbox::publish_all(&mut tx, [registered.at(1), state.at(1)]).await?;
        tx.commit().await?;
    }
    Ok(session)
}

/// Waits for all of them and returns what they return.
async fn join<T: Send + 'static>(mut tasks: JoinSet<Result<T>>) -> Result<Vec<T>> {
    let mut results = vec![];
    while let Some(result) = tasks.join_next().await {
        results.push(result??);
    }
    Ok(results)
}

impl Contest for Register<'_> {
    async fn ours(&mut self) -> Result<Slice> {
        let share = self.share();
        // The service closes a connection that is idle during a slice of the limit.
        let mut clients = vec![];
        for _ in 0..CONNECTIONS {
            clients.push(Connection::open(self.service.instance.http).await?);
        }
        let meter = self.lab.bed.meter(&[&self.service])?;
        let tasks = clients.into_iter().map(|client| send(client, share));
        join(tasks.collect()).await?;
        self.until_published().await?;
        let registered = share * CONNECTIONS as u64;
        self.registered += registered;
        meter.stop(registered)
    }

    async fn limit(&mut self) -> Result<Slice> {
        let share = self.share();
        let sessions = std::mem::take(&mut self.sessions);
        let meter = self.lab.bed.meter(&[&self.service])?;
        let tasks = sessions.into_iter().map(|session| insert(session, self.insert.clone(), share));
        self.sessions = join(tasks.collect()).await?;
        self.until_published().await?;
        let registered = share * CONNECTIONS as u64;
        self.registered += registered;
        meter.stop(registered)
    }
}
