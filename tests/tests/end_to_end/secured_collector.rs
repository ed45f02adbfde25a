//! A collector of traces with TLS, a client certificate and headers, and what happens when its
//! certificate is wrong.

use std::path::PathBuf;

use testbed::testing::free_port;
use tests::certificates::{Authority, Certificate};
use tests::otlp::Otlp;
use tests::{System, eventually};
use topology::USER;

const TOKEN: &str = "correct-horse";

/// A user service without a collector yet, and the authority of the collector.
struct Secured {
    system: System,
    authority: Authority,
    authority_file: PathBuf,
    client: (PathBuf, PathBuf),
    port: u16,
}

impl Secured {
    async fn new() -> Self {
        let mut system = System::empty().await;
        let authority = Authority::create();
        let file = |name: &str| system.processes.file(name);
        let authority_file = authority.write(file("authority.pem"));
        let client = authority.certificate("waybill").write_apart(file("client.pem"), file("client-key.pem"));
        let headers = format!("authorization=Bearer%20{TOKEN},x-tenant=waybill");
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_HEADERS", &*headers),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1000"),
            ("OTEL_BSP_SCHEDULE_DELAY", "100"),
        ] {
            system.processes.set(name, value);
        }
        Self { system, authority, authority_file, client, port: free_port() }
    }

    /// Starts a collector that asks for a client certificate.
    async fn collector(&self, certificate: &Certificate) -> Otlp {
        Otlp::start_secured(self.port, certificate.server(Some(&self.authority))).await
    }

    /// The settings with which the service reaches the collector.
    fn settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("https://localhost:{}", self.port)),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", self.authority_file.display().to_string()),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", self.client.0.display().to_string()),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", self.client.1.display().to_string()),
        ]
    }

    /// Starts the user service with the right settings, except these. An empty one is left out.
    async fn start(&mut self, different: &[(&str, &str)]) {
        let right = self.settings();
        let kept = right.iter().map(|(name, value)| (*name, value.as_str()));
        let kept = kept.filter(|(name, _)| different.iter().all(|(other, _)| other != name));
        let given = different.iter().copied().filter(|(_, value)| !value.is_empty());
        let settings: Vec<(&str, &str)> = kept.chain(given).collect();
        self.system.processes.start_with(USER, &settings).await;
    }

    async fn metric(&self, name: &str) -> f64 {
        self.system.processes.metric(USER, name, &[]).await.unwrap_or(0.0)
    }

    /// Requests succeed, batches are lost and counted, and the log says why. Not every attempt
    /// shows the reason: the collector may close the connection before the service has read its
    /// alert.
    async fn until_lost(&self, reason: &str) {
        eventually(&format!("two batches were lost, and the log says {reason:?}"), async || {
            self.system.users.register().await;
            let are_lost = self.metric("trace_exports_failed_total").await >= 2.0;
            (are_lost && self.system.processes.log(USER).contains(reason)).then_some(())
        })
        .await;
        assert_eq!(self.metric("trace_spans_exported_total").await, 0.0);
        self.assert_no_token();
    }

    fn assert_no_token(&self) {
        assert!(!self.system.processes.log(USER).contains(TOKEN), "the token is in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn traces_are_exported_over_tls_with_headers_and_a_client_certificate() {
    let mut secured = Secured::new().await;
    let collector = secured.collector(&secured.authority.certificate("localhost")).await;
    secured.start(&[]).await;
    secured.system.users.register().await;
    eventually("the collector has spans", async || (!collector.spans().is_empty()).then_some(())).await;
    assert_eq!(collector.header("authorization").as_deref(), Some("Bearer correct-horse"));
    assert_eq!(collector.header("x-tenant").as_deref(), Some("waybill"));
    secured.assert_no_token();
    eventually("exported spans are counted", async || {
        (secured.metric("trace_spans_exported_total").await > 0.0).then_some(())
    })
    .await;

    // The headers come from a file, too.
    let file = secured.system.processes.file("headers");
    std::fs::write(&file, "x-tenant=from-a-file\n").unwrap();
    let from_file = [("OTEL_EXPORTER_OTLP_HEADERS_FILE", file.to_str().unwrap()), ("OTEL_EXPORTER_OTLP_HEADERS", "")];
    secured.system.processes.set("OTEL_EXPORTER_OTLP_HEADERS", "");
    secured.start(&from_file).await;
    secured.system.users.register().await;
    eventually("the header of the file arrives", async || {
        (collector.header("x-tenant")? == "from-a-file").then_some(())
    })
    .await;
}

/// T61: a collector that cannot prove its name gets nothing, and one that refuses the service gets
/// nothing. The service works, says why, counts the losses, and exports when the collector is
/// corrected.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_certificate_of_the_collector_loses_traces_and_nothing_else() {
    let mut secured = Secured::new().await;
    let other = Authority::create();
    let [good, unknown, foreign, expired] = [
        secured.authority.certificate("localhost"),
        other.certificate("localhost"),
        secured.authority.certificate("collector.example.com"),
        secured.authority.expired_certificate("localhost"),
    ];
    for (certificate, different, reason) in [
        (&unknown, &[][..], "UnknownIssuer"),
        (&foreign, &[], "not valid for name"),
        (&expired, &[], "certificate expired"),
        (
            &good,
            &[("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", ""), ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "")],
            "CertificateRequired",
        ),
    ] {
        let collector = secured.collector(certificate).await;
        secured.start(different).await;
        secured.until_lost(reason).await;
        assert!(collector.spans().is_empty());
        secured.system.processes.stop(USER).await;
    }
    let collector = secured.collector(&good).await;
    collector.require("Bearer another");
    secured.start(&[]).await;
    secured.until_lost("Unauthenticated").await;
    assert!(collector.spans().is_empty());
    drop(collector);
    secured.system.processes.stop(USER).await;

    let collector = secured.collector(&unknown).await;
    secured.start(&[]).await;
    secured.until_lost("UnknownIssuer").await;
    drop(collector);
    let collector = secured.collector(&good).await;
    eventually("the collector has spans", async || {
        secured.system.users.register().await;
        (!collector.spans().is_empty()).then_some(())
    })
    .await;
    secured.system.processes.until_logged(USER, "the collector accepts traces again").await;
}

