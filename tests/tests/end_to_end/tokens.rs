//! Bearer tokens: which are accepted, and what their bearer may access.

use std::collections::BTreeSet;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use testbed::paths;
use tests::certificates::Authority;
use tests::http::{Answer, send, send_with_retries};
use tests::identity::{self, Identities, SigningKey, claims, in_seconds, key_set, publish, token_by_secret, unsigned};
use tests::services::{EMAIL_EVENTS, USER_EVENTS, USER_STATE};
use tests::users::{Users, address};
use tests::web::Web;
use tests::{System, eventually, eventually_eq};
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};
use uuid::Uuid;

/// A user that exists nowhere: a valid token gets 404.
const UNKNOWN_USER: &str = "/users/01a0a3f0-8d7e-7c60-b9f2-2f6d6f0f1a01";

/// The status of the user service's answer to the bearer of this token.
async fn status(users: &Users, token: &str) -> u16 {
    users.bearing(token).get(USER, UNKNOWN_USER).await.unwrap().status.as_u16()
}

/// Tokens that must be refused, each with a part of the reason in the answer.
fn invalid_tokens(identities: &Identities) -> Vec<(&'static str, String)> {
    let key = &identities.key;
    let header = |algorithm: &str| json!({ "typ": "JWT", "alg": algorithm, "kid": key.id });
    let with = |claim: &str, value: Value| {
        let mut claims = claims("ada");
        claims[claim] = value;
        key.token(&claims)
    };
    let without = |claim: &str| {
        let mut claims = claims("ada");
        claims.as_object_mut().unwrap().remove(claim);
        key.token(&claims)
    };
    let valid = identities.token_of("ada");
    let (signed, signature) = valid.rsplit_once('.').unwrap();
    let mut admin = claims("ada");
    admin["roles"] = json!([identity::ADMIN]);
    let forged = unsigned(&header("ES256"), &admin);
    let critical = json!({ "alg": "ES256", "kid": key.id, "crit": ["exp"] });
    vec![
        ("expired", with("exp", json!(in_seconds(-60)))),
        ("not valid yet", with("nbf", json!(in_seconds(60)))),
        ("another issuer", with("iss", json!("https://elsewhere.example.com/"))),
        ("another audience", with("aud", json!("another system"))),
        ("another audience", with("aud", json!([]))),
        ("is missing or has another type", without("exp")),
        ("is missing or has another type", without("iss")),
        ("is missing or has another type", without("aud")),
        ("is missing or has another type", without("sub")),
        ("no subject", with("sub", json!(""))),
        ("is missing or has another type", with("exp", json!("soon"))),
        ("is missing or has another type", with("roles", json!("waybill:admin"))),
        ("signature is wrong", format!("{forged}.{signature}")),
        ("signature is wrong", SigningKey::ecdsa(&key.id).token(&claims("ada"))),
        ("signature is wrong", format!("{signed}.")),
        ("its key is unknown", SigningKey::ecdsa("another key").token(&claims("ada"))),
        ("does not name its key", key.token_with(&json!({ "alg": "ES256" }), &claims("ada"))),
        ("not a JWT with a known algorithm", format!("{}.", unsigned(&header("none"), &claims("ada")))),
        ("algorithm is not that of its key", token_by_secret(&header("HS256"), &claims("ada"), key.public_key())),
        ("algorithm is not that of its key", key.token_with(&header("EdDSA"), &claims("ada"))),
        ("an extension of JWT", key.token_with(&critical, &claims("ada"))),
        ("not a JWT", "ada".to_owned()),
        ("not a JWT", format!("{valid}.{valid}")),
    ]
}

