//! The signals that end a command.

use tokio::signal::unix::{SignalKind, signal};

/// Waits for SIGINT (Ctrl-C), SIGTERM, or SIGHUP (the terminal was closed).
pub async fn termination_signal() {
    let install = |kind| signal(kind).expect("a signal handler can be installed");
    let mut interrupt = install(SignalKind::interrupt());
    let mut terminate = install(SignalKind::terminate());
    let mut hangup = install(SignalKind::hangup());
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
}
