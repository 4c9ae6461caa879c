//! Supervise: keeps one worker alive. The only place of the daemon, beside its parent, that spawns.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tracing::error;

use crate::flow::setup::WorkerSetup;
use crate::flow::worker::{self, Worker};
use crate::model::names;
use crate::retry::backoff;
use crate::shutdown::Stop;

/// A worker that dies this often in a row is not started again.
const DEATHS_IN_A_ROW: u32 = 10;
/// A worker that lived this long did not die "in a row".
const LIVED_WELL: Duration = Duration::from_secs(60);

/// Keeps one worker alive: starts it again when one of its parts panics.
pub(super) async fn supervise(slot: usize, parts: WorkerSetup, stop: Stop) {
    let worker: Arc<str> = names::worker(&names::host(), std::process::id(), slot).into();
    let (mut deaths, mut waits) = (0, backoff());
    while !stop.is_asked() {
        let started = Instant::now();
        let Worker { taker, settlers, acker, keeper } = worker::assemble(parts.clone(), worker.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(taker.run(stop.clone()));
        settlers.into_iter().for_each(|settler| drop(tasks.spawn(settler.run(stop.clone()))));
        tasks.spawn(acker.run(stop.clone()));
        keeper.into_iter().for_each(|keeper| drop(tasks.spawn(keeper.run())));
        let mut died = None;
        while let Some(ended) = tasks.join_next().await {
            died = died.or(ended.err());
        }
        if stop.is_asked() {
            return;
        }
        if started.elapsed() > LIVED_WELL {
            (deaths, waits) = (0, backoff());
        }
        deaths += 1;
        let cause = died.map_or_else(|| "a task ended".into(), |died| died.to_string());
        error!(%worker, %cause, deaths, "a worker died; what it held stays pending and is reclaimed");
        if deaths >= DEATHS_IN_A_ROW {
            return;
        }
        tokio::time::sleep(waits.next().unwrap_or_default()).await;
    }
}
