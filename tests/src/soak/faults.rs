//! The faults of a soak. Each one is healed before the next.

use std::fmt;
use std::time::Duration;

use fastrand::Rng;
use testbed::smtp_sink::{Fault as MailFault, Stage};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};
use uuid::Uuid;

use super::Cluster;
use crate::record::Draft;
use crate::services::USER_EVENTS;
use crate::system::System;
use crate::waiting::POLL;

/// Longer than the session time-out of Kafka and the time-out of Postgres for idle transactions. A
/// frozen process loses both.
const LONG: Duration = Duration::from_secs(12);
/// Shorter than both time-outs.
const SHORT: Duration = Duration::from_secs(3);
/// How long a process may take to reach a fault point under load. Some are never reached: an
/// unknown answer, for example, needs another fault.
const REACH_LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
pub enum Fault {
    /// SIGKILL.
    Kill(Service),
    /// SIGTERM, as in a rolling restart.
    Restart(Service),
    /// SIGKILL at a fault point.
    CrashAt(Service, &'static str),
    /// SIGSTOP, and SIGCONT after this time.
    Freeze(Service, Duration),
    /// A second process of the service starts and is killed.
    SecondCopy(Service),
    /// Of three brokers, the first one.
    KillKafka,
    /// Of three brokers, the first one.
    FreezeKafka(Duration),
    /// One of three brokers is killed and is down for this time. It has the only replica of some
    /// partitions, which have no leader meanwhile.
    LoseBroker(i32, Duration),
    /// Another program holds a transaction open in the topic of facts for this time.
    OpenTransaction(Duration),
    /// For this time no client may read the topic of facts.
    DenyTopic(Duration),
    KillPostgres,
    /// Valkey loses its data.
    KillValkey,
    FlushValkey,
    /// Valkey comes back from a snapshot that is older by this time.
    RestoreValkey(Duration),
    /// Valkey becomes a replica of nothing, and a master again after this time.
    DemoteValkey(Duration),
    /// The sessions of Postgres are read-only for this time.
    ReadOnlyPostgres(Duration),
    /// The next mails fail in this way.
    Mail(&'static str),
    /// The mail server answers each mail after this time.
    SlowMail(Duration),
    /// For this time the mail server refuses every recipient, for a reason that is about us.
    RefuseMail(Duration),
}

/// The fault points, with the services that have them.
const CRASHES: [(Service, &str); 18] = [
    (USER, "user.before_commit"),
    (USER, "user.after_commit"),
    (USER, "relay.after_read"),
    (USER, "relay.after_enqueue"),
    (USER, "relay.after_ack"),
    (USER, "relay.after_commit"),
    (USER, "relay.after_delete"),
    (EMAIL, "relay.after_commit"),
    (EMAIL, "email.after_claim"),
    (EMAIL, "email.after_answer"),
    (EMAIL, "email.before_record"),
    (EMAIL, "email.before_commit"),
    (EMAIL, "consumer.after_effect"),
    (ANALYTICS, "inbox.before_commit"),
    (ANALYTICS, "inbox.after_commit"),
    (ANALYTICS, "consumer.after_store"),
    (CACHE, "cache.before_script"),
    (CACHE, "cache.after_script"),
];

impl Fault {
    pub fn any(random: &mut Rng, cluster: Cluster) -> Self {
        let service = SERVICES[random.usize(..SERVICES.len())];
        let time = if random.bool() { SHORT } else { LONG };
        if cluster == Cluster::ThreeBrokers && random.u8(..4) > 0 {
            return Self::LoseBroker(random.i32(1..=3), time);
        }
        match random.u8(..16) {
            0 => Self::Kill(service),
            1 => Self::Restart(service),
            2 | 3 => {
                let (service, point) = CRASHES[random.usize(..CRASHES.len())];
                Self::CrashAt(service, point)
            }
            4 => Self::Freeze(service, time),
            5 => Self::SecondCopy(service),
            6 => Self::KillKafka,
            7 => Self::FreezeKafka(time),
            8 => Self::KillPostgres,
            9 if random.bool() => Self::KillValkey,
            9 => Self::FlushValkey,
            10 => Self::RestoreValkey(SHORT),
            11 => Self::DemoteValkey(SHORT),
            12 => Self::ReadOnlyPostgres(SHORT),
            13 => Self::OpenTransaction(time),
            14 => Self::DenyTopic(SHORT),
            _ => match random.u8(..5) {
                0 => Self::SlowMail(time),
                1 => Self::RefuseMail(time),
                _ => Self::Mail(["451", "reset", "drop"][random.usize(..3)]),
            },
        }
    }

    /// Injects the fault and heals it.
    pub async fn inject(self, system: &mut System) {
        match self {
            Self::Kill(service) => system.processes.kill(service),
            Self::Restart(service) => system.processes.stop(service).await,
            Self::CrashAt(service, point) => crash_at(system, service, point).await,
            Self::Freeze(service, time) => {
                system.processes.freeze(service);
                tokio::time::sleep(time).await; // the duration of the fault
                system.processes.thaw(service);
            }
            Self::SecondCopy(service) => second_copy(system, service).await,
            Self::KillKafka => system.components().kafka.restart().await.unwrap(),
            Self::FreezeKafka(time) => {
                system.components().kafka.process.freeze();
                tokio::time::sleep(time).await;
                system.components().kafka.process.thaw();
            }
            Self::LoseBroker(id, time) => {
                system.broker(id).process.kill();
                tokio::time::sleep(time).await;
                system.broker(id).restart().await.unwrap();
            }
            Self::OpenTransaction(time) => {
                let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1);
                let transaction = system.kafka.leave_transaction_open(USER_EVENTS, &fact).await;
                tokio::time::sleep(time).await;
                transaction.abort();
            }
            Self::DenyTopic(time) => {
                let topic = system.kafka.prefixed(USER_EVENTS);
                system.components().kafka.deny_reading(&topic).await.unwrap();
                tokio::time::sleep(time).await;
                system.components().kafka.allow_reading(&topic).await.unwrap();
            }
            Self::KillPostgres => system.components().postgres.restart().await.unwrap(),
            Self::KillValkey => system.components().redis.restart().await.unwrap(),
            Self::FlushValkey => system.stores.flush_valkey().await,
            Self::RestoreValkey(age) => {
                system.components().redis.save().await.unwrap();
                tokio::time::sleep(age).await;
                system.components().redis.restore().await.unwrap();
            }
            Self::DemoteValkey(time) => {
                system.components().redis.replicate(Some(1)).await.unwrap();
                tokio::time::sleep(time).await;
                system.components().redis.replicate(None).await.unwrap();
            }
            Self::ReadOnlyPostgres(time) => {
                system.components().postgres.set_read_only(true).await.unwrap();
                tokio::time::sleep(time).await;
                system.components().postgres.set_read_only(false).await.unwrap();
            }
            Self::Mail(how) => system.mail.fail(mail_fault(how).times(5)),
            Self::SlowMail(time) => slow_mail(system, time),
            Self::RefuseMail(time) => refuse_mail(system, time).await,
        }
        if let Self::Kill(service) | Self::Restart(service) | Self::CrashAt(service, _) = self {
            system.processes.spawn(service);
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(service) => write!(f, "Kill {}", service.name),
            Self::Restart(service) => write!(f, "Restart {}", service.name),
            Self::CrashAt(service, point) => write!(f, "CrashAt {} {point}", service.name),
            Self::Freeze(service, time) => write!(f, "Freeze {} for {time:?}", service.name),
            Self::SecondCopy(service) => write!(f, "SecondCopy {}", service.name),
            Self::KillKafka => write!(f, "KillKafka"),
            Self::FreezeKafka(time) => write!(f, "FreezeKafka for {time:?}"),
            Self::LoseBroker(id, time) => write!(f, "LoseBroker {id} for {time:?}"),
            Self::DenyTopic(time) => write!(f, "DenyTopic for {time:?}"),
            Self::OpenTransaction(time) => write!(f, "OpenTransaction for {time:?}"),
            Self::KillPostgres => write!(f, "KillPostgres"),
            Self::KillValkey => write!(f, "KillValkey"),
            Self::FlushValkey => write!(f, "FlushValkey"),
            Self::RestoreValkey(age) => write!(f, "RestoreValkey from {age:?} ago"),
            Self::DemoteValkey(time) => write!(f, "DemoteValkey for {time:?}"),
            Self::ReadOnlyPostgres(time) => write!(f, "ReadOnlyPostgres for {time:?}"),
            Self::Mail(how) => write!(f, "Mail {how}"),
            Self::SlowMail(time) => write!(f, "SlowMail for {time:?}"),
            Self::RefuseMail(time) => write!(f, "RefuseMail for {time:?}"),
        }
    }
}

/// The process is killed at the fault point. If it does not reach the point in time, it is killed
/// anyway.
async fn crash_at(system: &mut System, service: Service, point: &str) {
    system.processes.spawn_with(service, &[("FAULT_AT", &format!("{point}:2:kill"))]);
    let deadline = tokio::time::Instant::now() + REACH_LIMIT;
    while !system.processes.has_ended(service) && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
    }
    system.processes.kill(service);
}

/// A second process takes some of the partitions, and is killed.
async fn second_copy(system: &System, service: Service) {
    let mut copy = system.processes.spawn_another(service);
    copy.until_ready().await;
    copy.kill();
}

fn slow_mail(system: &System, time: Duration) {
    let ms = u64::try_from(time.as_millis()).unwrap();
    system.mail.fail(MailFault::Slow { ms, stage: Stage::Dot }.times(5));
}

async fn refuse_mail(system: &System, time: Duration) {
    let text = "554 5.7.1 Relay access denied".to_owned();
    system.mail.fail(MailFault::Reply { stage: Stage::Rcpt, text });
    tokio::time::sleep(time).await; // the duration of the fault
    system.mail.recover();
}

fn mail_fault(how: &str) -> MailFault {
    match how {
        "451" => MailFault::Reject { stage: Stage::Rcpt, code: 451 },
        "reset" => MailFault::ResetBeforeDot,
        _ => MailFault::DropAfterDot,
    }
}
