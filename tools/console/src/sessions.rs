//! Who is logged in. An operator types a token once. The browser gets the id of a session, and
//! never the token back. The sessions are in memory: after a restart every operator logs in again.
//!
//! A session does not decide what is allowed. The service that acts checks the token again, so a
//! token that was removed there is refused at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderValue, header};
use secrecy::SecretString;
use uuid::Uuid;

/// How long a login is valid: a working day.
const LIFETIME: Duration = Duration::from_secs(8 * 3600);
/// Sessions at the same time. One more ends the oldest.
const SESSIONS: usize = 100;
/// Browsers send a cookie to every port of a host, so the name says whose it is.
const COOKIE: &str = "waybill-console";

#[derive(Clone, Default)]
pub struct Sessions(Arc<Mutex<BTreeMap<Uuid, Session>>>);

/// One login.
#[derive(Clone)]
pub struct Session {
    /// The name of the token.
    pub operator: String,
    pub token: SecretString,
    begun: Instant,
}

impl Sessions {
    /// Begins a session. Returns the header that gives it to the browser: no script can read it,
    /// and the browser sends it with no request of another website.
    pub fn begin(&self, operator: String, token: SecretString) -> HeaderValue {
        let id = Uuid::new_v4();
        let mut sessions = self.lock();
        sessions.retain(|_, session| session.begun.elapsed() < LIFETIME);
        if sessions.len() >= SESSIONS {
            let oldest = sessions.iter().min_by_key(|(_, session)| session.begun).map(|(id, _)| *id);
            oldest.and_then(|oldest| sessions.remove(&oldest));
        }
        sessions.insert(id, Session { operator, token, begun: Instant::now() });
        cookie(&id.to_string(), LIFETIME)
    }

    /// The session of a request.
    pub fn of(&self, headers: &HeaderMap) -> Option<Session> {
        let session = self.lock().get(&id(headers)?).cloned()?;
        (session.begun.elapsed() < LIFETIME).then_some(session)
    }

    /// Ends the session of a request. Returns the header that makes the browser forget it.
    pub fn end(&self, headers: &HeaderMap) -> HeaderValue {
        if let Some(id) = id(headers) {
            self.lock().remove(&id);
        }
        cookie("", Duration::ZERO)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uuid, Session>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cookie(value: &str, age: Duration) -> HeaderValue {
    let text = format!("{COOKIE}={value}; Path=/; Max-Age={}; HttpOnly; SameSite=Strict", age.as_secs());
    HeaderValue::from_str(&text).expect("a name, an id and a number are a valid header")
}

fn id(headers: &HeaderMap) -> Option<Uuid> {
    let lines = headers.get_all(header::COOKIE).into_iter().filter_map(|line| line.to_str().ok());
    let mut cookies = lines.flat_map(|line| line.split(';')).filter_map(|cookie| cookie.trim().split_once('='));
    cookies.find(|(name, _)| *name == COOKIE).and_then(|(_, id)| Uuid::try_parse(id).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(cookie: &HeaderValue) -> HeaderMap {
        let pair = cookie.to_str().unwrap().split(';').next().unwrap();
        HeaderMap::from_iter([(header::COOKIE, HeaderValue::from_str(&format!("other=1; {pair}")).unwrap())])
    }

    #[test]
    fn a_session_is_found_by_its_cookie_until_it_ends() {
        let sessions = Sessions::default();
        let begin = |name: &str| sessions.begin(name.to_owned(), SecretString::from("token"));
        let (first, second) = (with(&begin("first")), with(&begin("second")));
        let operator = |headers: &HeaderMap| sessions.of(headers).map(|session| session.operator);
        assert_eq!(operator(&first).as_deref(), Some("first"));
        assert_eq!(operator(&second).as_deref(), Some("second"));
        assert_eq!(operator(&HeaderMap::new()), None);
        assert_eq!(operator(&with(&cookie(&Uuid::new_v4().to_string(), LIFETIME))), None);
        sessions.end(&first);
        assert_eq!(operator(&first), None);
        assert_eq!(operator(&second).as_deref(), Some("second"));
    }

    #[test]
    fn the_number_of_sessions_is_bounded() {
        let sessions = Sessions::default();
        for number in 0..=SESSIONS {
            sessions.begin(number.to_string(), SecretString::from("token"));
        }
        let sessions = sessions.lock();
        assert_eq!(sessions.len(), SESSIONS);
        assert!(sessions.values().all(|session| session.operator != "0"));
    }
}
