//! Trace: one trace for each batch that is sampled, from the read that brought it to the acknowledgement of its entries.
//!
//! Takes the moments at which the flow begins and ends its steps; gives spans to OpenTelemetry. Whether a batch is sampled is decided once,
//! when it was read; of one that is not, nothing is kept, and none of its entries is looked at. It cannot fail.
//!
//! ```text
//! settle ─┬─ read     the entries come from Valkey (or `reclaim`: they are taken over)
//!         ├─ flush    the transaction, with links to the producers' spans; one for each attempt and piece
//!         └─ ack      they are acknowledged
//! ```

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use opentelemetry::context::FutureExt;
use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
};
use opentelemetry::{Context, KeyValue, global};

use super::recorder::Labels;

/// The name under which all telemetry is made.
pub const SCOPE: &str = "tidegate";
/// How many producers' spans a flush is linked to at the most: a link is some 50 bytes of every trace that is kept.
pub const MAX_LINKS: usize = 32;

/// Whether anybody takes traces.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Traces are taken from now on.
pub(super) fn are_taken() {
    TAKEN.store(true, Ordering::Relaxed);
}

/// The trace of one batch. Its clones are one; its first span ends with the last of them.
#[derive(Debug, Clone, Default)]
pub struct Trace(Option<Arc<Batch>>);

#[derive(Debug)]
struct Batch {
    /// How it came, in one word.
    how: &'static str,
    /// When its first entries came.
    began: OnceLock<SystemTime>,
    /// Its first span, where it is sampled.
    root: OnceLock<Context>,
}

/// A span, which ends when it is dropped. One that is not sampled costs nothing.
#[derive(Debug)]
#[must_use = "a span lasts until it is dropped"]
pub struct Span(Option<Context>);

impl Trace {
    /// Of a batch that is to be read (`how` says in which way, in one word). Nothing is decided yet.
    pub fn of_batch(how: &'static str) -> Trace {
        let batch = || Arc::new(Batch { how, began: OnceLock::new(), root: OnceLock::new() });
        Trace(TAKEN.load(Ordering::Relaxed).then(batch))
    }

    /// Its first entries come now.
    pub fn begins(&self) {
        if let Some(batch) = &self.0 {
            batch.began.get_or_init(SystemTime::now);
        }
    }

    /// The batch was read, with so many entries: now it is decided whether it is sampled.
    pub(super) fn was_read(&self, labels: &Labels, entries: usize) {
        let Some(batch) = &self.0 else { return };
        let (tracer, began) = (global::tracer(SCOPE), *batch.began.get_or_init(SystemTime::now));
        let root = tracer
            .span_builder("settle")
            .with_kind(SpanKind::Consumer)
            .with_start_time(began)
            .with_attributes(labels.of_spans())
            .start_with_context(&tracer, &Context::new());
        if !root.is_recording() {
            return;
        }
        let root = Context::new().with_span(root);
        let mut read = tracer.span_builder(batch.how).with_start_time(began).start_with_context(&tracer, &root);
        read.set_attribute(KeyValue::new("tidegate.entries", entries as i64));
        read.end();
        let _ = batch.root.set(root);
    }

    /// Runs this; the log lines that it writes name the trace, where the batch is sampled.
    pub async fn covers<T>(&self, steps: impl Future<Output = T>) -> T {
        match self.0.as_ref().and_then(|batch| batch.root.get()) {
            // Boxed, so that those of most batches, which are not sampled, are no larger for it.
            Some(root) => Box::pin(steps).with_context(root.clone()).await,
            None => steps.await,
        }
    }

    /// A span within it.
    pub(super) fn span(&self, name: &'static str, kind: SpanKind) -> Span {
        let Some(root) = self.0.as_ref().and_then(|batch| batch.root.get()) else { return Span(None) };
        let tracer = global::tracer(SCOPE);
        let span = tracer.span_builder(name).with_kind(kind).start_with_context(&tracer, root);
        Span(Some(root.with_span(span)))
    }
}

