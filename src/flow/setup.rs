//! Setup: what a worker is made of. Its three actors have it in common.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::bisect::Refusals;
use super::flush::Lane;
use super::read::Limits;
use super::reclaim::Patience;
use crate::postgres::Database;
use crate::telemetry::contract::Metrics;
use crate::valkey;

/// A worker shows a sign of life this many times in each `reclaim.dead_after`, and in each `reclaim.gone_after`.
const SIGNS_OF_LIFE: u32 = 4;
/// The longest a connection is left without traffic: proxies and servers close idle ones, seldom sooner than after 10 s.
const LONGEST_IDLE: Duration = Duration::from_secs(3);
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
    /// What it feeds.
    pub lane: Lane,
    /// What bounds a batch.
    pub limits: Limits,
    /// When a consumer is dead, and when an entry that kills its readers is buried.
    pub patience: Patience,
    /// How often the dead are looked for.
    pub sweep_every: Duration,
    /// What the pipeline's table has refused lately; all workers of the pipeline share it.
    pub refusals: Arc<Mutex<Refusals>>,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
    /// Rung when the group had to be created: somebody should look for what is lost.
    pub regrouped: Arc<Notify>,
}

impl WorkerSetup {
    /// How often a worker shows a sign of life while it reads nothing.
    pub(super) fn sign_of_life_every(&self) -> Duration {
        let Patience { gone_after, dead_after, .. } = self.patience;
        (dead_after.min(gone_after) / SIGNS_OF_LIFE).min(LONGEST_IDLE)
    }

    /// How long one read waits for entries. Between two reads the dead are looked for.
    pub(super) fn block(&self) -> Duration {
        LONGEST_BLOCK.min(self.sweep_every).min(self.patience.dead_after / SIGNS_OF_LIFE).max(SHORTEST_BLOCK)
    }
}
