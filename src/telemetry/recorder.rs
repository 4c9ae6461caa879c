//! Recorder: durations and sizes of one shard, recorded as they happen, and the spans that go with them.
//!
//! Takes the beginning of a flush or an acknowledgement; gives a guard that records when it ends, whichever way. It cannot fail: where
//! nobody takes metrics or traces the instruments do nothing.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use opentelemetry::metrics::{Histogram, Meter};
use opentelemetry::trace::{SpanContext, SpanKind};
use opentelemetry::{KeyValue, global};

use super::contract::{self, METRICS, Metrics, Source, Tally};
use super::steps::Step;
use super::trace::{MAX_LINKS, SCOPE, Span, Trace};

/// What tells a shard from others.
#[derive(Debug, Clone, Default)]
pub struct Labels {
    /// The pipeline.
    pub pipeline: String,
    /// Its stream.
    pub stream: String,
    /// Its table.
    pub table: String,
    /// How its streams are delivered, in one word.
    pub delivery: &'static str,
    /// Whether metrics tell streams apart, and not only pipelines.
    pub per_stream: bool,
}

impl Labels {
    /// The labels that every metric of the shard has.
    pub fn of_metrics(&self) -> Vec<KeyValue> {
        let mut labels = vec![KeyValue::new("pipeline", self.pipeline.clone())];
        if self.per_stream {
            labels.push(KeyValue::new("stream", self.stream.clone()));
        }
        labels
    }

    /// What every first span of the shard tells: names of the semantic conventions where they have one.
    pub(super) fn of_spans(&self) -> [KeyValue; 4] {
        [
            KeyValue::new("tidegate.pipeline", self.pipeline.clone()),
            KeyValue::new("messaging.system", "valkey"),
            KeyValue::new("messaging.destination.name", self.stream.clone()),
            KeyValue::new("tidegate.table", self.table.clone()),
        ]
    }
}

/// Records for one shard; by default it records nothing.
#[derive(Debug, Default)]
pub struct Recorder(Option<Recording>);

#[derive(Debug)]
struct Recording {
    labels: Labels,
    flush: Histogram<f64>,
    committed: Vec<KeyValue>,
    refused: Vec<KeyValue>,
    failed: Vec<KeyValue>,
    age: Histogram<f64>,
    ack: Histogram<f64>,
    turn: Histogram<f64>,
    entries: Histogram<f64>,
    coalescing: Histogram<f64>,
    plain: Vec<KeyValue>,
}

impl Recorder {
    /// For this shard, with the meter that is set for the process.
    pub fn of(labels: Labels) -> Recorder {
        let meter = global::meter(SCOPE);
        let plain = labels.of_metrics();
        let with = |outcome: &'static str| {
            let mut labels = plain.clone();
            labels.push(KeyValue::new("outcome", outcome));
            labels
        };
        Recorder(Some(Recording {
            flush: histogram(&meter, contract::FLUSH_DURATION),
            committed: with("committed"),
            refused: with("refused"),
            failed: with("failed"),
            age: histogram(&meter, contract::ENTRY_AGE),
            ack: histogram(&meter, contract::ACK_DURATION),
            turn: histogram(&meter, contract::TURN_DURATION),
            entries: histogram(&meter, contract::BATCH_ENTRIES),
            coalescing: histogram(&meter, contract::BATCH_COALESCING),
            plain,
            labels,
        }))
    }

    /// What tells the shard from others.
    pub fn labels(&self) -> Option<&Labels> {
        self.0.as_ref().map(|recording| &recording.labels)
    }

    /// A flush has waited so long for its turn within this process.
    pub fn waited_for_turn(&self, seconds: f64) {
        if let Some(Recording { turn, plain, .. }) = &self.0 {
            turn.record(seconds, plain);
        }
    }

    /// A batch of so many entries was read.
    pub fn was_read(&self, trace: &Trace, entries: usize) {
        if let Some(labels) = self.labels() {
            trace.was_read(labels, entries);
        }
    }
}

/// The histogram of this name, as the contract declares it.
fn histogram(meter: &Meter, name: &'static str) -> Histogram<f64> {
    let builder = meter.f64_histogram(name);
    let Some(metric) = METRICS.iter().find(|metric| metric.name == name) else { return builder.build() };
    let bounds = match metric.source {
        Source::Histogram(bounds) => bounds.to_vec(),
        _ => Vec::new(),
    };
    builder.with_unit(metric.unit).with_description(metric.sentence).with_boundaries(bounds).build()
}

