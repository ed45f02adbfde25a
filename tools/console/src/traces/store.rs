//! The newest traces, in a fixed amount of memory. Spans are kept as they were sent, and are
//! decoded when a story is shown.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::mem::size_of;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opentelemetry_proto::tonic::trace::v1::{Span as Sent, span::Link};
use prost::Message;

use super::TraceId;
use super::span::Span;
use super::wire::{Head, each_span};

/// Bytes of all spans. A registration has about 8 KB of spans, so about 2,000 registrations fit.
pub const MEMORY: usize = 16 * 1024 * 1024;
/// Bytes of one trace. Otherwise the spans of a trace that never ends would replace all others.
const TRACE_MEMORY: usize = 1024 * 1024;
/// Bytes of one span. A span of ours has 1 KB, and a round of the relay with all its links 10 KB.
const SPAN_SIZE: usize = 64 * 1024;
/// What a span costs besides its own bytes and the name of its service: its place in a list, which
/// may be twice as long as it needs to be, and two allocations.
const SPAN_OVERHEAD: usize = 2 * size_of::<Stored>() + 64;
/// What a trace costs besides its spans: its place in the map, in the list of the oldest, and one
/// allocation. Both collections may be twice as long as they need to be.
const TRACE_OVERHEAD: usize = 2 * (size_of::<Trace>() + 2 * size_of::<TraceId>()) + 64;

/// The newest traces. Clones share them.
#[derive(Clone, Default)]
pub struct Traces(Arc<Mutex<Store>>);

/// How much is kept, and what is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    pub traces: usize,
    pub bytes: usize,
    /// Requests since the start.
    pub requests: u64,
    /// Spans that were larger than [`SPAN_SIZE`], beyond the memory of their trace, or without an
    /// id.
    pub dropped: u64,
}

#[derive(Default)]
struct Store {
    traces: HashMap<TraceId, Trace>,
    /// The oldest first.
    order: VecDeque<TraceId>,
    kept: Kept,
}

#[derive(Default)]
struct Trace {
    spans: Vec<Stored>,
    bytes: usize,
}

struct Stored {
    service: Box<str>,
    encoded: Box<[u8]>,
}

impl Traces {
    /// Keeps the spans of an `ExportTraceServiceRequest`, and forgets the oldest traces if there is
    /// no room.
    ///
    /// # Errors
    /// The request is malformed. Its spans up to there are kept.
    pub fn add(&self, request: &[u8]) -> anyhow::Result<()> {
        let mut store = self.lock();
        store.kept.requests += 1;
        each_span(request, |service, head| store.add(service, &head))
    }

    /// The spans of a trace, in the order in which they arrived.
    pub fn spans(&self, trace: &TraceId) -> Vec<Span> {
        let store = self.lock();
        let spans = store.traces.get(trace).map(|trace| trace.spans.as_slice()).unwrap_or_default();
        spans.iter().filter_map(|Stored { service, encoded }| Span::decode(service, encoded)).collect()
    }

