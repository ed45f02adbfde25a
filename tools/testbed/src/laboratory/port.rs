//! The control port: HTTP on loopback, with a token that is made at the start.
//!
//! - `GET /state`: what runs, and what the mail server does.
//! - `GET /mails`: how many mails each recipient has got, and how many of them without an answer.
//! - `POST /orders`: a [`Wanted`], for example `{"act": "kill", "target": "email"}`.
//!
//! Only the console knows the token. A browser never needs the port, so the port refuses every
//! request of a browser, even one with the right token.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Request as HttpRequest, State as FromState};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use uuid::Uuid;

use super::orders::{Order, Wanted, Wish, name_of};
use super::records::{FACTS, Records};
use super::{Orders, Request, State, WAITING_ORDERS};
use crate::smtp_sink::{Outcome, SmtpSink};

/// Bytes of a request's body.
const BODY_LIMIT: usize = 4 * 1024;
/// How many of the newest mails `GET /mails` counts.
const MAILS: usize = 10_000;
/// Headers that browsers send and programs do not.
const OF_BROWSERS: [&str; 2] = ["origin", "sec-fetch-site"];

/// What the port needs besides the system.
#[derive(Clone)]
pub struct Parts {
    pub sink: Arc<SmtpSink>,
    pub records: Arc<Records>,
}

/// The open port. It is closed when this is dropped.
pub struct Control {
    address: SocketAddr,
    token: Arc<str>,
    _server: JoinSet<()>,
}

impl Control {
    /// Opens the port on a free port of loopback, with a new token.
    ///
    /// # Errors
    /// No port can be opened.
    pub async fn open(parts: Parts) -> Result<(Self, Orders)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot open the control port")?;
        let address = listener.local_addr()?;
        // 122 random bits from the system.
        let token: Arc<str> = Uuid::new_v4().simple().to_string().into();
        let (sender, requests) = mpsc::channel(WAITING_ORDERS);
        let (states, known) = watch::channel(State::default());
        let port = Port { parts, requests: sender, states: known };
        let router = router(port, token.clone());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.expect("axum::serve never returns") });
        Ok((Self { address, token, _server: server }, Orders { requests, states }))
    }

    /// The settings with which the console finds the port.
    pub fn environment(&self) -> [(String, String); 2] {
        [
            ("CONTROL_ADDR".to_owned(), self.address.to_string()),
            ("CONTROL_TOKEN".to_owned(), self.token.as_ref().to_owned()),
        ]
    }
}

#[derive(Clone)]
struct Port {
    parts: Parts,
    requests: mpsc::Sender<Request>,
    states: watch::Receiver<State>,
}

fn router(port: Port, token: Arc<str>) -> Router {
    Router::new()
        .route("/state", get(state))
        .route("/mails", get(mails))
        .route("/orders", post(orders))
        .with_state(port)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(from_fn_with_state(token, guard))
}

/// Lets only the console pass.
async fn guard(FromState(token): FromState<Arc<str>>, request: HttpRequest, next: Next) -> Response {
    let headers = request.headers();
    if OF_BROWSERS.iter().any(|name| headers.contains_key(*name)) {
        return refusal(StatusCode::FORBIDDEN, "the control port is not for browsers");
    }
    if !bears(headers, &token) {
        return refusal(StatusCode::UNAUTHORIZED, "authorization: send CONTROL_TOKEN of this run as a bearer token");
    }
    next.run(request).await
}

fn bears(headers: &HeaderMap, token: &str) -> bool {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    bool::from(given.as_bytes().ct_eq(token.as_bytes()))
}

async fn state(FromState(port): FromState<Port>) -> Response {
    let state = port.states.borrow().clone();
    let mail = name_of(&port.parts.sink.behaviour());
    Json(json!({ "processes": state.processes, "components": state.components, "mail": mail })).into_response()
}

#[derive(Default, serde::Serialize)]
struct Received {
    mails: u32,
    /// Mails after which the connection was reset, so that the client got no answer.
    unanswered: u32,
}

async fn mails(FromState(port): FromState<Port>) -> Json<BTreeMap<String, Received>> {
    let mut received: BTreeMap<String, Received> = BTreeMap::new();
    for (recipient, outcome) in port.parts.sink.recipients(MAILS) {
        let entry = received.entry(recipient).or_default();
        entry.mails += 1;
        entry.unanswered += u32::from(outcome == Outcome::Dropped);
    }
    Json(received)
}

