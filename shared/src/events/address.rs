//! Which e-mail addresses a profile may contain. The user service checks a registration with this
//! rule, and the email service checks an address with it before it sends a mail. With two rules an
//! address could be registered that never gets a mail.

use email_address::{EmailAddress, Options};

/// The longest address that SMTP allows (RFC 5321 §4.5.3.1.3, without the brackets), in characters.
const MAX_LENGTH: usize = 254;

/// Checks that mail servers everywhere accept `address`: ASCII characters, a local part without
/// quotes, and a domain name with at least two labels. RFC 5321 also allows a quoted local part and
/// an IP address in brackets. Many servers refuse them, and hardly any person has such an address.
///
/// # Errors
/// The rule that the address violates. The text does not contain the address.
pub fn check_address(address: &str) -> Result<(), &'static str> {
    if address.chars().count() > MAX_LENGTH {
        return Err("at most 254 characters");
    }
    // Other addresses need SMTPUTF8, which not every mail server supports.
    if !address.is_ascii() {
        return Err("only ASCII characters can be delivered everywhere");
    }
    let options = Options::default().without_display_text().without_domain_literal().with_required_tld();
    let parsed = EmailAddress::parse_with_options(address, options).ok();
    let deliverable = parsed.is_some_and(|address| !address.local_part().starts_with('"') && named(address.domain()));
    if deliverable { Ok(()) } else { Err("not an address, for example ada@example.com") }
}

/// Whether this is a domain name of letters, digits and hyphens (RFC 5321 §4.1.2), and not an IP
/// address: no top-level domain starts with a digit.
fn named(domain: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    let last = domain.rsplit('.').next().unwrap_or_default();
    domain.bytes().all(allowed) && last.starts_with(|first: char| first.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_addresses_are_valid() {
        for address in
            ["ada@example.com", "a.b+c@mail.example.co.uk", "o'hara@xn--bcher-kva.example", "A_1@EXAMPLE.COM"]
        {
            assert_eq!(check_address(address), Ok(()), "{address}");
        }
    }

    #[test]
    fn an_address_that_a_mail_server_may_refuse_is_invalid() {
        let invalid = [
            "",
            "@",
            "ada",
            "ada@",
            "@example.com",
            "ada@localhost",
            "a b@example.com",
            "a..b@example.com",
            ".a@example.com",
            "a.@example.com",
            "a@.example.com",
            "a@example..com",
            "a@-example.com",
            "a@example.com.",
            r#""a..b"@example.com"#,
            r#""a b"@example.com"#,
            r#""a>b"@example.com"#,
            r#""ada"@example.com"#,
            "a@[127.0.0.1]",
            "a@[IPv6:::1]",
            "a@[x]",
            "a@[]",
            "a@127.0.0.1",
            "a@example.1",
            "a@ex!ample.com",
            "a@a=b.example",
            "a@a%b.example",
            "a@exam_ple.com",
            "a@x.y/z",
            "a@x.y'z",
            "a@x.example-",
            "Ada <ada@example.com>",
            "<ada@example.com>",
            "ada@example.com\r\nRCPT TO:<b@example.com>",
            "ada@example.com ",
            "ada@bücher.example",
            "ada@example.com\0",
        ];
        for address in invalid {
            assert!(check_address(address).is_err(), "{address}");
        }
        let long = format!("a@{}.example", "b".repeat(250));
        assert_eq!(check_address(&long), Err("at most 254 characters"));
        assert!(check_address(&format!("{}@example.com", "a".repeat(65))).is_err(), "a local part of 65 characters");
    }
}
