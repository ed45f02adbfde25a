//! What the tests of several files use.

use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

pub async fn database() -> PgPool {
    testbed::testing::migrated_database(testbed::services::EMAIL, &crate::MIGRATIONS).await
}

/// A database with a pool of one session, for [`blocks_read`].
pub async fn one_session() -> PgPool {
    let options = (*database().await.connect_options()).clone();
    PgPoolOptions::new().max_connections(1).connect_with(options).await.unwrap()
}

/// The blocks of `deliveries` and its indexes that this session has read so far.
pub async fn blocks_read(db: &PgPool) -> i64 {
    // Postgres collects the numbers of a session now and then, and now at the end of this
    // statement.
    sqlx::query("select pg_stat_force_next_flush()").execute(db).await.unwrap();
    let read = "select heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit
                from pg_statio_user_tables where relname = 'deliveries'";
    sqlx::query_scalar(read).fetch_one(db).await.unwrap()
}
