//! `cargo xtask up --temporary`: the system as a developer starts it, with the console and its
//! laboratory, on free ports.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use testbed::paths;
use testbed::process::Logs;
use testbed::testing::prefix;

use crate::console::Console;
use crate::waiting::within;

/// How long it may take to start everything. It is longer than the stack's own limits, so that the
/// stack is the one to report what did not start.
const START_DEADLINE: Duration = Duration::from_secs(240);
/// What it prints in front of the address of the console.
const READY: &str = "See it at ";

/// A running system. It is stopped when this is dropped.
pub struct Up {
    run: Child,
    printed: String,
}

impl Up {
    /// Compiles nothing, because it calls the program `true` instead of cargo. The services are
    /// already built.
    pub async fn start() -> Self {
        Self::start_program(&paths::root().join("target/debug/xtask")).await
    }

    /// As [`Up::start`], with another `xtask`.
    pub async fn start_program(program: &Path) -> Self {
        let logs = Logs::to_files(&format!("tests/up-{}", prefix())).unwrap();
        let output = logs.file("xtask");
        let file = File::create(&output).unwrap();
        let mut command = Command::new(program);
        command.args(["up", "--temporary"]).env("CARGO", "true");
        let mut run = command.stdin(Stdio::null()).stderr(file.try_clone().unwrap()).stdout(file).spawn().unwrap();
        within(START_DEADLINE, "`xtask up` prints how to register a user", async || {
            let printed = fs::read_to_string(&output).unwrap();
            assert!(run.try_wait().unwrap().is_none(), "`xtask up` has ended: {printed}");
            printed.contains("Register a user:").then_some(())
        })
        .await;
        Self { run, printed: fs::read_to_string(&output).unwrap() }
    }

    pub fn console(&self) -> Console {
        Console::at(&word_after(&self.printed, READY))
    }

    /// What it has printed until it was ready.
    pub fn printed(&self) -> &str {
        &self.printed
    }

    pub fn pid(&self) -> u32 {
        self.run.id()
    }

    /// The address of a service or of a component, as it was printed.
    pub fn address(&self, name: &str) -> String {
        word_after(&self.printed, &format!("\n  {name:<10} "))
    }

    /// Presses Ctrl-C, and waits for the end.
    pub fn interrupt(mut self) -> ExitStatus {
        self.signal("INT");
        self.run.wait().unwrap()
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([format!("-{signal}"), self.run.id().to_string()]).status();
        assert!(sent.unwrap().success(), "no process {}", self.run.id());
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if self.run.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.signal("TERM");
            let _ = self.run.wait();
        }
    }
}

fn word_after(text: &str, start: &str) -> String {
    let (_, rest) = text.split_once(start).unwrap_or_else(|| panic!("no {start:?} in {text}"));
    rest.split_whitespace().next().unwrap_or_default().to_owned()
}
