//! What the user service answers to requests that are wrong: a problem (RFC 9457) that names the field and the remedy.

use reqwest::{Client, Method, RequestBuilder};
use tests::users::address;
use tests::{System, eventually};
use topology::USER;
use uuid::Uuid;

/// Larger than the service reads.
const TOO_LARGE: usize = 17 * 1024;

/// The bad requests, by what is bad about each.
struct Requests {
    client: Client,
    base: String,
    /// A registered user.
    id: Uuid,
    /// Their address.
    taken: String,
    /// Another user's address.
    others: String,
}

impl Requests {
    fn to(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.base))
    }

    fn post(&self, body: impl Into<reqwest::Body>) -> RequestBuilder {
        self.to(Method::POST, "/users").header("content-type", "application/json").body(body)
    }

    fn register(&self, email: &str, display_name: &str) -> RequestBuilder {
        self.post(format!(r#"{{"email":"{email}","display_name":"{display_name}"}}"#))
    }

    fn patch(&self, path: &str) -> RequestBuilder {
        let body = r#"{"display_name":"Countess"}"#;
        self.to(Method::PATCH, path).header("content-type", "application/json").body(body)
    }

    fn put_email(&self, email: &str) -> RequestBuilder {
        let body = format!(r#"{{"email":"{email}"}}"#);
        self.to(Method::PUT, &format!("/users/{}/email", self.id)).header("content-type", "application/json").body(body)
    }

    fn bodies(&self) -> Vec<(&'static str, RequestBuilder)> {
        let plain = self.to(Method::POST, "/users").header("content-type", "text/plain").body("{}");
        vec![
            ("malformed JSON", self.post(r#"{"email":"ada@example.com","#)),
            ("no body", self.post("")),
            ("wrong content type", plain),
            ("missing field", self.post(r#"{"email":"ada@example.com"}"#)),
            ("unknown field", self.post(r#"{"email":"ada@example.com","display_name":"Ada","admin":true}"#)),
            ("wrong type", self.post(r#"{"email":7,"display_name":"Ada"}"#)),
            ("body too large", self.register("ada@example.com", &"a".repeat(TOO_LARGE))),
        ]
    }

    fn values(&self) -> Vec<(&'static str, RequestBuilder)> {
        let long_address = format!("ada@{}.com", "example.".repeat(32));
        vec![
            ("name too long", self.register("ada@example.com", &"a".repeat(101))),
            ("empty name", self.register("ada@example.com", "  ")),
            ("control character in the name", self.register("ada@example.com", r"Ada\nBcc: eve@example.com")),
            ("address too long", self.register(&long_address, "Ada")),
            ("not an address", self.register("ada.example.com", "Ada")),
            ("address with two lines", self.register(r"ada@example.com\r\nBcc: eve@example.com", "Ada")),
            ("address that is not ASCII", self.register("ädä@example.com", "Ada")),
            ("address taken", self.register(&self.taken, "Ada")),
            ("key too long", self.register("eve@example.com", "Eve").header("idempotency-key", "k".repeat(256))),
            ("key reused", self.register("eve@example.com", "Eve").header("idempotency-key", "used")),
        ]
    }

    fn places(&self) -> Vec<(&'static str, RequestBuilder)> {
        let known = format!("/users/{}", self.id);
        let unknown = format!("/users/{}", Uuid::now_v7());
        vec![
            ("unknown id", self.to(Method::GET, &unknown)),
            ("change of an unknown id", self.patch(&unknown)),
            ("erasure of an unknown id", self.to(Method::DELETE, &unknown)),
            ("id that is not a UUID", self.to(Method::GET, "/users/ada")),
            ("stale version", self.patch(&known).header("if-match", "\"7\"")),
            ("move from a stale version", self.put_email("eve@example.com").header("if-match", "\"7\"")),
            ("erasure of a stale version", self.to(Method::DELETE, &known).header("if-match", "\"7\"")),
            ("move to a taken address", self.put_email(&self.others)),
            ("bad If-Match", self.patch(&known).header("if-match", "1")),
            ("method not allowed", self.to(Method::PUT, &known)),
            ("unknown path", self.to(Method::GET, "/accounts")),
        ]
    }
}

/// Status, content type and body as a client sees them.
async fn shown(what: &str, request: RequestBuilder) -> String {
    let response = request.send().await.unwrap();
    let status = response.status();
    let content_type = response.headers().get("content-type").map(|value| value.to_str().unwrap().to_owned());
    let body = response.text().await.unwrap();
    assert!(status.is_client_error(), "{what}: {status} {body}");
    assert_eq!(content_type.as_deref(), Some("application/problem+json"), "{what}: {status} {body}");
    let problem: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(problem["status"], status.as_u16(), "{what}");
    assert!(problem["detail"].is_string(), "{what}: no detail: {body}");
    format!("{what}\n{status} · {}\n{problem:#}\n", content_type.unwrap_or_default())
}

/// Every bad input is told apart, by a problem whose detail says what to do. None of them shows what another user typed.
#[tokio::test(flavor = "multi_thread")]
async fn every_bad_request_is_answered_with_a_problem_that_names_field_and_remedy() {
    let system = System::start_only(&[USER]).await;
    let taken = address();
    let registered = eventually("somebody is registered", async || {
        system.users.post(&taken, Some("used")).await.ok().filter(|answer| answer.status == 201)
    });
    let id = registered.await.id();
    let others = address();
    system.users.register_as(&others).await;
    let requests = Requests { client: Client::new(), base: system.users.url(USER, ""), id, taken, others };
    let mut answers = vec![];
    for (what, request) in requests.bodies().into_iter().chain(requests.values()).chain(requests.places()) {
        answers.push(shown(what, request).await);
    }
    let answers = answers.join("\n").replace(&id.to_string(), "<id>");
    let addresses = [&requests.taken, &requests.others];
    assert!(!addresses.iter().any(|address| answers.contains(*address)), "an address is nobody else's business");
    insta::assert_snapshot!("problems", answers);
}