    pub fn kept(&self) -> Kept {
        self.lock().kept
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    fn add(&mut self, service: &str, head: &Head<'_>) {
        if head.encoded.len() > SPAN_SIZE {
            self.kept.dropped += 1;
            return;
        }
        let linked = if head.is_producer { for_linked_traces(head.encoded) } else { BTreeMap::new() };
        if linked.is_empty() {
            self.keep(head.trace, service, head.encoded.into());
        }
        for (trace, encoded) in linked {
            self.keep(&trace, service, encoded);
        }
    }

    fn keep(&mut self, trace: &[u8], service: &str, encoded: Box<[u8]>) {
        let Ok(id) = TraceId::try_from(trace) else {
            self.kept.dropped += 1;
            return;
        };
        let size = encoded.len() + service.len() + SPAN_OVERHEAD;
        let is_full = self.traces.get(&id).is_some_and(|trace| trace.bytes + size > TRACE_MEMORY);
        if is_full {
            self.kept.dropped += 1;
            return;
        }
        let trace = self.traces.entry(id).or_insert_with(|| {
            self.order.push_back(id);
            self.kept.bytes += TRACE_OVERHEAD;
            Trace { bytes: TRACE_OVERHEAD, ..Trace::default() }
        });
        trace.spans.push(Stored { service: service.into(), encoded });
        trace.bytes += size;
        self.kept.bytes += size;
        while self.kept.bytes > MEMORY {
            let Some(oldest) = self.order.pop_front() else { break };
            self.kept.bytes -= self.traces.remove(&oldest).map_or(0, |trace| trace.bytes);
        }
        self.kept.traces = self.traces.len();
    }
}

/// The span of a round of the relay, for each trace that it links to: with the links to that trace
/// only. The round itself is a trace of one span, which no story asks for.
fn for_linked_traces(encoded: &[u8]) -> BTreeMap<Vec<u8>, Box<[u8]>> {
    let Ok(mut span) = Sent::decode(encoded) else { return BTreeMap::new() };
    let mut links: BTreeMap<Vec<u8>, Vec<Link>> = BTreeMap::new();
    for link in std::mem::take(&mut span.links) {
        links.entry(link.trace_id.clone()).or_default().push(link);
    }
    let copies = links.into_iter().map(|(trace, links)| {
        span.links = links;
        (trace, span.encode_to_vec().into())
    });
    copies.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traces::wire::tests::{request, span};

    fn add(traces: &Traces, spans: Vec<Sent>) {
        traces.add(&request("user", spans).encode_to_vec()).unwrap();
    }

    fn id(trace: u128) -> TraceId {
        trace.to_be_bytes()
    }

    #[test]
    fn the_oldest_traces_are_forgotten_when_the_memory_is_full() {
        let traces = Traces::default();
        for trace in 0..40_000 {
            add(&traces, vec![span(trace, 1_000)]);
            add(&traces, vec![span(trace, 0)]);
            assert!(traces.kept().bytes <= MEMORY, "{:?}", traces.kept());
        }
        let kept = traces.kept();
        assert!(kept.bytes > MEMORY - 10_000, "the memory is not used: {kept:?}");
        assert_eq!(traces.spans(&id(39_999)).len(), 2);
        assert_eq!(traces.spans(&id(40_000 - kept.traces as u128)).len(), 2, "the oldest that is kept");
        assert_eq!(traces.spans(&id(40_000 - kept.traces as u128 - 1)).len(), 0, "the newest that is not");
        let store = traces.lock();
        assert_eq!(store.order.len(), store.traces.len());
        assert_eq!(store.traces.values().map(|trace| trace.bytes).sum::<usize>(), kept.bytes);
    }

    /// Each has two allocations and a place in two collections, which cost more than its bytes.
    #[test]
    fn many_empty_spans_cost_what_they_need() {
        let traces = Traces::default();
        for first in (0..400_000).step_by(1_000) {
            let empty = |trace: u128| Sent { trace_id: trace.to_be_bytes().to_vec(), ..Sent::default() };
            add(&traces, (first..first + 1_000).map(empty).collect());
        }
        let kept = traces.kept();
        assert!(kept.traces < 60_000 && kept.bytes <= MEMORY, "{kept:?}");
    }

    #[test]
    fn what_is_too_large_is_dropped_and_counted() {
        let traces = Traces::default();
        add(&traces, vec![span(1, 0), span(2, SPAN_SIZE)]);
        assert_eq!((traces.kept().traces, traces.kept().dropped), (1, 1));
        for _ in 0..100 {
            add(&traces, vec![span(1, SPAN_SIZE / 2)]);
        }
        assert_eq!(traces.spans(&id(1)).len() + traces.kept().dropped as usize, 1 + 100 + 1);
        assert!(traces.kept().bytes <= TRACE_MEMORY, "{:?}", traces.kept());
        add(&traces, vec![Sent { trace_id: vec![1; 3], ..Sent::default() }]);
        assert_eq!(traces.kept().traces, 1, "a span without the id of a trace");
    }

    #[test]
    fn a_round_of_the_relay_is_part_of_the_traces_that_it_links_to() {
        let traces = Traces::default();
        let link = |trace: u128, span: u8| Link {
            trace_id: trace.to_be_bytes().to_vec(),
            span_id: vec![span; 8],
            ..Link::default()
        };
        let mut round = span(1, 0);
        round.kind = 4;
        round.links = vec![link(2, 1), link(3, 2), link(2, 3)];
        add(&traces, vec![round.clone()]);
        assert_eq!(traces.spans(&id(1)), []);
        assert_eq!(traces.spans(&id(2)).len(), 1);
        assert_eq!(traces.spans(&id(3)).len(), 1);
        // A consumer links to the trace of its batch, and belongs to its own trace only.
        round.kind = 5;
        add(&traces, vec![round]);
        assert_eq!(traces.spans(&id(1)).len(), 1);
        assert_eq!(traces.spans(&id(3)).len(), 1);
    }
}
