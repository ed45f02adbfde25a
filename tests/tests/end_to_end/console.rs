//! The console as a browser without JavaScript sees it.

use reqwest::{Method, StatusCode};
use tests::System;
use tests::record::Draft;
use tests::services::{ANALYTICS_USERS, DEFAULT_CONSUMERS, EMAIL_WELCOME, USER_EVENTS, USER_STATE};
use tests::users::address;
use topology::{ANALYTICS, EMAIL, SERVICES, USER};
use uuid::Uuid;

/// Text that a browser would run or draw if it became markup.
const HOSTILE: &str = "<img src=x onerror=alert(1)>\"'&";

const OPERATOR_TOKEN: &str = "on-call-0123456789abcdef0123456789";

/// T103: the lag comes from Kafka, so it is shown although no process of the group runs.
#[tokio::test(flavor = "multi_thread")]
async fn the_map_shows_what_works_and_what_is_down() {
    let mut system = System::start().await;
    let console = system.console().await;
    let map = console.until_shows("/", "all parts work").await;
    for service in SERVICES {
        assert!(map.contains(&format!("data-text=\"status:{}\">works<", service.name)), "{}: {map}", service.name);
        for group in service.groups {
            assert!(map.contains(&format!("data-text=\"lag:{}\"", group.name)), "{}: {map}", group.name);
        }
    }

    system.processes.kill(EMAIL);
    console.until_shows("/", "email does not answer").await;
    system.users.register_many(3).await;
    let lag = format!("<td class=\"num wait\" data-text=\"lag:{EMAIL_WELCOME}\"");
    console.until_shows("/", &lag).await;

    system.processes.start(&[EMAIL]).await;
    console.until_shows("/", "all parts work").await;
    console.until_shows("/", &format!("data-text=\"lag:{EMAIL_WELCOME}\" data-state=\"lag:{EMAIL_WELCOME}\">0<")).await;
}

/// A process that waits says for what.
#[tokio::test(flavor = "multi_thread")]
async fn the_map_shows_the_reason_of_each_replica() {
    let mut system = System::empty().await;
    system.processes.spawn_with(USER, &[("USER_DATABASE_URL", "postgres://nobody@127.0.0.1:1/nothing")]);
    let console = system.console().await;
    console.until_shows("/", "class=\"pill wait\">database: ").await;
}

/// T102: states carry personal data, and facts do not.
#[tokio::test(flavor = "multi_thread")]
async fn the_events_are_listed_as_they_arrive_and_hide_personal_data() {
    let system = System::start_only(&[USER]).await;
    let console = system.console().await;
    let email = address();
    let (user, ()) = tokio::join!(
        system.users.register_as(&email),
        console.until_updated("/live/events?type=user.registered", "\"kind\":\"user.registered\"")
    );
    let events = console.until_shows(&format!("/events?user={user}"), "/events/user.state.v1/").await;
    assert!(events.contains("user.registered"), "{events}");
    assert!(!console.get("/events?type=user.deleted").await.body.contains(&user.to_string()));

    let [state, fact] = ["user.state.v1", "user.events.v1"].map(|topic| link(&events, topic));
    let state = console.get(&state).await.body;
    assert!(state.contains("email") && state.contains("hidden"), "{state}");
    for page in [&state, &events, &console.get("/").await.body] {
        assert!(!page.contains(&email), "the address is in a page: {page}");
    }
    let fact = console.get(&fact).await.body;
    assert!(fact.contains("ce_type") && fact.contains(&user.to_string()), "{fact}");

    let nothing = console.get("/events/user.events.v1/0/1000000").await;
    assert_eq!(nothing.status, StatusCode::NOT_FOUND);
    let unknown = console.get("/events/__consumer_offsets/0/0").await;
    assert!(!unknown.status.is_success(), "a topic that is not Waybill's was read");
}

