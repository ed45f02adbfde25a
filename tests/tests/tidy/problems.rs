//! The types of problem documents are part of the APIs, so `docs/problems.md` lists them.

use std::collections::BTreeMap;

use http::StatusCode;

use crate::tree::{code, read, sources};

/// The status of each kind of problem in the code, by its name.
fn declared() -> BTreeMap<String, String> {
    let mut kinds = BTreeMap::new();
    for (path, text) in sources() {
        for line in code(&text) {
            let Some((_, rest)) = line.split_once("Kind::new(\"") else { continue };
            let (name, rest) = rest.split_once('"').unwrap();
            let status = rest.split_once("StatusCode::").unwrap().1.trim_end_matches([')', ';']);
            let earlier = kinds.insert(name.to_owned(), status.to_owned());
            assert!(earlier.is_none_or(|earlier| earlier == status), "{path}: {name} has two statuses");
        }
    }
    kinds
}

/// The name of a status as a constant: `NOT_FOUND` for 404.
fn constant(status: &str) -> String {
    let status: StatusCode = status.trim().parse().unwrap();
    status.canonical_reason().unwrap().to_uppercase().replace(' ', "_")
}

#[test]
fn every_kind_of_problem_is_documented_with_its_status() {
    let page = read("docs/problems.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `/problems/"));
    let documented = rows.map(|row| {
        let (name, rest) = row.split_once("` |").unwrap();
        (name.to_owned(), constant(rest.split('|').next().unwrap()))
    });
    let declared = declared();
    assert!(declared.len() > 10, "only {} kinds were found: the rule checks nothing", declared.len());
    assert_eq!(documented.collect::<BTreeMap<_, _>>(), declared, "kinds in docs/problems.md, and kinds in the code");
}
