//! Supervise: keeps the daemon's tasks alive. The only place of the daemon, beside its parent, that spawns.
//!
//! Takes what to run; starts it again, after a pause, when it panics. A worker is ended whole when one of its parts panics, as if its process had been
//! killed: what it held stays pending and is reclaimed (I7). What dies ten times in a row is not started again: its supervisor ends, and the
//! daemon with it, for a process that does only a part of its work looks healthy to everybody.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinSet};
use tracing::error;

use crate::flow::holder::{Enlisted, Returned};
use crate::flow::member::Membership;
use crate::flow::setup::WorkerSetup;
use crate::flow::worker::{self, Soloist, Worker};
use crate::model::names;
use crate::retry::backoff;
use crate::shutdown::Stop;

/// What dies this often in a row is not started again.
const DEATHS_IN_A_ROW: u32 = 10;
/// What lived this long did not die "in a row".
const LIVED_WELL: Duration = Duration::from_secs(60);

/// Keeps one task alive until a stop; ends without one where it has died too often.
pub(super) async fn keep<F>(task: String, begin: impl Fn() -> F, stop: Stop)
where
    F: Future<Output = ()> + Send + 'static,
{
    revive(&task, begin, &stop, Deaths::default()).await;
}

async fn revive<F>(task: &str, begin: impl Fn() -> F, stop: &Stop, mut deaths: Deaths)
where
    F: Future<Output = ()> + Send + 'static,
{
    while !stop.is_asked() {
        let started = Instant::now();
        let mut parts = JoinSet::new();
        parts.spawn(begin());
        let died = all(parts, drop).await.err();
        if stop.is_asked() || !deaths.survives(task, started, died, stop).await {
            return;
        }
    }
}

/// Keeps one worker alive until a stop; ends without one where it has died too often.
pub(super) async fn supervise(slot: usize, parts: WorkerSetup, stop: Stop) {
    let worker: Arc<str> = names::worker(&names::host(), std::process::id(), slot).into();
    let mut deaths = Deaths::default();
    while !stop.is_asked() {
        let started = Instant::now();
        let died = of_group(worker::assemble(parts.clone(), worker.clone(), None), &stop).await.err();
        if stop.is_asked() || !deaths.survives(&worker, started, died, &stop).await {
            return;
        }
    }
}

/// Keeps alive what reads a pipeline's streams alone, and the workers of the group that read those which cannot be read alone yet.
pub(super) async fn supervise_soloist(parts: WorkerSetup, stop: Stop) {
    let worker: Arc<str> = names::worker(&names::host(), std::process::id(), 0).into();
    let mut deaths = Deaths::default();
    let mut of_members: BTreeMap<usize, Deaths> = BTreeMap::new();
    while !stop.is_asked() {
        let started = Instant::now();
        let Soloist { holder, settlers, acker, keeper, mut enlisted, returned, leases } =
            worker::assemble_soloist(parts.clone(), worker.clone());
        let (mut tasks, mut members) = (JoinSet::new(), JoinSet::new());
        tasks.spawn(holder.run(stop.clone()));
        settlers.into_iter().for_each(|settler| drop(tasks.spawn(settler.run(stop.clone()))));
        tasks.spawn(acker.run(stop.clone()));
        tasks.spawn(keeper.run());
        let died = loop {
            tokio::select! {
                Some(Enlisted { lane, doubtful }) = enlisted.recv() => {
                    let membership = Membership { lease: leases[lane].clone(), doubtful };
                    let member = worker::assemble(parts.of_lane(lane), worker.clone(), Some(membership));
                    let (stop, worker) = (stop.clone(), worker.clone());
                    let mut deaths = of_members.remove(&lane).unwrap_or_default();
                    members.spawn(async move {
                        let started = Instant::now();
                        let (is_alone, survives) = match of_group(member, &stop).await {
                            Ok(is_alone) => (is_alone, true),
                            // The holder enlists another one.
                            Err(died) => (false, deaths.survives(&worker, started, Some(died), &stop).await),
                        };
                        (Returned { lane, is_alone }, deaths, survives)
                    });
                }
                Some(left) = members.join_next() => match left {
                    Ok((left, deaths, true)) => {
                        of_members.insert(left.lane, deaths);
                        // Fails only if the holder has ended.
                        let _ = returned.send(left);
                    }
                    Ok((.., false)) | Err(_) if !stop.is_asked() => return,
                    Ok(_) | Err(_) => {}
                },
                ended = tasks.join_next() => match ended {
                    Some(Ok(())) => {}
                    Some(Err(died)) => break Some(died),
                    None => break None,
                },
            }
        };
        tasks.shutdown().await;
        // In a stop they settle what they hold, too.
        while stop.is_asked() && members.join_next().await.is_some() {}
        members.shutdown().await;
        if stop.is_asked() || !deaths.survives(&worker, started, died, &stop).await {
            return;
        }
    }
}

