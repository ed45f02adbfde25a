//! Everything that is printed on the terminal. Write errors are ignored: `cargo xtask up | head`
//! must not kill a database.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;

/// How often the spinner moves.
const TICK: Duration = Duration::from_millis(100);

pub fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// Prints what the work is, does it, and prints how long it took. Prints no second line when the
/// work fails.
pub async fn timed<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    say(what);
    let start = Instant::now();
    let result = work.await?;
    say(format_args!("  ready after {:.1} s", start.elapsed().as_secs_f64()));
    Ok(result)
}

/// A spinner on a terminal, a plain line elsewhere. The spinner disappears on drop.
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

    /// Shows what the work is doing at the moment, on a terminal only.
    pub fn detail(&self, detail: &str) {
        self.bar.set_message(format!("{}: {detail}", self.what));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
