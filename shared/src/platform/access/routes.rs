//! What stands before every public route: the limits per caller, the check of the token, and for
//! some routes the role of administrators.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use ipnet::IpNet;

use super::addresses::{self, Peer};
use super::caller::{Caller, Identity};
use super::rates::Rates;
use super::tokens::Tokens;
use crate::platform::problem::internal_error;

/// The public routes of a service, by who may call them. Each needs a valid token.
#[derive(Default)]
pub struct PublicRoutes(Router);

impl PublicRoutes {
    /// Routes for administrators.
    #[must_use]
    pub fn for_admins(self, routes: Router) -> Self {
        Self(self.0.merge(routes.route_layer(middleware::from_fn(admins_only))))
    }

    /// Routes that any bearer of a token may call. Their handlers take the [`Caller`] and check
    /// whether it may access what it asks for.
    #[must_use]
    pub fn for_owners(self, routes: Router) -> Self {
        Self(self.0.merge(routes))
    }

    pub(crate) fn into_router(self) -> Router {
        self.0
    }
}

async fn admins_only(caller: Caller, request: Request, next: Next) -> Response {
    match caller.require_admin() {
        Ok(()) => next.run(request).await,
        Err(forbidden) => forbidden.into_response(),
    }
}

/// What a request must pass.
#[derive(Clone)]
pub(crate) struct Gate {
    /// `None`: no tokens are required.
    pub tokens: Option<Tokens>,
    pub rates: Rates,
    pub trusted_proxies: Arc<[IpNet]>,
}

/// A layer that lets a request reach the routes only with a valid token and within the limits of
/// its caller. It checks requests for unknown paths as well.
pub(crate) async fn admit(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get().copied();
    match gate.caller(peer, request.headers()).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refusal) => refusal,
    }
}

impl Gate {
    /// The limit per address comes first: checking a signature takes longer than counting.
    async fn caller(&self, peer: Option<Peer>, headers: &HeaderMap) -> Result<Caller, Response> {
        let Some(peer) = peer else {
            tracing::error!("bug: a request came without the address of its connection");
            return Err(internal_error().into_response());
        };
        let address = addresses::of_caller(peer, headers, &self.trusted_proxies);
        self.rates.check_address(address).map_err(IntoResponse::into_response)?;
        let Some(tokens) = &self.tokens else { return Ok(Caller { address, identity: Identity::Unchecked }) };
        let principal = tokens.principal(headers).await.map_err(IntoResponse::into_response)?;
        self.rates.check_principal(principal).map_err(IntoResponse::into_response)?;
        Ok(Caller { address, identity: Identity::Principal(principal) })
    }
}
