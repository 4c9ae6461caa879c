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

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::sync::{mpsc, watch};

use super::acker::Acker;
use super::handoff::Shared;
use super::read::Reader;
use super::reclaim::Reclaimer;
use super::session::Identity;
use super::settler::Settler;
use super::setup::WorkerSetup;
use super::taker::Taker;
use crate::model::names;

/// Receipts between settler and acker: one flush and the end of its batch.
const RECEIPTS: usize = 2;

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
