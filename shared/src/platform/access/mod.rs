//! Who may call the public routes, and how often. A service checks tokens by itself: it knows the
//! public keys of the identity provider, and asks no other service.

mod addresses;
mod caller;
mod keys;
mod rates;
mod routes;
mod signatures;
mod tokens;

pub(crate) use addresses::Peer;
pub use caller::{Caller, Forbidden};
pub use rates::{RateConfig, Rates, TooMany};
pub use routes::PublicRoutes;
pub(crate) use routes::{Gate, admit};
pub use tokens::AuthConfig;
pub(crate) use tokens::Tokens;
