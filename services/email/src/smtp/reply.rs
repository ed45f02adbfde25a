//! The replies of a mail server, and what a refusal is about.
//!
//! A reply is bytes. Servers write its text in any character set, or write none. Only the three
//! digits decide (RFC 5321 §4.2); an enhanced status code directly after them (RFC 3463) says what
//! a refusal is about. The text is never used: it quotes the recipient's address.

use std::fmt;

/// The part of a line that is read. The rest is skipped, so a server cannot exhaust our memory.
/// RFC 5321 §4.5.3.1.5 allows 512 bytes.
pub const LINE_LIMIT: usize = 1024;

/// A reply without its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The three digits, 200 to 599.
    pub code: u16,
    pub enhanced: Option<Enhanced>,
}

/// An enhanced status code without its class: the digits decide whether a refusal is permanent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enhanced {
    pub class: u8,
    pub subject: u16,
    pub detail: u16,
}

/// What a refusal of RCPT, DATA or the mail is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// The recipient or this mail.
    Mail,
    /// Us: our address, our server's reputation, our settings. Or the mail server itself. The mail
    /// may succeed when that is corrected.
    Sender,
    /// The codes do not say: one of the two above.
    Unknown,
}

/// One line of a reply.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    pub reply: Reply,
    /// Whether the reply has further lines.
    pub continues: bool,
}

impl Line {
    /// Reads a line without its line break. `None` if it does not begin with a code.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let (digits, rest) = line.split_at_checked(3)?;
        let code: u16 = ascii(digits)?.parse().ok()?;
        if !digits[0].is_ascii_digit() || !(200..600).contains(&code) {
            return None;
        }
        let text = rest.get(1..).unwrap_or_default();
        Some(Self {
            reply: Reply { code, enhanced: Enhanced::parse(text) },
            // Any other byte, or none, ends the reply: some servers send the code alone.
            continues: rest.first() == Some(&b'-'),
        })
    }
}

impl Reply {
    pub fn is_positive(self) -> bool {
        self.code < 300
    }

    pub fn is_permanent(self) -> bool {
        self.code >= 500
    }

    /// What this refusal of RCPT, DATA or the mail is about. Servers refuse a client, its greeting
    /// or its sender address at RCPT too (`smtpd_delay_reject` of Postfix), so the step does not
    /// show it.
    pub fn about(self) -> About {
        // RFC 3463 §3: 1 address, 2 mailbox, 3 mail system, 4 network and routing, 5 protocol,
        // 6 content, 7 security or policy. 1.7 and 1.8: the sender's address.
        match self.enhanced.map(|enhanced| (enhanced.subject, enhanced.detail)) {
            Some((1, 7 | 8)) => About::Sender,
            Some((1 | 2 | 4 | 6, _)) => About::Mail,
            Some((3 | 5 | 7, _)) => About::Sender,
            // Without a meaningful enhanced code the digits say little. Servers use 55x for a
            // missing mailbox and for a client that they do not relay for, 501 for the recipient's
            // address and for our greeting, and 4xx for everything.
            _ if !self.is_permanent() || matches!(self.code, 501 | 550..=559) => About::Unknown,
            // The other 50x are syntax, 521 is a host that accepts no mail (RFC 7504), and 53x are
            // about authentication (RFC 4954).
            _ => About::Sender,
        }
    }
}

impl Enhanced {
    /// Reads `5.1.1` at the beginning of a reply's text. A blank or the end of the line must
    /// follow.
    fn parse(text: &[u8]) -> Option<Self> {
        let word = text.split(|byte| byte.is_ascii_whitespace()).next()?;
        let mut numbers = ascii(word)?.split('.').map(number);
        let enhanced =
            Self { class: u8::try_from(numbers.next()??).ok()?, subject: numbers.next()??, detail: numbers.next()?? };
        let complete = numbers.next().is_none() && [2, 4, 5].contains(&enhanced.class);
        complete.then_some(enhanced)
    }
}

