//! Drain: when the daemon is to stop, and how its tasks end in two phases.

use std::cell::{Cell, RefCell};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tracing::{info, warn};

use super::prepare::{Flow, Options};
use crate::flow::read::{self, Backlog};
use crate::retry::{Fault, Verdict, backoff, judge};
use crate::shutdown::{Signals, Stop};
use crate::telemetry::contract::Snapshot;
use crate::valkey::{self, Link, Links};

/// How often it is looked whether the stream is empty.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a daemon that was forced to stop waits for its tasks to notice.
const FORCED_GRACE: Duration = Duration::from_millis(200);

/// How often `--until-empty` looks whether anything moves.
const LOOK_FOR_PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Why tasks are to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drain {
    /// The daemon stops: a signal now is the second one.
    ToStop,
    /// Another configuration follows: a signal now is the first one.
    ToReload,
}

/// How they ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drained {
    /// Everything that was held is settled.
    Settled,
    /// Everything that was held is settled, and this signal came while a configuration was to follow.
    Signalled(&'static str),
    /// A second signal: what was held is pending.
    SignalledTwice,
    /// The time was over: what was held is pending.
    OutOfTime,
}

/// Waits for the tasks in two phases, and says which one ended it.
pub(super) async fn drain(
    grace: Duration,
    signals: &mut Signals,
    reason: Drain,
    stop: &Stop,
    workers: &mut JoinSet<()>,
    caretakers: &mut JoinSet<()>,
) -> Drained {
    let settled = async {
        while workers.join_next().await.is_some() {}
        while caretakers.join_next().await.is_some() {}
    };
    let (mut settled, mut deadline) = (std::pin::pin!(settled), std::pin::pin!(tokio::time::sleep(grace)));
    let (mut first, mut asked) = (None, reason == Drain::ToStop);
    let drained = loop {
        tokio::select! {
            () = &mut settled => return first.map_or(Drained::Settled, Drained::Signalled),
            signal = signals.next() => {
                if asked {
                    warn!(signal, "told again: leaving what is held pending");
                    break Drained::SignalledTwice;
                }
                info!(signal, "stopping: settling what is held");
                (first, asked) = (Some(signal), true);
            }
            () = &mut deadline => {
                let grace_ms = grace.as_millis() as u64;
                warn!(grace_ms, "stop.grace is over: leaving what is held pending");
                break if first.is_some() { Drained::SignalledTwice } else { Drained::OutOfTime };
            }
        }
    };
    stop.force();
    let _ = tokio::time::timeout(FORCED_GRACE, settled).await;
    drained
}

/// How `--until-empty` ends.
#[derive(Debug)]
pub(super) enum Emptied {
    /// Every pipeline's group has settled everything in its stream.
    Settled,
    /// It has not, and waiting does not help: because of this fault, or because nothing has moved for `--timeout`.
    Stuck(Option<Fault>),
}

/// Resolves when everything is settled, or when waiting for that does not help; never, unless that is asked for.
pub(super) async fn until_empty(valkey: &valkey::Endpoint, flows: &[Flow], options: Options) -> Emptied {
    if !options.until_empty {
        return std::future::pending().await;
    }
    let (met, moved) = (RefCell::default(), Cell::new(Instant::now()));
    tokio::select! {
        emptied = until_settled(valkey, flows, &met, &moved) => emptied,
        stuck = until_stuck(flows, options.timeout, &met, &moved) => stuck,
    }
}

/// `met`: the last fault of a Valkey that has not answered since. `moved`: when anybody was last seen to settle something.
async fn until_settled(
    valkey: &valkey::Endpoint,
    flows: &[Flow],
    met: &RefCell<Option<Fault>>,
    moved: &Cell<Instant>,
) -> Emptied {
    let mut waits = backoff();
    loop {
        let answered = || {
            waits = backoff();
            met.take();
        };
        let mut links = Links::to(valkey, "tidegate:until-empty");
        let fault = match watch_until_empty(&mut links, flows, answered, moved).await {
            Ok(()) => return Emptied::Settled,
            Err(fault) => fault,
        };
        if judge(&fault, 1).verdict == Verdict::Halt {
            return Emptied::Stuck(Some(fault));
        }
        met.replace(Some(fault));
        // The workers meet it too, and tell.
        tokio::time::sleep(waits.next().unwrap_or_default()).await;
    }
}

