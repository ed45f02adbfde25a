//! One side of the comparison, running: its processes, its stores, and how to break them.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use testbed::postgres::create_database;
use testbed::services::{Instance, RunningService};
use testbed::testing;
use tests::System;
use tests::judge::Judge;
use tests::mail::Mail;
use tests::proxy::Proxy;
use tests::services::groups;
use tests::synchronous::{Role, Synchronous, Variant};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};
use uuid::Uuid;

use crate::load::Target;

/// Mails that both sides may send at the same time. The synchronous version has this limit as a
/// constant.
const MAIL_CONNECTIONS: &str = "50";
/// Waybill's own default. The tests set a shorter one.
const BACKOFF_MS: &str = "1000";

/// Records when each user was counted. It runs in the transaction of the count, on both sides.
const COUNTED_AT: &str = "
    create table if not exists counted_at (user_id uuid primary key, at timestamptz not null default clock_timestamp());
    create or replace function note_count() returns trigger language plpgsql as $$ begin
        insert into counted_at (user_id) values (new.user_id) on conflict do nothing;
        return null;
    end $$;";
const ON_FUNNEL: &str = "create trigger note_count after insert or update of registered_at on funnel
    for each row when (new.registered_at is not null) execute function note_count()";
const ON_COUNTED: &str = "create trigger note_count after insert on counted for each row execute function note_count()";
/// The role of the service inserts the rows.
const GRANT: &str = "grant insert, select on counted_at to public";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Side {
    Sequential,
    Parallel,
    Resilient,
    Background,
    Waybill,
}

impl Side {
    pub const ALL: [Self; 5] = [Self::Sequential, Self::Parallel, Self::Resilient, Self::Background, Self::Waybill];
    pub const SYNCHRONOUS: [Self; 4] = [Self::Sequential, Self::Parallel, Self::Resilient, Self::Background];
    /// Those synchronous variants that do nothing after the answer.
    pub const WITHIN_THE_REQUEST: [Self; 3] = [Self::Sequential, Self::Parallel, Self::Resilient];

    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Parallel => "parallel",
            Self::Resilient => "resilient",
            Self::Background => "background",
            Self::Waybill => "Waybill",
        }
    }
}

pub struct Subject {
    kind: Kind,
    /// In front of the database of analytics and of the store of the cache, if they are to fail.
    pub proxies: Option<Proxies>,
    /// The fourth service of Waybill, if it was added.
    search: Option<RunningService>,
}

/// The service that the patch in `tests/compare` adds to the topology.
const SEARCH: Service = Service {
    name: "search",
    http: 8085,
    admin: 9085,
    has_database: true,
    writes: &[],
    groups: &[],
    stores: &["Postgres"],
};

pub struct Proxies {
    pub analytics: Proxy,
    pub store: Proxy,
}

enum Kind {
    Waybill(Box<System>, Option<Judge>),
    Synchronous(Box<Synchronous>),
}

impl Subject {
    /// Starts a side on fresh databases and waits until it is ready. With `breakable`, faults can
    /// be injected, and the checker of the fault tests records Waybill's run.
    pub async fn start(side: Side, breakable: bool) -> Self {
        let variant = match side {
            Side::Sequential => Variant::Sequential,
            Side::Parallel => Variant::Parallel,
            Side::Resilient => Variant::Resilient,
            Side::Background => Variant::Background,
            Side::Waybill => return Self::waybill(breakable).await,
        };
        let mut synchronous = Synchronous::empty(variant).await;
        let mut proxies = None;
        if breakable {
            let (analytics, database) = Proxy::before_url(synchronous.setting("ANALYTICS_DATABASE_URL")).await;
            let (store, valkey) = Proxy::before_url(synchronous.setting("VALKEY_URL")).await;
            synchronous.set("ANALYTICS_DATABASE_URL", &database);
            synchronous.set("VALKEY_URL", &valkey);
            proxies = Some(Proxies { analytics, store });
        }
        synchronous.start_all().await;
        note_counts(&synchronous.counts().await, ON_COUNTED).await;
        Self { kind: Kind::Synchronous(Box::new(synchronous)), proxies, search: None }
    }

    async fn waybill(breakable: bool) -> Self {
        let mut system = System::empty().await;
        system.processes.set("SENDERS", MAIL_CONNECTIONS);
        system.processes.set("BACKOFF_MS", BACKOFF_MS);
        let mut proxies = None;
        if breakable {
            let (analytics, (name, database)) = system.proxied_database(ANALYTICS).await;
            let (store, valkey) = Proxy::before_url(system.processes.setting("VALKEY_URL")).await;
            system.processes.set(&name, &database);
            system.processes.set("VALKEY_URL", &valkey);
            proxies = Some(Proxies { analytics, store });
        }
        note_counts(&system.stores.database(ANALYTICS).await, ON_FUNNEL).await;
        system.processes.start_all().await;
        let judge = if breakable { Some(system.judge().await) } else { None };
        Self { kind: Kind::Waybill(Box::new(system), judge), proxies, search: None }
    }