/// I14: an operator sees the value of a state with a reason. A service shows it, and records the
/// action. A foreign page cannot ask for it.
#[tokio::test(flavor = "multi_thread")]
async fn the_value_of_a_state_is_shown_as_a_recorded_action() {
    let system = System::start_only(&[USER, EMAIL]).await;
    let console = system.console().await;
    let email = address();
    let user = system.users.register_as(&email).await;
    let events = console.until_shows(&format!("/events?user={user}"), "/events/user.state.v1/").await;
    let link = link(&events, "user.state.v1");
    let coordinates = link.trim_start_matches("/events/").replace('/', "-");
    let own = console.url("");
    let token = console.page_token(&link).await;
    let show = async |origin: &str, token: &str| {
        let fields = [("coordinates", &*coordinates), ("reason", "ticket 4711"), ("page_token", token)];
        console.post("/events/show", origin, &fields).await
    };
    for (origin, token) in [("http://evil.example", &*token), ("null", &token), (&own, "guessed"), (&own, "")] {
        let refused = show(origin, token).await;
        assert_eq!(refused.status, StatusCode::FORBIDDEN, "{origin} {token}");
        assert!(!refused.body.contains(&email), "{}", refused.body);
    }
    let actions = console.get("/dead-letters").await.body;
    assert!(!actions.contains("ticket 4711"), "a refused action was recorded: {actions}");

    let shown = show(&own, &token).await;
    assert!(shown.body.contains(&email), "{}", shown.body);
    console.until_shows("/dead-letters", "ticket 4711").await;
    let actions = console.get("/dead-letters").await.body;
    assert!(actions.contains("show-record") && !actions.contains(&email), "{actions}");
}

/// The address of the first record of a topic in a list.
fn link(events: &str, topic: &str) -> String {
    let start = format!("/events/{topic}/");
    let from = events.find(&start).unwrap_or_else(|| panic!("no record of {topic}: {events}"));
    events[from..].split('"').next().unwrap().to_owned()
}

/// T102: any client may write anything to a topic.
#[tokio::test(flavor = "multi_thread")]
async fn text_from_a_record_never_becomes_markup() {
    let system = System::start_only(&[USER]).await;
    let console = system.console().await;
    let mut hostile =
        Draft::user_event("user.registered", Uuid::now_v7(), 1).replace_header("ce_type", HOSTILE.as_bytes());
    hostile = hostile.with_header(HOSTILE, HOSTILE.as_bytes()).with_value(HOSTILE.as_bytes());
    hostile.key = Some(HOSTILE.as_bytes().to_vec());
    let (partition, offset) = system.kafka.write(USER_EVENTS, &hostile).await;
    let state = Draft::user_state(Uuid::now_v7(), 1, None).with_value(HOSTILE.as_bytes());
    let (state_partition, state_offset) = system.kafka.write(USER_STATE, &state).await;

    let events = console.until_shows("/events", &format!("{partition}@{offset}")).await;
    let record = console.get(&format!("/events/{USER_EVENTS}/{partition}/{offset}")).await;
    let state = console.get(&format!("/events/{USER_STATE}/{state_partition}/{state_offset}")).await;
    let filtered = console.get("/events?type=%22%3E%3Cimg+src%3Dx%3E&user=%22%3E%3Cimg+src%3Dx%3E").await;
    for page in [&events, &record.body, &state.body, &filtered.body] {
        assert!(!page.contains("<img"), "{page}");
    }
    assert_eq!((record.status, state.status), (StatusCode::OK, StatusCode::OK));
    assert!(record.body.matches("onerror").count() >= 4, "key, header and value are shown: {}", record.body);

    // librdkafka cannot decode this name, and rust-rdkafka panics on it.
    let broken = [(&b"ce_type"[..], &b"user.registered"[..]), (b"\xff\xfe", b"x")];
    let (partition, offset) = system.kafka.write_bytes(USER_EVENTS, 0, b"key", b"{}", &broken).await;
    console.until_shows("/events", &format!("{partition}@{offset}")).await;
    assert_eq!(console.get(&format!("/events/{USER_EVENTS}/{partition}/{offset}")).await.status, StatusCode::OK);
}

