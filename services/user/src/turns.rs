//! The sessions of commands, and limits on the commands that are in progress. A command keeps its
//! database session while it waits for a lock. Without limits the callers of one locked user would
//! occupy all sessions, and every other request would wait for a session in vain.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use shared::platform::database::POOL_SIZE;
use sqlx::{PgConnection, PgPool, Postgres, Transaction};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Duration, timeout};
use uuid::Uuid;

use crate::problem::Error;

/// Commands in progress on one user, or with one key, in this process: one works and two wait for
/// its locks. Further ones are refused at once.
const PER_TARGET: usize = 3;
/// Sessions of the pool that commands leave to other statements, whatever the commands wait for.
const SESSIONS_FOR_READS: u32 = 3;
/// How long a command waits for a session, as long as a read does.
const SESSION_TIMEOUT: Duration = Duration::from_secs(3);
/// How many commands one after another use a session before it returns to the pool. Only the pool
/// replaces sessions that are old or that it does not trust. And a transaction that begins with the
/// commit of another one is not affected when the server's defaults change in between, such as
/// `default_transaction_read_only`.
const COMMANDS_PER_SESSION: u32 = 100;

/// What a command locks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    User(Uuid),
    /// An `Idempotency-Key` with its scope.
    Key(String),
}

#[derive(Clone)]
pub struct Turns {
    db: PgPool,
    places: Arc<Semaphore>,
    waiting: Waiting,
    in_progress: InProgress,
}

/// The commands that wait for a session, in their order. One that has given up stays in the queue
/// until another one looks at it.
type Waiting = Arc<Mutex<VecDeque<oneshot::Sender<Session>>>>;
type InProgress = Arc<Mutex<HashMap<Target, usize>>>;

/// The turn of one command. Dropping it rolls its transaction back.
pub struct Turn {
    session: Session,
    /// After the transaction: fields are dropped in their order.
    _places: Places,
}

/// A session whose transaction is open and, at first, empty.
struct Session {
    tx: Transaction<'static, Postgres>,
    /// How many commands have used the session since it left the pool.
    commands: u32,
    waiting: Waiting,
    /// After the transaction.
    _place: OwnedSemaphorePermit,
}

/// The places of one command. Dropping it frees them.
struct Places {
    targets: Vec<Target>,
    in_progress: InProgress,
}

impl Turns {
    pub fn new(db: PgPool) -> Self {
        let places = Arc::new(Semaphore::new((POOL_SIZE - SESSIONS_FOR_READS) as usize));
        Self { db, places, waiting: Waiting::default(), in_progress: InProgress::default() }
    }

    /// Waits for a session and begins a transaction.
    ///
    /// # Errors
    /// [`Error::Busy`], or no session becomes free.
    pub async fn take(&self, targets: Vec<Target>) -> Result<Turn, Error> {
        let places = Places::take(targets, &self.in_progress)?;
        Ok(Turn { session: self.session().await?, _places: places })
    }

    /// A session that another command hands over, or one of the pool if a place is free.
    async fn session(&self) -> Result<Session, Error> {
        let place = match Arc::clone(&self.places).try_acquire_owned() {
            Ok(place) => place,
            Err(_) => match timeout(SESSION_TIMEOUT, self.next()).await {
                Ok(Next::Session(session)) => return Ok(session),
                Ok(Next::Place(place)) => place,
                Err(_) => return Err(sqlx::Error::PoolTimedOut.into()),
            },
        };
        Ok(Session { tx: self.db.begin().await?, commands: 0, waiting: Arc::clone(&self.waiting), _place: place })
    }

    async fn next(&self) -> Next {
        let (sender, mut session) = oneshot::channel();
        {
            let mut waiting = lock(&self.waiting);
            // Bounds the queue by the number of requests in progress.
            waiting.retain(|waiter| !waiter.is_closed());
            waiting.push_back(sender);
        }
        tokio::select! {
            biased;
            Ok(session) = &mut session => Next::Session(session),
            place = Arc::clone(&self.places).acquire_owned() => Next::Place(place.expect("the semaphore is never closed")),
        }
    }
}

/// What a waiting command gets.
enum Next {
    Session(Session),
    /// A command has ended without handing its session over.
    Place(OwnedSemaphorePermit),
}

impl Turn {
    /// The transaction.
    pub fn tx(&mut self) -> &mut PgConnection {
        &mut self.session.tx
    }

    /// Commits the transaction.
    ///
    /// # Errors
    /// The answer of the database: the transaction may be committed or not.
    pub async fn commit(self) -> sqlx::Result<()> {
        self.session.commit().await
    }
}

impl Session {
    /// Commits. If a command waits, its transaction begins in the same statement, and it gets the
    /// session. Thus under load a command does not wait for a `begin`, and its session is not
    /// tested as the pool tests it: a session that has just committed works.
    ///
    /// Crash before the commit: this command changed nothing. Crash after it: this command took
    /// effect, and the transaction of the next one is empty. If the next one gives up in this
    /// moment, its empty transaction is rolled back.
    async fn commit(mut self) -> sqlx::Result<()> {
        self.commands += 1;
        let is_awaited = lock(&self.waiting).iter().any(|waiter| !waiter.is_closed());
        if self.commands >= COMMANDS_PER_SESSION || !is_awaited {
            return self.tx.commit().await;
        }
        sqlx::raw_sql("commit and chain").execute(&mut *self.tx).await?;
        self.hand_over();
        Ok(())
    }