/// T81: tokens that the identity provider did not make for this system, or that it made for another
/// time, are refused with the reason.
#[tokio::test(flavor = "multi_thread")]
async fn only_a_valid_token_of_the_identity_provider_is_accepted() {
    let mut system = System::empty().await;
    let identities = Identities::required_by(&mut system.processes);
    let second = SigningKey::ed25519("second key");
    publish(&identities.file, &[&identities.key, &second]);
    system.processes.start(&[USER]).await;
    let users = &system.users;
    let mut for_two = claims("ada");
    for_two["aud"] = json!(["another system", identity::AUDIENCE]);
    for_two["nbf"] = json!(in_seconds(-1));
    for valid in [identities.token_of("ada"), second.token(&claims("ada")), identities.key.token(&for_two)] {
        assert_eq!(status(users, &valid).await, 404, "{valid}");
    }
    for (reason, token) in invalid_tokens(&identities) {
        let answer = users.bearing(&token).request(Method::GET, USER, UNKNOWN_USER).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{reason}: {token}");
        let challenge = answer.headers()["www-authenticate"].to_str().unwrap().to_owned();
        assert!(challenge.starts_with("Bearer error=\"invalid_token\""), "{challenge}");
        assert!(challenge.contains(reason), "{reason}: {challenge}");
        let problem: Value = answer.json().await.unwrap();
        assert_eq!(problem["type"], "/problems/invalid-token");
        assert!(problem["detail"].as_str().unwrap().contains(reason), "{problem}");
    }
    let valid = identities.token_of("ada");
    let request = || users.request(Method::GET, USER, UNKNOWN_USER);
    for (request, kind) in [
        (request(), "no-token"),
        (request().header("authorization", format!("Basic {valid}")), "no-token"),
        (request().header("authorization", valid.clone()), "no-token"),
        (request().bearer_auth(&valid).bearer_auth(&valid), "invalid-token"),
    ] {
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{kind}");
        assert!(answer.headers()["www-authenticate"].to_str().unwrap().starts_with("Bearer"), "{kind}");
        assert_eq!(answer.json::<Value>().await.unwrap()["type"], format!("/problems/{kind}"));
    }
}

/// The callers of the table: how each is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    /// Any bearer, for itself.
    Anyone,
    /// The owner of the user, and administrators.
    Owner,
    /// Administrators only.
    Admin,
}

/// Every public route of every service, with who may call it. A new one is added here and to the
/// requests of [`request`].
const ROUTES: [(Service, Method, &str, Right); 9] = [
    (USER, Method::POST, "/users", Right::Anyone),
    (USER, Method::GET, "/users/{id}", Right::Owner),
    (USER, Method::PATCH, "/users/{id}", Right::Owner),
    (USER, Method::PUT, "/users/{id}/email", Right::Owner),
    (EMAIL, Method::GET, "/users/{id}/emails", Right::Owner),
    (ANALYTICS, Method::GET, "/registrations", Right::Admin),
    (ANALYTICS, Method::GET, "/funnel", Right::Admin),
    (ANALYTICS, Method::GET, "/audit", Right::Owner),
    (CACHE, Method::GET, "/profiles/{id}", Right::Owner),
];
/// In the table of its own, because it ends the user.
const ERASURE: (Service, Method, &str, Right) = (USER, Method::DELETE, "/users/{id}", Right::Owner);

/// A valid request for a route, about this user.
fn request(users: &Users, (service, method, route, _): &(Service, Method, &str, Right), user: Uuid) -> RequestBuilder {
    match (method.as_str(), *route) {
        ("POST", "/users") => users.registration(&address(), None),
        ("PATCH", "/users/{id}") => users.renaming(user, "Countess"),
        ("PUT", "/users/{id}/email") => users.change_of_email(user, &address()),
        ("GET", "/audit") => users.request(Method::GET, ANALYTICS, &format!("/audit?user_id={user}")),
        ("GET", "/registrations") => users.request(Method::GET, ANALYTICS, "/registrations?bucket=day"),
        _ => users.request(method.clone(), *service, &route.replace("{id}", &user.to_string())),
    }
}

