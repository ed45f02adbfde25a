//! A mail server that requires TLS and a login.

use tests::mail_front::{Front, PASSWORD, RunningFront, USER};
use tests::users::address;
use tests::{System, eventually};
use topology::EMAIL;
use uuid::Uuid;

/// Starts the email service with a front of the mail server. Returns the system.
async fn start(front: Front, settings: &[(&str, &str)]) -> (System, RunningFront) {
    let mut system = System::start_mailing(&[]).await;
    system.processes.stop(EMAIL).await;
    let front = front.start(system.mail.address()).await;
    let own = front.settings(system.processes.folder());
    let own = own.iter().map(|(name, value)| (*name, value.as_str()));
    let all: Vec<(&str, &str)> = own.chain(settings.iter().copied()).collect();
    system.processes.start_with(EMAIL, &all).await;
    (system, front)
}

/// Waits until the first attempt to send a mail has failed, and returns the log.
async fn until_not_sent(system: &System, user: Uuid) -> String {
    eventually("the first attempt has failed", async || {
        system.stores.delivery_states(user).await.starts_with("pending sending pending").then_some(())
    })
    .await;
    system.processes.log(EMAIL)
}

/// The password and its encoded form are not in the log.
fn assert_no_password(log: &str) {
    assert!(!log.contains(PASSWORD) && !log.contains("Y29ycmVjdCBob3JzZQ"), "the password is in the log");
}

/// Mails are sent over TLS from the first byte or after STARTTLS, with AUTH PLAIN or AUTH LOGIN.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_is_sent_over_tls_and_after_a_login() {
    for (tls, implicit, login) in [("implicit", true, "PLAIN"), ("starttls", false, "LOGIN")] {
        let front = Front { implicit, login: Some(login), name: "localhost" };
        let settings = [("SMTP_TLS", tls), ("SMTP_USER", USER), ("SMTP_PASSWORD", PASSWORD)];
        let (system, _front) = start(front, &settings).await;
        let email = address();
        let id = system.users.register_as(&email).await;
        system.stores.until_delivery_states(id, "pending sending sent").await;
        assert_eq!(system.mail.to(&email).len(), 1, "mails with {tls} and {login}");
        assert_no_password(&system.processes.log(EMAIL));
    }
}

/// A wrong password is about us: no mail fails, and the log has the code.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_fails_no_mail() {
    let front = Front { implicit: true, login: Some("PLAIN"), name: "localhost" };
    let settings = [("SMTP_TLS", "implicit"), ("SMTP_USER", USER), ("SMTP_PASSWORD", "battery staple")];
    let (system, _front) = start(front, &settings).await;
    let id = system.users.register().await;
    assert!(until_not_sent(&system, id).await.contains("reply 535 5.7.8 to AUTH"), "the log must name the reply");
}

/// A certificate of an unknown authority, for another host, or that has expired is not accepted,
/// and no mail is sent without encryption to a server that offers none.
#[tokio::test(flavor = "multi_thread")]
async fn no_mail_is_sent_to_a_server_that_cannot_prove_its_name() {
    let wrong_name = Front { implicit: true, login: None, name: "mail.example.com" };
    let (system, _front) = start(wrong_name, &[("SMTP_TLS", "implicit")]).await;
    let id = system.users.register().await;
    let log = until_not_sent(&system, id).await;
    assert!(
        log.contains("TLS handshake with the mail server failed") && log.contains("invalid peer certificate"),
        "{log}"
    );

    let front = Front { implicit: true, login: None, name: "localhost" };
    let (mut system, front) = start(front, &[("SMTP_TLS", "implicit")]).await;
    let other = Front { implicit: true, login: None, name: "localhost" }.start(system.mail.address()).await;
    system.processes.stop(EMAIL).await;
    let port = front.address.port().to_string();
    let [host, _, authority] = other.settings(system.processes.folder());
    let settings =
        [(host.0, host.1.as_str()), ("SMTP_PORT", &port), (authority.0, &authority.1), ("SMTP_TLS", "implicit")];
    system.processes.start_with(EMAIL, &settings).await;
    let id = system.users.register().await;
    let log = until_not_sent(&system, id).await;
    assert!(log.contains("invalid peer certificate"), "{log}");

    let expired = Front { implicit: true, login: None, name: "localhost" }.start_expired(system.mail.address()).await;
    let [host, port, authority] = expired.settings(system.processes.folder());
    let settings = [(host.0, &*host.1), (port.0, &*port.1), (authority.0, &*authority.1), ("SMTP_TLS", "implicit")];
    system.processes.start_with(EMAIL, &settings).await;
    let id = system.users.register().await;
    let log = until_not_sent(&system, id).await;
    assert!(log.contains("certificate expired"), "{log}");
    assert_eq!(system.mail.all(), []);

    // The mail server itself has no STARTTLS.
    let system = System::start_mailing(&[("SMTP_TLS", "starttls")]).await;
    let id = system.users.register().await;
    assert!(until_not_sent(&system, id).await.contains("the server does not offer STARTTLS"));
    assert_eq!(system.mail.all(), []);
}

/// The error names the setting and the file.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_file_without_a_certificate_is_an_error_at_the_start() {
    let mut system = System::start_mailing(&[]).await;
    system.processes.stop(EMAIL).await;
    let file = system.processes.file("empty.pem");
    std::fs::write(&file, "not a certificate").unwrap();
    system.processes.spawn_with(EMAIL, &[("SMTP_TLS", "implicit"), ("SMTP_CA_FILE", file.to_str().unwrap())]);
    system.processes.until_ended(EMAIL).await;
    let log = system.processes.log(EMAIL);
    assert!(log.contains("SMTP_CA_FILE") && log.contains("empty.pem contains no certificate"), "{log}");
}