/// Resolves when a pipeline is halted by what waiting does not mend, or when nothing was settled for so long: by this process, as its counters
/// say, or by any other one of the group, as the backlog says. A process that stands by settles nothing itself.
async fn until_stuck(
    flows: &[Flow],
    timeout: Duration,
    met: &RefCell<Option<Fault>>,
    moved: &Cell<Instant>,
) -> Emptied {
    let mut last: Vec<Snapshot> = Vec::new();
    loop {
        tokio::time::sleep(LOOK_FOR_PROGRESS_EVERY).await;
        for flow in flows {
            let refusals = flow.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(fault) = refusals.halted_by().filter(|fault| judge(fault, 1).verdict == Verdict::Halt) {
                return Emptied::Stuck(Some(fault.clone()));
            }
        }
        let now: Vec<Snapshot> = flows.iter().map(|flow| flow.metrics.snapshot()).collect();
        // Gauges move while nothing is settled: an age grows by itself.
        if last.is_empty() || now.iter().zip(&last).any(|(now, before)| now.counted_since(before)) {
            last = now;
            moved.set(Instant::now());
        }
        if moved.get().elapsed() >= timeout {
            return Emptied::Stuck(met.take());
        }
    }
}

/// Resolves when no lane has a backlog. Most looks end at the first lane that has one; all lanes are looked at often enough to see what others settle.
async fn watch_until_empty(
    links: &mut Links,
    flows: &[Flow],
    mut answered: impl FnMut(),
    moved: &Cell<Instant>,
) -> Result<(), Fault> {
    let lanes = || flows.iter().flat_map(|flow| flow.lanes.iter());
    let mut before: Vec<Option<Backlog>> = lanes().map(|_| None).collect();
    let mut looked_at_all: Option<Instant> = None;
    loop {
        let looks_at_all = looked_at_all.is_none_or(|at| at.elapsed() >= LOOK_FOR_PROGRESS_EVERY);
        if looks_at_all {
            looked_at_all = Some(Instant::now());
        }
        let mut empty = true;
        for (lane, before) in lanes().zip(&mut before) {
            let pipeline = lane.pipeline();
            let look = async |link: &Link| read::backlog(link, &pipeline.stream, &pipeline.group()).await;
            let backlog = links.look(&pipeline.stream, look).await?;
            empty &= backlog.is_empty;
            if before.as_ref().is_some_and(|before| has_moved(before, &backlog)) {
                moved.set(Instant::now());
            }
            *before = Some(backlog);
            if !empty && !looks_at_all {
                break;
            }
        }
        answered();
        if empty {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether something was settled between two looks: the first unsettled entry is a later one, or there are fewer of them. What producers add
/// meanwhile is no progress, and neither is what is read and not settled.
fn has_moved(before: &Backlog, now: &Backlog) -> bool {
    let is_later = before.first.is_some_and(|before| now.first.is_none_or(|now| now > before));
    let entries = |backlog: &Backlog| backlog.undelivered.map(|undelivered| undelivered + backlog.pending);
    is_later || entries(before).zip(entries(now)).is_some_and(|(before, now)| now < before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::entry::EntryId;

    #[test]
    fn only_what_is_settled_is_progress() {
        let backlog = |first: Option<u64>, pending, undelivered| {
            let first = first.map(|seq| EntryId { ms: 1_000, seq });
            Backlog { pending, undelivered, is_empty: first.is_none(), first, oldest: None, now_ms: 5_000 }
        };
        let before = backlog(Some(7), 10, Some(90));
        for (moved, now, why) in [
            (false, backlog(Some(7), 10, Some(90)), "nothing happened"),
            (false, backlog(Some(7), 100, Some(0)), "read, and not settled"),
            (false, backlog(Some(7), 10, Some(500)), "producers add"),
            (false, backlog(Some(7), 10, None), "the server can no longer tell"),
            (false, backlog(Some(1), 0, Some(900)), "the group was rewound"),
            (true, backlog(Some(8), 10, Some(500)), "the first is settled, and producers add"),
            (true, backlog(Some(8), 10, None), "the first is settled, and the server cannot tell how many there are"),
            (true, backlog(Some(7), 9, Some(90)), "one that is not the first is settled"),
            (true, backlog(None, 0, Some(0)), "everything is settled"),
        ] {
            assert_eq!(has_moved(&before, &now), moved, "{why}");
        }
        assert!(!has_moved(&backlog(None, 0, Some(0)), &before), "the first entries come");
    }
}