/// One to three digits (RFC 3463 §2).
fn number(text: &str) -> Option<u16> {
    let digits = (1..=3).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}

fn ascii(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| text.is_ascii())
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        match self.enhanced {
            Some(Enhanced { class, subject, detail }) => write!(f, " {class}.{subject}.{detail}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(line: &[u8]) -> Option<String> {
        Line::parse(line).map(|line| format!("{}{}", line.reply, if line.continues { " …" } else { "" }))
    }

    #[test]
    fn the_three_digits_decide_whatever_follows() {
        for (line, expected) in [
            (&b"250 2.0.0 Message accept\xe9"[..], Some("250 2.0.0")),
            (b"550 5.1.1 Bo\xeete inconnue", Some("550 5.1.1")),
            (b"550 \xd3\xc3\xbb\xa7\xb2\xbb\xb4\xe6\xd4\xda", Some("550")),
            (b"250", Some("250")),
            (b"250 ", Some("250")),
            (b"250-", Some("250 …")),
            (b"250-5.1.1", Some("250 5.1.1 …")),
            (b"250\tok", Some("250")),
            (b"354go", Some("354")),
            (b"550 5.1.1", Some("550 5.1.1")),
            (b"550 5.1.10 null MX", Some("550 5.1.10")),
            (b"550 5.1.1000 no", Some("550")),
            (b"550 5.1 no", Some("550")),
            (b"550 5.1.1.1 no", Some("550")),
            (b"550 5.1.1<a@b>", Some("550")),
            (b"550 +5.1.1 no", Some("550")),
            (b"550 9.1.1 no", Some("550")),
            (b"", None),
            (b"25", None),
            (b"25x ok", None),
            (b"+25 ok", None),
            (b"199 no", None),
            (b"600 no", None),
            (b"\xff\xfe\xfd", None),
        ] {
            assert_eq!(shown(line).as_deref(), expected, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn the_enhanced_status_code_says_what_a_refusal_is_about() {
        let about = |line: &str| Line::parse(line.as_bytes()).unwrap().reply.about();
        for line in [
            "550 5.1.1 no such user",
            "550 5.1.10 null MX",
            "550 5.2.1 mailbox disabled",
            "552 5.2.2 mailbox full",
            "550 5.4.1 access denied by the recipient's domain",
            "554 5.6.0 content",
            "450 4.2.0 greylisted",
            "452 4.2.2 mailbox full",
            "450 4.1.1 mailbox unavailable",
            "451 4.4.3 the recipient's domain cannot be resolved",
        ] {
            assert_eq!(about(line), About::Mail, "{line}");
        }
        for line in [
            "554 5.7.1 Relay access denied",
            "550 5.7.1 blocked using zen.example.org",
            "530 5.7.0 Authentication required",
            "504 5.5.2 Helo command rejected",
            "550 5.1.8 Sender address rejected",
            "553 5.1.7 sender's syntax",
            "554 5.3.0 system",
            "530 log in first",
            "521 this host accepts no mail",
            "500 what?",
            "503 wrong order",
            "454 4.7.1 Relay access denied",
            "450 4.7.1 Client host rejected: cannot find your hostname",
            "450 4.1.8 Sender address rejected: Domain not found",
            "452 4.3.1 Insufficient system storage",
            "451 4.3.0 queue file write error",
            "454 4.5.0 protocol",
        ] {
            assert_eq!(about(line), About::Sender, "{line}");
        }
        for line in [
            "550 relay not permitted",
            "550 #5.7.1 relaying denied",
            "553 sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)",
            "550 no such user",
            "552 full",
            "554 transaction failed",
            "556 domain accepts no mail",
            "501 <ada@example.com>: syntax",
            "550 5.0.0 no",
            "550 5.9.9 no",
            "450 greylisted",
            "451 4.0.0 try later",
            "454 relay access denied",
        ] {
            assert_eq!(about(line), About::Unknown, "{line}");
        }
    }
}
