//! Pauses: looks which pipelines an operator has paused, and tells their workers.
//!
//! Takes the flows; asks PostgreSQL once a second. It cannot fail: while PostgreSQL does not answer, what was known last holds.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;
use tracing::info;

use super::prepare::Flow;
use crate::flow::pause::State;
use crate::pauses;
use crate::postgres::Database;

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks for as long as it is polled.
pub(super) async fn watch(database: &Database, source: &str, flows: &[Flow]) -> Infallible {
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        look(database, source, flows).await;
    }
}

/// Looks once.
pub(super) async fn look(database: &Database, source: &str, flows: &[Flow]) {
    // The workers meet the fault too, and tell.
    let Ok(found) = database.run(async |c| pauses::in_force(c, source).await).await else { return };
    for flow in flows {
        let pipeline = &flow.pipeline.name;
        let pause = found.iter().find(|pause| pause.pipeline == *pipeline);
        let state = pause.map_or(State::Flows, |pause| State::Paused(pause.left.map(|left| Instant::now() + left)));
        flow.metrics.told_paused(pause.is_some());
        // A pipeline's shards share one.
        if flow.pause.set(state) {
            match pause {
                Some(pause) => {
                    let left_ms = pause.left.map(|left| left.as_millis() as u64);
                    info!(event = "paused", %pipeline, reason = pause.reason, left_ms, "paused: nothing is read");
                }
                None => info!(event = "unpaused", %pipeline, "the pause is over: reading goes on"),
            }
        }
    }
}
