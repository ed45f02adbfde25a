//! What protects a page on localhost from other websites. Every website that a visitor opens can
//! send requests to it, and a name under its control can point to this machine.
//!
//! - A request must name a known host, so a foreign name that points here is refused.
//! - The pages run no code but their own, load nothing from elsewhere, and cannot be framed.
//! - A request that changes something comes from a page of this console: it has the page's token, and
//!   the browser says that it comes from the same origin. The service that acts checks the operator's
//!   token as well.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'none'";
/// Headers of every answer.
const HEADERS: [(HeaderName, HeaderValue); 5] = [
    (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    // With `no-referrer` browsers send `Origin: null` with the forms of the console itself.
    (header::REFERRER_POLICY, HeaderValue::from_static("same-origin")),
    (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
    (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
];

/// Refuses requests for unknown hosts, and adds the headers to every answer.
pub async fn guarded(State(hosts): State<Arc<[String]>>, request: Request, next: Next) -> Response {
    let mut response = if is_known(request.headers(), &hosts) {
        next.run(request).await
    } else {
        let text = "unknown host: add the name to CONSOLE_HOSTS if it is yours\n";
        (StatusCode::MISDIRECTED_REQUEST, text).into_response()
    };
    response.headers_mut().extend(HEADERS.map(|(name, value)| (Some(name), value)));
    response
}

/// Whether the header `Host` names one of these hosts. The port does not matter: a proxy or a
/// container may publish another one.
fn is_known(headers: &HeaderMap, hosts: &[String]) -> bool {
    let mut given = headers.get_all(header::HOST).into_iter();
    let (Some(host), None) = (given.next(), given.next()) else { return false };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    hosts.iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// Whether a request may change something. `given` is the page's token in the form, and `expected`
/// the right one.
pub fn may_change(headers: &HeaderMap, given: &str, expected: &str) -> bool {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let (Some(origin), Some(host)) = (text(header::ORIGIN), text(header::HOST)) else { return false };
    let is_same_origin = ["http://", "https://"].iter().any(|scheme| origin.strip_prefix(scheme) == Some(host));
    // Browsers that do not send this header are recognised by `Origin` alone.
    let site = text(HeaderName::from_static("sec-fetch-site"));
    let is_same_site = site.is_none_or(|site| site == "same-origin");
    let is_token = bool::from(given.as_bytes().ct_eq(expected.as_bytes()));
    is_same_origin && is_same_site && is_token
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_hosts_are_served() {
        let hosts = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let known = |lines: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(header::HOST, HeaderValue::from_static(line));
            }
            is_known(&headers, &hosts)
        };
        for host in ["localhost", "localhost:8084", "LOCALHOST:80", "127.0.0.1:8084"] {
            assert!(known(&[host]), "{host}");
        }
        for host in
            ["", "evil.example", "localhost.evil.example", "evil.example:8084", "localhost:8084:1", "[::1]:8084"]
        {
            assert!(!known(&[host]), "{host}");
        }
        assert!(!known(&[]));
        assert!(!known(&["localhost", "evil.example"]));
    }

    #[test]
    fn only_a_page_of_this_console_may_change_something() {
        let may = |origin: &'static str, site: Option<&'static str>, token| {
            let mut headers = HeaderMap::from_iter([(header::HOST, HeaderValue::from_static("localhost:8084"))]);
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            headers
                .extend(site.map(|site| (HeaderName::from_static("sec-fetch-site"), HeaderValue::from_static(site))));
            may_change(&headers, token, "page-token")
        };
        assert!(may("http://localhost:8084", None, "page-token"));
        assert!(may("https://localhost:8084", Some("same-origin"), "page-token"));
        assert!(!may("http://localhost:8084", None, "another"));
        assert!(!may("http://localhost:8084", None, ""));
        assert!(!may("http://localhost:3000", None, "page-token"));
        assert!(!may("http://evil.example", None, "page-token"));
        assert!(!may("null", None, "page-token"));
        assert!(!may("http://localhost:8084", Some("cross-site"), "page-token"));
        assert!(!may_change(&HeaderMap::new(), "page-token", "page-token"), "without an origin");
    }
}
