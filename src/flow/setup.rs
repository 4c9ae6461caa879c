//! Setup: what a worker is made of. Its three actors have it in common.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tracing::{error, info, warn};

use super::bisect::Refusals;
use super::flush::Lane;
use super::lease::Shares;
use super::pause::Pause;
use super::read::Limits;
use super::reclaim::Patience;
use crate::model::pipeline::{Delivery, Pipeline};
use crate::postgres::Database;
use crate::retry::{Fault, Incident, Judgement, Verdict};
use crate::telemetry::contract::{Metrics, Side};
use crate::valkey;

/// The time between two signs of life, for each stream, at the least.
const SIGN_FOR_EACH: Duration = Duration::from_millis(1);
/// A worker shows a sign of life this many times in each `reclaim.dead_after`, and in each `reclaim.gone_after`.
const SIGNS_OF_LIFE: u32 = 4;
/// The longest a connection is left without traffic: proxies and servers close idle ones, seldom sooner than after 10 s.
pub(super) const LONGEST_IDLE: Duration = Duration::from_secs(3);
/// The longest a reader waits for entries in one read.
const LONGEST_BLOCK: Duration = Duration::from_secs(2);
/// The shortest: while there is nothing to do a worker asks ten times a second at the most.
const SHORTEST_BLOCK: Duration = Duration::from_millis(100);

/// What a worker is made of.
#[derive(Debug, Clone)]
pub struct WorkerSetup {
    /// Where Valkey is.
    pub valkey: valkey::Endpoint,
    /// PostgreSQL.
    pub database: Database,
    /// What it feeds: the configured pipeline, or one shard of it.
    pub pipeline: Arc<Pipeline>,
    /// The places in the ledger of all that it may read. One, but where leases are held.
    pub lanes: Arc<[Lane]>,
    /// What bounds a batch.
    pub limits: Limits,
    /// When a consumer is dead, and when an entry that kills its readers is buried.
    pub patience: Patience,
    /// How often the dead are looked for.
    pub sweep_every: Duration,
    /// How many batches are settled at once where one process reads alone.
    pub settlers: usize,
    /// How long the lease lasts by which it does so.
    pub lease: Duration,
    /// How many of the pipeline's leases this process holds; all workers of the pipeline share it.
    pub shares: Arc<Shares>,
    /// What the pipeline's table has refused lately; all workers of the pipeline share it.
    pub refusals: Arc<Mutex<Refusals>>,
    /// Whether it is to read nothing for now; all workers of the pipeline share it.
    pub pause: Pause,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
    /// Rung when the group had to be created: somebody should look for what is lost.
    pub regrouped: Arc<Notify>,
}

impl WorkerSetup {
    /// How often a worker shows a sign of life while it reads nothing.
    pub(super) fn sign_of_life_every(&self) -> Duration {
        self.sign_for_each_every(self.lanes.len()).min(LONGEST_IDLE)
    }

    /// How many of the streams that are read alone one sign of life names, each in its turn.
    pub(super) fn signed_at_once(&self, alone: usize) -> usize {
        let (every, for_each) = (self.sign_of_life_every(), self.sign_for_each_every(self.lanes.len()));
        let share = alone as u128 * every.as_nanos();
        alone.min(share.div_ceil(for_each.as_nanos().max(1)) as usize)
    }

    /// How often each of so many streams is told.
    fn sign_for_each_every(&self, streams: usize) -> Duration {
        let Patience { gone_after, dead_after, .. } = self.patience;
        let often = dead_after.min(gone_after) / SIGNS_OF_LIFE;
        // Silence is no more than the second best sign of death: a connection that has gone is the first.
        often.max((SIGN_FOR_EACH * streams as u32).min(dead_after / SIGNS_OF_LIFE))
    }

    /// The same for one of its lanes alone.
    pub fn of_lane(&self, lane: usize) -> WorkerSetup {
        let lane = self.lanes[lane].clone();
        WorkerSetup { pipeline: Arc::new(lane.pipeline().clone()), lanes: Arc::new([lane]), ..self.clone() }
    }

    /// Whether one process at a time reads the stream.
    pub fn is_exclusive(&self) -> bool {
        self.pipeline.delivery == Delivery::Exclusive
    }

    /// How many settled entries the group's position may be behind for a moment, where one process reads alone.
    pub(super) fn most_unmoved(&self) -> u64 {
        2 * self.limits.max_entries as u64
    }

    /// How many entries behind the group's position a process that read alone may have held when it died: what was not moved over,
    /// three batches a settler, and two more on the way.
    pub(super) fn most_in_doubt(&self) -> u64 {
        self.most_unmoved() + (3 * self.settlers as u64 + 2) * self.limits.max_entries as u64
    }

    /// A fault on Valkey's side: tells it, once for all workers of the pipeline; gives how long to wait.
    pub(super) fn met_reading(&self, incident: &mut Incident, fault: &Fault) -> Duration {
        let now = Instant::now();
        let response = incident.met(fault, now);
        let Judgement { verdict, advice } = response.judgement;
        if verdict == Verdict::Halt {
            self.metrics.is_halted(Side::Reading, true);
        }
        if incident.is_news(verdict, now) {
            let (pipeline, lasted_ms) = (&self.pipeline, response.lasted.as_millis() as u64);
            let (name, stream) = (&pipeline.name, &pipeline.stream);
            match verdict {
                Verdict::Halt => {
                    error!(event = "halted", pipeline = %name, %stream, %fault, advice, lasted_ms, "reading is halted until this is corrected");
                }
                _ => {
                    warn!(event = "interrupted", pipeline = %name, %stream, %fault, advice, lasted_ms, "reading is interrupted");
                }
            }
        }
        response.wait
    }

    /// Reading works: the last worker that an incident kept waiting says so.
    pub(super) fn reads_again(&self, incident: &mut Incident) {
        self.metrics.is_halted(Side::Reading, false);
        if let Some((_, lasted)) = incident.over(Instant::now()) {
            let (pipeline, lasted_ms) = (&self.pipeline, lasted.as_millis() as u64);
            info!(event = "resumed", pipeline = %pipeline.name, stream = %pipeline.stream, lasted_ms, "reading goes on");
        }
    }

    /// How long one read waits for entries. Between two reads the dead are looked for.
    pub(super) fn block(&self) -> Duration {
        LONGEST_BLOCK.min(self.sweep_every).min(self.patience.dead_after / SIGNS_OF_LIFE).max(SHORTEST_BLOCK)
    }
}
