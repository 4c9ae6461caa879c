//! Observe: what is counted anyhow becomes metrics when somebody asks: a scrape, or the next export.
//!
//! Takes the contract's metrics and the registry; registers one callback for each metric. It cannot fail. The same callbacks serve Prometheus
//! and OTLP, so the names and the numbers are the same.

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Meter, MeterProvider};

use super::contract::{METRICS, Metric, Source};
use super::registry::Registry;
use super::trace::SCOPE;

/// Registers every metric that is observed.
pub(super) fn observe(meters: &impl MeterProvider, registry: &Registry) {
    let meter = meters.meter(SCOPE);
    for metric in METRICS {
        match metric.source {
            Source::Counters(counters) => counter(&meter, metric, registry, move |registry, tell| {
                for group in registry.groups().iter() {
                    for (outcome, of) in counters {
                        let labels = with(group.labels.of_metrics(), "outcome", outcome);
                        tell(of(&group.now), &labels);
                    }
                }
            }),
            Source::Faults => counter(&meter, metric, registry, |registry, tell| {
                for group in registry.groups().iter() {
                    for (side, code, count) in &group.faults {
                        let mut labels = with(group.labels.of_metrics(), "side", side);
                        labels.push(KeyValue::new("code", code.clone()));
                        tell(*count, &labels);
                    }
                }
            }),
            Source::Happenings(of) => counter(&meter, metric, registry, move |registry, tell| {
                for (outcome, count) in of(&registry.process()) {
                    tell(count, &with(Vec::new(), "outcome", outcome));
                }
            }),
            Source::Gauge(of) => gauge(&meter, metric, registry, move |registry, tell| {
                for group in registry.groups().iter().filter(|group| group.is_at_work) {
                    if let Some(value) = of(&group.now) {
                        tell(value, &group.labels.of_metrics());
                    }
                }
            }),
            Source::Info => gauge(&meter, metric, registry, |registry, tell| {
                for group in registry.groups().iter().filter(|group| group.is_at_work) {
                    let labels = with(group.labels.of_metrics(), "delivery", group.labels.delivery);
                    let table = KeyValue::new("table", group.labels.table.clone());
                    tell(1.0, &[labels, vec![table]].concat());
                }
            }),
            Source::Process(of) => gauge(&meter, metric, registry, move |registry, tell| {
                let label = metric.labels.first().copied().unwrap_or_default();
                for (word, value) in of(&registry.process()) {
                    tell(value, &with(Vec::new(), label, word));
                }
            }),
            // Recorded as it happens.
            Source::Histogram(_) => {}
        }
    }
}

fn counter(
    meter: &Meter,
    metric: &Metric,
    registry: &Registry,
    look: impl Fn(&Registry, &mut dyn FnMut(u64, &[KeyValue])) + Send + Sync + 'static,
) {
    let registry = registry.clone();
    let builder = meter.u64_observable_counter(metric.name).with_unit(metric.unit).with_description(metric.sentence);
    builder.with_callback(move |told| look(&registry, &mut |value, labels| told.observe(value, labels))).build();
}

fn gauge(
    meter: &Meter,
    metric: &Metric,
    registry: &Registry,
    look: impl Fn(&Registry, &mut dyn FnMut(f64, &[KeyValue])) + Send + Sync + 'static,
) {
    let registry = registry.clone();
    let builder = meter.f64_observable_gauge(metric.name).with_unit(metric.unit).with_description(metric.sentence);
    builder.with_callback(move |told| look(&registry, &mut |value, labels| told.observe(value, labels))).build();
}

/// The labels and one more, where there is a word for it.
fn with(mut labels: Vec<KeyValue>, name: &'static str, word: &str) -> Vec<KeyValue> {
    if !word.is_empty() {
        labels.push(KeyValue::new(name, word.to_owned()));
    }
    labels
}
