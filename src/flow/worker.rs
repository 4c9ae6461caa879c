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
use super::reclaim::Reclaimer;
use super::settler::Settler;
use super::taker::Taker;
use crate::postgres::Database;
use crate::retry::Incident;
use crate::telemetry::contract::Metrics;
use crate::valkey;

/// A reader that waits for entries shows a sign of life this many times in each `reclaim.dead_after`.
pub(super) const SIGNS_OF_LIFE: u32 = 4;
/// The longest a reader waits for entries in one read.
const LONGEST_BLOCK: Duration = Duration::from_secs(2);
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
    /// When a silent consumer is dead.
    pub dead_after: Duration,
    /// How often the dead are looked for.
    pub sweep_every: Duration,
    /// When an entry that kills its readers is buried.
    pub max_deliveries: u64,
    /// What the pipeline's table has refused lately; all workers of the pipeline share it.
    pub refusals: Arc<Mutex<Refusals>>,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
    /// Rung when the group had to be created: somebody should look for what is lost.
    pub regrouped: Arc<Notify>,
}

/// The three setup of a worker of this consumer name, which nobody may have had before.
pub fn assemble(setup: WorkerSetup, consumer: Arc<str>) -> (Taker, Settler, Acker) {
    let (sender, receiver) = mpsc::channel(1);
    let (receipts, settled) = mpsc::channel(RECEIPTS);
    let shared = Arc::new(Shared { done: watch::Sender::new(0), failing: AtomicBool::new(false) });
    let block = LONGEST_BLOCK.min(setup.dead_after / SIGNS_OF_LIFE);
    let pipeline = setup.lane.pipeline();
    let taker = Taker {
        reader: Reader::new(pipeline, consumer.clone(), setup.limits, block),
        reclaimer: Reclaimer::new(
            pipeline,
            consumer.clone(),
            setup.dead_after,
            setup.max_deliveries,
            setup.limits.max_entry_bytes,
        ),
        consumer: consumer.clone(),
        setup: setup.clone(),
        shared: shared.clone(),
        sender: Some(sender),
        sent: 0,
        incident: Incident::default(),
    };
    let acker = Acker { setup: setup.clone(), consumer: consumer.clone(), shared: shared.clone(), settled };
    let settler = Settler::new(setup, consumer, shared, receiver, receipts);
    (taker, settler, acker)
}
