//! The caller of a request, and what it may access.

use std::net::IpAddr;

use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use crate::platform::problem::{Kind, internal_error, problem};

const FORBIDDEN: Kind = Kind::new("forbidden", StatusCode::FORBIDDEN);

/// Who sent a request. A handler takes it as an argument, and checks with it what the caller may
/// access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub(super) address: IpAddr,
    pub(super) identity: Identity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// The service checks no tokens: every caller may access everything.
    Unchecked,
    /// The bearer of a valid token.
    Principal(Principal),
}

/// The bearer of a valid token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Principal {
    /// A keyed hash of the token's issuer and subject, in the form of a UUID.
    pub id: Uuid,
    pub is_admin: bool,
}

impl Caller {
    /// The id of the principal: the actor of the events that the request causes, and the owner of
    /// what it creates. `None` if the service checks no tokens.
    pub fn actor(&self) -> Option<Uuid> {
        self.principal().map(|principal| principal.id)
    }

    /// Checks that the caller owns what it asks for, or is an administrator. What was created
    /// without a token has no owner: only administrators may access it.
    ///
    /// # Errors
    /// The caller is neither.
    pub fn require_owner(&self, owner: Option<Uuid>) -> Result<(), Forbidden> {
        match self.principal() {
            Some(principal) if !principal.is_admin && owner != Some(principal.id) => Err(Forbidden),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// The caller is no administrator.
    pub fn require_admin(&self) -> Result<(), Forbidden> {
        match self.principal() {
            Some(principal) if !principal.is_admin => Err(Forbidden),
            _ => Ok(()),
        }
    }

    pub(super) fn principal(&self) -> Option<Principal> {
        match self.identity {
            Identity::Unchecked => None,
            Identity::Principal(principal) => Some(principal),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        let caller = parts.extensions.get().copied();
        caller.ok_or_else(|| {
            tracing::error!("bug: a request was routed without a caller");
            internal_error().into_response()
        })
    }
}

/// The caller may not access what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the caller may not access this")]
pub struct Forbidden;

impl IntoResponse for Forbidden {
    fn into_response(self) -> Response {
        let detail = "the bearer of this token may not access this: only its owner and administrators may";
        problem(FORBIDDEN, detail).into_response()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn only_owners_and_administrators_may_access_something() {
        let owner = Uuid::from_u128(1);
        let caller = |identity| Caller { address: Ipv4Addr::LOCALHOST.into(), identity };
        let principal = |id, is_admin| caller(Identity::Principal(Principal { id: Uuid::from_u128(id), is_admin }));
        for allowed in [principal(1, false), principal(2, true), caller(Identity::Unchecked)] {
            assert_eq!(allowed.require_owner(Some(owner)), Ok(()), "{allowed:?}");
        }
        assert_eq!(principal(2, false).require_owner(Some(owner)), Err(Forbidden));
        assert_eq!(principal(1, false).require_owner(None), Err(Forbidden));
        assert_eq!(principal(1, false).require_admin(), Err(Forbidden));
        assert_eq!(principal(1, true).require_admin(), Ok(()));
        assert_eq!(principal(1, true).require_owner(None), Ok(()));
    }
}
