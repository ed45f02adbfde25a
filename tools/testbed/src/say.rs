//! Everything that is said on the terminal. Errors of writing are ignored: `cargo xtask up | head` must not kill a database.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::ProgressBar;

const TICK: Duration = Duration::from_millis(100);

pub fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// A spinner on a terminal, a plain line elsewhere.
pub struct Progress {
    bar: ProgressBar,
    what: String,
}

impl Progress {
    pub fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = ProgressBar::new_spinner().with_message(what.clone());
        if std::io::stderr().is_terminal() {
            bar.enable_steady_tick(TICK);
        } else {
            say(format_args!("{what} …"));
        }
        Self { bar, what }
    }

    /// What the work is at just now; shown on a terminal only.
    pub fn detail(&self, detail: &str) {
        self.bar.set_message(format!("{}: {detail}", self.what));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
