//! What a soak does to the system. Each fault is healed before the next one strikes.

use std::time::Duration;

use fastrand::Rng;
use testbed::smtp_sink::{Fault as MailFault, Stage};

use crate::{Part, System};

/// Longer than Kafka's session time-out and Postgres' for an idle transaction: a frozen process loses both.
const LONG: Duration = Duration::from_secs(12);
/// Shorter than both.
const SHORT: Duration = Duration::from_secs(3);
/// For a fault point to be met under load. Not all are, for example one about an answer that takes a fault to be unknown.
const MET: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// SIGKILL.
    Kill(Part),
    /// SIGTERM, as a roll-out does.
    Restart(Part),
    /// SIGKILL between two chosen effects.
    CrashAt(Part, &'static str),
    /// SIGSTOP, and SIGCONT after this time.
    Freeze(Part, Duration),
    /// A second process of a service joins, and is killed.
    SecondCopy(Part),
    KillKafka,
    FreezeKafka(Duration),
    KillPostgres,
    /// Valkey keeps nothing.
    KillValkey,
    FlushValkey,
    /// The next mails fail in this way.
    Mail(&'static str),
}

/// The crashes between two effects, and whose they are.
const CRASHES: [(Part, &str); 17] = [
    (Part::User, "user.before_commit"),
    (Part::User, "user.after_commit"),
    (Part::User, "relay.after_read"),
    (Part::User, "relay.after_enqueue"),
    (Part::User, "relay.after_ack"),
    (Part::User, "relay.after_commit"),
    (Part::User, "relay.after_delete"),
    (Part::Email, "relay.after_commit"),
    (Part::Email, "email.after_claim"),
    (Part::Email, "email.after_answer"),
    (Part::Email, "email.before_commit"),
    (Part::Email, "consumer.after_effect"),
    (Part::Analytics, "inbox.before_commit"),
    (Part::Analytics, "inbox.after_commit"),
    (Part::Analytics, "consumer.after_store"),
    (Part::Cache, "cache.before_script"),
    (Part::Cache, "cache.after_script"),
];

impl Fault {
    pub fn any(random: &mut Rng) -> Self {
        let part = Part::ALL[random.usize(..Part::ALL.len())];
        let time = if random.bool() { SHORT } else { LONG };
        match random.u8(..11) {
            0 => Self::Kill(part),
            1 => Self::Restart(part),
            2 | 3 => {
                let (part, point) = CRASHES[random.usize(..CRASHES.len())];
                Self::CrashAt(part, point)
            }
            4 => Self::Freeze(part, time),
            5 => Self::SecondCopy(part),
            6 => Self::KillKafka,
            7 => Self::FreezeKafka(time),
            8 => Self::KillPostgres,
            9 if random.bool() => Self::KillValkey,
            9 => Self::FlushValkey,
            _ => Self::Mail(["451", "reset", "drop"][random.usize(..3)]),
        }
    }

    /// Injects the fault and heals it.
    pub async fn strike(self, system: &mut System) {
        match self {
            Self::Kill(part) => system.kill(part),
            Self::Restart(part) => system.stop(part).await,
            Self::CrashAt(part, point) => crash_at(system, part, point).await,
            Self::Freeze(part, time) => {
                system.freeze(part);
                tokio::time::sleep(time).await; // the fault itself, no condition
                system.thaw(part);
            }
            Self::SecondCopy(part) => second_copy(system, part).await,
            Self::KillKafka => system.stack.as_mut().unwrap().kafka.restart().await.unwrap(),
            Self::FreezeKafka(time) => {
                system.stack.as_mut().unwrap().kafka.process.freeze();
                tokio::time::sleep(time).await;
                system.stack.as_mut().unwrap().kafka.process.thaw();
            }
            Self::KillPostgres => system.stack.as_mut().unwrap().postgres.restart().await.unwrap(),
            Self::KillValkey => system.stack.as_mut().unwrap().redis.restart().await.unwrap(),
            Self::FlushValkey => {
                redis::cmd("FLUSHALL").query_async::<()>(&mut system.valkey().await).await.unwrap();
            }
            Self::Mail(how) => system.sink.set(mail_fault(how).times(5)),
        }
        if let Self::Kill(part) | Self::Restart(part) | Self::CrashAt(part, _) = self {
            system.spawn(part, &[]);
        }
    }
}

/// The service dies when it meets the point under load; one that never does dies of an ordinary kill.
async fn crash_at(system: &mut System, part: Part, point: &str) {
    system.spawn(part, &[("FAULT_AT", &format!("{point}:2:kill"))]);
    let deadline = tokio::time::Instant::now() + MET;
    while !system.has_ended(part) && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(crate::POLL).await;
    }
    system.kill(part);
}

/// Takes some of the partitions, or the relay when its leader dies, and is gone again.
async fn second_copy(system: &System, part: Part) {
    let mut copy = system.spawn_another(part, &[]);
    copy.until_ready().await.unwrap();
    copy.process.kill();
}

fn mail_fault(how: &str) -> MailFault {
    match how {
        "451" => MailFault::Reject { stage: Stage::Rcpt, code: 451 },
        "reset" => MailFault::ResetBeforeDot,
        _ => MailFault::DropAfterDot,
    }
}
