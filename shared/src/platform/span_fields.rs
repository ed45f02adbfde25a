//! The fields of spans, as the log writes them.

use std::fmt;

use tracing::span::Record;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FormatFields, FormattedFields};

/// Formats fields as a JSON object, as [`JsonFields`] does. When a span records a further field,
/// `JsonFields` parses the object that it has written and writes it again. Every request and every
/// mail records its trace id, so this one appends the field instead.
pub(super) struct SpanFields(JsonFields);

impl SpanFields {
    pub fn new() -> Self {
        Self(JsonFields::new())
    }
}

impl<'writer> FormatFields<'writer> for SpanFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        self.0.format_fields(writer, fields)
    }

    fn add_fields(&self, current: &'writer mut FormattedFields<Self>, fields: &Record<'_>) -> fmt::Result {
        let mut further = String::new();
        self.0.format_fields(Writer::new(&mut further), fields)?;
        let object = &mut current.fields;
        match (object.strip_suffix('}'), further.strip_prefix('{')) {
            (Some(before), Some(added)) if before.len() > 1 && added.len() > 1 => {
                object.truncate(before.len());
                object.push(',');
                object.push_str(added);
            }
            // One of them has no field.
            (Some(_), Some(added)) if added.len() > 1 => *object = further,
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use serde_json::{Value, json};
    use tracing::field::Empty;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(text)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The fields of these spans in a log line.
    fn logged(within: impl FnOnce()) -> Vec<Value> {
        let log = Log::default();
        let writer = log.clone();
        let lines = tracing_subscriber::fmt::layer().json().fmt_fields(SpanFields::new());
        let lines = lines.with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), within);
        let lines = log.0.lock().unwrap();
        let lines = String::from_utf8_lossy(&lines);
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["span"].clone()).collect()
    }

    #[test]
    fn fields_that_are_recorded_later_are_logged_with_the_others() {
        let lines = logged(|| {
            let span = tracing::error_span!("request", route = "/users", trace.id = Empty, note = Empty);
            let _entered = span.enter();
            tracing::error!("before");
            span.record("trace.id", "ab\"c}");
            tracing::error!("with one");
            span.record("note", 7);
            tracing::error!("with two");
            let span = tracing::error_span!("empty", first = Empty);
            let _entered = span.enter();
            tracing::error!("without any");
            span.record("first", true);
            tracing::error!("with its only one");
        });
        let expected = [
            json!({ "name": "request", "route": "/users" }),
            json!({ "name": "request", "route": "/users", "trace.id": "ab\"c}" }),
            json!({ "name": "request", "route": "/users", "trace.id": "ab\"c}", "note": 7 }),
            json!({ "name": "empty" }),
            json!({ "name": "empty", "first": true }),
        ];
        assert_eq!(lines, expected);
    }
}