async fn orders(FromState(port): FromState<Port>, body: Bytes) -> Response {
    let wanted = serde_json::from_slice::<Wanted>(&body).map_err(|error| anyhow!("body: {error}"));
    let wish = match wanted.and_then(|wanted| wanted.checked()) {
        Ok(wish) => wish,
        Err(error) => return refusal(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    match port.fulfil(wish).await {
        Ok(done) => Json(json!({ "done": done })).into_response(),
        Err(error) => refusal(StatusCode::CONFLICT, &format!("{error:#}")),
    }
}

fn refusal(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
}

impl Port {
    async fn fulfil(&self, wish: Wish) -> Result<String> {
        match wish {
            Wish::Order(order) => self.order(order).await,
            Wish::Mail(behaviour) => {
                let name = name_of(&behaviour);
                self.parts.sink.set(behaviour);
                Ok(format!("the mail server is {name}"))
            }
            Wish::Malformed => {
                let key = self.parts.records.malformed().await?;
                Ok(format!("a malformed record with the key {key} was written to {FACTS}"))
            }
            Wish::Again { topic, partition, offset } => {
                self.parts.records.again(topic, partition, offset).await?;
                Ok(format!("the record {topic}/{partition}/{offset} was written again"))
            }
        }
    }

    async fn order(&self, order: Order) -> Result<String> {
        let (answer, done) = oneshot::channel();
        let sent = self.requests.try_send(Request { order, answer });
        sent.map_err(|_| anyhow!("too many orders wait; try again"))?;
        done.await.context("the system is stopping")?
    }
}

#[cfg(test)]
mod tests {
    use reqwest::{Client, RequestBuilder};
    use serde_json::Value;

    use super::*;
    use crate::fetch::Fetched;
    use crate::laboratory::orders::{Act, Target};
    use crate::process::Logs;

    /// A port without a system.
    async fn open(name: &str) -> (Control, Orders, Arc<SmtpSink>) {
        let logs = Logs::to_files(&format!("testbed-tests/{name}")).unwrap();
        let nothing = std::path::PathBuf::from("/nothing");
        let fetched =
            Fetched { java: nothing.clone(), jars: String::new(), postgres: nothing.clone(), redis_server: nothing };
        let sink = Arc::new(SmtpSink::start(([127, 0, 0, 1], 0).into()).await.unwrap());
        let records = Arc::new(Records::new(&fetched, "127.0.0.1:1".to_owned(), &logs).unwrap());
        let (control, orders) = Control::open(Parts { sink: sink.clone(), records }).await.unwrap();
        (control, orders, sink)
    }

    impl Control {
        fn request(&self, method: &str, path: &str) -> RequestBuilder {
            let request = Client::new().request(method.parse().unwrap(), format!("http://{}{path}", self.address));
            // An order that no system answers waits.
            request.timeout(std::time::Duration::from_secs(5))
        }
    }

    async fn answer(request: RequestBuilder) -> (u16, Value) {
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap_or_default())
    }

    #[tokio::test]
    async fn only_a_program_with_the_token_is_served() {
        let (control, mut orders, _sink) = open("control-token").await;
        let token = control.token.to_string();
        let kill = || control.request("POST", "/orders").body(r#"{"act":"kill","target":"email"}"#);
        let wrong = format!("{}x", &token[1..]);
        for (request, status) in [
            (kill(), 401),
            (kill().bearer_auth(&wrong), 401),
            (kill().bearer_auth(""), 401),
            (kill().header("authorization", &token), 401),
            (kill().bearer_auth(&token).header("origin", "http://evil.example"), 403),
            (kill().bearer_auth(&token).header("origin", "null"), 403),
            (kill().bearer_auth(&token).header("sec-fetch-site", "none"), 403),
            (control.request("GET", "/state"), 401),
            (control.request("GET", "/mails"), 401),
        ] {
            assert_eq!(answer(request).await.0, status);
        }
        assert!(orders.requests.try_recv().is_err(), "a refused request became an order");
        assert_eq!(answer(control.request("GET", "/state").bearer_auth(&token)).await.0, 200);
        assert!(control.address.ip().is_loopback());
    }

    #[tokio::test]
    async fn an_order_reaches_the_system_and_is_answered() {
        let (control, mut orders, _sink) = open("control-order").await;
        let kill = control.request("POST", "/orders").bearer_auth(&control.token);
        let system = async {
            let Request { order, answer } = orders.requests.recv().await.unwrap();
            assert_eq!((order.act, matches!(order.target, Target::Service(_))), (Act::Kill, true));
            answer.send(Err(anyhow!("target: it does not run"))).unwrap();
        };
        let (answer, ()) = tokio::join!(answer(kill.body(r#"{"act":"kill","target":"email"}"#)), system);
        assert_eq!(answer, (409, json!({ "error": "target: it does not run" })));
    }

    #[tokio::test]
    async fn a_wrong_body_is_refused_with_the_field() {
        let (control, _orders, sink) = open("control-body").await;
        let post = |body: String| control.request("POST", "/orders").bearer_auth(&control.token).body(body);
        for (body, words) in [
            ("", "body:"),
            ("[1]", "body:"),
            (r#"{"act":"kill","victim":"email"}"#, "`victim`"),
            (r#"{"act":"again","topic":"user.state.v1","partition":"first"}"#, "body:"),
            (r#"{"act":"mail","target":"friendly"}"#, "target:"),
        ] {
            let (status, answer) = answer(post(body.to_owned())).await;
            assert!(status == 400 && answer["error"].as_str().unwrap().contains(words), "{body}: {status} {answer}");
        }
        assert_eq!(answer(post(" ".repeat(BODY_LIMIT + 1))).await.0, 413);
        assert_eq!(answer(post(r#"{"act":"mail","target":"refusing"}"#.to_owned())).await.0, 200);
        assert_eq!(name_of(&sink.behaviour()), "refusing");
        let state = answer(control.request("GET", "/state").bearer_auth(&control.token)).await.1;
        assert_eq!(state["mail"], "refusing");
    }
}
