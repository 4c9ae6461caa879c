//! A worker: a taker takes batches from Valkey, a settler settles them in PostgreSQL, an acker acknowledges what is settled.
//!
//! ```text
//!  Valkey ──▶ Taker ──[one batch]──▶ Settler ──▶ PostgreSQL
//!    ▲                                  │
//!    └──────────── Acker ◀──[settled]───┘
//! ```
//!
//! The three work at once: while one batch is flushed the next is read and the one before is acknowledged. The taker
//! reserves the room before it reads, so a worker holds two batches at the most, the ids of two more, and what a few reads
//! under way bring; when PostgreSQL is slow reading stops and the backlog stays in Valkey. What arrives while a batch is
//! flushed is the next batch: under low load entries land at once, under high load batches grow by themselves.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};

use super::acker::Acker;
use super::bisect::Refusals;
use super::flush::Lane;
use super::handoff::Shared;
use super::read::{Limits, Reader};
use super::reclaim::{Patience, Reclaimer};
use super::session::Identity;
use super::settler::Settler;
use super::taker::Taker;
use crate::model::names;
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
/// Receipts between settler and acker: one flush and the end of its batch.
const RECEIPTS: usize = 2;

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
    fn block(&self) -> Duration {
        LONGEST_BLOCK.min(self.sweep_every).min(self.patience.dead_after / SIGNS_OF_LIFE).max(SHORTEST_BLOCK)
    }
}

/// The three actors of a worker. `worker`: its name in log lines; its consumers' names begin with it.
pub fn assemble(setup: WorkerSetup, worker: Arc<str>) -> (Taker, Settler, Acker) {
    let (sender, receiver) = mpsc::channel(1);
    let (receipts, settled) = mpsc::channel(RECEIPTS);
    let shared = Arc::new(Shared { done: watch::Sender::new(0), failing: AtomicBool::new(false) });
    let pipeline = setup.lane.pipeline();
    let connections = names::connections_of(setup.lane.source(), &pipeline.name);
    let taker = Taker {
        reader: Reader::new(pipeline, setup.limits, setup.block()),
        reclaimer: Reclaimer::new(pipeline, &connections, setup.patience, setup.limits),
        identity: Identity { worker: worker.clone(), connections: connections.into() },
        setup: setup.clone(),
        shared: shared.clone(),
        sender: Some(sender),
        sent: 0,
        suspect: None,
        met: None,
        has_group: false,
        incident: setup.metrics.reading.incident(),
    };
    let acker = Acker { setup: setup.clone(), worker: worker.clone(), shared: shared.clone(), settled };
    let settler = Settler::new(setup, worker, shared, receiver, receipts);
    (taker, settler, acker)
}
