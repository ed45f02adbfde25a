//! Whether this process can answer queries: Valkey answers, evicts no keys, and the view is
//! complete. Whether the view is up to date is another question, which `/status` and the lag
//! answer. While Kafka is down, every replica still answers with the profiles that it has.

use std::time::Duration;

use redis::{ErrorKind, RedisError};
use shared::platform::health::Health;
use tokio::time::sleep;
use uuid::Uuid;

use crate::view::View;

const INTERVAL: Duration = Duration::from_secs(1);
/// The component's name in `/readyz`.
const COMPONENT: &str = "view";

/// Reads what a query reads, once a second. The process is not ready before the first answer.
pub fn watch(view: View, health: Health) -> impl Future<Output = anyhow::Result<()>> {
    health.waiting(COMPONENT, "Valkey to answer");
    ask(view, health)
}

async fn ask(view: View, health: Health) -> anyhow::Result<()> {
    loop {
        match reason_to_wait(&view).await {
            Ok(None) => health.ready(COMPONENT),
            Ok(Some(reason)) => health.waiting(COMPONENT, reason),
            Err(error) => health.waiting(COMPONENT, unreachable(&error)),
        }
        sleep(INTERVAL).await;
    }
}

async fn reason_to_wait(view: &View) -> anyhow::Result<Option<&'static str>> {
    if view.check_policy().await? {
        return Ok(Some(
            "Valkey to keep all keys: it evicts some when its memory is full; set maxmemory-policy noeviction",
        ));
    }
    let found = view.find(Uuid::nil()).await?;
    Ok((!found.complete).then_some("the view to be filled from the topic"))
}

/// Of the errors of a connection the text is shown: it names the fault of a certificate, for
/// example. Others may quote a key.
fn unreachable(error: &anyhow::Error) -> String {
    match error.downcast_ref::<RedisError>() {
        Some(error) if error.is_io_error() => format!("Valkey to answer: {error}"),
        Some(error) if error.kind() == ErrorKind::AuthenticationFailed => {
            "Valkey to accept the login: check user and password in VALKEY_URL".to_owned()
        }
        Some(error) if is_denied(error) => {
            "Valkey to let the user of VALKEY_URL run the commands of this service: check its ACL".to_owned()
        }
        _ => "Valkey to answer".to_owned(),
    }
}

/// Whether a command, alone or within a transaction, is not in the rights of the user.
fn is_denied(error: &RedisError) -> bool {
    let answers = error.clone().into_server_errors().unwrap_or_default();
    answers.iter().any(|(_, answer)| answer.code() == "NOPERM")
}
