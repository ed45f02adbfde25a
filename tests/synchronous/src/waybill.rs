//! Files of the services: the same code, so that the comparison does not measure two clients. Not
//! all of it is used here.

#[allow(dead_code)]
#[path = "../../../services/email/src/mail.rs"]
pub mod mail;
#[allow(dead_code)]
#[path = "../../../services/email/src/smtp/mod.rs"]
pub mod smtp;
#[allow(dead_code)]
#[path = "../../../services/cache/src/valkey.rs"]
pub mod valkey;
