//! History: what the last quarter of an hour looked like, for charts that are there when the page is opened.
//!
//! Takes the registry's numbers every few seconds; gives them by pipeline. No server is asked, so it goes on in an outage. Its memory is bounded.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::time::MissedTickBehavior;

use super::{Console, locked};
use crate::telemetry::registry::Registry;

/// How often numbers are kept.
pub(super) const EVERY: Duration = Duration::from_secs(5);
/// So many of them: a quarter of an hour.
const POINTS: usize = 180;
/// Of so many pipelines, by name.
const PIPELINES: usize = 200;

/// A pipeline's numbers at one moment: milliseconds since 1970, unsettled entries, the age of the oldest of them in milliseconds, and
/// entries settled by this process since it started. Null where it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Point(u64, Option<u64>, Option<u64>, u64);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct History(BTreeMap<String, VecDeque<Point>>);

/// Keeps it for as long as it is polled.
pub(super) async fn keep(console: &Console) {
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        locked(&console.0.history).note(&console.0.registry, now_ms());
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl History {
    fn note(&mut self, registry: &Registry, now_ms: u64) {
        let mut points = BTreeMap::<String, Point>::new();
        for group in registry.groups().iter() {
            // Streams that metrics tell apart are one pipeline here.
            let point = points.entry(group.labels.pipeline.clone()).or_insert(Point(now_ms, None, None, 0));
            let now = &group.now;
            point.3 += now.applied + now.recognised + now.buried + now.dropped;
            if group.is_at_work {
                let backlog = match (now.undelivered, now.pending) {
                    (None, None) => None,
                    (undelivered, pending) => Some(undelivered.unwrap_or(0) + pending.unwrap_or(0)),
                };
                point.1 = point.1.map_or(backlog, |sum| Some(sum + backlog.unwrap_or(0)));
                point.2 = point.2.max(now.age_ms);
            }
        }
        for (pipeline, point) in points.into_iter().take(PIPELINES) {
            let kept = self.0.entry(pipeline).or_default();
            if kept.len() == POINTS {
                kept.pop_front();
            }
            kept.push_back(point);
        }
        // A pipeline that a reload has removed leaves when its last number is old.
        let oldest = now_ms.saturating_sub(POINTS as u64 * EVERY.as_millis() as u64);
        self.0.retain(|_, kept| kept.back().is_some_and(|point| point.0 > oldest));
    }

    /// What came after this moment.
    pub(super) fn after(&self, ms: u64) -> BTreeMap<&str, Vec<Point>> {
        let after = |kept: &VecDeque<Point>| kept.iter().filter(|point| point.0 > ms).copied().collect();
        self.0.iter().map(|(pipeline, kept)| (pipeline.as_str(), after(kept))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::postgres::Database;
    use crate::postgres::Endpoint;
    use crate::telemetry::contract::{Metrics, Unsettled};
    use crate::telemetry::recorder::Labels;
    use crate::telemetry::registry::Shard;

    #[test]
    fn it_is_bounded_and_streams_of_a_pipeline_are_one_line() {
        let registry = Registry::default();
        let shard = |stream: &str, age_ms| {
            let labels = Labels { pipeline: "p".into(), stream: stream.into(), per_stream: true, ..Labels::default() };
            let metrics = Arc::new(Metrics::of(labels.clone()));
            metrics.told_backlog(Unsettled { undelivered: Some(5), pending: 2, age_ms });
            Shard { labels, metrics, streams: 1 }
        };
        let endpoint = Endpoint {
            url: "postgres://h/d".into(),
            connect_timeout: EVERY,
            statement_timeout: EVERY,
            lock_timeout: EVERY,
            idle_in_transaction_timeout: EVERY,
        };
        registry.at_work(vec![shard("a", 10), shard("b", 99)], Vec::new(), Database::new(endpoint, 1), EVERY);
        let mut history = History::default();
        for n in 0..POINTS as u64 + 3 {
            history.note(&registry, n * 5_000);
        }
        let all = history.after(0);
        let points = &all["p"];
        assert_eq!(points.len(), POINTS);
        let Point(_, backlog, age, _) = points[POINTS - 1];
        assert_eq!(backlog, Some(14));
        assert!(age >= Some(99), "{age:?}");
        assert_eq!(history.after(points[POINTS - 2].0)["p"].len(), 1);
    }
}
