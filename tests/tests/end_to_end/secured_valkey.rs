//! A Valkey with TLS, client certificates and users.

use std::path::PathBuf;

use testbed::redis::Redis;
use testbed::testing::free_port;
use tests::certificates::{Authority, Certificate};
use tests::system::Own;
use tests::{System, eventually};
use topology::{CACHE, USER};

const PASSWORD: &str = "correct-horse";

/// Files in PEM format: the authority of the server, and a client's certificate and key.
struct Files {
    signs: Authority,
    authority: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

/// A server whose TLS port asks for a client certificate, and its port.
async fn start(system: &mut System) -> (Own<Redis>, u16, Files) {
    let folder = system.processes.folder().to_owned();
    let file = |name: &str| folder.join(name);
    let authority = Authority::create();
    let server = authority.certificate("localhost");
    let client = authority.certificate("waybill-cache");
    for (file, text) in [
        (file("server.pem"), server.certificate.pem()),
        (file("server-key.pem"), server.key.serialize_pem()),
        (file("client.pem"), client.certificate.pem()),
        (file("client-key.pem"), client.key.serialize_pem()),
    ] {
        std::fs::write(file, text).unwrap();
    }
    let signs = authority;
    let authority = signs.write(file("authority.pem"));
    let port = free_port();
    let flags = [
        format!("--tls-port {port}"),
        format!("--tls-cert-file {}", file("server.pem").display()),
        format!("--tls-key-file {}", file("server-key.pem").display()),
        format!("--tls-ca-cert-file {}", authority.display()),
        "--tls-auth-clients yes".to_owned(),
        format!("--user cache on >{PASSWORD} ~* +@all -@dangerous +info"),
    ];
    let flags: Vec<String> = flags.iter().flat_map(|flag| flag.split(' ')).map(str::to_owned).collect();
    let valkey = system.own_valkey_with(&flags).await;
    (valkey, port, Files { signs, authority, certificate: file("client.pem"), key: file("client-key.pem") })
}

/// The cache uses Valkey over TLS, with a client certificate and as a user who may do little.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_uses_valkey_over_tls_as_a_limited_user() {
    let mut system = System::start_only(&[USER]).await;
    let (_valkey, port, files) = start(&mut system).await;
    let url = format!("rediss://cache:{PASSWORD}@localhost:{port}");
    let settings = [
        ("VALKEY_URL", &*url),
        ("VALKEY_CA_FILE", files.authority.to_str().unwrap()),
        ("VALKEY_CERTIFICATE_FILE", files.certificate.to_str().unwrap()),
        ("VALKEY_KEY_FILE", files.key.to_str().unwrap()),
    ];
    system.processes.start_with(CACHE, &settings).await;
    let user = system.users.register().await;
    system.users.until_cached(user, 1).await;
    assert!(!system.processes.log(CACHE).contains(PASSWORD), "the password is in the log");
}

/// T61: a server whose authority is unknown is not used. `/status` says why, and the process keeps
/// running.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_does_not_use_a_valkey_that_cannot_prove_its_name() {
    let mut system = System::start_only(&[USER]).await;
    let (_valkey, port, files) = start(&mut system).await;
    let other = Authority::create().write(system.processes.file("other-authority.pem"));
    let by_address = format!("rediss://cache:{PASSWORD}@127.0.0.1:{port}");
    let by_name = format!("rediss://cache:{PASSWORD}@localhost:{port}");
    for (url, authority) in [(&by_name, &other), (&by_address, &files.authority)] {
        let settings = [
            ("VALKEY_URL", &**url),
            ("VALKEY_CA_FILE", authority.to_str().unwrap()),
            ("VALKEY_CERTIFICATE_FILE", files.certificate.to_str().unwrap()),
            ("VALKEY_KEY_FILE", files.key.to_str().unwrap()),
        ];
        system.processes.spawn_with(CACHE, &settings);
        eventually("/status says what is wrong with the certificate", async || {
            let (_, body) = system.processes.status(CACHE).await?;
            body["waiting_for"]["view"].as_str()?.contains("certificate").then_some(())
        })
        .await;
        assert!(!system.processes.has_ended(CACHE), "a wrong certificate must not end the process");
        system.processes.stop(CACHE).await;
    }
}

/// T61: the certificate has expired, and the password is wrong. `/status` says so, and the cache
/// continues without a restart when they are corrected at the server.
#[tokio::test(flavor = "multi_thread")]
async fn the_cache_continues_when_the_certificate_and_the_password_of_valkey_are_corrected() {
    let mut system = System::start_only(&[USER]).await;
    let (_valkey, port, files) = start(&mut system).await;
    set_certificate(&system, &files.signs.expired_certificate("localhost")).await;
    let url = format!("rediss://cache:{PASSWORD}@localhost:{port}");
    let settings = [
        ("VALKEY_URL", &*url),
        ("VALKEY_CA_FILE", files.authority.to_str().unwrap()),
        ("VALKEY_CERTIFICATE_FILE", files.certificate.to_str().unwrap()),
        ("VALKEY_KEY_FILE", files.key.to_str().unwrap()),
    ];
    system.processes.spawn_with(CACHE, &settings);
    until_reason(&system, "expired").await;
    set_certificate(&system, &files.signs.certificate("localhost")).await;
    system.processes.until_ready(&[CACHE]).await;

    let set_password = async |password: &str| {
        let mut set = redis::cmd("ACL");
        let set = set.arg("SETUSER").arg("cache").arg("resetpass").arg(format!(">{password}"));
        let () = set.query_async(&mut system.stores.valkey().await).await.unwrap();
    };
    let set_right = async |right: &str| {
        let mut set = redis::cmd("ACL");
        let set = set.arg("SETUSER").arg("cache").arg(right);
        let () = set.query_async(&mut system.stores.valkey().await).await.unwrap();
    };
    set_password("battery-staple").await;
    system.processes.spawn_with(CACHE, &settings);
    until_reason(&system, "check user and password").await;
    set_password(PASSWORD).await;
    system.processes.until_ready(&[CACHE]).await;

    set_right("-info").await;
    system.processes.spawn_with(CACHE, &settings);
    until_reason(&system, "check its acl").await;
    set_right("+info").await;
    system.processes.until_ready(&[CACHE]).await;
    assert!(!system.processes.log(CACHE).contains(PASSWORD), "the password is in the log");
}

/// Gives the running server this certificate. The command makes it read both files again.
async fn set_certificate(system: &System, certificate: &Certificate) {
    let [server, key] = ["server.pem", "server-key.pem"].map(|name| system.processes.file(name));
    let (server, _) = certificate.write_apart(server, key);
    let mut set = redis::cmd("CONFIG");
    let set = set.arg("SET").arg("tls-cert-file").arg(server.to_str().unwrap());
    let () = set.query_async(&mut system.stores.valkey().await).await.unwrap();
}

async fn until_reason(system: &System, text: &str) {
    eventually(&format!("/status says {text:?}"), async || {
        let (_, body) = system.processes.status(CACHE).await?;
        body["waiting_for"]["view"].as_str()?.to_lowercase().contains(text).then_some(())
    })
    .await;
}

/// Files of TLS without TLS are a mistake, and the error says which.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_without_tls_are_an_error_at_the_start() {
    let mut system = System::empty().await;
    let authority = Authority::create().write(system.processes.file("authority.pem"));
    system.processes.spawn_with(CACHE, &[("VALKEY_CA_FILE", authority.to_str().unwrap())]);
    system.processes.until_ended(CACHE).await;
    let log = system.processes.log(CACHE);
    assert!(log.contains("need a VALKEY_URL with rediss://"), "{log}");
}