/// Wrong settings are errors at the start, which name the setting and show no header.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_settings_of_the_collector_are_errors_at_the_start() {
    let mut secured = Secured::new().await;
    let authority = secured.authority_file.display().to_string();
    let [http, https] =
        ["http://localhost:4317", "https://localhost:4317"].map(|url| ("OTEL_EXPORTER_OTLP_ENDPOINT", url));
    let certificate = ("OTEL_EXPORTER_OTLP_CERTIFICATE", &*authority);
    for (settings, error) in [
        (&[http, certificate][..], "need an OTEL_EXPORTER_OTLP_ENDPOINT with https://"),
        (&[https, ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/ca.pem")], "cannot read OTEL_EXPORTER_OTLP_CERTIFICATE"),
        (&[https, ("OTEL_EXPORTER_OTLP_CLIENT_KEY", &authority)], "need each other"),
        (&[https, ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2")], "OTEL_EXPORTER_OTLP_HEADERS: header 1 is not name=value"),
    ] {
        secured.system.processes.spawn_with(USER, settings);
        secured.system.processes.until_ended(USER).await;
        let log = secured.system.processes.log(USER);
        assert!(log.contains(error), "{settings:?}: {log}");
        assert!(!log.contains("hunter2") && !log.contains(TOKEN), "{settings:?}: {log}");
    }
    // An empty endpoint switches the export off, and the file is not used.
    secured.system.processes.start_with(USER, &[("OTEL_EXPORTER_OTLP_ENDPOINT", ""), certificate]).await;
    let help = secured.system.processes.run(USER, &["--help"]).await.unwrap();
    assert!(help.contains("OTEL_EXPORTER_OTLP_HEADERS") && !help.contains(TOKEN), "{help}");
    let flag = secured.system.processes.run(USER, &["--otel-exporter-otlp-headers", "a=b"]).await.unwrap_err();
    assert!(flag.to_string().contains("unexpected argument"), "{flag}");
}
