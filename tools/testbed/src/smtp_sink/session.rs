//! The SMTP dialogue of one connection (RFC 5321).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufStream};
use tokio::net::TcpStream;

use super::state::{Fault, Outcome, Shared, Stage};

/// Bytes of a mail above which the sink closes the connection, so that it does not run out of
/// memory.
const MAX_MAIL: usize = 16 * 1024 * 1024;
/// The reply of a sink that refuses connections.
const REFUSAL: &str = "421 try again later";

pub(super) async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    shared.state().connections += 1;
    let mut session = Session { stream: BufStream::new(stream), shared: shared.clone(), from: None, to: Vec::new() };
    // An error means that the client closed the connection or that a fault reset it.
    let _ = session.run().await;
    shared.state().connections -= 1;
}

struct Session {
    stream: BufStream<TcpStream>,
    shared: Arc<Shared>,
    from: Option<String>,
    to: Vec<String>,
}

impl Session {
    async fn run(&mut self) -> io::Result<()> {
        if self.refuses() {
            return self.reply(REFUSAL).await;
        }
        if !self.answer(Stage::Connect, &[], "220 waybill sink").await? {
            return Ok(());
        }
        while let Some(line) = self.line().await? {
            let line = String::from_utf8_lossy(&line).into_owned();
            let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match verb.to_ascii_uppercase().as_str() {
                "EHLO" => self.reply("250-waybill sink\r\n250-8BITMIME\r\n250 SMTPUTF8").await?,
                "HELO" | "NOOP" => self.reply("250 ok").await?,
                "MAIL" if self.refuses() => return self.reply(REFUSAL).await,
                "MAIL" => self.mail(rest).await?,
                "RCPT" => self.rcpt(rest).await?,
                "DATA" => self.data().await?,
                "RSET" => {
                    self.reset_mail();
                    self.reply("250 ok").await?;
                }
                "QUIT" => return self.reply("221 bye").await,
                _ => self.reply("502 command not implemented").await?,
            }
        }
        Ok(())
    }

    fn refuses(&self) -> bool {
        self.shared.take(&[], |fault| *fault == Fault::Refuse).is_some()
    }

    async fn mail(&mut self, rest: &str) -> io::Result<()> {
        let Some(from) = address(rest, "FROM:") else {
            return self.reply("501 expected MAIL FROM:<address>").await;
        };
        self.reset_mail();
        if self.answer(Stage::Mail, &[], "250 ok").await? {
            self.from = Some(from);
        }
        Ok(())
    }

    async fn rcpt(&mut self, rest: &str) -> io::Result<()> {
        let Some(to) = address(rest, "TO:") else {
            return self.reply("501 expected RCPT TO:<address>").await;
        };
        if self.from.is_none() {
            return self.reply("503 send MAIL first").await;
        }
        if self.answer(Stage::Rcpt, std::slice::from_ref(&to), "250 ok").await? {
            self.to.push(to);
        }
        Ok(())
    }

    async fn data(&mut self) -> io::Result<()> {
        let to = std::mem::take(&mut self.to);
        let Some(from) = self.from.take().filter(|_| !to.is_empty()) else {
            return self.reply("503 send MAIL and RCPT first").await;
        };
        if !self.answer(Stage::Data, &to, "354 end the mail with a dot").await? {
            return Ok(());
        }
        if self.shared.take(&to, |fault| *fault == Fault::ResetBeforeDot).is_some() {
            self.line().await?;
            return self.reset_connection();
        }
        let raw = self.content().await?;
        if let Some(Fault::Reject { code, .. }) = self.shared.take(&to, rejects_at(Stage::Dot)) {
            return self.reply(&refusal(code, &to)).await;
        }
        if let Some(Fault::Reply { text, .. }) = self.shared.take(&to, replies_at(Stage::Dot)) {
            if text.starts_with('2') {
                self.shared.keep(&from, &to, &raw, Outcome::Answered);
            }
            return self.reply_bytes(&text).await;
        }
        if self.shared.take(&to, |fault| *fault == Fault::DropAfterDot).is_some() {
            self.shared.keep(&from, &to, &raw, Outcome::Dropped);
            return self.reset_connection();
        }
        self.shared.keep(&from, &to, &raw, Outcome::Answered);
        self.answer(Stage::Dot, &to, "250 accepted").await.map(|_| ())
    }