/// A span of its own, sampled like a batch.
pub fn alone(name: &'static str, labels: &Labels) -> Span {
    if !TAKEN.load(Ordering::Relaxed) {
        return Span(None);
    }
    let tracer = global::tracer(SCOPE);
    let builder = tracer.span_builder(name).with_attributes(labels.of_spans());
    let span = builder.start_with_context(&tracer, &Context::new());
    Span(span.is_recording().then(|| Context::new().with_span(span)))
}

impl Span {
    /// Whether it is kept.
    pub fn is_sampled(&self) -> bool {
        self.0.is_some()
    }

    /// Notes a number.
    pub fn number(&self, name: &'static str, value: u64) {
        self.attribute(KeyValue::new(name, i64::try_from(value).unwrap_or(i64::MAX)));
    }

    /// Notes a word.
    pub fn word(&self, name: &'static str, value: &'static str) {
        self.attribute(KeyValue::new(name, value));
    }

    pub(super) fn attribute(&self, attribute: KeyValue) {
        if let Some(context) = &self.0 {
            context.span().set_attribute(attribute);
        }
    }

    /// Links it to what a producer did.
    pub(super) fn link(&self, cause: SpanContext) {
        if let Some(context) = &self.0 {
            context.span().add_link(cause, Vec::new());
        }
    }

    /// It did not succeed. `why`: one word, the same for every one of its kind.
    pub fn failed(&self, why: &'static str) {
        if let Some(context) = &self.0 {
            context.span().set_status(Status::error(why));
        }
    }
}

/// The trace and the span that the current step belongs to, where they are sampled.
pub(super) fn current() -> Option<(TraceId, SpanId)> {
    if !TAKEN.load(Ordering::Relaxed) {
        return None;
    }
    Context::map_current(|context| {
        let span = context.span().span_context().clone();
        (span.is_valid() && span.is_sampled()).then(|| (span.trace_id(), span.span_id()))
    })
}

/// Reads a W3C `traceparent` of version 00: `00-<32 hex>-<16 hex>-<2 hex>`. None: it is no such text, or has an id of zeros.
///
/// Higher versions may be longer; what they begin with is read in the same way, as the standard asks.
pub fn parse_traceparent(text: &[u8]) -> Option<SpanContext> {
    const LENGTH: usize = 55;
    let (head, rest) = text.split_at_checked(LENGTH)?;
    let head = std::str::from_utf8(head).ok()?;
    let mut parts = head.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex =
        |part: &str, length| part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let well_formed = is_hex(version, 2) && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2);
    let ends_well = if version == "00" { rest.is_empty() } else { rest.is_empty() || rest[0] == b'-' };
    if parts.next().is_some() || !well_formed || !ends_well || version == "ff" {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()? & 1);
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let context = SpanContext::new(trace, span, flags, true, TraceState::default());
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_read_and_what_is_none_is_not() {
        let context = parse_traceparent(GOOD.as_bytes()).expect("a good one");
        assert_eq!(context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(context.span_id().to_string(), "b7ad6b7169203331");
        assert!(context.is_sampled() && context.is_remote());
        assert!(!parse_traceparent(&GOOD.as_bytes()[..54]).is_some_and(|context| context.is_valid()));
        for bad in [
            "",
            "00",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01x",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331x01",
        ] {
            assert_eq!(parse_traceparent(bad.as_bytes()), None, "{bad}");
        }
        let later = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more";
        assert!(parse_traceparent(later.as_bytes()).is_some_and(|context| !context.is_sampled()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_context_or_none(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = parse_traceparent(&bytes);
        }

        #[test]
        fn a_context_that_is_read_has_the_ids_of_its_text(trace in 1u128.., span in 1u64.., flags: u8) {
            let text = format!("00-{trace:032x}-{span:016x}-{flags:02x}");
            let context = parse_traceparent(text.as_bytes()).expect("well formed");
            prop_assert_eq!(context.trace_id(), TraceId::from(trace));
            prop_assert_eq!(context.span_id(), SpanId::from(span));
        }
    }
}
