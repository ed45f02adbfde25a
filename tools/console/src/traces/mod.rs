//! The traces of the services. The console receives them by OTLP over gRPC, keeps the newest in
//! memory for the stories, and passes each request on to another collector if there is one.
//!
//! The services never wait for the console: they export in the background, and lose traces while it
//! does not answer.

mod config;
mod wire;
mod store;
mod forward;
mod receiver;
mod span;

pub use config::TracesConfig;
pub use forward::{Forward, forward};
pub use receiver::{Receiver, receive};
pub use span::{Event, Span};
pub use store::{MEMORY, Traces};

/// The id of a trace.
pub type TraceId = [u8; 16];

/// The trace that a `traceparent` names.
pub fn trace_of(traceparent: &str) -> Option<TraceId> {
    let id = traceparent.split('-').nth(1).filter(|id| id.len() == 32)?;
    Some(u128::from_str_radix(id, 16).ok()?.to_be_bytes())
}

/// An id as hexadecimal text.
pub fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_names_its_trace() {
        let trace = trace_of("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
        assert_eq!(hex(&trace), "0af7651916cd43dd8448eb211c80319c");
        for wrong in ["", "00", "00-0af7-b7ad-01", "00-zzf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"] {
            assert_eq!(trace_of(wrong), None, "{wrong}");
        }
    }
}
