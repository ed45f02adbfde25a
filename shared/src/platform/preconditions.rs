//! `If-Match` and `If-None-Match` (RFC 9110 §13). The entity tag of a representation is its version
//! in quotes.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use headers::{ETag, Header, HeaderMapExt, IfMatch, IfNoneMatch};

use super::problem::{self, problem};

/// The preconditions of a request. A malformed one matches no version.
#[derive(Debug)]
pub struct Preconditions {
    if_match: Option<IfMatch>,
    if_none_match: Option<IfNoneMatch>,
}

impl Preconditions {
    pub fn of(headers: &HeaderMap) -> Self {
        let mut readable = HeaderMap::new();
        for name in [header::IF_MATCH, header::IF_NONE_MATCH] {
            for line in headers.get_all(&name) {
                readable.append(&name, readable_line(line));
            }
        }
        Self { if_match: readable.typed_get(), if_none_match: readable.typed_get() }
    }

    /// Whether a change is allowed while the resource has this version. `None`: the resource does
    /// not exist yet.
    pub fn allow_change_of(&self, version: Option<i64>) -> bool {
        let current = version.map(etag);
        let matches = |wanted: &IfMatch| current.as_ref().is_some_and(|etag| wanted.precondition_passes(etag));
        let differs = |known: &IfNoneMatch| current.as_ref().is_none_or(|etag| known.precondition_passes(etag));
        self.if_match.as_ref().is_none_or(matches) && self.if_none_match.as_ref().is_none_or(differs)
    }

    /// The answer to GET or HEAD: the representation, 304 if the caller has it already, or 412 if
    /// the caller requires another version.
    pub fn answer_with(&self, version: i64, representation: impl IntoResponse) -> Response {
        let etag = etag(version);
        if self.if_match.as_ref().is_some_and(|wanted| !wanted.precondition_passes(&etag)) {
            let detail = format!("the current version is {version}, and If-Match requires another one");
            return problem(problem::PRECONDITION_FAILED, detail).into_response();
        }
        let mut response = match &self.if_none_match {
            Some(known) if !known.precondition_passes(&etag) => StatusCode::NOT_MODIFIED.into_response(),
            _ => representation.into_response(),
        };
        response.headers_mut().typed_insert(etag);
        response
    }
}

impl<S: Sync> FromRequestParts<S> for Preconditions {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Self::of(&parts.headers))
    }
}

/// The entity tag of a version.
pub fn etag(version: i64) -> ETag {
    format!("\"{version}\"").parse().expect("digits in quotes are an entity tag")
}

/// The names of the headers that are preconditions.
pub fn names() -> [&'static HeaderName; 2] {
    [IfMatch::name(), IfNoneMatch::name()]
}

/// Replaces each byte that the crate `headers` cannot read by a character that no tag of ours
/// contains. The crate ignores a whole list if one byte is not ASCII, and in a debug build it
/// panics at white space within a tag. A tag that the line does not end would continue in the next
/// line, after the white space with which the crate joins them. So it is ended, as a tag that
/// matches no version.
fn readable_line(line: &HeaderValue) -> HeaderValue {
    let mut in_quotes = false;
    let readable = line.as_bytes().iter().map(|byte| {
        in_quotes ^= *byte == b'"';
        if byte.is_ascii_graphic() || (!in_quotes && *byte == b' ') { *byte } else { b'_' }
    });
    let mut readable: Vec<u8> = readable.collect();
    if in_quotes {
        readable.extend(b"_\"");
    }
    HeaderValue::from_bytes(&readable).expect("ASCII without control characters")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The preconditions of a request with this header. `|` separates its lines.
    fn preconditions(name: &HeaderName, lines: &[u8]) -> Preconditions {
        let mut headers = HeaderMap::new();
        for line in lines.split(|byte| *byte == b'|') {
            headers.append(name, HeaderValue::from_bytes(line).unwrap());
        }
        Preconditions::of(&headers)
    }

    #[test]
    fn if_match_compares_each_tag_of_all_lines_byte_by_byte_and_strongly() {
        let matching: [&[u8]; 8] = [
            b"\"1\"",
            b"*",
            b"\"77\", \"1\"",
            b"\"77\",\"1\"|\"2\"",
            b"\"77\"|\"1\"",
            b"\"a b\", \"\xe9\", W/\"1\", nonsense, \"1\"",
            b"\"a|b\"|\"1\"",
            b"\"1\", \"a|b\"",
        ];
        let others: [&[u8]; 13] = [
            b"W/\"1\"",
            b"\"001\"",
            b"\"+1\"",
            b"\" 1\"",
            b"1",
            b"",
            b"\"1",
            b"'1'",
            b"\"2\"",
            b"\"a\xe9 b\t\"",
            b"\"a|b\"",
            b"\"1|\"",
            b"\"|1\"",
        ];
        let cases = matching.map(|lines| (lines, true)).into_iter().chain(others.map(|lines| (lines, false)));
        for (lines, matches) in cases {
            let preconditions = preconditions(&header::IF_MATCH, lines);
            let text = String::from_utf8_lossy(lines);
            assert_eq!(preconditions.allow_change_of(Some(1)), matches, "{text}");
            let expected = if matches { StatusCode::OK } else { StatusCode::PRECONDITION_FAILED };
            assert_eq!(preconditions.answer_with(1, "").status(), expected, "{text}");
            assert!(!preconditions.allow_change_of(None), "nothing matches what does not exist: {text}");
        }
    }

    #[test]
    fn if_none_match_answers_304_to_a_read_and_forbids_a_change() {
        let same: [&[u8]; 4] = [b"\"1\"", b"W/\"1\"", b"*", b"\"77\"|\"2\", \"1\""];
        let others: [&[u8]; 6] = [b"\"001\"", b"\"2\"", b"1", b"\"a|b\"", b"\"1|\"", b"W/\"1|2\""];
        let cases = same.map(|lines| (lines, true)).into_iter().chain(others.map(|lines| (lines, false)));
        for (lines, same) in cases {
            let preconditions = preconditions(&header::IF_NONE_MATCH, lines);
            let text = String::from_utf8_lossy(lines);
            let answer = preconditions.answer_with(1, "");
            assert_eq!(answer.status() == StatusCode::NOT_MODIFIED, same, "{text}");
            assert_eq!(answer.headers()[header::ETAG], "\"1\"");
            assert_eq!(preconditions.allow_change_of(Some(1)), !same, "{text}");
            assert!(preconditions.allow_change_of(None), "{text}");
        }
    }
}
