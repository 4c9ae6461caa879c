//! Recovery: how long the entries of a killed worker process take to be settled by its peers.
//!
//! Takes a steady load on two or more worker processes; kills one of them (SIGKILL) in each round and waits until nothing is
//! pending for it and every entry that was added before is settled. Gives a time for each round; fails if entries do not land within a limit.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use tokio::time::MissedTickBehavior;

use super::load::Load;
use super::watch::Watch;
use super::workers::Workers;
use super::{LANDED_WITHIN, Opts, POLL_EVERY, SEND_EVERY, add_one, is_exact, start_anew};
use crate::ops::stage::{Stage, Trouble};
use crate::valkey::{Command, Connection, Reply};

/// How long the load runs between a recovery and the next kill.
const BETWEEN_KILLS: Duration = Duration::from_millis(500);
/// The longest time that is told apart, in microseconds.
const LONGEST_RECOVERY: u64 = 600_000_000;
/// A killed process that held nothing proves nothing. So many kills in a row without a held entry mean that the rate is too low.
const EMPTY_KILLS: u32 = 200;

/// What the rounds showed.
#[derive(Debug)]
pub(super) struct Recovery {
    /// From the kill until the killed process has nothing pending and all that was added before is settled, in microseconds.
    pub(super) times: Histogram<u64>,
    /// Entries that the killed processes held, all rounds together.
    pub(super) held: u64,
    pub(super) exact: bool,
}

/// Kills a process in each round.
pub(super) async fn recover(opts: &Opts, stage: &Stage, load: &Load) -> Result<Recovery, Trouble> {
    start_anew(stage).await?;
    let (connection, stream) = (Connection::open(&stage.valkey, "tidegate:bench").await?, &stage.pipeline.stream);
    let mut workers = Workers::start(opts.processes(), stage)?;
    let mut watch = Watch::begin(stage).await?;
    let (mut deltas, mut under_way, mut sent) = (load.deltas(), FuturesUnordered::new(), 0);
    let (mut send, mut poll) = (tokio::time::interval(SEND_EVERY), tokio::time::interval(POLL_EVERY));
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut times, mut held, mut empty_kills) = (Histogram::new_with_bounds(1, LONGEST_RECOVERY, 3)?, 0, 0);
    let (started, mut kill_at, mut killed) = (Instant::now(), Instant::now() + BETWEEN_KILLS, None);
    while times.len() < u64::from(opts.rounds) {
        tokio::select! {
            _ = send.tick() => {
                let due = (started.elapsed().as_secs_f64() * opts.rate as f64) as u64;
                while sent < due {
                    under_way.push(add_one(&connection, stream, deltas.next().ok_or("no load")?));
                    sent += 1;
                }
            }
            Some(added) = under_way.next() => watch.expect(added?),
            _ = poll.tick() => {
                watch.look(stage).await?;
                match killed {
                    None if Instant::now() >= kill_at => {
                        let process = workers.kill_one().await?;
                        let at = Instant::now();
                        let left = pending_of(&connection, stage, process).await?;
                        workers.replace_the_dead(stage)?;
                        if left > 0 {
                            (killed, held, empty_kills) = (Some((at, process)), held + left, 0);
                        } else {
                            (kill_at, empty_kills) = (at + BETWEEN_KILLS / 10, empty_kills + 1);
                        }
                        if empty_kills > EMPTY_KILLS {
                            return Err("the killed processes held no entry: raise --rate".into());
                        }
                    }
                    Some((at, process))
                        if !watch.is_waiting_since_before(at)
                            && pending_of(&connection, stage, process).await? == 0 =>
                    {
                        times.saturating_record(at.elapsed().as_micros() as u64);
                        (killed, kill_at) = (None, Instant::now() + BETWEEN_KILLS);
                    }
                    Some((at, _)) if at.elapsed() > LANDED_WITHIN => {
                        return Err("what a killed process held was not settled in time".into());
                    }
                    _ => {}
                }
            }
        }
    }
    while let Some(added) = under_way.next().await {
        watch.expect(added?);
    }
    let deadline = Instant::now() + LANDED_WITHIN;
    while watch.is_waiting() {
        poll.tick().await;
        watch.look(stage).await?;
        if Instant::now() > deadline {
            return Err("the last entries did not land".into());
        }
    }
    workers.stop().await?;
    let exact = is_exact(stage, load, sent).await?;
    Ok(Recovery { times, held, exact })
}

/// How many entries are pending for the consumers of this process: its id is a part of their names.
async fn pending_of(connection: &Connection, stage: &Stage, process: u32) -> Result<u64, Trouble> {
    let command = Command::new("XINFO").arg("CONSUMERS").arg(&*stage.pipeline.stream).arg(stage.pipeline.group());
    let consumers = connection.call(command).await?.into_array().ok_or("XINFO CONSUMERS gave no list")?;
    let part = format!("-{process}-");
    let pending = |consumer: Reply| {
        let fields: Vec<(Reply, Reply)> = consumer.into_map()?.collect();
        let field = |name: &str| fields.iter().find(|(field, _)| field.as_text() == Some(name)).map(|(_, value)| value);
        let is_its = field("name")?.as_text()?.contains(&part);
        is_its.then(|| field("pending")?.as_int()).flatten()
    };
    Ok(consumers.filter_map(pending).map(i64::unsigned_abs).sum())
}
