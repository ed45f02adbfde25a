//! The relations that docs/compared.md claims hold in a short comparison of the programs of the
//! tests.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use compare::{Plan, Size, claims};

#[tokio::test(flavor = "multi_thread")]
async fn every_relation_that_the_comparison_claims_holds() {
    let results = compare::run(Plan::of(Size::Smoke)).await.unwrap();
    assert!(results.violations.is_empty(), "{:#?}", results.violations);
    let mut checked = 0;
    for claim in claims() {
        let holds = (claim.holds)(&results);
        assert_ne!(holds, Some(false), "{}\n{results:#?}", claim.text);
        checked += usize::from(holds.is_some());
    }
    assert!(checked >= 13, "only {checked} claims were checked: the plan lacks their scenarios");
}