/// A flush under way. Dropped, it has failed.
#[derive(Debug)]
pub struct Flushing {
    metrics: Arc<Metrics>,
    began: Instant,
    entries: usize,
    /// When its oldest entry was added, by Valkey's clock.
    oldest_ms: u64,
    outcome: Outcome,
    span: Span,
    _step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Committed,
    Refused,
    Failed,
}

impl Metrics {
    /// Of the shard with these labels.
    pub fn of(labels: Labels) -> Metrics {
        Metrics { recorder: Recorder::of(labels), ..Metrics::default() }
    }

    /// A flush of so many entries begins. `oldest_ms`: when the first of them was added. `causes`: what producers did; asked for only where
    /// the batch is sampled.
    pub fn flush_begins(
        self: &Arc<Metrics>,
        trace: &Trace,
        entries: usize,
        oldest_ms: u64,
        causes: impl FnOnce() -> Vec<SpanContext>,
    ) -> Flushing {
        let span = trace.span("flush", SpanKind::Client);
        if span.is_sampled() {
            span.word("db.system.name", "postgresql");
            span.number("tidegate.entries", entries as u64);
            causes().into_iter().take(MAX_LINKS).for_each(|cause| span.link(cause));
        }
        let began = Instant::now();
        let step = self.steps.begin("flush", began);
        Flushing { metrics: self.clone(), began, entries, oldest_ms, outcome: Outcome::Failed, span, _step: step }
    }

    /// An acknowledgement of so many entries, or a move of the group's position, begins.
    pub fn ack_begins(self: &Arc<Metrics>, trace: &Trace, entries: usize) -> Acking {
        let span = trace.span("ack", SpanKind::Client);
        span.number("tidegate.entries", entries as u64);
        let began = Instant::now();
        Acking { metrics: self.clone(), began, _span: span, _step: self.steps.begin("ack", began) }
    }
}

impl Flushing {
    /// It is committed.
    pub fn committed(mut self, tally: &Tally) {
        self.outcome = Outcome::Committed;
        self.span.number("tidegate.rows", tally.rows);
        self.span.number("tidegate.entries.applied", tally.applied);
        if let Some(recording) = &self.metrics.recorder.0 {
            recording.entries.record(self.entries as f64, &recording.plain);
            if tally.rows > 0 {
                recording.coalescing.record(tally.applied as f64 / tally.rows as f64, &recording.plain);
            }
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64;
            let age_ms = now + self.metrics.valkey_ahead_ms() - self.oldest_ms as i64;
            recording.age.record(age_ms.max(0) as f64 / 1000.0, &recording.plain);
        }
    }

    /// The ledger has refused it: parts of it may have been flushed before.
    pub fn refused(mut self) {
        self.outcome = Outcome::Refused;
    }
}

impl Drop for Flushing {
    fn drop(&mut self) {
        if self.span.is_sampled() {
            match self.outcome {
                Outcome::Committed => self.span.word("tidegate.outcome", "committed"),
                Outcome::Refused => self.span.word("tidegate.outcome", "refused"),
                Outcome::Failed => {
                    self.span.word("tidegate.outcome", "failed");
                    self.span.failed("the flush failed");
                }
            }
        }
        if let Some(recording) = &self.metrics.recorder.0 {
            let labels = match self.outcome {
                Outcome::Committed => &recording.committed,
                Outcome::Refused => &recording.refused,
                Outcome::Failed => &recording.failed,
            };
            recording.flush.record(self.began.elapsed().as_secs_f64(), labels);
        }
    }
}

/// An acknowledgement under way, until it is dropped.
#[derive(Debug)]
#[must_use = "it lasts until it is dropped"]
pub struct Acking {
    metrics: Arc<Metrics>,
    began: Instant,
    _span: Span,
    _step: Step,
}

impl Drop for Acking {
    fn drop(&mut self) {
        if let Some(Recording { ack, plain, .. }) = &self.metrics.recorder.0 {
            ack.record(self.began.elapsed().as_secs_f64(), plain);
        }
    }
}
