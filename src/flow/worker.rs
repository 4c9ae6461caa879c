//! A worker: a taker takes batches from Valkey, settlers settle them in PostgreSQL, an acker gives back what is settled.
//!
//! ```text
//!  Valkey ──▶ Taker ──[one batch]──▶ Settler ──▶ PostgreSQL
//!    ▲                                  │
//!    └──────────── Acker ◀──[settled]───┘
//! ```
//!
//! They work at once: while one batch is flushed the next is read and the one before is acknowledged. The taker
//! reserves the room before it reads, so a settler holds two batches at the most, the ids of two more, and what a few reads
//! under way bring; when PostgreSQL is slow reading stops and the backlog stays in Valkey. What arrives while a batch is
//! flushed is the next batch: under low load entries land at once, under high load batches grow by themselves.
//!
//! A worker of a group has one settler, and there are several workers. Where one process reads a stream alone it has one worker
//! with several settlers, and a keeper of the lease.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::acker::Acker;
use super::handoff::{Outlets, Shared};
use super::lease::{self, Keeper};
use super::read::Reader;
use super::reclaim::Reclaimer;
use super::session::Identity;
use super::settler::Settler;
use super::setup::WorkerSetup;
use super::taker::Taker;
use crate::model::names;

/// Receipts between a settler and the acker: one flush and the end of its batch.
const RECEIPTS: usize = 2;

/// The actors of a worker.
#[derive(Debug)]
pub struct Worker {
    /// Takes batches from Valkey.
    pub taker: Taker,
    /// Settle them in PostgreSQL.
    pub settlers: Vec<Settler>,
    /// Gives back what is settled.
    pub acker: Acker,
    /// Keeps the lease, where one process reads the stream alone.
    pub keeper: Option<Keeper>,
}

/// The actors of a worker. `name`: its name in log lines; its consumers' names begin with it.
pub fn assemble(setup: WorkerSetup, name: Arc<str>) -> Worker {
    let count = if setup.is_exclusive() { setup.settlers } else { 1 };
    let (receipts, settled) = mpsc::channel(RECEIPTS * count);
    let shared = Arc::new(Shared::of(count));
    let (outlets, settlers) = (0..count)
        .map(|slot| {
            let (sender, receiver) = mpsc::channel(1);
            (sender, Settler::new(setup.clone(), name.clone(), (shared.clone(), slot), receiver, receipts.clone()))
        })
        .unzip();
    let (keeper, lease) = if setup.is_exclusive() { Some(lease::lease(&setup, &name)).unzip() } else { (None, None) };
    let pipeline = setup.lane.pipeline();
    let connections = names::connections_of(setup.lane.source(), &pipeline.name);
    let process = names::consumers_of(&names::host(), std::process::id());
    let taker = Taker {
        reader: Reader::new(pipeline, setup.limits, setup.block()),
        reclaimer: Reclaimer::new(pipeline, &connections, process, setup.patience, setup.limits),
        identity: Identity { worker: name.clone(), connections: connections.into() },
        setup: setup.clone(),
        shared: shared.clone(),
        outlets: Some(Outlets::to(outlets)),
        sent: 0,
        suspect: None,
        met: None,
        has_group: false,
        lease,
        doubtful: 0,
        incident: setup.metrics.reading.incident(),
    };
    let acker = Acker::new(setup, name, shared, settled);
    Worker { taker, settlers, acker, keeper }
}
