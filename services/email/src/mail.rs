//! Mails from templates: plain text and HTML, with a Message-ID that is the same on every attempt.

use anyhow::bail;
use askama::Template;
use lettre::Message;
use lettre::message::{Mailbox, MultiPart};

use crate::deliveries::Claim;

#[derive(Template)]
#[template(path = "welcome.txt", escape = "none")]
struct WelcomeText<'a> {
    display_name: &'a str,
}

#[derive(Template)]
#[template(path = "welcome.html")]
struct WelcomeHtml<'a> {
    display_name: &'a str,
}

/// Builds the mail of a delivery. Mailboxes recognise copies by the Message-ID, `<delivery
/// id@domain of the sender>`.
///
/// # Errors
/// The address or the template is invalid. A retry cannot help, so the delivery fails.
pub fn build(claim: &Claim, from: &Mailbox) -> anyhow::Result<Message> {
    let (subject, text, html) = match claim.template.as_str() {
        "welcome" => (
            "Welcome",
            WelcomeText { display_name: &claim.display_name }.render()?,
            WelcomeHtml { display_name: &claim.display_name }.render()?,
        ),
        _ => bail!("this release does not have the template"),
    };
    let to = Mailbox::new(Some(claim.display_name.clone()), claim.email.parse()?);
    let message = Message::builder()
        .message_id(Some(format!("<{}@{}>", claim.id, from.email.domain())))
        .from(from.clone())
        .to(to)
        .subject(subject)
        .multipart(MultiPart::alternative_plain_html(text, html))?;
    Ok(message)
}
