//! `send`: deliveries that are due, until the mail server has a mail of each and the results are
//! recorded. The limit is a bare client that sends the same mails over as many connections and
//! records nothing.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sqlx::{PgPool, query_scalar};
use testbed::services::RunningService;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use topology::EMAIL;

use crate::bed::{Bed, Lab};
use crate::checks;
use crate::meter::Slice;
use crate::report::Report;
use crate::slices::{Contest, measure};

const SENDERS: usize = 8;
/// Mails of a slice.
const MAILS: u64 = 10_000;
const GOAL: f64 = 0.6;
const POLL: Duration = Duration::from_millis(10);
/// How long a slice may take.
const LIMIT: Duration = Duration::from_secs(300);
const INSERT: &str = "
    with users as (
        insert into recipients (user_id, version, email)
        select gen_random_uuid(), 1, 'ada-' || number || '@example.com' from generate_series(1, $1) number
        returning user_id)
    insert into deliveries (id, user_id, template, version, status, due_at, requested_at)
    select gen_random_uuid(), user_id, 'welcome', 1, 'pending', now(), now() from users";
const OPEN: &str = "select count(*) from deliveries where status in ('unaddressed', 'pending', 'sending', 'unknown')";

/// For readers of docs/performance.md.
const LIMITED_BY: &str = "\
What limits it: the database. For each mail a sender waits for a transaction, which records its last mail and claims this
one, and for a check right before the mail is sent. The senders of a process share both statements, one at a time. A crash
must duplicate at most the mail that a sender has in progress, so no sender sends a mail before its last one is recorded.
The bare client records nothing. A mail costs Postgres, the service and Kafka 0.66 ms of CPU together, and the bare client and
the mail server 0.07 ms for the whole dialogue. At these costs two cores send 3,000 mails a second at most, a ratio of 0.11.";

pub async fn run(bed: &Bed) -> Result<Report> {
    let lab = bed.lab("send").await?;
    let mut send = Send::start(&lab).await?;
    let slices = measure(bed, &mut send).await?;
    send.check().await?;
    let what = ["8 senders send mails that are due", "a bare client sends the same mails over 8 connections"];
    Ok(Report::of_slices("send", "mails", what, slices, GOAL).limited_by(LIMITED_BY))
}

struct Send<'a> {
    lab: &'a Lab<'a>,
    service: RunningService,
    db: PgPool,
    mails: u64,
    sent: u64,
    /// A mail of the service, for the limit.
    sample: String,
}

impl<'a> Send<'a> {
    async fn start(lab: &'a Lab<'a>) -> Result<Self> {
        lab.create_topics().await?;
        let service = lab.start(EMAIL, &[("SENDERS", &SENDERS.to_string())]).await?;
        let db = lab.owner(EMAIL).await?;
        Ok(Self { lab, service, db, mails: lab.bed.size().of(MAILS), sent: 0, sample: String::new() })
    }

    async fn until_arrived(&self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        while (self.lab.bed.stack.sink.count() as u64) < self.mails {
            ensure!(Instant::now() < deadline, "the mails do not arrive");
            sleep(POLL).await;
        }
        Ok(())
    }

    async fn check(&mut self) -> Result<()> {
        let question = "select count(*) from deliveries where status = 'sent' and attempt = 1";
        let sent: i64 = query_scalar(question).fetch_one(&self.db).await?;
        checks::require_equal("deliveries were sent with the first attempt", sent as u64, self.sent)?;
        self.service.stop().await;
        Ok(())
    }
}

impl Contest for Send<'_> {
    async fn ours(&mut self) -> Result<Slice> {
        let sink = &self.lab.bed.stack.sink;
        sink.clear();
        let mut tx = self.db.begin().await?;
        sqlx::query(INSERT).bind(self.mails as i64).execute(&mut *tx).await?;
        let meter = self.lab.bed.meter(&[&self.service])?;
        let deadline = Instant::now() + LIMIT;
        tx.commit().await?;
        self.until_arrived().await?;
        while query_scalar::<_, i64>(OPEN).fetch_one(&self.db).await? > 0 {
            ensure!(Instant::now() < deadline, "the results are not recorded");
            sleep(POLL).await;
        }
        let slice = meter.stop(self.mails)?;
        self.sent += self.mails;
        let mails = sink.mails();
        let ids: BTreeSet<&String> = mails.iter().filter_map(|mail| mail.message_id.as_ref()).collect();
        checks::require_equal("mails", mails.len() as u64, self.mails)?;
        checks::require_equal("different mails", ids.len() as u64, self.mails)?;
        self.sample = mails.first().context("no mail arrived")?.raw.clone();
        Ok(slice)
    }

    async fn limit(&mut self) -> Result<Slice> {
        let sink = &self.lab.bed.stack.sink;
        sink.clear();
        let share = self.mails.div_ceil(SENDERS as u64);
        let meter = self.lab.bed.meter(&[])?;
        let mut tasks: JoinSet<Result<()>> =
            (0..SENDERS).map(|_| dialogue(sink.address(), self.sample.clone(), share)).collect();
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        let slice = meter.stop(share * SENDERS as u64)?;
        checks::require_equal("mails of the limit", sink.count() as u64, slice.amount)?;
        Ok(slice)
    }
}

/// Sends mails one after another over one connection.
async fn dialogue(server: SocketAddr, mail: String, mails: u64) -> Result<()> {
    let stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let mut session = Session { stream: BufReader::new(stream) };
    // A dot at the beginning of a line is doubled: RFC 5321, section 4.5.2.
    let content = format!("{}\r\n.", mail.trim_end().replace("\r\n.", "\r\n.."));
    session.expect('2').await?;
    session.command("EHLO bench.example", '2').await?;
    for number in 0..mails {
        session.command("MAIL FROM:<bench@example.com>", '2').await?;
        session.command(&format!("RCPT TO:<ada-{number}@example.com>"), '2').await?;
        session.command("DATA", '3').await?;
        session.command(&content, '2').await?;
    }
    session.command("QUIT", '2').await
}

struct Session {
    stream: BufReader<TcpStream>,
}

impl Session {
    /// Sends a line and waits for a reply whose code begins with this digit.
    async fn command(&mut self, line: &str, digit: char) -> Result<()> {
        self.stream.write_all(format!("{line}\r\n").as_bytes()).await?;
        self.expect(digit).await
    }

    async fn expect(&mut self, digit: char) -> Result<()> {
        let mut line = String::new();
        loop {
            line.clear();
            self.stream.read_line(&mut line).await?;
            ensure!(line.starts_with(digit), "the mail server replied {line:?}");
            // The last line of a reply has a blank after the code.
            if line.as_bytes().get(3) != Some(&b'-') {
                return Ok(());
            }
        }
    }
}
