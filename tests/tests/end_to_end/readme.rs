//! The README's `curl` lines, run exactly as they are printed, on a system whose ports replace the
//! ones in the text.

use std::fs;
use std::process::Output;

use serde_json::Value;
use testbed::paths;
use tests::{System, eventually};
use tokio::process::Command;
use topology::SERVICES;

/// The commands of the README's `curl` block, without their comments. A line that ends in `\`
/// continues.
fn commands() -> Vec<String> {
    let readme = fs::read_to_string(paths::root().join("README.md")).unwrap();
    let joined = readme.replace("\\\n", " ");
    let lines = joined.lines().filter_map(|line| line.strip_prefix("    ")).filter(|line| line.starts_with("curl "));
    lines.map(|line| line.split("   # ").next().unwrap().trim().to_owned()).collect()
}

/// Runs a command of the README in a shell, on the ports of this system.
async fn run(system: &System, command: &str) -> Output {
    let mut command = command.to_owned();
    for service in SERVICES {
        let public = system.users.url(service, "");
        let admin = system.processes.admin(service).url("");
        command = command.replace(&format!("localhost:{}", service.http), &public);
        command = command.replace(&format!("localhost:{}", service.admin), &admin);
    }
    Command::new("sh").args(["-c", &command]).output().await.unwrap()
}

/// Repeats a query until its answer fulfils the condition.
async fn until_answer(system: &System, command: &str, accepts: impl Fn(&Value) -> bool) {
    eventually(command, async || {
        let output = run(system, command).await;
        let answer: Value = serde_json::from_slice(&output.stdout).ok()?;
        accepts(&answer).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_curl_lines_of_the_readme_show_what_their_comments_say() {
    if paths::on_path(&["curl"]).is_none() {
        eprintln!("skipped: there is no curl on the PATH");
        return;
    }
    let system = System::start().await;
    let commands = commands();
    let [register, profile, emails, funnel, audit, status] = commands.as_slice() else {
        panic!("the README has other curl lines than this test expects: {commands:#?}")
    };

    let registered = String::from_utf8(run(&system, register).await.stdout).unwrap();
    let (head, body) = registered.split_once("\r\n\r\n").unwrap_or_else(|| panic!("not HTTP: {registered}"));
    assert!(head.starts_with("HTTP/1.1 201 "), "{registered}");
    let answer: Value = serde_json::from_str(body).unwrap();
    let with_id = |command: &str| command.replace("ID", answer["id"].as_str().unwrap());

    until_answer(&system, &with_id(profile), |profile| profile["display_name"] == "Ada Lovelace").await;
    until_answer(&system, &with_id(emails), |emails| emails[0]["status"] == "sent").await;
    until_answer(&system, funnel, |funnel| funnel["registered"] == 1 && funnel["mailed"] == 1).await;
    until_answer(&system, &with_id(audit), |audit| audit["entries"][0]["type"] == "user.registered").await;
    eventually(status, async || (run(&system, status).await.stdout == b"ok\n").then_some(())).await;
}
