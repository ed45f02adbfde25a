//! A front of the mail server: TLS and a login. It hands the rest of a session to the server.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufStream, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::certificates::{Authority, Certificate};

/// What the front demands of its clients.
#[derive(Clone, Copy)]
pub struct Front {
    /// Whether a connection is encrypted from the first byte. Otherwise the front offers STARTTLS
    /// and accepts no mail before.
    pub implicit: bool,
    /// The mechanism of the login that it offers and requires. `None`: no login.
    pub login: Option<&'static str>,
    /// Name in its certificate.
    pub name: &'static str,
}

pub const USER: &str = "waybill";
pub const PASSWORD: &str = "correct horse";

/// A running front. It ends when it is dropped.
pub struct RunningFront {
    pub address: SocketAddr,
    authority: Authority,
    _tasks: JoinSet<()>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Front {
    /// Starts the front of the mail server at `server`, with a new authority and a certificate
    /// signed by it.
    pub async fn start(self, server: SocketAddr) -> RunningFront {
        let authority = Authority::create();
        let certificate = authority.certificate(self.name);
        self.start_with(server, authority, &certificate).await
    }

    /// As [`Front::start`], with a certificate that was valid until yesterday.
    pub async fn start_expired(self, server: SocketAddr) -> RunningFront {
        let authority = Authority::create();
        let certificate = authority.expired_certificate(self.name);
        self.start_with(server, authority, &certificate).await
    }

    async fn start_with(self, server: SocketAddr, authority: Authority, certificate: &Certificate) -> RunningFront {
        let acceptor = certificate.acceptor();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut sessions = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                // An error means that the client closed the connection or does not trust us.
                let acceptor = acceptor.clone();
                sessions.spawn(async move { self.serve(stream, &acceptor, server).await.is_ok() });
            }
        });
        RunningFront { address, authority, _tasks: tasks }
    }

    async fn serve(self, stream: TcpStream, acceptor: &TlsAcceptor, server: SocketAddr) -> io::Result<()> {
        let mut encrypted = self.implicit;
        let mut stream: BufStream<Box<dyn Stream>> = if encrypted {
            BufStream::new(Box::new(acceptor.accept(stream).await?))
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
                    let login = self.login.filter(|_| encrypted);
                    let login = login.map(|mechanism| format!("250-AUTH {mechanism}\r\n")).unwrap_or_default();
                    answer(&mut stream, &format!("250-front\r\n{starttls}{login}250 HELP")).await?;
                }
                "STARTTLS" => {
                    answer(&mut stream, "220 go").await?;
                    let inner = stream.into_inner();
                    stream = BufStream::new(Box::new(acceptor.accept(inner).await?));
                    encrypted = true;
                }
                "AUTH" => {
                    let credentials = match rest.strip_prefix("PLAIN ") {
                        Some(credentials) => decoded(credentials),
                        None => {
                            answer(&mut stream, "334 VXNlcm5hbWU6").await?;
                            let user = decoded(&self::line(&mut stream).await?);
                            answer(&mut stream, "334 UGFzc3dvcmQ6").await?;
                            format!("\0{user}\0{}", decoded(&self::line(&mut stream).await?))
                        }
                    };
                    logged_in = credentials == format!("\0{USER}\0{PASSWORD}");
                    answer(&mut stream, if logged_in { "235 2.7.0 welcome" } else { "535 5.7.8 wrong" }).await?;
                }
                "MAIL" if encrypted && logged_in => break hand_over(stream, &line, server).await,
                "MAIL" => answer(&mut stream, "530 5.7.0 encrypt and log in first").await?,
                _ => return answer(&mut stream, "221 bye").await,
            }
        }
    }
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

impl RunningFront {
    /// The settings with which the email service trusts this front and uses it.
    pub fn settings(&self, folder: &Path) -> [(&'static str, String); 3] {
        let file = folder.join(format!("authority-{}.pem", self.address.port()));
        self.authority.write(file.clone());
        [
            ("SMTP_HOST", "localhost".to_owned()),
            ("SMTP_PORT", self.address.port().to_string()),
            ("SMTP_CA_FILE", file.to_str().unwrap().to_owned()),
        ]
    }
}
