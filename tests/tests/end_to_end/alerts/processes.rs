//! Processes that are not there, do not answer, or do not stay.

use sqlx::{Connection, PgConnection};
use tests::System;
use tests::alerts::SCRAPES;
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, USER};

use super::{record, until};

/// I12: analytics is frozen, and the only process of the cache has died. The email service ends
/// again and again. Another session holds the lock of the relays of `user`. Before that, while all
/// is well, no alert fires.
#[tokio::test(flavor = "multi_thread")]
async fn processes_that_are_missing_frozen_restarted_or_without_a_leader() {
    let mut system = System::start().await;
    let user = system.users.register().await;
    system.until_applied(&[user]).await;
    let Some(mut recording) = record(&system, &SERVICES).await else { return };
    recording.scrapes(SCRAPES).await;
    recording.fault_begins();

    system.processes.freeze(ANALYTICS);
    system.processes.kill(CACHE);
    let mut holder = PgConnection::connect(&system.stores.urls(USER).url).await.unwrap();
    let lock =
        "select (classid::bigint << 32) | objid::bigint from pg_locks join pg_database on database = pg_database.oid
                where locktype = 'advisory' and datname = current_database()";
    let lock: i64 = sqlx::query_scalar(lock).fetch_one(&mut holder).await.unwrap();
    system.processes.kill(USER);
    sqlx::query("select pg_advisory_lock($1)").bind(lock).execute(&mut holder).await.unwrap();
    system.processes.spawn(USER);
    for _ in 0..3 {
        system.processes.kill(EMAIL);
        system.processes.spawn(EMAIL);
        until(&system, EMAIL, "relay_leader", &[], 1.0).await;
        recording.scrapes(1).await;
    }
    until(&system, USER, "relay_leader", &[], 0.0).await;
    recording.fault_shows();
    recording.scrapes(SCRAPES).await;
    recording.fault_ends();

    holder.close().await.unwrap();
    system.processes.thaw(ANALYTICS);
    system.processes.start(&[CACHE]).await;
    until(&system, USER, "relay_leader", &[], 1.0).await;
    for service in SERVICES {
        system.processes.until_nothing_reported(service).await;
    }
    recording.scrapes(SCRAPES).await;
    recording.check(&["NoRelayLeader", "RestartLoop", "ServiceMissing", "TargetDown"]);
}
