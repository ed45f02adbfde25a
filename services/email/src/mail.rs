//! The mails of this release: plain text and HTML, with a Message-ID that is the same on every
//! attempt.
//!
//! A mail contains no text that its recipient has not confirmed. A registration proves nothing
//! about an address: any client can register any address under any name. If the mail contained the
//! display name, a stranger could send an advertisement to anybody, from our server.

use lettre::message::{Mailbox, MultiPart};
use lettre::{Address, Message};
use uuid::Uuid;

/// A kind of mail. A delivery names it.
pub struct Template {
    pub name: &'static str,
    subject: &'static str,
    text: &'static str,
    html: &'static str,
}

pub const WELCOME: Template = Template {
    name: "welcome",
    subject: "Welcome",
    text: include_str!("../templates/welcome.txt"),
    html: include_str!("../templates/welcome.html"),
};

/// The templates of this release. A delivery with another template is left for a release that has
/// it.
const TEMPLATES: [&Template; 1] = [&WELCOME];

/// The names of the templates, for the query that claims a delivery.
pub fn template_names() -> Vec<String> {
    TEMPLATES.iter().map(|template| template.name.to_owned()).collect()
}

pub fn template(name: &str) -> Option<&'static Template> {
    TEMPLATES.into_iter().find(|template| template.name == name)
}

impl Template {
    /// Builds the mail. Mailboxes recognise copies by the Message-ID, `<delivery id@domain of the
    /// sender>`.
    pub fn build(&self, delivery: Uuid, from: &Mailbox, to: &Address) -> Message {
        Message::builder()
            .message_id(Some(format!("<{delivery}@{}>", from.email.domain())))
            .from(from.clone())
            .to(Mailbox::new(None, to.clone()))
            .subject(self.subject)
            .multipart(MultiPart::alternative_plain_html(self.text.to_owned(), self.html.to_owned()))
            .expect("a mail with a sender and a recipient is complete")
    }
}
