//! Rows of an outbox, written as a backlog.

use anyhow::Result;
use shared::events::{Topic, key_hash, mint_id, now};
use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

/// Rows of one insert.
const CHUNK: usize = 10_000;
/// Versions of each key.
const VERSIONS: u64 = 10;
/// Bytes of a payload.
const PAYLOAD: usize = 300;

/// What every row of the backlog has.
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// Inserts rows into a table with the columns of an outbox, in one transaction, so that a relay
/// sees all of them at one moment. Ten versions of each key follow each other at a distance, as in
/// practice. Returns the id of the last row, and calls `before_commit` when all rows are inserted.
pub async fn insert(db: &PgPool, table: &str, rows: u64) -> Result<(i64, sqlx::Transaction<'static, sqlx::Postgres>)> {
    let keys: Vec<Uuid> = (0..rows.div_ceil(VERSIONS)).map(|_| mint_id()).collect();
    let mut tx = db.begin().await?;
    let mut last = 0;
    let statement = format!(
        "insert into {table} (event_id, topic, aggregatetype, aggregateid, key_hash, version, type, payload, causationid,
             correlationid, traceparent, occurred_at)
         select event_id, $1, 'user', key, key_hash, version, 'user.registered', payload, event_id, event_id, $2, $3
         from unnest($4::uuid[], $5::uuid[], $6::int[], $7::bigint[], $8::bytea[])
             with ordinality as row (event_id, key, key_hash, version, payload, number)
         order by number returning id"
    );
    let numbers: Vec<u64> = (0..rows).collect();
    for chunk in numbers.chunks(CHUNK) {
        let key = |number: &u64| keys[(*number % keys.len() as u64) as usize];
        let ids: Vec<i64> = sqlx::query_scalar(AssertSqlSafe(statement.as_str()))
            .bind(Topic::USER_EVENTS.name)
            .bind(TRACEPARENT)
            .bind(now())
            .bind(chunk.iter().map(|_| mint_id()).collect::<Vec<_>>())
            .bind(chunk.iter().map(key).collect::<Vec<_>>())
            .bind(chunk.iter().map(|number| key_hash(key(number))).collect::<Vec<_>>())
            .bind(chunk.iter().map(|number| (*number / keys.len() as u64 + 1) as i64).collect::<Vec<_>>())
            .bind(chunk.iter().map(|_| payload()).collect::<Vec<_>>())
            .fetch_all(&mut *tx)
            .await?;
        last = ids.into_iter().max().unwrap_or(last);
    }
    Ok((last, tx))
}

/// JSON of the length of a typical event. Half of it cannot be compressed.
fn payload() -> Vec<u8> {
    let mut payload = format!("{{\"user_id\":\"{}\",\"text\":\"", Uuid::new_v4());
    while payload.len() < PAYLOAD - 2 {
        payload.push(char::from(fastrand::alphanumeric() as u8));
    }
    payload.push_str("\"}");
    payload.into_bytes()
}
