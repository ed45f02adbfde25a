//! Runs every job with few events on the programs of the tests. Each job fails unless the effects
//! are exact. The times say nothing here, so none is asserted.

use std::path::Path;

use bench::{Job, Programs, Size};

#[tokio::test]
async fn every_job_has_exact_effects() {
    let services = testbed::testing::stack().programs;
    let programs = Programs { services: &services, bench: Path::new(env!("CARGO_BIN_EXE_bench")) };
    let reports = bench::run(&Job::ALL, Size::Smoke, programs, |report| println!("{report}")).await.unwrap();
    let jobs: Vec<&str> = reports.iter().map(|report| report.job.as_str()).collect();
    let expected = Job::ALL.map(|job| format!("{job:?}").to_lowercase());
    assert_eq!(jobs, expected, "each job has a report");
}
