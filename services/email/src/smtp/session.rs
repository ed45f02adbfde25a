//! One SMTP session (RFC 5321): commands and replies over one connection, with or without TLS. The
//! time-outs are those of RFC 5321 §4.5.3.2. Some servers use them: they scan a mail for minutes
//! before they answer. A shorter time-out would send the mail again while the server accepts it.

use std::io;
use std::time::Duration;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::reply::{LINE_LIMIT, Line, Reply};

/// How long a session waits for the answer to each step.
#[derive(Clone, Copy)]
pub struct Limits {
    pub greeting: Duration,
    /// Also for EHLO, STARTTLS and AUTH, for which RFC 5321 gives no time.
    pub command: Duration,
    pub data: Duration,
    /// For each part of the mail that the connection takes.
    pub block: Duration,
    pub final_dot: Duration,
}

impl Limits {
    pub const RFC_5321: Self = Self {
        greeting: Duration::from_secs(300),
        command: Duration::from_secs(300),
        data: Duration::from_secs(120),
        block: Duration::from_secs(180),
        final_dot: Duration::from_secs(600),
    };
}

/// Not from RFC 5321: a TLS handshake needs a few round trips.
const HANDSHAKE: Duration = Duration::from_secs(60);
/// Not from RFC 5321: nothing depends on the answer to QUIT.
const QUIT: Duration = Duration::from_secs(1);
/// Bytes per write to the connection.
const BLOCK_SIZE: usize = 16 * 1024;
/// Lines of one reply. No server has so many extensions.
const MAX_LINES: usize = 200;

/// A connection, with or without TLS.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

pub struct Session {
    stream: BufReader<Box<dyn Stream>>,
    limits: Limits,
}

/// Why a step failed.
#[derive(Debug)]
pub enum Failure {
    /// The server refused the step.
    Refused(Reply),
    /// No answer came, or none that is a reply. What happened, without any text of the server.
    NoAnswer(&'static str),
}

/// What the server offers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    pub starttls: bool,
    pub auth_plain: bool,
    pub auth_login: bool,
}

impl Session {
    /// Reads the greeting.
    pub async fn greeted(stream: impl Stream + 'static, limits: Limits) -> Result<Self, Failure> {
        let mut session = Self { stream: BufReader::new(Box::new(stream)), limits };
        session.positive_reply(limits.greeting).await?;
        Ok(session)
    }

    /// EHLO, or HELO if the server does not know EHLO.
    pub async fn hello(&mut self, name: &str) -> Result<Extensions, Failure> {
        self.write(format!("EHLO {name}\r\n").as_bytes()).await?;
        let mut lines = vec![];
        let reply = self.reply(self.limits.command, Some(&mut lines)).await?;
        if reply.is_positive() {
            return Ok(Extensions::of(&lines));
        }
        if matches!(reply.code, 500 | 502) {
            self.command(&format!("HELO {name}")).await?;
            return Ok(Extensions::default());
        }
        Err(Failure::Refused(reply))
    }

    /// Encrypts the connection.
    pub async fn starttls(mut self, connector: &TlsConnector, name: ServerName<'static>) -> Result<Self, Failure> {
        self.command("STARTTLS").await?;
        // An attacker who can write into the connection before it is encrypted could put replies
        // here, and we would read them as encrypted ones.
        if !self.stream.buffer().is_empty() {
            return Err(Failure::NoAnswer("the server sent text between STARTTLS and the handshake"));
        }
        let stream = handshake(connector, name, self.stream.into_inner()).await?;
        Ok(Self { stream: BufReader::new(stream), limits: self.limits })
    }

    /// Sends a command and waits for a positive reply.
    pub async fn command(&mut self, command: &str) -> Result<Reply, Failure> {
        self.write(format!("{command}\r\n").as_bytes()).await?;
        self.positive_reply(self.limits.command).await
    }

    /// Sends a line and waits for a reply that asks for more (3xx).
    pub async fn challenge(&mut self, line: &str) -> Result<(), Failure> {
        self.write(format!("{line}\r\n").as_bytes()).await?;
        self.intermediate_reply(self.limits.command).await
    }

    /// DATA: the server is ready for the mail.
    pub async fn data(&mut self) -> Result<(), Failure> {
        self.write(b"DATA\r\n").await?;
        self.intermediate_reply(self.limits.data).await
    }

    /// Sends the mail without the dot that ends it. The server cannot have accepted the mail if
    /// this fails.
    pub async fn content(&mut self, mail: &[u8]) -> Result<(), Failure> {
        for block in dot_stuffed(mail).chunks(BLOCK_SIZE) {
            self.write(block).await?;
        }
        Ok(())
    }

