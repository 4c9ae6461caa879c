//! Causes: what producers did, as far as the entries of a batch tell it.
//!
//! Takes a batch; gives the distinct trace contexts that some of its entries carry in the field `traceparent`, for the span of its flush. It
//! cannot fail: what is no trace context is passed over. It is asked of sampled batches only, and looks at a bounded number of entries.

use std::collections::HashSet;

use opentelemetry::trace::SpanContext;

use super::batch::Batch;
use crate::client::TRACEPARENT_FIELD;
use crate::telemetry::trace::{MAX_LINKS, parse_traceparent};

/// Entries that are looked at, spread evenly over the batch: some 100 µs of a flush that is sampled.
const LOOKED_AT: usize = 1_000;

impl Batch {
    /// What producers did, [`MAX_LINKS`] causes at the most. Traces that their producers do not keep lead nowhere and are left out.
    pub fn causes(&self) -> Vec<SpanContext> {
        let stride = self.len().div_ceil(LOOKED_AT).max(1);
        let mut known = HashSet::new();
        self.entries()
            .iter()
            .step_by(stride)
            .filter_map(|entry| {
                let mut fields = self.canonical(entry).fields();
                fields.find(|(name, _)| *name == TRACEPARENT_FIELD.as_bytes()).map(|(_, value)| value)
            })
            .filter_map(parse_traceparent)
            .filter(|cause| cause.is_sampled() && known.insert((cause.trace_id(), cause.span_id())))
            .take(MAX_LINKS)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::Filling;
    use crate::flow::batch::tests::origin;
    use crate::model::entry::EntryId;

    fn batch(traces: impl Iterator<Item = Option<String>>) -> Batch {
        let mut filling = Filling::new(origin(), 1 << 20);
        for (n, trace) in traces.enumerate() {
            let mut strings: Vec<&[u8]> = vec![b"id", b"a", b"amount", b"1"];
            if let Some(trace) = &trace {
                strings.extend([TRACEPARENT_FIELD.as_bytes(), trace.as_bytes()]);
            }
            filling.push(EntryId { ms: 1 + n as u64, seq: 0 }, strings);
        }
        filling.close_run();
        filling.seal(false)
    }

    fn trace(n: usize, flags: &str) -> Option<String> {
        Some(format!("00-{:032x}-{:016x}-{flags}", n + 1, n + 1))
    }

    #[test]
    fn each_cause_is_given_once_and_what_is_none_or_not_kept_is_left_out() {
        let traces =
            vec![trace(1, "01"), None, trace(1, "01"), trace(2, "00"), Some("nonsense".into()), trace(3, "01")];
        let causes: Vec<String> = batch(traces.into_iter()).causes().iter().map(|c| c.trace_id().to_string()).collect();
        assert_eq!(causes, [format!("{:032x}", 2), format!("{:032x}", 4)]);
    }

    #[test]
    fn neither_many_causes_nor_many_entries_are_too_many() {
        assert_eq!(batch((0..500).map(|n| trace(n, "01"))).causes().len(), MAX_LINKS);
        let sparse = batch((0..40_000).map(|n| (n == 39_960).then(|| trace(n, "01")).flatten()));
        assert_eq!(sparse.causes().len(), 1, "the last one looked at");
    }
}
