//! Supervise: keeps one worker alive. The only place of the daemon, beside its parent, that spawns.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinSet};
use tracing::error;

use crate::flow::holder::{Enlisted, Returned};
use crate::flow::member::Membership;
use crate::flow::setup::WorkerSetup;
use crate::flow::worker::{self, Soloist, Worker};
use crate::model::names;
use crate::retry::{Backoff, backoff};
use crate::shutdown::Stop;

/// A worker that dies this often in a row is not started again.
const DEATHS_IN_A_ROW: u32 = 10;
/// A worker that lived this long did not die "in a row".
const LIVED_WELL: Duration = Duration::from_secs(60);

/// Keeps one worker alive: starts it again when one of its parts panics.
pub(super) async fn supervise(slot: usize, parts: WorkerSetup, stop: Stop) {
    let worker: Arc<str> = names::worker(&names::host(), std::process::id(), slot).into();
    let mut deaths = Deaths::default();
    while !stop.is_asked() {
        let started = Instant::now();
        let died = of_group(worker::assemble(parts.clone(), worker.clone(), None), &stop).await.err();
        if stop.is_asked() || !deaths.survives(&worker, started, died).await {
            return;
        }
    }
}

/// Keeps alive what reads a pipeline's streams alone, and the workers of the group that read those which cannot be read alone yet.
pub(super) async fn supervise_soloist(parts: WorkerSetup, stop: Stop) {
    let worker: Arc<str> = names::worker(&names::host(), std::process::id(), 0).into();
    let mut deaths = Deaths::default();
    while !stop.is_asked() {
        let started = Instant::now();
        let Soloist { holder, settlers, acker, keeper, mut enlisted, returned, leases } =
            worker::assemble_soloist(parts.clone(), worker.clone());
        let (mut tasks, mut members) = (JoinSet::new(), JoinSet::new());
        tasks.spawn(holder.run(stop.clone()));
        settlers.into_iter().for_each(|settler| drop(tasks.spawn(settler.run(stop.clone()))));
        tasks.spawn(acker.run(stop.clone()));
        tasks.spawn(keeper.run());
        let mut died = None;
        loop {
            tokio::select! {
                Some(Enlisted { lane, doubtful }) = enlisted.recv() => {
                    let membership = Membership { lease: leases[lane].clone(), doubtful };
                    let member = worker::assemble(parts.of_lane(lane), worker.clone(), Some(membership));
                    let stop = stop.clone();
                    members.spawn(async move {
                        let ended = of_group(member, &stop).await;
                        if let Err(died) = &ended {
                            error!(%died, "a worker of the group died; what it held stays pending and is reclaimed");
                        }
                        Returned { lane, is_alone: ended.unwrap_or(false) }
                    });
                }
                Some(Ok(left)) = members.join_next() => drop(returned.send(left)),
                ended = tasks.join_next() => match ended {
                    Some(ended) => died = died.or(ended.err()),
                    None => break,
                },
            }
        }
        // In a stop they settle what they hold, too.
        while stop.is_asked() && members.join_next().await.is_some() {}
        if stop.is_asked() || !deaths.survives(&worker, started, died).await {
            return;
        }
    }
}

/// Runs a worker of a group until all its parts have ended; says whether its stream can be read alone. An error: one has panicked.
async fn of_group(Worker { taker, settlers, acker }: Worker, stop: &Stop) -> Result<bool, JoinError> {
    let mut tasks = JoinSet::new();
    settlers.into_iter().for_each(|settler| drop(tasks.spawn(settler.run(stop.clone()))));
    tasks.spawn(acker.run(stop.clone()));
    let mut taking = JoinSet::new();
    taking.spawn(taker.run(stop.clone()));
    let taken = taking.join_next().await.unwrap_or(Ok(false));
    let mut died = None;
    while let Some(ended) = tasks.join_next().await {
        died = died.or(ended.err());
    }
    died.map_or(taken, Err)
}

/// The deaths of one worker.
struct Deaths {
    in_a_row: u32,
    waits: Backoff,
}

impl Default for Deaths {
    fn default() -> Deaths {
        Deaths { in_a_row: 0, waits: backoff() }
    }
}

impl Deaths {
    /// A worker has ended: tells it, and waits before the next one. False: there have been too many.
    async fn survives(&mut self, worker: &str, started: Instant, died: Option<JoinError>) -> bool {
        if started.elapsed() > LIVED_WELL {
            *self = Deaths::default();
        }
        self.in_a_row += 1;
        let cause = died.map_or_else(|| "a task ended".into(), |died| died.to_string());
        error!(%worker, %cause, deaths = self.in_a_row, "a worker died; what it held stays pending and is reclaimed");
        if self.in_a_row >= DEATHS_IN_A_ROW {
            return false;
        }
        tokio::time::sleep(self.waits.next().unwrap_or_default()).await;
        true
    }
}