    /// Sends the dot that ends the mail and waits for the answer.
    ///
    /// # Errors
    /// With [`Failure::NoAnswer`] it is unknown whether the server has accepted the mail.
    pub async fn final_dot(&mut self) -> Result<Reply, Failure> {
        self.write(b".\r\n").await?;
        match self.reply(self.limits.final_dot, None).await? {
            reply if reply.is_positive() => Ok(reply),
            // Neither accepted nor refused.
            reply if reply.code < 400 => Err(Failure::NoAnswer("the server's answer to the mail makes no sense")),
            reply => Err(Failure::Refused(reply)),
        }
    }

    /// QUIT, so that the server does not wait for its time-out.
    pub async fn quit(mut self) {
        let quit = async {
            self.write(b"QUIT\r\n").await?;
            self.reply(QUIT, None).await
        };
        let _ = timeout(QUIT, quit).await; // the result does not matter
    }

    async fn positive_reply(&mut self, limit: Duration) -> Result<Reply, Failure> {
        match self.reply(limit, None).await? {
            reply if reply.is_positive() => Ok(reply),
            reply if reply.code < 400 => Err(Failure::NoAnswer("the server asked for more than the command")),
            reply => Err(Failure::Refused(reply)),
        }
    }

    async fn intermediate_reply(&mut self, limit: Duration) -> Result<(), Failure> {
        match self.reply(limit, None).await? {
            reply if (300..400).contains(&reply.code) => Ok(()),
            reply if reply.is_positive() => Err(Failure::NoAnswer("the server did not ask for what follows")),
            reply => Err(Failure::Refused(reply)),
        }
    }

    /// Reads a reply of one or more lines. The code is that of the last line. The enhanced status
    /// code is the first one.
    async fn reply(&mut self, limit: Duration, lines: Option<&mut Vec<Vec<u8>>>) -> Result<Reply, Failure> {
        timeout(limit, self.read_reply(lines))
            .await
            .unwrap_or(Err(Failure::NoAnswer("the server did not answer in time")))
    }

    async fn read_reply(&mut self, mut lines: Option<&mut Vec<Vec<u8>>>) -> Result<Reply, Failure> {
        let mut enhanced = None;
        for _ in 0..MAX_LINES {
            let text = self.line().await?;
            let line = Line::parse(&text).ok_or(Failure::NoAnswer("the server did not answer with SMTP"))?;
            enhanced = enhanced.or(line.reply.enhanced);
            if let Some(lines) = &mut lines {
                lines.push(text);
            }
            if !line.continues {
                return Ok(Reply { enhanced, ..line.reply });
            }
        }
        Err(Failure::NoAnswer("the server's reply has too many lines"))
    }

