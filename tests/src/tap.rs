//! Records what clients send to a server.

use std::io;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Forwards connections until it is dropped.
pub struct Tap {
    address: String,
    sent: Arc<Mutex<Vec<u8>>>,
    _listener: JoinSet<()>,
}

impl Tap {
    /// `target` is `host:port`.
    pub async fn before(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let sent = Arc::default();
        let recorded = Arc::clone(&sent);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let target = target.clone();
                let recorded = Arc::clone(&recorded);
                connections.spawn(async move { serve(client, &target, &recorded).await.is_ok() });
            }
        });
        Self { address, sent, _listener: task }
    }

    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Whether a client has sent this text.
    pub fn has_seen(&self, text: &str) -> bool {
        self.sent.lock().unwrap().windows(text.len()).any(|window| window == text.as_bytes())
    }
}

async fn serve(mut client: TcpStream, target: &str, sent: &Mutex<Vec<u8>>) -> io::Result<()> {
    let mut server = TcpStream::connect(target).await?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let there = async {
        let mut piece = vec![0; 16 * 1024];
        loop {
            let length = from_client.read(&mut piece).await?;
            if length == 0 {
                return to_server.shutdown().await;
            }
            sent.lock().unwrap().extend_from_slice(&piece[..length]);
            to_server.write_all(&piece[..length]).await?;
        }
    };
    let back = tokio::io::copy(&mut from_server, &mut to_client);
    tokio::try_join!(there, back).map(drop)
}