/// T82: every route, called without a token, by a stranger, by the owner of the user, and by an
/// administrator. A route of the code that the table lacks is an error.
#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_only_its_owner_and_administrators() {
    assert_eq!(
        routes_in_code(),
        ROUTES.iter().chain([&ERASURE]).map(named).collect(),
        "routes of the code and of the table"
    );
    let mut system = System::empty().await;
    let identities = Identities::required_by(&mut system.processes);
    system.processes.start_all().await;
    let users = &system.users;
    let owner = users.bearing(&identities.token_of("owner"));
    let stranger = users.bearing(&identities.token_of("stranger"));
    let admin = users.bearing(&identities.admin());
    let user = owner.register().await;
    owner.until_cached(user, 1).await;
    owner.until_mailed(user).await;
    eventually("the audit has the registration", async || {
        let audit = owner.get(ANALYTICS, &format!("/audit?user_id={user}")).await.ok()?;
        audit.body["entries"].get(0).map(drop)
    })
    .await;
    for route in ROUTES.iter().chain([&ERASURE]) {
        let (_, _, _, right) = route;
        let answers = async |caller: &Users| send_with_retries(|| request(caller, route, user)).await;
        let none = answers(users).await;
        assert_eq!(
            (none.status, &none.body["type"]),
            (StatusCode::UNAUTHORIZED, &json!("/problems/no-token")),
            "{route:?}"
        );
        let stranger = answers(&stranger).await;
        let has_right = |answer: &Answer, has: bool| {
            assert_eq!(answer.status.is_success(), has, "{route:?}: {answer:?}");
            assert!(has || answer.body["type"] == "/problems/forbidden", "{route:?}: {answer:?}");
        };
        has_right(&stranger, *right == Right::Anyone);
        if *route != ERASURE {
            has_right(&answers(&owner).await, *right != Right::Admin);
        }
        has_right(&answers(&admin).await, true);
    }
    let second = owner.register().await;
    let erased = owner.erase(second).await.unwrap();
    assert_eq!(erased.status, StatusCode::NO_CONTENT, "the owner may erase, too: {erased:?}");
}

fn named((service, method, route, _): &(Service, Method, &str, Right)) -> String {
    format!("{} {method} {route}", service.name)
}

/// The routes in the sources of the services. Each has its public routes in the file `http.rs`.
fn routes_in_code() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for service in SERVICES {
        let file = paths::root().join(format!("services/{}/src/http.rs", service.name));
        let text = std::fs::read_to_string(file).unwrap();
        let routes = text.split(".route(\"").skip(1);
        for (route, rest) in routes.filter_map(|rest| rest.split_once('"')) {
            let methods = rest.lines().next().unwrap();
            for method in ["get(", "post(", "put(", "patch(", "delete("] {
                if methods.contains(method) {
                    let method = method.trim_end_matches('(').to_uppercase();
                    found.insert(format!("{} {method} {route}", service.name));
                }
            }
        }
    }
    found
}

/// T82: with one `Idempotency-Key` two principals send two requests. Neither gets the answer of the
/// other.
#[tokio::test(flavor = "multi_thread")]
async fn one_idempotency_key_of_two_principals_is_two_keys() {
    let mut system = System::empty().await;
    let identities = Identities::required_by(&mut system.processes);
    system.processes.start(&[USER]).await;
    let register = async |subject: &str, email: &str| {
        let users = system.users.bearing(&identities.token_of(subject));
        send(users.registration(email, Some("one key"))).await.unwrap()
    };
    let [mine, yours] = [address(), address()];
    let first = register("first", &mine).await;
    let second = register("second", &yours).await;
    assert_eq!((first.status, second.status), (StatusCode::CREATED, StatusCode::CREATED), "{first:?} {second:?}");
    assert_ne!(first.id(), second.id());
    assert_eq!(register("first", &mine).await, first, "a repetition");
}