    /// The beginning of the next line, without its line break.
    async fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut line = vec![];
        loop {
            let available = self.stream.fill_buf().await?;
            if available.is_empty() {
                return Err(Failure::NoAnswer("the server closed the connection"));
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let length = end.unwrap_or(available.len());
            let room = LINE_LIMIT - line.len();
            line.extend_from_slice(&available[..length.min(room)]);
            let read = length + usize::from(end.is_some());
            self.stream.consume(read);
            if end.is_some() {
                line.pop_if(|byte| *byte == b'\r');
                return Ok(line);
            }
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let limit = self.limits.block;
        let write = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        timeout(limit, write).await.map_err(|_| Failure::NoAnswer("the server does not take any data"))??;
        Ok(())
    }
}

/// Starts TLS on a connection.
pub async fn handshake(
    connector: &TlsConnector,
    name: ServerName<'static>,
    stream: impl Stream + 'static,
) -> Result<Box<dyn Stream>, Failure> {
    let connected = timeout(HANDSHAKE, connector.connect(name, stream)).await;
    let connected = connected.map_err(|_| Failure::NoAnswer("the server did not finish the TLS handshake in time"))?;
    connected.map(|stream| Box::new(stream) as Box<dyn Stream>).map_err(|error| {
        // The error names the certificate's fault and contains nothing of a mail.
        tracing::warn!(%error, "TLS handshake with the mail server failed; check SMTP_TLS, SMTP_HOST and SMTP_CA_FILE");
        Failure::NoAnswer("the TLS handshake failed")
    })
}

impl Extensions {
    fn of(lines: &[Vec<u8>]) -> Self {
        let mut extensions = Self::default();
        // The first line is the greeting.
        for line in lines.iter().skip(1) {
            let text = String::from_utf8_lossy(line.get(4..).unwrap_or_default()).to_ascii_uppercase();
            // Some old servers write `AUTH=PLAIN`.
            let mut words = text.split([' ', '=']).filter(|word| !word.is_empty());
            match words.next() {
                Some("STARTTLS") => extensions.starttls = true,
                Some("AUTH") => {
                    for mechanism in words {
                        extensions.auth_plain |= mechanism == "PLAIN";
                        extensions.auth_login |= mechanism == "LOGIN";
                    }
                }
                _ => {}
            }
        }
        extensions
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::NoAnswer(match error.kind() {
            io::ErrorKind::ConnectionRefused => "the server refused the connection",
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => "the server reset the connection",
            _ => "the connection broke",
        })
    }
}

/// The mail as it is sent (RFC 5321 §4.5.2): every line ends in CRLF, and a dot at the beginning of
/// a line is doubled. A lone CR or LF counts as a line break, so that no server sees an end of the
/// mail that we do not see.
fn dot_stuffed(mail: &[u8]) -> Vec<u8> {
    let mut sent = Vec::with_capacity(mail.len() + 64);
    let mut rest = mail;
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(rest.len());
        let (line, after) = rest.split_at(end);
        if line.first() == Some(&b'.') {
            sent.push(b'.');
        }
        sent.extend_from_slice(line);
        sent.extend_from_slice(b"\r\n");
        rest = after.strip_prefix(b"\r\n").or_else(|| after.get(1..)).unwrap_or_default();
    }
    sent
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};
    use tokio::task::JoinSet;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const PATIENT: Limits = Limits { greeting: LONG, command: LONG, data: LONG, block: LONG, final_dot: LONG };

    /// A server that answers each line with the next reply. After the last one it is silent. An
    /// empty reply closes the connection. Returns also what it received.
    fn server(replies: &'static [&'static [u8]]) -> (DuplexStream, JoinSet<Vec<u8>>) {
        let (client, server) = duplex(1 << 16);
        let mut received = JoinSet::new();
        received.spawn(async move {
            let mut stream = BufReader::new(server);
            let mut all = vec![];
            for (number, reply) in replies.iter().enumerate() {
                if number > 0 {
                    let start = all.len();
                    while stream.read_until(b'\n', &mut all).await.unwrap() > 0 && !expects_reply(&all[start..]) {}
                }
                if reply.is_empty() {
                    return all;
                }
                stream.write_all(reply).await.unwrap();
            }
            stream.read_until(0, &mut all).await.unwrap();
            all
        });
        (client, received)
    }

    /// Whether the text is a whole command, or a mail up to its final dot.
    fn expects_reply(text: &[u8]) -> bool {
        !text.starts_with(b"Subject:") || text.ends_with(b"\r\n.\r\n")
    }

    /// Holds one conversation. Returns `ok` for each step that succeeded, and the first failure.
    async fn converse(stream: DuplexStream, limits: Limits) -> Vec<String> {
        let mut steps = 0;
        let failure = match hold(stream, limits, &mut steps).await {
            Ok(()) => None,
            Err(Failure::Refused(reply)) => Some(reply.to_string()),
            Err(Failure::NoAnswer(why)) => Some(why.to_owned()),
        };
        std::iter::repeat_n("ok".to_owned(), steps).chain(failure).collect()
    }

    async fn hold(stream: DuplexStream, limits: Limits, steps: &mut usize) -> Result<(), Failure> {
        let mut session = Session::greeted(stream, limits).await?;
        *steps += 1;
        session.hello("waybill.example").await?;
        *steps += 1;
        session.command("MAIL FROM:<a@test>").await?;
        *steps += 1;
        session.data().await?;
        *steps += 1;
        session.content(b"Subject: x\r\n\r\n.dot\r\n").await?;
        session.final_dot().await?;
        *steps += 1;
        Ok(())
    }

    #[tokio::test]
    async fn replies_without_text_and_in_any_character_set_are_understood() {
        let (client, mut received) = server(&[
            b"220\r\n",
            b"250-m\xfcller\r\n250-SIZE\r\n250 HELP\r\n",
            b"250\n",
            b"354\r\n",
            b"250 2.0.0 Message accept\xe9\r\n",
        ]);
        assert_eq!(converse(client, PATIENT).await, ["ok"; 5]);
        let received = String::from_utf8(received.join_next().await.unwrap().unwrap()).unwrap();
        let expected = "EHLO waybill.example\r\nMAIL FROM:<a@test>\r\nDATA\r\nSubject: x\r\n\r\n..dot\r\n.\r\n";
        assert_eq!(received, expected);
    }

    #[tokio::test]
    async fn a_refusal_has_the_code_and_the_enhanced_status_code_of_any_line() {
        for (reply, expected) in [
            (&b"550 5.1.1 Bo\xeete inconnue\r\n"[..], "550 5.1.1"),
            (b"550-5.7.1 blocked\r\n550 see https://example.org\r\n", "550 5.7.1"),
            (b"550-blocked\r\n550 5.7.1 see\r\n", "550 5.7.1"),
            (b"451 try later\r\n", "451"),
        ] {
            let replies: &'static [&'static [u8]] = Box::leak(Box::new([b"220 hello\r\n", b"250 hello\r\n", reply]));
            let (client, _received) = server(replies);
            assert_eq!(converse(client, PATIENT).await, ["ok", "ok", expected]);
        }
    }

    #[tokio::test]
    async fn a_server_that_does_not_know_ehlo_is_greeted_with_helo() {
        let (client, mut received) = server(&[b"220 old\r\n", b"502 what?\r\n", b"250 hello\r\n", b"250 ok\r\n", b""]);
        assert_eq!(converse(client, PATIENT).await, ["ok", "ok", "ok", "the server closed the connection"]);
        let received = received.join_next().await.unwrap().unwrap();
        assert!(received.starts_with(b"EHLO waybill.example\r\nHELO waybill.example\r\n"));
    }

    #[tokio::test]
    async fn what_is_not_smtp_is_no_answer() {
        for (reply, expected) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], "the server did not answer with SMTP"),
            (b"\x16\x03\x01\x00\x05\n", "the server did not answer with SMTP"),
            (b"\r\n", "the server did not answer with SMTP"),
        ] {
            let replies: &'static [&'static [u8]] = Box::leak(Box::new([reply]));
            let (client, _received) = server(replies);
            assert_eq!(converse(client, PATIENT).await, [expected]);
        }
        // A line of any length is read, and only its beginning is kept.
        let long = [b"220 ".to_vec(), vec![b'x'; 100_000], b"\r\n".to_vec()].concat();
        let replies: &'static [&'static [u8]] =
            Box::leak(Box::new([&*Box::leak(long.into_boxed_slice()), b"250 ok\r\n"]));
        let (client, _received) = server(replies);
        assert_eq!(converse(client, Limits { command: Duration::from_millis(50), ..PATIENT }).await[..2], ["ok", "ok"]);
        let (client, _received) =
            server(Box::leak(Box::new([&*Box::leak(b"220-x\r\n".repeat(300).into_boxed_slice())])));
        assert_eq!(converse(client, PATIENT).await, ["the server's reply has too many lines"]);
    }

    /// A server is silent at one step, and only the limit of this step is short.
    #[tokio::test]
    async fn each_step_has_its_own_time_limit() {
        const SHORT: Duration = Duration::from_millis(20);
        let replies: [&'static [u8]; 4] = [b"220 a\r\n", b"250 a\r\n", b"250 ok\r\n", b"354 go\r\n"];
        for (answers, limits) in [
            (0, Limits { greeting: SHORT, ..PATIENT }),
            (1, Limits { command: SHORT, ..PATIENT }),
            (2, Limits { command: SHORT, ..PATIENT }),
            (3, Limits { data: SHORT, ..PATIENT }),
            (4, Limits { final_dot: SHORT, ..PATIENT }),
        ] {
            let (client, _received) = server(Box::leak(replies[..answers].to_vec().into_boxed_slice()));
            let steps = converse(client, limits).await;
            assert_eq!(steps.last().unwrap(), "the server did not answer in time", "after {answers} answers");
        }
    }

    #[test]
    fn the_time_limits_are_those_of_rfc_5321() {
        let Limits { greeting, command, data, block, final_dot } = Limits::RFC_5321;
        let minutes = [greeting, command, data, block, final_dot].map(|limit| limit.as_secs() / 60);
        assert_eq!(minutes, [5, 5, 2, 3, 10]);
    }

    #[test]
    fn only_the_extensions_that_are_used_are_read() {
        let lines = ["250-mx", "250-starttls", "250-AUTH=LOGIN", "250-AUTH CRAM-MD5 PLAIN", "250 8BITMIME"];
        let lines = lines.map(|line| line.as_bytes().to_vec());
        let all = Extensions { starttls: true, auth_plain: true, auth_login: true };
        assert_eq!(Extensions::of(&lines), all);
        assert_eq!(Extensions::of(&[b"250 STARTTLS".to_vec()]), Extensions::default(), "the greeting");
    }

    #[test]
    fn a_mail_cannot_end_before_its_end() {
        for (mail, sent) in [
            (&b"a\r\n.\r\nMAIL FROM:<x@y>\r\n"[..], &b"a\r\n..\r\nMAIL FROM:<x@y>\r\n"[..]),
            (b"a\n.\nb", b"a\r\n..\r\nb\r\n"),
            (b"a\r.\rb\r\n", b"a\r\n..\r\nb\r\n"),
            (b"\r\n\r\n", b"\r\n\r\n"),
            (b"..a", b"...a\r\n"),
        ] {
            assert_eq!(dot_stuffed(mail).escape_ascii().to_string(), sent.escape_ascii().to_string());
        }
    }
}
