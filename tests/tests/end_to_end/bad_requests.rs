//! The user service answers a bad request with a problem (RFC 9457) that names the field and the
//! remedy.

use reqwest::{Client, Method, RequestBuilder};
use tests::users::address;
use tests::{System, eventually};
use topology::USER;
use uuid::Uuid;

/// Bytes. More than the service reads of a body.
const TOO_LARGE: usize = 17 * 1024;

/// Builds the bad requests, each with a description of its fault.
struct Requests {
    client: Client,
    base_url: String,
    /// A registered user.
    user: Uuid,
    /// The address of `user`.
    own_address: String,
    /// The address of another registered user.
    other_address: String,
}

impl Requests {
    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.base_url))
    }

    fn post(&self, body: impl Into<reqwest::Body>) -> RequestBuilder {
        self.request(Method::POST, "/users").header("content-type", "application/json").body(body)
    }

    fn register(&self, email: &str, display_name: &str) -> RequestBuilder {
        self.post(format!(r#"{{"email":"{email}","display_name":"{display_name}"}}"#))
    }

    fn rename(&self, path: &str) -> RequestBuilder {
        let body = r#"{"display_name":"Countess"}"#;
        self.request(Method::PATCH, path).header("content-type", "application/json").body(body)
    }

    fn change_email(&self, email: &str) -> RequestBuilder {
        let path = format!("/users/{}/email", self.user);
        let body = format!(r#"{{"email":"{email}"}}"#);
        self.request(Method::PUT, &path).header("content-type", "application/json").body(body)
    }

    fn bad_bodies(&self) -> Vec<(&'static str, RequestBuilder)> {
        let plain_text = self.request(Method::POST, "/users").header("content-type", "text/plain").body("{}");
        vec![
            ("malformed JSON", self.post(r#"{"email":"ada@example.com","#)),
            ("no body", self.post("")),
            ("wrong content type", plain_text),
            ("missing field", self.post(r#"{"email":"ada@example.com"}"#)),
            ("unknown field", self.post(r#"{"email":"ada@example.com","display_name":"Ada","admin":true}"#)),
            ("wrong type", self.post(r#"{"email":7,"display_name":"Ada"}"#)),
            ("body too large", self.register("ada@example.com", &"a".repeat(TOO_LARGE))),
        ]
    }

    fn bad_values(&self) -> Vec<(&'static str, RequestBuilder)> {
        let long_address = format!("ada@{}.com", "example.".repeat(32));
        vec![
            ("name too long", self.register("ada@example.com", &"a".repeat(101))),
            ("empty name", self.register("ada@example.com", "  ")),
            ("control character in the name", self.register("ada@example.com", r"Ada\nBcc: eve@example.com")),
            ("address too long", self.register(&long_address, "Ada")),
            ("not an address", self.register("ada.example.com", "Ada")),
            ("address without a domain name", self.register("ada@ex!ample.com", "Ada")),
            ("address with two lines", self.register(r"ada@example.com\r\nBcc: eve@example.com", "Ada")),
            ("address that is not ASCII", self.register("ädä@example.com", "Ada")),
            ("address taken", self.register(&self.own_address, "Ada")),
            ("key too long", self.register("eve@example.com", "Eve").header("idempotency-key", "k".repeat(256))),
            (
                "two keys",
                self.register("eve@example.com", "Eve").header("idempotency-key", "a").header("idempotency-key", "b"),
            ),
            ("key reused", self.register("eve@example.com", "Eve").header("idempotency-key", "used")),
        ]
    }

    fn bad_paths_and_preconditions(&self) -> Vec<(&'static str, RequestBuilder)> {
        let known = format!("/users/{}", self.user);
        let unknown = format!("/users/{}", Uuid::now_v7());
        let stale = |request: RequestBuilder| request.header("if-match", "\"7\"");
        vec![
            ("unknown id", self.request(Method::GET, &unknown)),
            ("rename of an unknown id", self.rename(&unknown)),
            ("erasure of an unknown id", self.request(Method::DELETE, &unknown)),
            ("id that is not a UUID", self.request(Method::GET, "/users/ada")),
            ("rename of a stale version", stale(self.rename(&known))),
            ("change of address of a stale version", stale(self.change_email("eve@example.com"))),
            ("erasure of a stale version", stale(self.request(Method::DELETE, &known))),
            ("change to a taken address", self.change_email(&self.other_address)),
            ("malformed If-Match", self.rename(&known).header("if-match", "1")),
            ("rename of a version that the caller excludes", self.rename(&known).header("if-none-match", "*")),
            ("registration with If-Match", self.register("eve@example.com", "Eve").header("if-match", "*")),
            ("read of a stale version", stale(self.request(Method::GET, &known))),
            ("method not allowed", self.request(Method::PUT, &known)),
            ("unknown path", self.request(Method::GET, "/accounts")),
        ]
    }
}

/// Sends a request, and returns its description with the status, content type and body of the
/// answer.
///
/// # Panics
/// The answer is not a problem with a detail and a status of 400 to 499.
async fn answer_of(description: &str, request: RequestBuilder) -> String {
    let response = request.send().await.unwrap();
    let status = response.status();
    let content_type = response.headers().get("content-type").map(|value| value.to_str().unwrap().to_owned());
    let body = response.text().await.unwrap();
    assert!(status.is_client_error(), "{description}: {status} {body}");
    assert_eq!(content_type.as_deref(), Some("application/problem+json"), "{description}: {status} {body}");
    let problem: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(problem["status"], status.as_u16(), "{description}");
    assert!(problem["detail"].is_string(), "{description}: no detail in {body}");
    format!("{description}\n{status} · {}\n{problem:#}\n", content_type.unwrap_or_default())
}

/// The detail of each problem says what to do. No answer contains the address of a registered user.
#[tokio::test(flavor = "multi_thread")]
async fn every_bad_request_gets_a_problem_that_names_the_field_and_the_remedy() {
    let system = System::start_only(&[USER]).await;
    let own_address = address();
    let registered = eventually("the user is registered", async || {
        system.users.post(&own_address, Some("used")).await.ok().filter(|answer| answer.status == 201)
    });
    let user = registered.await.id();
    let other_address = address();
    system.users.register_as(&other_address).await;
    let base_url = system.users.url(USER, "");
    let requests = Requests { client: Client::new(), base_url, user, own_address, other_address };
    let mut bad_requests = requests.bad_bodies();
    bad_requests.extend(requests.bad_values());
    bad_requests.extend(requests.bad_paths_and_preconditions());
    let mut answers = vec![];
    for (description, request) in bad_requests {
        answers.push(answer_of(description, request).await);
    }
    let answers = answers.join("\n").replace(&user.to_string(), "<id>");
    for address in [&requests.own_address, &requests.other_address] {
        assert!(!answers.contains(address), "an answer contains the address of a registered user");
    }
    insta::assert_snapshot!("problems", answers);
}
