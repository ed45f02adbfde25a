//! A front of the mail server, with a new authority and a certificate signed by it.

use std::net::SocketAddr;
use std::path::Path;

use testbed::mail_front::{self, Login};

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
    _front: mail_front::RunningFront,
}

impl Front {
    /// Starts the front of the mail server at `server`.
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
        let login = |mechanism| Login { mechanism, user: USER.to_owned(), password: PASSWORD.to_owned() };
        let front = mail_front::Front { implicit: self.implicit, login: self.login.map(login), acceptor };
        let front = front.start(([127, 0, 0, 1], 0).into(), server).await.unwrap();
        RunningFront { address: front.address, authority, _front: front }
    }
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
