//! A TCP proxy between a service and one of its dependencies. It fails as networks do: slow, broken
//! or silent.

use std::io;
use std::time::Duration;

use testbed::testing::free_port;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The most bytes that are forwarded at once.
const PIECE: usize = 16 * 1024;

/// Forwards until it is dropped.
pub struct Proxy {
    /// `host:port`. New connections go there.
    target: watch::Sender<String>,
    port: u16,
    network: watch::Sender<Network>,
    _listener: JoinSet<()>,
}

#[derive(Clone, Copy, Default)]
struct Network {
    link: Link,
    /// Delay of each piece, in each direction.
    latency: Duration,
    /// If set, only pieces with such a request are delayed.
    delayed: Option<KafkaRequest>,
    /// Number of resets. Each one breaks the open connections.
    resets: u64,
}

/// A type of Kafka request, by its API key.
#[derive(Clone, Copy)]
pub enum KafkaRequest {
    ListOffsets = 2,
}

impl KafkaRequest {
    /// Whether a piece that begins with a request contains one of this type. A request begins with
    /// its length in four bytes and its API key in two.
    fn is_in(self, mut piece: &[u8]) -> bool {
        while let Some((head, _)) = piece.split_first_chunk::<6>() {
            let [l0, l1, l2, l3, key @ ..] = *head;
            if u16::from_be_bytes(key) == self as u16 {
                return true;
            }
            piece = piece.get(4 + u32::from_be_bytes([l0, l1, l2, l3]) as usize..).unwrap_or_default();
        }
        false
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Link {
    #[default]
    Up,
    Cut,
    Silent,
}

impl Proxy {
    /// A proxy in front of `target`, which is `host:port`.
    pub async fn before(target: &str) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let (network, watched) = watch::channel(Network::default());
        let (target, targets) = watch::channel(target.to_owned());
        let mut task = JoinSet::new();
        task.spawn(accept(listener, targets, watched));
        Self { target, port, network, _listener: task }
    }

    /// A proxy in front of the server of `url`, and the URL of the same server through the proxy.
    pub async fn before_url(url: &str) -> (Self, String) {
        let (_, address) = url.split_once("://").unwrap();
        let address = address.rsplit('@').next().unwrap().split('/').next().unwrap();
        let proxy = Self::before(address).await;
        let through = url.replace(address, &proxy.address());
        (proxy, through)
    }

    /// The `host:port` to which new connections go.
    pub fn target(&self) -> String {
        self.target.borrow().clone()
    }

    /// New connections go to this `host:port`, as after a failover. Open ones stay where they are.
    pub fn redirect(&self, target: String) {
        self.target.send_replace(target);
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Delays everything by this time, in each direction.
    pub fn slow(&self, latency: Duration) {
        self.network.send_modify(|network| network.latency = latency);
    }

    /// Delays requests of this type by this time, and with them the later ones of the same
    /// connection.
    pub fn slow_requests(&self, delayed: KafkaRequest, latency: Duration) {
        self.network.send_modify(|network| {
            network.latency = latency;
            network.delayed = Some(delayed);
        });
    }

    /// Breaks every open connection (RST). New ones work.
    pub fn reset(&self) {
        self.network.send_modify(|network| network.resets += 1);
    }

    /// Breaks every open connection, and each new one as soon as it is accepted.
    pub fn cut(&self) {
        self.network.send_modify(|network| network.link = Link::Cut);
    }

    /// Half-open network: connections stay open and new ones are accepted, but nothing arrives in
    /// either direction, not even the end of a connection.
    pub fn silence(&self) {
        self.network.send_modify(|network| network.link = Link::Silent);
    }

    /// New connections work, without delay. A connection that fell silent stays silent, as after a
    /// firewall has dropped its state, so only a time-out of the client can end it.
    pub fn heal(&self) {
        self.network.send_modify(|network| {
            network.link = Link::Up;
            network.latency = Duration::ZERO;
            network.delayed = None;
        });
    }
}

async fn accept(listener: TcpListener, targets: watch::Receiver<String>, network: watch::Receiver<Network>) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let target = targets.borrow().clone();
        let network = network.clone();
        connections.spawn(async move {
            // Connections of a failing network may end with any error.
            let _ = serve(client, &target, network).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(mut client: TcpStream, target: &str, mut network: watch::Receiver<Network>) -> io::Result<()> {
    let mut watched = network.clone();
    let resets = watched.borrow().resets;
    tokio::select! {
        biased;
        _ = watched.wait_for(|network| network.link == Link::Cut || network.resets != resets) => {}
        ended = forward_both_ways(&mut client, target, &mut network) => return ended,
    }
    client.set_zero_linger()
}

/// Forwards until one side closes. If the network falls silent, waits until both sides have closed.
async fn forward_both_ways(
    client: &mut TcpStream,
    target: &str,
    network: &mut watch::Receiver<Network>,
) -> io::Result<()> {
    if network.borrow().link == Link::Silent {
        return discard(client).await;
    }
    let mut server = TcpStream::connect(target).await?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let there = network.clone();
    let back = network.clone();
    let silent = tokio::select! {
        biased;
        _ = network.wait_for(|network| network.link == Link::Silent) => true,
        ended = forward(&mut from_client, &mut to_server, &there) => {
            ended?;
            false
        }
        ended = forward(&mut from_server, &mut to_client, &back) => {
            ended?;
            false
        }
    };
    if silent {
        let _ = tokio::join!(discard(&mut from_client), discard(&mut from_server));
    }
    Ok(())
}

async fn forward(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    network: &watch::Receiver<Network>,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let length = from.read(&mut piece).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        let Network { latency, delayed, .. } = *network.borrow();
        if !latency.is_zero() && delayed.is_none_or(|request| request.is_in(&piece[..length])) {
            tokio::time::sleep(latency).await;
        }
        to.write_all(&piece[..length]).await?;
    }
}

/// Reads until the end and forwards nothing.
async fn discard(from: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    while from.read(&mut piece).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::time::timeout;

    use super::*;

    /// Longer than anything on the loopback device takes, and short enough to wait for something
    /// that does not happen.
    const MOMENT: Duration = Duration::from_millis(300);

    /// A server that echoes, and a proxy in front of it.
    async fn proxied_echo() -> (Proxy, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut clients = JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                clients.spawn(async move {
                    let (mut from, mut to) = client.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        (Proxy::before(&address).await, server)
    }

    async fn connect(proxy: &Proxy) -> TcpStream {
        TcpStream::connect(proxy.address()).await.unwrap()
    }

    async fn echoes(stream: &mut TcpStream) -> io::Result<()> {
        stream.write_all(b"ping").await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.map(drop)
    }

    #[tokio::test]
    async fn latency_applies_in_both_directions_until_the_network_heals() {
        let (proxy, _server) = proxied_echo().await;
        let mut stream = connect(&proxy).await;
        echoes(&mut stream).await.unwrap();
        proxy.slow(MOMENT);
        let sent_at = Instant::now();
        echoes(&mut stream).await.unwrap();
        assert!(sent_at.elapsed() >= 2 * MOMENT);
        proxy.heal();
        timeout(MOMENT, echoes(&mut stream)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_reset_breaks_open_connections_and_a_cut_also_new_ones() {
        let (proxy, _server) = proxied_echo().await;
        let mut stream = connect(&proxy).await;
        echoes(&mut stream).await.unwrap();
        proxy.reset();
        assert_eq!(stream.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        echoes(&mut connect(&proxy).await).await.unwrap();
        proxy.cut();
        echoes(&mut connect(&proxy).await).await.unwrap_err();
        proxy.heal();
        echoes(&mut connect(&proxy).await).await.unwrap();
    }

    #[tokio::test]
    async fn a_silent_connection_stays_silent_until_it_is_reset() {
        let (proxy, _server) = proxied_echo().await;
        let mut early = connect(&proxy).await;
        echoes(&mut early).await.unwrap();
        proxy.silence();
        let mut late = connect(&proxy).await;
        for stream in [&mut early, &mut late] {
            timeout(MOMENT, echoes(stream)).await.expect_err("the proxy is silent");
        }
        proxy.heal();
        timeout(MOMENT, echoes(&mut early)).await.expect_err("the connection is still silent");
        echoes(&mut connect(&proxy).await).await.unwrap();
        proxy.reset();
        assert_eq!(early.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
