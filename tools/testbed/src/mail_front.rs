//! A front of the mail server: TLS and a login. It hands the rest of a session to the server.

use std::io;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufStream, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// What the front demands of its clients.
#[derive(Clone)]
pub struct Front {
    /// Whether a connection is encrypted from the first byte. Otherwise the front offers STARTTLS
    /// and accepts no mail before.
    pub implicit: bool,
    /// `None`: no login.
    pub login: Option<Login>,
    pub acceptor: TlsAcceptor,
}

/// The only login that the front accepts.
#[derive(Clone)]
pub struct Login {
    /// The mechanism: `PLAIN` or `LOGIN`.
    pub mechanism: &'static str,
    pub user: String,
    pub password: String,
}

/// A running front. It ends when it is dropped.
pub struct RunningFront {
    pub address: SocketAddr,
    _tasks: JoinSet<()>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Front {
    /// Starts the front of the mail server at `server`.
    pub async fn start(self, address: SocketAddr, server: SocketAddr) -> Result<RunningFront> {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("the front of the SMTP sink cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut sessions = JoinSet::new();
            loop {
                // An error means that the client closed the connection or does not trust us.
                if let Ok((stream, _)) = listener.accept().await {
                    let front = self.clone();
                    sessions.spawn(async move { front.serve(stream, server).await.is_ok() });
                }
                while sessions.try_join_next().is_some() {}
            }
        });
        Ok(RunningFront { address, _tasks: tasks })
    }

    async fn serve(self, stream: TcpStream, server: SocketAddr) -> io::Result<()> {
        let mut encrypted = self.implicit;
        let mut stream: BufStream<Box<dyn Stream>> = if encrypted {
            BufStream::new(Box::new(self.acceptor.accept(stream).await?))
        } else {
            BufStream::new(Box::new(stream))
        };
        let mut logged_in = self.login.is_none();
        answer(&mut stream, "220 front").await?;
        loop {
            let line = line(&mut stream).await?;
            let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match verb {
                "EHLO" => {
                    let starttls = if encrypted { "" } else { "250-STARTTLS\r\n" };
                    let login = self.login.as_ref().filter(|_| encrypted);
                    let login = login.map(|login| format!("250-AUTH {}\r\n", login.mechanism)).unwrap_or_default();
                    answer(&mut stream, &format!("250-front\r\n{starttls}{login}250 HELP")).await?;
                }
                "STARTTLS" => {
                    answer(&mut stream, "220 go").await?;
                    let inner = stream.into_inner();
                    stream = BufStream::new(Box::new(self.acceptor.accept(inner).await?));
                    encrypted = true;
                }
                "AUTH" => {
                    let credentials = credentials(&mut stream, rest).await?;
                    let expected = self.login.as_ref().map(|login| format!("\0{}\0{}", login.user, login.password));
                    logged_in = expected.is_some_and(|expected| credentials == expected);
                    answer(&mut stream, if logged_in { "235 2.7.0 welcome" } else { "535 5.7.8 wrong" }).await?;
                }
                "MAIL" if encrypted && logged_in => break hand_over(stream, &line, server).await,
                "MAIL" => answer(&mut stream, "530 5.7.0 encrypt and log in first").await?,
                _ => return answer(&mut stream, "221 bye").await,
            }
        }
    }
}

/// What follows `AUTH`, as PLAIN sends it. LOGIN sends user and password one after the other.
async fn credentials(stream: &mut BufStream<Box<dyn Stream>>, rest: &str) -> io::Result<String> {
    if let Some(credentials) = rest.strip_prefix("PLAIN ") {
        return Ok(decoded(credentials));
    }
    answer(stream, "334 VXNlcm5hbWU6").await?;
    let user = decoded(&line(stream).await?);
    answer(stream, "334 UGFzc3dvcmQ6").await?;
    Ok(format!("\0{user}\0{}", decoded(&line(stream).await?)))
}

/// Connects to the mail server, says hello for the client, and passes on everything from `line`.
async fn hand_over(mut client: BufStream<Box<dyn Stream>>, line: &str, server: SocketAddr) -> io::Result<()> {
    let mut server = BufStream::new(TcpStream::connect(server).await?);
    self::line(&mut server).await?;
    answer(&mut server, "HELO front").await?;
    self::line(&mut server).await?;
    answer(&mut server, line).await?;
    copy_bidirectional(&mut client, &mut server).await.map(|_| ())
}

async fn answer(stream: &mut (impl AsyncWrite + Unpin), text: &str) -> io::Result<()> {
    stream.write_all(format!("{text}\r\n").as_bytes()).await?;
    stream.flush().await
}

async fn line(stream: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}

fn decoded(text: &str) -> String {
    STANDARD.decode(text).ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default()
}