/// T101: every website that a visitor opens can send requests to a page on localhost.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_website_reaches_nothing() {
    let system = System::empty().await;
    let console = system.console().await;
    for path in ["/", "/events", "/live/map", "/assets/look.css"] {
        let foreign = console.send(Method::GET, path, Some("evil.example")).await;
        assert_eq!(foreign.status, StatusCode::MISDIRECTED_REQUEST, "{path}");
        assert!(foreign.headers["content-security-policy"].to_str().unwrap().contains("default-src 'none'"), "{path}");
        let posted = console.send(Method::POST, path, None).await;
        assert_eq!(posted.status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
    }
    let page = console.get("/").await;
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe"), "{policy}");
    assert!(!page.headers.contains_key("access-control-allow-origin"));
    // The policy forbids them, so they would have no effect.
    assert!(!page.body.contains(" style=") && !page.body.contains("<style") && !page.body.contains(" onclick"));
}

/// An operator sees the letters, and acts on them with a reason. A service records each action.
#[tokio::test(flavor = "multi_thread")]
async fn letters_are_shown_redriven_and_discarded_with_a_reason() {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let console = system.console().await;
    let kept = malformed(&system).await;
    let discarded = malformed(&system).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[kept, discarded]).await;
    let [kept, discarded] = [kept, discarded].map(|record| system.kafka.letter_key(ANALYTICS_USERS, record));
    console.until_shows("/dead-letters", &kept).await;
    let token = console.page_token("/dead-letters").await;
    let act = async |act: &str, coordinates: &str, reason: &str| {
        let fields = [
            ("act", act),
            ("group", ANALYTICS_USERS),
            ("coordinates", coordinates),
            ("reason", reason),
            ("page_token", &token),
        ];
        console.post("/dead-letters/act", &console.url(""), &fields).await
    };
    let shown = act("show", &kept, "a wrong producer").await;
    assert_eq!(shown.status, StatusCode::OK, "{}", shown.body);
    assert!(shown.body.contains("&#60;img src=x&#62;") && !shown.body.contains("<img"), "{}", shown.body);
    let redriven = act("redrive", &kept, "a new release").await;
    assert!(redriven.body.contains("&#34;failed&#34;: 1"), "{}", redriven.body);
    let gone = act("discard", &discarded, "written by a test").await;
    assert_eq!(gone.status, StatusCode::OK, "{}", gone.body);

    let page = console.until_shows(&format!("/dead-letters?group={ANALYTICS_USERS}"), "tried 2 times").await;
    assert!(page.contains(&format!("aria-label=\"Letter {kept}\"")), "{page}");
    assert!(!page.contains(&format!("aria-label=\"Letter {discarded}\"")), "{page}");
    for reason in ["a wrong producer", "a new release", "written by a test"] {
        assert!(page.contains(reason), "the actions lack {reason:?}: {page}");
    }
    let refused = act("discard", &discarded, "again").await;
    assert_eq!(refused.status, StatusCode::BAD_GATEWAY);
    assert!(refused.body.contains("the service refuses"), "{}", refused.body);
}

/// A fact without a valid value. Partition and offset.
async fn malformed(system: &System) -> (i32, i64) {
    let fact = Draft::user_event("user.registered", Uuid::now_v7(), 1).with_value(b"<img src=x>");
    system.kafka.write(USER_EVENTS, &fact).await
}

/// T101: a website that the operator has open in the same browser sends the form by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_page_cannot_act_on_letters() {
    let system = System::start_only(&[USER, EMAIL, ANALYTICS]).await;
    let console = system.console().await;
    let record = malformed(&system).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[record]).await;
    let coordinates = system.kafka.letter_key(ANALYTICS_USERS, record);
    console.until_shows("/dead-letters", &coordinates).await;
    let token = console.page_token("/dead-letters").await;
    let own = console.url("");
    for (origin, token) in [("http://evil.example", &*token), ("null", &token), (&own, "guessed"), (&own, "")] {
        let fields = [
            ("act", "discard"),
            ("group", ANALYTICS_USERS),
            ("coordinates", &coordinates),
            ("reason", "hostile"),
            ("page_token", token),
        ];
        let refused = console.post("/dead-letters/act", origin, &fields).await;
        assert_eq!(refused.status, StatusCode::FORBIDDEN, "{origin} {token}");
    }
    let page = console.get("/dead-letters").await.body;
    assert!(page.contains(&coordinates) && !page.contains("hostile"), "{page}");
}

