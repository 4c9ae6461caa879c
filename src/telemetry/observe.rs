//! Observe: what is counted anyhow becomes metrics when somebody asks: a scrape, or the next export.
//!
//! Takes the contract's metrics and the registry; registers one callback for each metric. It cannot fail. The same callbacks serve Prometheus
//! and OTLP, so the names and the numbers are the same.

use std::panic::{AssertUnwindSafe, catch_unwind};

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
    builder
        .with_callback(move |told| alone(|| look(&registry, &mut |value, labels| told.observe(value, labels))))
        .build();
}

fn gauge(
    meter: &Meter,
    metric: &Metric,
    registry: &Registry,
    look: impl Fn(&Registry, &mut dyn FnMut(f64, &[KeyValue])) + Send + Sync + 'static,
) {
    let registry = registry.clone();
    let builder = meter.f64_observable_gauge(metric.name).with_unit(metric.unit).with_description(metric.sentence);
    builder
        .with_callback(move |told| alone(|| look(&registry, &mut |value, labels| told.observe(value, labels))))
        .build();
}

/// A look that panics is an event of the log (`panicked`), and takes no other metric with it: beyond this callback it would end the exporter's thread, or
/// poison its locks, and no metric at all would be told any more.
fn alone(look: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(look));
}

/// The labels and one more, where there is a word for it.
fn with(mut labels: Vec<KeyValue>, name: &'static str, word: &str) -> Vec<KeyValue> {
    if !word.is_empty() {
        labels.push(KeyValue::new(name, word.to_owned()));
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::prometheus::Scrape;
    use opentelemetry_sdk::metrics::SdkMeterProvider;

    #[test]
    fn a_metric_whose_look_panics_takes_no_other_one_with_it() {
        let (scrape, registry) = (Scrape::default(), Registry::default());
        let meters = SdkMeterProvider::builder().with_reader(scrape.reader().expect("a reader")).build();
        let meter = meters.meter(SCOPE);
        let metric = |name: &str| METRICS.iter().find(|metric| metric.name == name).expect("a metric");
        counter(&meter, metric("tidegate.reloads"), &registry, |_, _| panic!("a bug"));
        gauge(&meter, metric("tidegate.shards"), &registry, |_, tell| tell(7.0, &[]));
        for _ in 0..2 {
            let text = scrape.text().expect("told");
            assert!(text.contains("tidegate_shards 7"), "{text}");
        }
    }
}