/// T81, I14: the actor of an event is a keyed hash. The subject of the token is in no record,
/// table, cache key, log line or metric, not even if it is a UUID and would fit.
#[tokio::test(flavor = "multi_thread")]
async fn the_subject_of_a_token_is_stored_nowhere() {
    let mut system = System::empty().await;
    let identities = Identities::required_by(&mut system.processes);
    system.processes.start_all().await;
    let judge = system.judge().await;
    let subjects = [Uuid::now_v7().to_string(), format!("ada-{}", Uuid::now_v7().simple())];
    let admin = system.users.bearing(&identities.admin());
    let mut owners = BTreeSet::new();
    for subject in &subjects {
        let owner = system.users.bearing(&identities.token_of(subject));
        let user = owner.register().await;
        owner.rename(user, "Countess").await.unwrap();
        assert_eq!(admin.erase(user).await.unwrap().status, StatusCode::NO_CONTENT);
        admin.until_delivery_ended(user).await;
        eventually_eq("facts", 3, async || system.kafka.read_key(USER_EVENTS, user).len()).await;
        let facts = system.kafka.read_key(USER_EVENTS, user);
        let actors: Vec<&str> = facts.iter().map(|fact| fact.header("ce_actor").unwrap()).collect();
        assert_eq!(actors[0], actors[1], "the owner registers and renames");
        assert_ne!(actors[0], actors[2], "the administrator erases");
        let states = system.kafka.read_key(USER_STATE, user);
        let first: Value = serde_json::from_slice(states[0].value.as_ref().unwrap()).unwrap();
        assert_eq!(first["owner"], actors[0]);
        let id: Uuid = actors[0].parse().unwrap();
        assert_eq!(id.get_version_num(), 8, "a UUID made of a hash");
        assert!(owners.insert(id), "two subjects have one id");
    }
    let uuid = subjects[0].parse::<Uuid>().unwrap();
    let texts = [subjects[0].clone(), uuid.simple().to_string(), subjects[1].clone()];
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    assert_eq!(judge.places_of(&system, &texts).await, Vec::<String>::new());
    let mails = system.kafka.read(EMAIL_EVENTS);
    assert!(mails.iter().all(|record| record.header("ce_actor").is_none()), "no caller gave a command for a mail");
}

/// T83: a new key is accepted, and a removed one refused, without a restart.
#[tokio::test(flavor = "multi_thread")]
async fn keys_are_rotated_in_their_file() {
    let mut system = System::empty().await;
    let identities = Identities::required_by(&mut system.processes);
    system.processes.start_with(USER, &[("AUTH_JWKS_REFRESH_S", "1")]).await;
    let users = &system.users;
    let old = identities.token_of("ada");
    let new_key = SigningKey::ed25519("new key");
    let new = new_key.token(&claims("ada"));
    assert_eq!((status(users, &old).await, status(users, &new).await), (404, 401));
    publish(&identities.file, &[&identities.key, &new_key]);
    eventually_eq("the answer to a token with the new key", 404, async || status(users, &new).await).await;
    assert_eq!(status(users, &old).await, 404);

    publish(&identities.file, &[&new_key]);
    eventually_eq("the answer to a token with the removed key", 401, async || status(users, &old).await).await;

    std::fs::write(&identities.file, "nothing").unwrap();
    let reported = async || {
        let (_, body) = system.processes.admin(USER).status().await?;
        body["waiting_for"]["token keys"].as_str().filter(|text| text.contains("AUTH_JWKS_FILE")).map(drop)
    };
    eventually("/status names the broken file", reported).await;
    assert_eq!(status(users, &new).await, 404, "the known keys stay");
    assert_eq!(system.processes.admin(USER).is_ready().await, Some(true));
    publish(&identities.file, &[&new_key]);
    eventually_eq("whether the service waits", Some(true), async || {
        system.processes.admin(USER).status().await.map(|(ok, _)| ok)
    })
    .await;
}

