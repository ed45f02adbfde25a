//! A web server with TLS and one document, which a test changes and counts the requests for.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::certificates::Certificate;

#[derive(Default)]
struct Served {
    /// `None`: the server answers 503.
    document: Option<String>,
    requests: usize,
}

/// Serves until it is dropped.
pub struct Web {
    address: SocketAddr,
    served: Arc<Mutex<Served>>,
    server: JoinHandle<()>,
}

impl Web {
    /// With a certificate for `localhost`.
    pub async fn start(certificate: &Certificate) -> Self {
        let acceptor = certificate.acceptor();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = Arc::<Mutex<Served>>::default();
        let answers = served.clone();
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                // A client may end the connection at any time.
                let _ = answer(stream, &acceptor, &answers).await;
            }
        });
        Self { address, served, server }
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}/keys?of=tests", self.address.port())
    }

    /// The answer from now on. `None`: 503.
    pub fn set(&self, document: Option<String>) {
        self.served.lock().unwrap().document = document;
    }

    pub fn requests(&self) -> usize {
        self.served.lock().unwrap().requests
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn answer(stream: TcpStream, acceptor: &TlsAcceptor, served: &Mutex<Served>) -> std::io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let mut request = vec![];
    while !request.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    assert!(request.starts_with(b"GET /keys?of=tests HTTP/1.1\r\n"), "{}", String::from_utf8_lossy(&request));
    let document = {
        let mut served = served.lock().unwrap();
        served.requests += 1;
        served.document.clone()
    };
    let status = if document.is_some() { "200 OK" } else { "503 Service Unavailable" };
    let body = document.unwrap_or_default();
    let length = body.len();
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}
