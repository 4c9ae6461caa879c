//! Turn: leave to flush many rows of a table. Those who flush the same rows at once wait for each other anyhow; in turn they wait before
//! they hold a snapshot, which would keep PostgreSQL from pruning what the others leave behind.
//!
//! Takes a table; gives the flushes of one process their turn one after the other, and says how the flushes of several processes get
//! theirs ([`flush_in_turn`](../../migrations/0005_turn.sql)). No part of any promise: out of turn the same rows are right, only slower.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::model::entry::digest;
use crate::model::pipeline::Table;
use crate::postgres::Endpoint;
use crate::telemetry::contract::Metrics;

/// A flush of so many rows takes its turn. One of fewer is over before waiting would have helped.
pub(super) const MANY_ROWS: usize = 200;
/// How many tables the migration made to be locked.
const SLOTS: u64 = 4;

/// The turn of one table, or of one shard's rows in it, for all who flush them in this process.
#[derive(Debug, Clone)]
pub struct Turn {
    slot: i32,
    in_process: Arc<Mutex<()>>,
    peers: Arc<AtomicBool>,
    /// How many flushes of this process wait for it.
    waiting: Arc<AtomicU64>,
    /// Where the waits are recorded.
    metrics: Option<Arc<Metrics>>,
}

/// Counts one that waits, until it is dropped.
struct Waits<'a>(&'a AtomicU64);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Turn {
    /// Of this table; with several shards, of the rows of one of them: no other shard has a key among them.
    pub fn of(table: &Table, shard: Option<u16>) -> Turn {
        let rows = format!("{table} {shard:?}");
        let slot = digest(rows.as_bytes()) % SLOTS;
        Turn {
            slot: slot as i32,
            in_process: Arc::default(),
            peers: Arc::default(),
            waiting: Arc::default(),
            metrics: None,
        }
    }

    /// The same turn for one lane: whether other processes are at work is known for each lane by itself.
    pub fn of_lane(&self, metrics: Arc<Metrics>) -> Turn {
        Turn { peers: Arc::default(), metrics: Some(metrics), ..self.clone() }
    }

    /// Waits for its turn within this process. Who comes first is served first.
    pub(super) async fn in_process(&self) -> OwnedMutexGuard<()> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let (_waits, began) = (Waits(&self.waiting), Instant::now());
        let turn = self.in_process.clone().lock_owned().await;
        if let Some(metrics) = &self.metrics {
            metrics.recorder.waited_for_turn(began.elapsed().as_secs_f64());
        }
        turn
    }

    /// How many flushes of this process wait for it now. All lanes that share the turn share the number.
    pub fn waiting(&self) -> &Arc<AtomicU64> {
        &self.waiting
    }

    /// Whether other processes flush this lane, as far as was seen lately.
    pub(super) fn set_peers(&self, are_there: bool) {
        self.peers.store(are_there, Ordering::Relaxed);
    }

    /// The table that is locked for a turn among processes. None where there is only this one, or where who has waited for it in vain would
    /// have no time left for the flush.
    pub(super) fn among_processes(&self, database: &Endpoint) -> Option<i32> {
        let has_time = database.lock_timeout * 3 / 2 <= database.statement_timeout;
        (has_time && self.peers.load(Ordering::Relaxed)).then_some(self.slot)
    }
}