    fn hand_over(self) {
        let waiting = Arc::clone(&self.waiting);
        let mut session = self;
        loop {
            let Some(waiter) = lock(&waiting).pop_front() else { return };
            match waiter.send(session) {
                Ok(()) => return,
                Err(refused) => session = refused,
            }
        }
    }
}

impl Places {
    fn take(targets: Vec<Target>, in_progress: &InProgress) -> Result<Self, Error> {
        let mut counts = lock(in_progress);
        if targets.iter().any(|target| counts.get(target).is_some_and(|count| *count >= PER_TARGET)) {
            return Err(Error::Busy);
        }
        for target in &targets {
            *counts.entry(target.clone()).or_default() += 1;
        }
        drop(counts);
        Ok(Self { targets, in_progress: Arc::clone(in_progress) })
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let mut counts = lock(&self.in_progress);
        for target in &self.targets {
            if let Some(count) = counts.get_mut(target) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(target);
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panics while it holds the lock")
}

#[cfg(test)]
mod tests {
    use shared::events::mint_id;

    use super::*;

    #[test]
    fn three_commands_on_one_target_are_in_progress_and_others_are_refused() {
        let in_progress = InProgress::default();
        let [ada, grace] = [(); 2].map(|()| Target::User(mint_id()));
        let key = |number: usize| Target::Key(format!("key {number}"));
        let mut places = vec![];
        for number in 0..PER_TARGET {
            places.push(Places::take(vec![ada.clone(), key(number)], &in_progress).unwrap());
        }
        assert!(matches!(Places::take(vec![key(9), ada.clone()], &in_progress), Err(Error::Busy)));
        assert!(Places::take(vec![grace, key(0)], &in_progress).is_ok());
        drop(places.pop());
        places.push(Places::take(vec![ada], &in_progress).unwrap());
        drop(places);
        assert!(lock(&in_progress).is_empty(), "targets without commands are forgotten");
    }

    const SESSIONS: usize = (POOL_SIZE - SESSIONS_FOR_READS) as usize;

    async fn database() -> PgPool {
        let db = testbed::testing::migrated_database(testbed::services::USER, &crate::MIGRATIONS).await;
        sqlx::raw_sql("create table commands (number int not null)").execute(&db).await.unwrap();
        db
    }

    async fn all_places(turns: &Turns) -> Vec<Turn> {
        let mut taken = vec![];
        for _ in 0..SESSIONS {
            taken.push(turns.take(vec![]).await.unwrap());
        }
        taken
    }

    async fn insert(turn: &mut Turn, number: i32) {
        sqlx::query("insert into commands values ($1)").bind(number).execute(turn.tx()).await.unwrap();
    }

    async fn inserted(db: &PgPool) -> Vec<i32> {
        sqlx::query_scalar("select number from commands order by number").fetch_all(db).await.unwrap()
    }

    async fn process(turn: &mut Turn) -> i32 {
        sqlx::query_scalar("select pg_backend_pid()").fetch_one(turn.tx()).await.unwrap()
    }

    async fn until_waiting(turns: &Turns) {
        while lock(&turns.waiting).is_empty() {
            tokio::task::yield_now().await;
        }
    }

    /// I1: the commands of one session are transactions of their own.
    #[tokio::test]
    async fn a_command_that_commits_hands_its_session_over() {
        let db = database().await;
        let turns = Turns::new(db.clone());
        let mut taken = all_places(&turns).await;
        let mut first = taken.remove(0);
        let session = process(&mut first).await;
        insert(&mut first, 1).await;
        let commit = async {
            until_waiting(&turns).await;
            first.commit().await.unwrap();
            assert_eq!(inserted(&db).await, [1], "committed before the next command has begun");
        };
        let (second, ()) = tokio::join!(turns.take(vec![]), commit);

        let mut second = second.unwrap();
        assert_eq!(process(&mut second).await, session);
        insert(&mut second, 2).await;
        assert_eq!(inserted(&db).await, [1], "the second command has not committed");
        drop(second);
        let mut third = turns.take(vec![]).await.unwrap();
        insert(&mut third, 3).await;
        third.commit().await.unwrap();
        assert_eq!(inserted(&db).await, [1, 3], "the second command was rolled back");
    }

    #[tokio::test]
    async fn a_command_that_gives_up_does_not_keep_a_session() {
        let db = database().await;
        let turns = Turns::new(db.clone());
        let mut taken = all_places(&turns).await;
        for number in 0..3 {
            let mut waiting = Box::pin(turns.take(vec![]));
            tokio::select! {
                biased;
                _ = &mut waiting => panic!("all places are taken"),
                () = until_waiting(&turns) => {}
            }
            let mut turn = taken.remove(0);
            insert(&mut turn, number).await;
            // The one gets the session and drops it, the other has given up before.
            if number == 0 {
                turn.commit().await.unwrap();
                drop(waiting);
            } else {
                drop(waiting);
                turn.commit().await.unwrap();
            }
            taken.push(turns.take(vec![]).await.unwrap());
        }
        assert_eq!(inserted(&db).await, [0, 1, 2]);
    }

    #[tokio::test]
    async fn a_session_returns_to_the_pool_after_many_commands() {
        let db = database().await;
        let turns = Turns::new(db.clone());
        let mut taken = all_places(&turns).await;
        taken[0].session.commands = COMMANDS_PER_SESSION - 1;
        let waiting = turns.take(vec![]);
        let commit = async {
            until_waiting(&turns).await;
            taken.remove(0).commit().await.unwrap();
        };
        let (turn, ()) = tokio::join!(waiting, commit);
        assert_eq!(turn.unwrap().session.commands, 0, "a session of the pool");
    }
}
