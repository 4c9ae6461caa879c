//! What a process counts, by pipeline. The names here are the names in the log, in `tidegate demo` and in the documents.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// What happened to the entries of one flush.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Applied now.
    pub applied: u64,
    /// Found in the ledger: redeliveries.
    pub recognised: u64,
    /// Buried now.
    pub buried: u64,
    /// Applied although the ledger covers their id: other content under a used id.
    pub collided: u64,
    /// Table rows written.
    pub rows: u64,
}

/// Counters of one pipeline in one process, since its start.
#[derive(Debug, Default)]
pub struct Metrics {
    applied: AtomicU64,
    recognised: AtomicU64,
    buried: AtomicU64,
    collided: AtomicU64,
    rows: AtomicU64,
    flushes: AtomicU64,
    reclaimed: AtomicU64,
    dropped: AtomicU64,
    lost_upstream: AtomicU64,
    trimmed: AtomicU64,
    acks_dropped: AtomicU64,
    failing: AtomicUsize,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Entries applied to the table.
    pub applied: u64,
    /// Entries found in the ledger: redeliveries that would have counted twice.
    pub recognised: u64,
    /// Entries buried as dead letters.
    pub buried: u64,
    /// Entries applied although the ledger covers their id: other content under a used id.
    pub collided: u64,
    /// Table rows written.
    pub rows: u64,
    /// Transactions committed.
    pub flushes: u64,
    /// Entries taken over from dead consumers, or found again after a lost reply.
    pub reclaimed: u64,
    /// Entries that could not be judged, and that somebody had settled: dropped.
    pub dropped: u64,
    /// Entries that Valkey lost: flushed before, or never to be flushed.
    pub lost_upstream: u64,
    /// Entries trimmed from the stream.
    pub trimmed: u64,
    /// Acknowledgements that were not sent because the connection, or the server behind it, had changed.
    pub acks_dropped: u64,
}

impl Metrics {
    /// A transaction was committed.
    pub fn flushed(&self, tally: &Tally) {
        self.applied.fetch_add(tally.applied, Ordering::Relaxed);
        self.recognised.fetch_add(tally.recognised, Ordering::Relaxed);
        self.buried.fetch_add(tally.buried, Ordering::Relaxed);
        self.collided.fetch_add(tally.collided, Ordering::Relaxed);
        self.rows.fetch_add(tally.rows, Ordering::Relaxed);
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }

    /// Entries were taken up again.
    pub fn reclaimed(&self, entries: usize) {
        self.reclaimed.fetch_add(entries as u64, Ordering::Relaxed);
    }

    /// Entries were dropped because somebody had settled them.
    pub fn dropped(&self, entries: usize) {
        self.dropped.fetch_add(entries as u64, Ordering::Relaxed);
    }

    /// Entries were found lost upstream.
    pub fn lost_upstream(&self, entries: usize) {
        self.lost_upstream.fetch_add(entries as u64, Ordering::Relaxed);
    }

    /// Entries were trimmed.
    pub fn trimmed(&self, entries: u64) {
        self.trimmed.fetch_add(entries, Ordering::Relaxed);
    }

    /// An acknowledgement was dropped.
    pub fn ack_dropped(&self) {
        self.acks_dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// A worker's flushes begin to fail.
    pub fn begins_to_fail(&self) {
        self.failing.fetch_add(1, Ordering::Relaxed);
    }

    /// A worker's flushes work again.
    pub fn works_again(&self) {
        self.failing.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether any worker's flushes are failing.
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed) > 0
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            applied: read(&self.applied),
            recognised: read(&self.recognised),
            buried: read(&self.buried),
            collided: read(&self.collided),
            rows: read(&self.rows),
            flushes: read(&self.flushes),
            reclaimed: read(&self.reclaimed),
            dropped: read(&self.dropped),
            lost_upstream: read(&self.lost_upstream),
            trimmed: read(&self.trimmed),
            acks_dropped: read(&self.acks_dropped),
        }
    }
}