/// Runs a worker of a group until all its parts have ended; says whether its stream can be read alone. An error: one has panicked.
async fn of_group(Worker { taker, settlers, acker }: Worker, stop: &Stop) -> Result<bool, JoinError> {
    let (mut parts, mut is_alone) = (JoinSet::new(), false);
    for settler in settlers {
        let settling = settler.run(stop.clone());
        parts.spawn(async {
            settling.await;
            false
        });
    }
    let acking = acker.run(stop.clone());
    parts.spawn(async {
        acking.await;
        false
    });
    parts.spawn(taker.run(stop.clone()));
    all(parts, |ended| is_alone |= ended).await?;
    Ok(is_alone)
}

/// Waits until all of these have ended. Where one panics the others are ended, too: each of them may wait for it.
async fn all<T: 'static>(mut parts: JoinSet<T>, mut ended: impl FnMut(T)) -> Result<(), JoinError> {
    while let Some(part) = parts.join_next().await {
        match part {
            Ok(told) => ended(told),
            Err(died) => {
                parts.shutdown().await;
                return Err(died);
            }
        }
    }
    Ok(())
}

/// The deaths of one task.
struct Deaths {
    in_a_row: u32,
    waits: Box<dyn Iterator<Item = Duration> + Send>,
}

impl Default for Deaths {
    fn default() -> Deaths {
        Deaths { in_a_row: 0, waits: Box::new(backoff()) }
    }
}

impl Deaths {
    /// A task has ended: tells it, and waits before the next one. False: there have been too many.
    async fn survives(&mut self, task: &str, started: Instant, died: Option<JoinError>, stop: &Stop) -> bool {
        if started.elapsed() > LIVED_WELL {
            *self = Deaths::default();
        }
        self.in_a_row += 1;
        let cause = died.map_or_else(|| "it ended by itself".into(), |died| died.to_string());
        error!(
            event = "task_died", task, %cause, deaths = self.in_a_row,
            "a task died, which is a bug: please report it. It is started again; what a worker held stays pending and is reclaimed"
        );
        if self.in_a_row >= DEATHS_IN_A_ROW {
            return false;
        }
        tokio::select! {
            () = tokio::time::sleep(self.waits.next().unwrap_or_default()) => {}
            () = stop.asked() => {}
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn at_once() -> Deaths {
        Deaths { in_a_row: 0, waits: Box::new(std::iter::repeat(Duration::ZERO)) }
    }

    /// The how manieth time this is.
    fn counted(begun: &Arc<AtomicU32>) -> u32 {
        begun.fetch_add(1, Ordering::Relaxed) + 1
    }

    #[tokio::test]
    async fn a_task_that_panics_is_started_again_and_a_stop_ends_it() {
        let (begun, stop) = (Arc::new(AtomicU32::new(0)), Stop::default());
        let task = {
            let (begun, stop) = (begun.clone(), stop.clone());
            move || {
                let (begun, stop) = (begun.clone(), stop.clone());
                async move {
                    match counted(&begun) {
                        1 => panic!("at the first time"),
                        // As a thread, or a closure for the threads that may block, would end the task that waits for it.
                        2 => tokio::task::spawn_blocking(|| panic!("in a thread")).await.expect("it ends"),
                        3 => {}
                        _ => stop.ask(),
                    }
                }
            }
        };
        revive("task", task, &stop, at_once()).await;
        assert!(stop.is_asked(), "it was given up");
        assert_eq!(begun.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn what_dies_ten_times_in_a_row_is_given_up() {
        let (begun, stop) = (Arc::new(AtomicU32::new(0)), Stop::default());
        let dies = {
            let begun = begun.clone();
            move || {
                let begun = begun.clone();
                async move {
                    counted(&begun);
                    panic!("always");
                }
            }
        };
        revive("task", dies, &stop, at_once()).await;
        assert!(!stop.is_asked());
        assert_eq!(begun.load(Ordering::Relaxed), DEATHS_IN_A_ROW);
    }

    #[tokio::test]
    async fn where_one_part_panics_the_others_are_ended_although_they_would_wait_for_ever() {
        struct Told(Arc<AtomicU32>);
        impl Drop for Told {
            fn drop(&mut self) {
                counted(&self.0);
            }
        }
        let ended = Arc::new(AtomicU32::new(0));
        let mut parts = JoinSet::new();
        for _ in 0..3 {
            let told = Told(ended.clone());
            parts.spawn(async move {
                let _told = told;
                std::future::pending::<()>().await;
            });
        }
        parts.spawn(async { panic!("one of them") });
        assert!(all(parts, drop).await.expect_err("one has panicked").is_panic());
        assert_eq!(ended.load(Ordering::Relaxed), 3, "they are gone before it says so");
    }
}