/// T83: the service starts and waits without the URL. While the URL is down the known keys stay.
/// Callers that name unknown keys cannot make the service read the URL again and again.
#[tokio::test(flavor = "multi_thread")]
async fn keys_come_from_a_url_that_may_be_down() {
    let mut system = System::empty().await;
    let authority = Authority::create();
    let web = Web::start(&authority.certificate("localhost")).await;
    let trusted = system.processes.file("authorities.pem");
    Authority::create().write(trusted.clone());
    identity::require(&mut system.processes);
    system.processes.set("AUTH_JWKS_URL", &web.url());
    system.processes.set("AUTH_CA_FILE", trusted.to_str().unwrap());
    system.processes.spawn(USER);
    eventually("/status names the certificate", async || {
        let (_, body) = system.processes.admin(USER).status().await?;
        let reason = body["waiting_for"]["token keys"].as_str()?;
        (reason.contains("AUTH_JWKS_URL") && reason.contains("certificate")).then_some(())
    })
    .await;
    assert_eq!(web.requests(), 0, "the keys of a server that is not trusted are not read");
    system.processes.kill(USER);
    authority.write(trusted);
    system.processes.spawn(USER);
    let first = SigningKey::ecdsa("first");
    let token = first.token(&claims("ada"));
    let users = &system.users;
    let answer = async || users.bearing(&token).get(USER, UNKNOWN_USER).await.ok().map(|answer| answer.status.as_u16());
    eventually_eq("the answer without keys", Some(503), answer).await;
    assert_eq!(system.processes.admin(USER).is_ready().await, Some(false));
    web.set(Some(key_set(&[&first])));
    eventually_eq("the answer with keys", Some(404), answer).await;

    let second = SigningKey::ecdsa("second");
    web.set(Some(key_set(&[&first, &second])));
    let new = second.token(&claims("ada"));
    eventually_eq("the answer to a token with the new key", 404, async || status(users, &new).await).await;

    web.set(None);
    let before = web.requests();
    for number in 0..200 {
        let unknown = SigningKey::ecdsa(&format!("unknown {number}")).token(&claims("ada"));
        assert_eq!(status(users, &unknown).await, 401);
    }
    let requests = web.requests() - before;
    assert!(requests <= 20, "200 tokens with unknown keys caused {requests} reads of the URL");
    assert_eq!(answer().await, Some(404), "the known keys stay");
}

/// T81: a service that cannot check tokens as its operator wants does not start. One that checks
/// none says so.
#[tokio::test(flavor = "multi_thread")]
async fn an_incomplete_check_of_tokens_is_refused_at_start() {
    let mut system = System::empty().await;
    let file = system.processes.file("jwks.json");
    let path = file.to_str().unwrap().to_owned();
    let secret = ("AUTH_PRINCIPAL_SECRET", "a secret of the tests that stands for callers");
    let complete = [("AUTH_JWKS_FILE", path.as_str()), ("AUTH_ISSUER", "a"), ("AUTH_AUDIENCE", "b"), secret];
    let refused = async |settings: &[(&str, &str)]| {
        let error = system.processes.run_with(USER, &[], settings).await;
        error.expect_err("the service must not start").to_string()
    };
    for (name, _) in complete {
        std::fs::write(&file, key_set(&[&SigningKey::ecdsa("key")])).unwrap();
        let settings: Vec<_> = complete.into_iter().filter(|(other, _)| *other != name).collect();
        let error = refused(&settings).await;
        assert!(error.contains(name), "{name}: {error}");
    }
    for document in ["", "{}", r#"{"keys":[]}"#, r#"{"keys":[{"kty":"oct","kid":"secret","k":"c2VjcmV0"}]}"#] {
        std::fs::write(&file, document).unwrap();
        let error = refused(&complete).await;
        assert!(error.contains("AUTH_JWKS_FILE") && error.contains(&path), "{document}: {error}");
    }
    std::fs::remove_file(&file).unwrap();
    let error = refused(&complete).await;
    assert!(error.contains("AUTH_JWKS_FILE") && error.contains(&path), "{error}");
    let unencrypted = [("AUTH_JWKS_URL", "http://example.com/keys"), complete[1], complete[2], secret];
    let error = refused(&unencrypted).await;
    assert!(error.contains("AUTH_JWKS_URL") && error.contains("https://"), "{error}");
    let short = ("AUTH_PRINCIPAL_SECRET", "hunter2");
    let error = refused(&[("AUTH_JWKS_URL", "https://example.com/keys"), complete[1], complete[2], short]).await;
    assert!(error.contains("AUTH_PRINCIPAL_SECRET has 7 characters") && !error.contains("hunter2"), "{error}");
    system.processes.start(&[USER]).await;
    system.processes.until_logged(USER, "requests need no token").await;
}
