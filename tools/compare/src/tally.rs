//! What the requests of a scenario have left: users, mails, counts and profiles.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use reqwest::Client;
use tokio::time::sleep;
use uuid::Uuid;

use crate::load::Registration;
use crate::subject::Subject;

const POLL: Duration = Duration::from_millis(100);
/// Users whose profile is read, at most: evenly chosen among all.
const PROFILES: usize = 5_000;
/// Profiles that are read at the same time.
const READERS: usize = 8;

/// The users that a scenario registered, whether their clients know it or not, and their effects.
#[derive(Debug, Default)]
pub struct Tally {
    /// Users without the effect, by their id.
    pub without_mail: BTreeSet<Uuid>,
    pub without_count: BTreeSet<Uuid>,
    pub without_profile: BTreeSet<Uuid>,
    /// Copies of mails beyond the first.
    pub doubled_mails: usize,
    /// The id of each user, by address.
    pub users: BTreeMap<String, Uuid>,
    /// When the mail server got each user's first mail, and when the user was counted, in
    /// milliseconds since 1970.
    pub mailed_at: BTreeMap<Uuid, u64>,
    pub counted_at: BTreeMap<Uuid, u64>,
}

impl Tally {
    /// The users that lack an effect.
    pub fn incomplete(&self) -> BTreeSet<Uuid> {
        let lacking = [&self.without_mail, &self.without_count, &self.without_profile];
        lacking.into_iter().flatten().copied().collect()
    }

    fn missing(&self) -> usize {
        self.without_mail.len() + self.without_count.len() + self.without_profile.len()
    }
}

/// Counts until every effect exists, or until none was added for the time `quiet`. Returns the last
/// tally, and the time until every effect existed.
pub async fn settle(subject: &Subject, requests: &[Registration], quiet: Duration) -> (Tally, Option<Duration>) {
    let begin = Instant::now();
    let mut changed = begin;
    let mut fewest = usize::MAX;
    let mut readable = BTreeSet::new();
    loop {
        let tally = tally(subject, requests, &mut readable).await;
        let missing = tally.missing();
        if missing == 0 {
            return (tally, Some(begin.elapsed()));
        }
        if missing < fewest {
            fewest = missing;
            changed = Instant::now();
        }
        if changed.elapsed() > quiet {
            return (tally, None);
        }
        sleep(POLL).await;
    }
}

/// Waits until as many users are counted and mailed as there are, or until nothing changed for the
/// time `quiet`.
pub async fn until_all_have_effects(subject: &Subject, quiet: Duration) {
    let users = subject.users().await;
    let counts = subject.counts().await;
    let mut changed = Instant::now();
    let mut last = None;
    loop {
        let users = tests::stores::count(&users, "select count(*) from users").await;
        let counted = tests::stores::count(&counts, "select count(*) from counted_at").await;
        let mailed = subject.mail().count() as i64;
        if users == counted && users <= mailed {
            return;
        }
        if last.replace((users, counted, mailed)) != Some((users, counted, mailed)) {
            changed = Instant::now();
        }
        if changed.elapsed() > quiet {
            return;
        }
        sleep(POLL).await;
    }
}

/// `readable` are the users whose profile was found before. They are not read again.
async fn tally(subject: &Subject, requests: &[Registration], readable: &mut BTreeSet<Uuid>) -> Tally {
    let emails: Vec<&str> = requests.iter().map(|request| request.email.as_str()).collect();
    let users = sqlx::query_as("select email, id from users where email = any($1)").bind(&emails);
    let users: Vec<(String, Uuid)> = users.fetch_all(&subject.users().await).await.unwrap();
    let users: BTreeMap<String, Uuid> = users.into_iter().collect();
    let ids: Vec<Uuid> = users.values().copied().collect();
    let counted =
        "select user_id, floor(extract(epoch from at) * 1000)::bigint from counted_at where user_id = any($1)";
    let counted: Vec<(Uuid, i64)> =
        sqlx::query_as(counted).bind(&ids).fetch_all(&subject.counts().await).await.unwrap();
    let counted_at: BTreeMap<Uuid, u64> = counted.into_iter().map(|(user, at)| (user, at as u64)).collect();
    let (mailed_at, copies) = mails(subject, &users);
    let without = |having: &BTreeMap<Uuid, u64>| ids.iter().copied().filter(|id| !having.contains_key(id)).collect();
    let mut tally = Tally {
        without_mail: without(&mailed_at),
        without_count: without(&counted_at),
        without_profile: BTreeSet::new(),
        doubled_mails: copies - mailed_at.len(),
        users,
        mailed_at,
        counted_at,
    };
    let one_in = ids.len().div_ceil(PROFILES).max(1);
    let unknown: Vec<Uuid> = ids.into_iter().step_by(one_in).filter(|id| !readable.contains(id)).collect();
    tally.without_profile = without_profile(subject, &unknown).await;
    readable.extend(unknown.into_iter().filter(|id| !tally.without_profile.contains(id)));
    tally
}

/// When each user's first mail arrived, and the number of all their mails.
fn mails(subject: &Subject, users: &BTreeMap<String, Uuid>) -> (BTreeMap<Uuid, u64>, usize) {
    let mut first: HashMap<Uuid, u64> = HashMap::new();
    let mut copies = 0;
    for (to, at) in subject.mail().arrivals() {
        if let Some(user) = users.get(&to) {
            copies += 1;
            let earliest = first.entry(*user).or_insert(at);
            *earliest = at.min(*earliest);
        }
    }
    (first.into_iter().collect(), copies)
}

/// The users whose profile a reader does not get.
async fn without_profile(subject: &Subject, ids: &[Uuid]) -> BTreeSet<Uuid> {
    let client = Client::builder().no_proxy().build().expect("the settings are valid");
    let profiles = subject.target().profiles;
    let read = stream::iter(ids).map(async |id| {
        let found = client.get(format!("{profiles}/{id}")).send().await;
        (!found.is_ok_and(|answer| answer.status().is_success())).then_some(*id)
    });
    read.buffer_unordered(READERS).filter_map(async |missing| missing).collect().await
}