    /// Where clients send their requests.
    pub fn target(&self) -> Target {
        let (users, profiles) = match &self.kind {
            Kind::Waybill(system, _) => (system.users.url(USER, "/users"), system.users.url(CACHE, "/profiles")),
            Kind::Synchronous(synchronous) => {
                (synchronous.url(Role::User, "/users"), synchronous.url(Role::Cache, "/profiles"))
            }
        };
        Target { users, profiles }
    }

    pub fn mail(&self) -> &Mail {
        match &self.kind {
            Kind::Waybill(system, _) => &system.mail,
            Kind::Synchronous(synchronous) => &synchronous.mail,
        }
    }

    /// The database with the users.
    pub async fn users(&self) -> PgPool {
        match &self.kind {
            Kind::Waybill(system, _) => system.stores.database(USER).await,
            Kind::Synchronous(synchronous) => synchronous.users().await,
        }
    }

    /// The database with the counts.
    pub async fn counts(&self) -> PgPool {
        match &self.kind {
            Kind::Waybill(system, _) => system.stores.database(ANALYTICS).await,
            Kind::Synchronous(synchronous) => synchronous.counts().await,
        }
    }

    /// SIGKILL for the process that registers users.
    pub fn kill_registering(&mut self) {
        match &mut self.kind {
            Kind::Waybill(system, _) => system.processes.kill(USER),
            Kind::Synchronous(synchronous) => synchronous.kill(Role::User),
        }
    }

    /// Starts the process that registers users again, and waits until it is ready.
    pub async fn start_registering(&mut self) {
        match &mut self.kind {
            Kind::Waybill(system, _) => system.processes.start(&[USER]).await,
            Kind::Synchronous(synchronous) => synchronous.start_role(Role::User).await,
        }
    }

    pub fn pids(&mut self) -> Vec<u32> {
        match &mut self.kind {
            Kind::Waybill(system, _) => SERVICES.map(|service| system.processes.pid(service)).to_vec(),
            Kind::Synchronous(synchronous) => synchronous.pids(),
        }
    }

    /// Calls, batches and mails that were retried so far. A process that was killed has forgotten
    /// its own.
    pub async fn retried(&self) -> f64 {
        match &self.kind {
            Kind::Waybill(system, _) => {
                let mut retried = 0.0;
                for group in groups() {
                    retried += system.processes.retries(group).await;
                }
                let mails = "select coalesce(sum(attempt - 1) filter (where attempt > 1), 0)::bigint from deliveries";
                retried + system.stores.count(EMAIL, mails).await as f64
            }
            Kind::Synchronous(synchronous) => synchronous.calls("Retried").await,
        }
    }

    /// Adds the fourth receiver while the others run, with the programs in this folder. Returns the
    /// database of its index.
    pub async fn add_search(&mut self, programs: &Path) -> PgPool {
        let system = match &mut self.kind {
            Kind::Waybill(system, _) => system,
            Kind::Synchronous(synchronous) => return synchronous.add_search(programs).await,
        };
        let name = format!("search_{}", Uuid::now_v7().simple());
        let database = create_database(&testing::stack().postgres, &name, ANALYTICS).await.unwrap();
        let (environment, logs) = system.processes.environment();
        let mut environment = environment.to_vec();
        environment.push(("SEARCH_DATABASE_URL".to_owned(), database.owner_url.clone()));
        let mut search = Instance::on_free_ports(SEARCH).spawn(programs, &environment, logs).unwrap();
        search.until_ready().await.unwrap();
        self.search = Some(search);
        PgPool::connect(&database.owner_url).await.unwrap()
    }

    /// The violated invariants of Waybill's run. None for the synchronous version: the invariants
    /// are about topics, inboxes and deliveries, which it does not have.
    pub async fn violations(mut self, answers: &tests::load::Answers) -> Result<Vec<String>> {
        let Kind::Waybill(system, Some(judge)) = &mut self.kind else { return Ok(vec![]) };
        let (_, violations) = judge.violations(system, answers).await;
        Ok(violations.iter().map(ToString::to_string).collect())
    }
}

async fn note_counts(db: &PgPool, trigger: &'static str) {
    for statement in [COUNTED_AT, trigger, GRANT] {
        sqlx::raw_sql(statement).execute(db).await.unwrap();
    }
}
