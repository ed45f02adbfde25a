//! Reads a document from another server by HTTP. Written on hyper, because reqwest with TLS would
//! bring a second provider of cryptography. It follows no redirects and uses no proxy.

use std::sync::Arc;

use anyhow::{Context, ensure};
use axum::body::Bytes;
use axum::http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Duration, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;

/// For the whole exchange.
const FETCH_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes.
const DOCUMENT_LIMIT: usize = 256 * 1024;

/// A document on another server.
#[derive(Clone)]
pub(super) struct Remote {
    url: Uri,
    host: String,
    port: u16,
    /// `None` for http.
    tls: Option<Arc<ClientConfig>>,
}

impl Remote {
    /// # Errors
    /// The text is not a URL with a host.
    pub fn new(url: &str, tls: impl FnOnce() -> anyhow::Result<ClientConfig>) -> anyhow::Result<Self> {
        let url: Uri = url.parse().context("it is not a URL such as https://example.com/keys")?;
        let host = url.host().context("it has no host")?.to_owned();
        let (tls, port) = match url.scheme_str() {
            Some("https") => (Some(Arc::new(tls()?)), 443),
            Some("http") if is_loopback(&host) => (None, 80),
            _ => anyhow::bail!("it must begin with https://. Only a server on this machine may use http://"),
        };
        let port = url.port_u16().unwrap_or(port);
        Ok(Self { url, host, port, tls })
    }

    /// # Errors
    /// The server does not answer in time, its certificate is not valid, or its answer is not 200.
    pub async fn fetch(&self) -> anyhow::Result<Bytes> {
        let fetched = timeout(FETCH_TIMEOUT, async {
            let address = (self.host.trim_matches(['[', ']']), self.port);
            let stream = TcpStream::connect(address).await.context("cannot connect")?;
            let Some(tls) = &self.tls else { return self.exchange(stream).await };
            let name = ServerName::try_from(self.host.clone()).context("the host is not a name")?;
            let stream =
                TlsConnector::from(Arc::clone(tls)).connect(name, stream).await.context("no TLS connection")?;
            self.exchange(stream).await
        });
        fetched.await.with_context(|| format!("no answer within {FETCH_TIMEOUT:?}"))?
    }

    async fn exchange(&self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> anyhow::Result<Bytes> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let path = self.url.path_and_query().map_or("/", |path| path.as_str());
        let host = self.url.authority().map_or("", |authority| authority.as_str());
        let request = Request::get(path).header(header::HOST, host).header(header::ACCEPT, "application/json");
        let request = request.body(Empty::<Bytes>::new())?;
        let answer = async {
            let response = sender.send_request(request).await?;
            ensure!(response.status() == StatusCode::OK, "the server answers with {}", response.status());
            let body = Limited::new(response.into_body(), DOCUMENT_LIMIT).collect().await;
            let too_large = || format!("the answer is incomplete, or has more than {DOCUMENT_LIMIT} bytes");
            Ok(body.map_err(anyhow::Error::from_boxed).with_context(too_large)?.to_bytes())
        };
        // The connection makes the exchange progress. It may end first.
        tokio::select! {
            answer = answer => answer,
            Err(error) = connection => Err(anyhow::Error::new(error).context("the connection ended early")),
        }
    }
}

/// Whether the host is this machine, so that no other one can change the answer.
fn is_loopback(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_without_tls_is_read_only_from_this_machine() {
        let remote = |url: &str| Remote::new(url, || super::super::tls::client("TEST_CA_FILE", None));
        for url in ["https://example.com/keys", "http://127.0.0.1:8000/keys", "http://[::1]/", "http://localhost/keys"]
        {
            remote(url).unwrap();
        }
        for url in
            ["http://example.com/keys", "http://127.0.0.1.example.com/", "ftp://localhost/keys", "/keys", "keys", ""]
        {
            assert!(remote(url).is_err(), "{url}");
        }
    }
}
