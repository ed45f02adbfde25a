//! Settings that a service refuses, and secrets, which it never shows.

use std::collections::BTreeSet;
use std::net::TcpListener;

use testbed::testing;
use tests::System;
use topology::{ANALYTICS, CACHE, EMAIL, SERVICES, Service, USER};

/// A setting, a refused value, and its range.
const OUT_OF_RANGE: [(Service, &str, &str, &str); 31] = [
    (EMAIL, "--max-age-hours", "99999999", "from 1 to 87600"),
    (EMAIL, "--max-age-hours", "4294967295", "from 1 to 87600"),
    (EMAIL, "--max-age-hours", "0", "from 1 to 87600"),
    (EMAIL, "--lease-ms", "300000000000000000", "from 1000 to 3600000"),
    (EMAIL, "--lease-ms", "0", "from 1000 to 3600000"),
    (EMAIL, "--backoff-ms", "0", "from 10 to 600000"),
    (EMAIL, "--backoff-ms", "300000000000000000000", "from 10 to 600000"),
    (EMAIL, "--senders", "0", "from 1 to 64"),
    (USER, "--heartbeat-interval-ms", "0", "from 100 to 604800000"),
    (USER, "--heartbeat-interval-ms", "18446744073709551615", "from 100 to 604800000"),
    (USER, "--outbox-poll-ms", "0", "from 10 to 600000"),
    (USER, "--outbox-linger-ms", "1001", "from 0 to 1000"),
    (USER, "--drain-ms", "600001", "from 0 to 600000"),
    (USER, "--drain-ms", "soon", "from 0 to 600000"),
    (USER, "--shutdown-ms", "0", "from 1000 to 900000"),
    (USER, "--http-connections", "0", "from 1 to 65536"),
    (USER, "--http-requests", "4294967296", "from 1 to 65536"),
    (USER, "--http-read-timeout-ms", "0", "from 100 to 600000"),
    (USER, "--http-rate-per-address", "1000001", "from 0 to 1000000"),
    (USER, "--http-rate-per-principal", "4294967296", "from 0 to 1000000"),
    (USER, "--registrations-per-principal", "some", "from 0 to 1000000"),
    (USER, "--auth-jwks-refresh-s", "0", "from 1 to 86400"),
    (CACHE, "--max-waiters", "0", "from 1 to 65535"),
    (CACHE, "--consumers", "65", "from 1 to 64"),
    (CACHE, "--handle-timeout-ms", "1", "from 2000 to 600000"),
    (CACHE, "--kafka-replication-factor", "0", "from 1 to 100"),
    (ANALYTICS, "--breaker-window", "0", "from 1 to 10000"),
    (ANALYTICS, "--breaker-minimum", "65536", "from 1 to 10000"),
    (ANALYTICS, "--breaker-share", "1.5", "above 0 and at most 1"),
    (ANALYTICS, "--breaker-share", "half", "above 0 and at most 1"),
    (ANALYTICS, "--breaker-share", "NaN", "above 0 and at most 1"),
];