    /// Answers a step with `usual`, or as the current fault says. Returns whether the step is
    /// accepted: whether the answer has the same first digit as the usual one.
    async fn answer(&mut self, stage: Stage, recipients: &[String], usual: &str) -> io::Result<bool> {
        let slow = |fault: &Fault| matches!(fault, Fault::Slow { stage: slow, .. } if *slow == stage);
        if let Some(Fault::Slow { ms, .. }) = self.shared.take(recipients, slow) {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        if let Some(Fault::Reply { text, .. }) = self.shared.take(recipients, replies_at(stage)) {
            self.reply_bytes(&text).await?;
            return Ok(text.as_bytes().first() == usual.as_bytes().first());
        }
        if let Some(Fault::Reject { code, .. }) = self.shared.take(recipients, rejects_at(stage)) {
            self.reply(&refusal(code, recipients)).await?;
            return Ok(false);
        }
        self.reply(usual).await?;
        Ok(true)
    }

    /// Resets the mail transaction.
    fn reset_mail(&mut self) {
        self.from = None;
        self.to.clear();
    }

    /// Reads the mail up to the line that holds only a dot. The client doubled every other leading
    /// dot.
    async fn content(&mut self) -> io::Result<Vec<u8>> {
        let mut raw = Vec::new();
        loop {
            let line = self.line().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if line == b"." {
                return Ok(raw);
            }
            raw.extend_from_slice(line.strip_prefix(b".").unwrap_or(&line));
            raw.extend_from_slice(b"\r\n");
            if raw.len() > MAX_MAIL {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
    }

    /// The next line without its line break. `None` if the client has closed the connection.
    async fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        if self.stream.read_until(b'\n', &mut line).await? == 0 {
            return Ok(None);
        }
        line.pop_if(|byte| *byte == b'\n');
        line.pop_if(|byte| *byte == b'\r');
        Ok(Some(line))
    }

    async fn reply(&mut self, text: &str) -> io::Result<()> {
        self.stream.write_all(text.as_bytes()).await?;
        self.stream.write_all(b"\r\n").await?;
        self.stream.flush().await
    }

    /// Sends each character as one byte.
    async fn reply_bytes(&mut self, text: &str) -> io::Result<()> {
        let bytes: Vec<u8> = text.chars().map(|character| u8::try_from(character).unwrap_or(b'?')).collect();
        self.stream.write_all(&bytes).await?;
        self.stream.write_all(b"\r\n").await?;
        self.stream.flush().await
    }

    /// Ends the connection with a TCP reset instead of an orderly close.
    fn reset_connection(&mut self) -> io::Result<()> {
        self.stream.get_ref().set_zero_linger()?;
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

/// A rejection that quotes the recipients, as real servers do.
fn refusal(code: u16, recipients: &[String]) -> String {
    format!("{code} <{}> rejected on request", recipients.join(","))
}

fn rejects_at(stage: Stage) -> impl Fn(&Fault) -> bool {
    move |fault| matches!(fault, Fault::Reject { stage: rejected, .. } if *rejected == stage)
}

fn replies_at(stage: Stage) -> impl Fn(&Fault) -> bool {
    move |fault| matches!(fault, Fault::Reply { stage: replied, .. } if *replied == stage)
}

/// The address in a text such as `FROM:<a@b> SIZE=3`.
fn address(rest: &str, keyword: &str) -> Option<String> {
    let given = rest.get(..keyword.len()).filter(|start| start.eq_ignore_ascii_case(keyword))?;
    let (address, _) = rest[given.len()..].trim_start().strip_prefix('<')?.split_once('>')?;
    Some(address.to_owned())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, BufReader};

    use super::super::{Behaviour, SmtpSink};
    use super::*;

    const MAIL: &str = "Message-ID: <1@test>\r\nSubject: Hello\r\n\r\nfirst\r\n..second\r\n.\r\n";

    struct Client(BufReader<TcpStream>);

    impl Client {
        async fn connect(sink: &SmtpSink) -> Self {
            Self(BufReader::new(TcpStream::connect(sink.address()).await.unwrap()))
        }

        /// The last line of the answer, or the kind of the I/O error.
        async fn answer(&mut self) -> Result<String, io::ErrorKind> {
            loop {
                let mut line = String::new();
                if self.0.read_line(&mut line).await.map_err(|error| error.kind())? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof);
                }
                if line.as_bytes().get(3) != Some(&b'-') {
                    return Ok(line.trim_end().to_owned());
                }
            }
        }

        async fn send_line(&mut self, text: &str) -> Result<String, io::ErrorKind> {
            self.0.write_all(text.as_bytes()).await.map_err(|error| error.kind())?;
            self.answer().await
        }

        /// Sends one mail. Returns the codes of the answers, up to the first rejection or error.
        async fn send(&mut self, to: &str) -> String {
            let rcpt = format!("RCPT TO:<{to}>\r\n");
            let mut codes = String::new();
            for text in ["", "EHLO test\r\n", "MAIL FROM:<a@test> BODY=8BITMIME\r\n", &rcpt, "DATA\r\n", MAIL] {
                let answer = match self.send_line(text).await {
                    Ok(answer) => answer,
                    Err(kind) => return format!("{codes}{kind:?}"),
                };
                codes += &format!("{} ", &answer[..3]);
                if answer.starts_with(['4', '5']) {
                    break;
                }
            }
            codes.trim_end().to_owned()
        }
    }

    async fn sink(behaviour: impl Into<Behaviour>) -> SmtpSink {
        let sink = SmtpSink::start(([127, 0, 0, 1], 0).into()).await.unwrap();
        sink.set(behaviour);
        sink
    }

    async fn send(sink: &SmtpSink, to: &str) -> String {
        Client::connect(sink).await.send(to).await
    }

    #[tokio::test]
    async fn dot_stuffing_is_removed_from_a_mail() {
        let sink = sink(Fault::None).await;
        assert_eq!(send(&sink, "b@test").await, "220 250 250 250 354 250");
        let mail = &sink.mails()[0];
        assert_eq!(mail.from, "a@test");
        assert_eq!(mail.to, ["b@test"]);
        assert_eq!(mail.message_id.as_deref(), Some("1@test"));
        assert_eq!(mail.subject.as_deref(), Some("Hello"));
        assert!(mail.raw.ends_with("\r\n\r\nfirst\r\n.second\r\n"), "{}", mail.raw);
        assert_eq!(mail.outcome, Outcome::Answered);
    }

    #[tokio::test]
    async fn one_connection_can_send_several_mails() {
        let sink = sink(Fault::None).await;
        let mut client = Client::connect(&sink).await;
        client.send("b@test").await;
        assert_eq!(client.send_line("RCPT TO:<c@test>\r\n").await.unwrap(), "503 send MAIL first");
        assert_eq!(client.send_line("mail from: <a@test>\r\n").await.unwrap(), "250 ok");
        assert_eq!(client.send_line("RSET\r\n").await.unwrap(), "250 ok");
        assert_eq!(client.send_line("DATA\r\n").await.unwrap(), "503 send MAIL and RCPT first");
        assert_eq!(client.send_line("VRFY x\r\n").await.unwrap(), "502 command not implemented");
        assert_eq!(client.send_line("QUIT\r\n").await.unwrap(), "221 bye");
        assert_eq!(client.0.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(sink.mails().len(), 1);
    }

    #[tokio::test]
    async fn a_refused_connection_is_answered_with_421() {
        let sink = sink(Fault::Refuse.times(1)).await;
        assert_eq!(Client::connect(&sink).await.answer().await.unwrap(), "421 try again later");
        assert_eq!(send(&sink, "b@test").await, "220 250 250 250 354 250");
    }

    #[tokio::test]
    async fn a_connection_that_was_open_before_is_refused_at_its_next_mail() {
        let sink = sink(Fault::None).await;
        let mut client = Client::connect(&sink).await;
        assert_eq!(client.answer().await.unwrap(), "220 waybill sink");
        sink.set(Fault::Refuse.times(1));
        assert_eq!(client.send_line("MAIL FROM:<a@test>\r\n").await.unwrap(), REFUSAL);
        assert_eq!(client.answer().await, Err(io::ErrorKind::UnexpectedEof), "the connection is closed");
    }

    #[tokio::test]
    async fn the_sink_can_reject_at_each_stage() {
        for (stage, codes) in [
            (Stage::Connect, "554"),
            (Stage::Mail, "220 250 554"),
            (Stage::Rcpt, "220 250 250 554"),
            (Stage::Data, "220 250 250 250 554"),
            (Stage::Dot, "220 250 250 250 354 554"),
        ] {
            let sink = sink(Fault::Reject { stage, code: 554 }).await;
            assert!(send(&sink, "b@test").await.starts_with(codes), "{stage:?}");
            assert!(sink.mails().is_empty(), "{stage:?}");
        }
    }

    #[tokio::test]
    async fn the_sink_can_answer_with_any_bytes() {
        let reply = |stage, text: &str| Fault::Reply { stage, text: text.to_owned() };
        let accepting = sink(reply(Stage::Dot, "250 accept\u{e9}").times(1)).await;
        let mut client = Client::connect(&accepting).await;
        for text in ["EHLO test\r\n", "MAIL FROM:<a@test>\r\n", "RCPT TO:<b@test>\r\n", "DATA\r\n", MAIL] {
            client.0.write_all(text.as_bytes()).await.unwrap();
        }
        client.0.write_all(b"QUIT\r\n").await.unwrap();
        let mut answers = vec![];
        client.0.read_to_end(&mut answers).await.unwrap();
        assert!(answers.windows(12).any(|bytes| bytes == b"250 accept\xe9\r"), "{}", answers.escape_ascii());
        assert_eq!(accepting.mails().len(), 1);
        let refusing = sink(reply(Stage::Rcpt, "554 5.7.1 no")).await;
        assert_eq!(send(&refusing, "b@test").await, "220 250 250 554");
    }

    #[tokio::test]
    async fn a_reset_before_the_dot_keeps_nothing() {
        let sink = sink(Fault::ResetBeforeDot.times(1)).await;
        assert_eq!(send(&sink, "b@test").await, "220 250 250 250 354 ConnectionReset");
        assert!(sink.mails().is_empty());
        assert_eq!(sink.behaviour(), Behaviour::default());
    }

    #[tokio::test]
    async fn a_drop_after_the_dot_keeps_the_mail() {
        let sink = sink(Fault::DropAfterDot.times(1)).await;
        assert_eq!(send(&sink, "b@test").await, "220 250 250 250 354 ConnectionReset");
        send(&sink, "b@test").await;
        let outcomes: Vec<Outcome> = sink.mails().iter().map(|mail| mail.outcome).collect();
        assert_eq!(outcomes, [Outcome::Dropped, Outcome::Answered]);
    }

    #[tokio::test]
    async fn a_slow_answer_to_the_dot_comes_after_the_wait() {
        let sink = sink(Fault::Slow { ms: 200, stage: Stage::Dot }).await;
        let start = std::time::Instant::now();
        assert_eq!(send(&sink, "b@test").await, "220 250 250 250 354 250");
        assert!(start.elapsed() >= Duration::from_millis(200));
    }

    #[tokio::test]
    async fn a_fault_can_be_limited_to_one_recipient() {
        let fault = Fault::Reject { stage: Stage::Rcpt, code: 450 };
        let sink = sink(Behaviour { recipient: Some("b@test".to_owned()), ..fault.into() }).await;
        assert_eq!(send(&sink, "c@test").await, "220 250 250 250 354 250");
        assert!(send(&sink, "b@test").await.starts_with("220 250 250 450"));
    }

    #[test]
    fn a_behaviour_is_parsed_from_json() {
        let reject = r#"{"fault": "reject", "stage": "rcpt", "code": 550, "times": 2}"#;
        let behaviour: Behaviour = serde_json::from_str(reject).unwrap();
        assert_eq!(behaviour, Fault::Reject { stage: Stage::Rcpt, code: 550 }.times(2));
        let slow: Behaviour = serde_json::from_str(r#"{"fault": "slow", "ms": 5}"#).unwrap();
        assert_eq!(slow.fault, Fault::Slow { ms: 5, stage: Stage::Dot });
    }
}