/// An operator logs in with a token of the services and acts under its name. A service that does
/// not know the token any more refuses. After the logout the session is gone.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_acts_under_the_name_of_a_token() {
    let mut system = System::start_only(&[USER, EMAIL]).await;
    let tokens = system.processes.file("admin-tokens");
    std::fs::write(&tokens, format!("on-call:{OPERATOR_TOKEN}\n")).unwrap();
    let setting = [("ADMIN_TOKENS_FILE", tokens.to_str().unwrap())];
    system.processes.stop(EMAIL).await;
    system.processes.start_with(EMAIL, &setting).await;
    system.processes.start_with(ANALYTICS, &setting).await;
    let console = system.console().await;
    let record = malformed(&system).await;
    system.kafka.until_dead_letters(ANALYTICS_USERS, &[record]).await;
    let coordinates = system.kafka.letter_key(ANALYTICS_USERS, record);
    console.until_shows("/dead-letters", &coordinates).await;
    let own = console.url("");
    let page_token = console.page_token("/login").await;
    let discard = async |cookie: &str, reason: &str| {
        let fields = [
            ("act", "discard"),
            ("group", ANALYTICS_USERS),
            ("coordinates", &*coordinates),
            ("reason", reason),
            ("page_token", &page_token),
        ];
        console.post_with(cookie, "/dead-letters/act", &own, &fields).await
    };
    let login = async |token: &str, page_token: &str| {
        console.post("/login", &own, &[("operator_token", token), ("page_token", page_token)]).await
    };
    assert_eq!(login(OPERATOR_TOKEN, "guessed").await.status, StatusCode::FORBIDDEN);
    let unknown = login("another-0123456789abcdef0123456789", &page_token).await;
    assert!(unknown.body.contains("does not know this token"), "{}", unknown.body);
    let begun = login(OPERATOR_TOKEN, &page_token).await;
    assert_eq!(begun.status, StatusCode::SEE_OTHER, "{}", begun.body);
    let cookie = begun.headers["set-cookie"].to_str().unwrap();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    assert!(!cookie.contains(OPERATOR_TOKEN), "the token is in the cookie");
    let cookie = cookie.split(';').next().unwrap();

    let without = discard("", "without a login").await;
    assert!(without.body.contains("needs a token"), "{}", without.body);
    std::fs::write(&tokens, "other:0123456789abcdef0123456789abcdef\n").unwrap();
    let removed = discard(cookie, "with a token that was removed").await;
    assert!(removed.body.contains("does not know this token"), "{}", removed.body);
    std::fs::write(&tokens, format!("on-call:{OPERATOR_TOKEN}\n")).unwrap();
    let discarded = discard(cookie, "written by a test").await;
    assert_eq!(discarded.status, StatusCode::OK, "{}", discarded.body);
    let page = console.until_shows("/dead-letters", "written by a test").await;
    assert!(page.contains("<td>on-call</td>"), "{page}");

    let ended = console.post_with(cookie, "/logout", &own, &[("page_token", &page_token)]).await;
    assert_eq!(ended.status, StatusCode::SEE_OTHER);
    let after = discard(cookie, "after the logout").await;
    assert!(after.body.contains("needs a token"), "{}", after.body);
}

/// T103: the console starts before everything else, waits, and continues.
#[tokio::test(flavor = "multi_thread")]
async fn the_console_needs_no_service_and_joins_no_group() {
    let mut system = System::empty().await;
    let console = system.console().await;
    console.until_shows("/", "does not answer").await;
    system.processes.set_all(&DEFAULT_CONSUMERS);
    system.processes.start_all().await;
    console.until_shows("/", "all parts work").await;
    system.users.register().await;
    console.until_shows("/events", "user.registered<").await;
    for group in
        ["console"].into_iter().chain(SERVICES.iter().flat_map(|service| service.groups).map(|group| group.name))
    {
        let members = system.kafka.members(group).len();
        assert_eq!(members, usize::from(group != "console"), "members of {group}");
    }
}
