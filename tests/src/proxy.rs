//! A TCP proxy between one service and one of its dependencies, which fails as networks do: slow, broken, or silent.

use std::io;
use std::time::Duration;

use testbed::testing::free_port;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

const PIECE: usize = 16 * 1024;

/// Forwards until it is dropped.
pub struct Proxy {
    target: String,
    port: u16,
    network: watch::Sender<Network>,
    _listener: JoinSet<()>,
}

#[derive(Clone, Copy, Default)]
struct Network {
    link: Link,
    /// Before each piece, in each direction.
    latency: Duration,
    /// If set, only pieces that hold such a request are late.
    late: Option<Request>,
    /// Every increase ends the connections that are there.
    resets: u64,
}

/// A kind of Kafka request, by its API key.
#[derive(Clone, Copy)]
pub enum Request {
    ListOffsets = 2,
}

impl Request {
    /// Whether it is in a piece that begins where a request does: four bytes of length, then the API key.
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
    /// Before `target`, which is `host:port`.
    pub async fn before(target: &str) -> Self {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let (network, watched) = watch::channel(Network::default());
        let mut task = JoinSet::new();
        task.spawn(accept(listener, target.to_owned(), watched));
        Self { target: target.to_owned(), port, network, _listener: task }
    }

    /// Before the server that `url` names; and the URL that leads through the proxy.
    pub async fn before_url(url: &str) -> (Self, String) {
        let (_, address) = url.split_once("://").unwrap();
        let address = address.rsplit('@').next().unwrap().split('/').next().unwrap();
        let proxy = Self::before(address).await;
        let through = url.replace(&proxy.target, &proxy.address());
        (proxy, through)
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whatever passes takes this much longer, each way.
    pub fn slow(&self, latency: Duration) {
        self.network.send_modify(|network| network.latency = latency);
    }

    /// Requests of this kind take this much longer, and with them what follows on the same connection.
    pub fn slow_requests(&self, late: Request, latency: Duration) {
        self.network.send_modify(|network| (network.latency, network.late) = (latency, Some(late)));
    }

    /// Breaks every connection that is there (RST). New ones are welcome.
    pub fn reset(&self) {
        self.network.send_modify(|network| network.resets += 1);
    }

    /// Breaks every connection, and each new one as soon as it comes.
    pub fn cut(&self) {
        self.network.send_modify(|network| network.link = Link::Cut);
    }

    /// Half open: connections stay, new ones are taken, and nothing that is sent arrives, in either direction, not even the end.
    pub fn silence(&self) {
        self.network.send_modify(|network| network.link = Link::Silent);
    }

    /// New connections work, without delay. One that has fallen silent stays so, as when a firewall has forgotten it: only its
    /// own side can give it up.
    pub fn heal(&self) {
        self.network.send_modify(|network| {
            network.link = Link::Up;
            (network.latency, network.late) = (Duration::ZERO, None);
        });
    }
}

async fn accept(listener: TcpListener, target: String, network: watch::Receiver<Network>) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let (target, network) = (target.clone(), network.clone());
        connections.spawn(async move {
            // What ends a connection of a failing network is part of the game.
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
        ended = converse(&mut client, target, &mut network) => return ended,
    }
    client.set_zero_linger()
}

/// Until one side ends, or nothing arrives any more: then until both are gone.
async fn converse(client: &mut TcpStream, target: &str, network: &mut watch::Receiver<Network>) -> io::Result<()> {
    if network.borrow().link == Link::Silent {
        return swallow(client).await;
    }
    let mut server = TcpStream::connect(target).await?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let (there, back) = (network.clone(), network.clone());
    let silent = tokio::select! {
        biased;
        _ = network.wait_for(|network| network.link == Link::Silent) => true,
        ended = carry(&mut from_client, &mut to_server, &there) => { ended?; false }
        ended = carry(&mut from_server, &mut to_client, &back) => { ended?; false }
    };
    if silent {
        let _ = tokio::join!(swallow(&mut from_client), swallow(&mut from_server));
    }
    Ok(())
}

async fn carry(
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
        let Network { latency, late, .. } = *network.borrow();
        if !latency.is_zero() && late.is_none_or(|request| request.is_in(&piece[..length])) {
            tokio::time::sleep(latency).await;
        }
        to.write_all(&piece[..length]).await?;
    }
}

async fn swallow(from: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    while from.read(&mut piece).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::time::timeout;

    use super::*;

    /// Long enough for anything on loopback, short enough to wait for nothing.
    const MOMENT: Duration = Duration::from_millis(300);

    /// A server that answers every piece with the same, and a proxy before it.
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
    async fn latency_counts_both_ways_and_ends_when_healed() {
        let (proxy, _server) = proxied_echo().await;
        let mut stream = connect(&proxy).await;
        echoes(&mut stream).await.unwrap();
        proxy.slow(MOMENT);
        let asked = Instant::now();
        echoes(&mut stream).await.unwrap();
        assert!(asked.elapsed() >= 2 * MOMENT);
        proxy.heal();
        timeout(MOMENT, echoes(&mut stream)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_reset_breaks_what_is_there_and_a_cut_also_what_comes() {
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
    async fn what_fell_silent_stays_silent_until_it_is_reset() {
        let (proxy, _server) = proxied_echo().await;
        let mut early = connect(&proxy).await;
        echoes(&mut early).await.unwrap();
        proxy.silence();
        let mut late = connect(&proxy).await;
        for stream in [&mut early, &mut late] {
            timeout(MOMENT, echoes(stream)).await.expect_err("no answer, and no error either");
        }
        proxy.heal();
        timeout(MOMENT, echoes(&mut early)).await.expect_err("still none");
        echoes(&mut connect(&proxy).await).await.unwrap();
        proxy.reset();
        assert_eq!(early.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