/// The error of a program that must not start.
async fn refused(system: &System, service: Service, arguments: &[&str]) -> String {
    match system.processes.run(service, arguments).await {
        Err(error) => error.to_string(),
        Ok(output) => panic!("{} started with {arguments:?}: {output}", service.name),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_out_of_range_is_refused_at_start_with_the_setting_and_the_range() {
    let system = System::empty().await;
    for (service, setting, value, range) in OUT_OF_RANGE {
        let error = refused(&system, service, &[setting, value]).await;
        assert!(error.contains(setting) && error.contains(range), "{setting} {value}: {error}");
    }
    for (service, subcommand, flag, range) in [
        (EMAIL, "send-held", "--younger-than-hours", "from 1 to 87600"),
        (ANALYTICS, "rebuild", "--wait-seconds", "from 0 to 86400"),
    ] {
        for value in ["99999999", "-1", "4294967296"] {
            let error = refused(&system, service, &[subcommand, &format!("{flag}={value}")]).await;
            assert!(error.contains(flag) && error.contains(range), "{flag} {value}: {error}");
        }
    }
}

/// Every mail server must accept the sender of our mails, as it must accept a recipient.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_a_mail_server_may_refuse_is_refused_at_start() {
    let system = System::empty().await;
    for (sender, remedy) in [
        ("Waybill <waybill@b\u{fc}cher.example>", "only ASCII characters can be delivered everywhere"),
        ("Waybill <w\u{e4}ybill@example.com>", "only ASCII characters can be delivered everywhere"),
        ("Waybill <waybill@localhost>", "not an address, for example ada@example.com"),
        ("Waybill <waybill@ex_ample.com>", "not an address, for example ada@example.com"),
        ("Waybill", "for example Waybill <waybill@example.com>"),
    ] {
        let error = refused(&system, EMAIL, &["--mail-from", sender]).await;
        assert!(error.contains("--mail-from") && error.contains(remedy), "{sender}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_contradict_each_other_are_refused_at_start() {
    let system = System::empty().await;
    for (service, settings, names) in [
        (USER, ["--http-connections=10", "--http-requests=11"], ["HTTP_CONNECTIONS", "HTTP_REQUESTS"]),
        (CACHE, ["--http-requests=10", "--max-waiters=10"], ["HTTP_REQUESTS", "MAX_WAITERS"]),
        (CACHE, ["--breaker-window=10", "--breaker-minimum=11"], ["BREAKER_WINDOW", "BREAKER_MINIMUM"]),
    ] {
        let error = refused(&system, service, &settings).await;
        assert!(names.iter().all(|name| error.contains(name)), "{settings:?}: {error}");
    }
}

/// The process raises its limit of open files as far as it may, and does not start if that is too
/// few for its connections. Where it may, the start continues until the next error: the port is in
/// use.
#[tokio::test(flavor = "multi_thread")]
async fn more_connections_than_open_files_are_refused_at_start() {
    let system = System::empty().await;
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let start = async |limit: &str| {
        let mut command = tokio::process::Command::new("sh");
        command.args(["-c", &format!("{limit} && exec \"$0\"")]).arg(testing::stack().programs.join(USER.name));
        for secret in ["USER_DATABASE_URL", "IDEMPOTENCY_SECRET"] {
            command.env(secret, system.processes.setting(secret));
        }
        command.env("ADMIN_ADDR", occupied.local_addr().unwrap().to_string()).env("HTTP_CONNECTIONS", "512");
        let output = tokio::time::timeout(tests::DEADLINE, command.kill_on_drop(true).output()).await.unwrap().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let error = start("ulimit -n 256").await;
    assert!(error.contains("HTTP_CONNECTIONS is 512") && error.contains("the limit of the process is 256"), "{error}");
    let error = start("ulimit -Sn 256").await;
    assert!(error.contains("ADMIN_ADDR"), "{error}");
}

/// The secrets of every service, by the names of their variables.
const SECRETS: [(Service, &str); 5] = [
    (USER, "USER_DATABASE_URL"),
    (USER, "IDEMPOTENCY_SECRET"),
    (EMAIL, "EMAIL_DATABASE_URL"),
    (ANALYTICS, "ANALYTICS_DATABASE_URL"),
    (CACHE, "VALKEY_URL"),
];

/// `--help` names each secret and shows no value. `ps` shows flags, so a secret has none.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_not_in_the_help_and_has_no_flag() {
    let mut system = System::empty().await;
    for (_, name) in SECRETS {
        system.processes.set(name, "redis://user:hunter2-hunter2-hunter2-hunter2@localhost:1/");
    }
    for service in SERVICES {
        for help in [&["--help"][..], &["-h"], &["serve", "--help"], &["healthcheck", "--help"]] {
            let text = system.processes.run(service, help).await.unwrap();
            assert!(!text.contains("hunter2"), "{} {help:?}: {text}", service.name);
        }
    }
    for (service, name) in SECRETS {
        let help = system.processes.run(service, &["--help"]).await.unwrap();
        assert!(help.contains(name) && help.contains("_FILE"), "{help}");
        let flag = format!("--{}", name.to_lowercase().replace('_', "-"));
        let error = refused(&system, service, &[&flag, "hunter3"]).await;
        assert!(error.contains("unexpected argument"), "{error}");
    }
}

/// A secret that cannot be used is named, and not shown.
#[tokio::test(flavor = "multi_thread")]
async fn the_error_of_a_malformed_secret_does_not_show_it() {
    let mut system = System::empty().await;
    let urls = ["postgres://ada:hunter2@localhost:port/db", "redis://ada:hunter2@localhost:port", "hunter2"];
    for (service, name) in SECRETS {
        let usable = system.processes.setting(name).to_owned();
        let malformed = if name.ends_with("_URL") { &urls[..] } else { &["hunter2"] };
        for value in malformed {
            system.processes.set(name, value);
            let error = refused(&system, service, &[]).await;
            assert!(!error.contains("hunter2"), "{name}: {error}");
        }
        system.processes.set(name, &usable);
    }
}

/// A secret comes from a file, too. Both at once are refused, and no error shows a value.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_comes_from_its_variable_or_from_a_file() {
    let mut system = System::empty().await;
    let file = system.processes.file("secret");
    let path = file.to_str().unwrap().to_owned();
    for (service, name) in [(USER, "USER_DATABASE_URL"), (CACHE, "VALKEY_URL")] {
        let value = system.processes.setting(name).to_owned();
        std::fs::write(&file, format!("{value}\n")).unwrap();
        let from_file = format!("{name}_FILE");
        system.processes.set(&from_file, &path);
        let error = refused(&system, service, &[]).await;
        assert!(error.contains(&format!("both {name} and {name}_FILE are set")) && !error.contains(&value), "{error}");
        system.processes.start_with(service, &[(name, "")]).await;
        system.processes.set(&from_file, "");
        system.processes.set(name, "");
    }
    let error = refused(&system, USER, &[]).await;
    assert!(error.contains("set USER_DATABASE_URL or USER_DATABASE_URL_FILE"), "{error}");
    system.processes.set("USER_DATABASE_URL_FILE", "/nowhere/secret");
    let error = refused(&system, USER, &[]).await;
    assert!(error.contains("USER_DATABASE_URL_FILE") && error.contains("/nowhere/secret"), "{error}");
}

/// The variables that the harness sets for every process.
const OF_THE_HARNESS: [&str; 3] = ["HTTP_ADDR", "ADMIN_ADDR", "DRAIN_MS"];

/// Docker Compose passes a variable without a value (`${KAFKA_CA_FILE:-}`) as the empty text. It
/// means "not set", for every setting of every service.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_variable_is_not_set() {
    let mut system = System::empty().await;
    for service in SERVICES {
        let help = system.processes.run(service, &["--help"]).await.unwrap();
        let names = help.split("[env: ").skip(1).map(|rest| rest.split(['=', ']']).next().unwrap().to_owned());
        let names: BTreeSet<String> = names.collect();
        for known in ["KAFKA_CA_FILE", "KAFKA_PROPERTY", "RUST_LOG", "OTEL_EXPORTER_OTLP_ENDPOINT", "SHUTDOWN_MS"] {
            assert!(names.contains(known), "{known} is not in the help of {}: {help}", service.name);
        }
        let empty = names.iter().map(String::as_str).filter(|name| !OF_THE_HARNESS.contains(name));
        let empty: Vec<(&str, &str)> =
            empty.filter(|name| !system.processes.is_set(name)).map(|name| (name, "")).collect();
        system.processes.spawn_with(service, &empty);
    }
    system.processes.until_ready(&SERVICES).await;
    let user = system.users.register().await;
    system.until_applied(&[user]).await;
    system.processes.set("KAFKA_CA_FILE", "");
    let help = system.processes.run(USER, &["--help"]).await.unwrap();
    assert!(help.contains("[env: KAFKA_CA_FILE"), "{help}");
}
