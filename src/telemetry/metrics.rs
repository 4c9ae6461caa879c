//! Metrics: what one shard of a pipeline counts while it runs.
//!
//! Takes what the flow did; gives the instruments of [`super::contract`] their values. It cannot fail. A step of the hot path is a few
//! atomic operations for each batch, and none for an entry.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Instant;

use super::contract::{Metrics, Snapshot};

/// From when the process's own clock counts.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
/// Valkey could not be asked for so long: the pipeline is degraded.
const UNKNOWN_IS_DEGRADED_MS: u64 = 30_000;

fn now_ms() -> u64 {
    EPOCH.elapsed().as_millis() as u64
}

/// A number that may be unknown.
#[derive(Debug)]
pub(super) struct Gauge(AtomicU64);

impl Gauge {
    /// No gauge reaches this value.
    const UNKNOWN: u64 = u64::MAX;

    pub(super) fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|value| *value != Gauge::UNKNOWN)
    }

    fn set(&self, value: Option<u64>) {
        self.0.store(value.unwrap_or(Gauge::UNKNOWN), Ordering::Relaxed);
    }
}

impl Default for Gauge {
    fn default() -> Gauge {
        Gauge(AtomicU64::new(Gauge::UNKNOWN))
    }
}

/// One of the two sides of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Valkey's.
    Reading,
    /// PostgreSQL's.
    Flushing,
}

/// What is kept to tell how a shard stands now, and not only how it stood at the last look.
#[derive(Debug, Default)]
pub(super) struct Clock {
    /// Until when everything was settled, on the process's own clock.
    settled_until: Gauge,
    reading_halted: AtomicBool,
    flushing_halted: AtomicBool,
    valkey_ahead_ms: AtomicI64,
}

impl Clock {
    pub(super) fn at_risk_ms(&self) -> Option<u64> {
        self.settled_until.get().map(|until| now_ms().saturating_sub(until))
    }

    pub(super) fn halted(&self) -> u64 {
        (self.reading_halted.load(Ordering::Relaxed) || self.flushing_halted.load(Ordering::Relaxed)).into()
    }
}

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

/// What a pipeline has yet to settle, as Valkey told it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unsettled {
    /// Entries that nobody has read; none where the server cannot tell.
    pub undelivered: Option<u64>,
    /// Entries read and not yet acknowledged.
    pub pending: u64,
    /// How old the oldest of both is.
    pub age_ms: u64,
}

/// Where managed shards stand, as Valkey told it; none where it cannot be asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ManagedState {
    /// Whether absent counters are brought back.
    pub is_open: Option<bool>,
    /// How many counters have deltas that are not settled.
    pub dirty: Option<u64>,
}

/// What of Valkey's memory is left, as it was told; none where that is not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoomState {
    /// Dirty counters without a value.
    pub blind: Option<u64>,
    /// Bytes in use.
    pub used: Option<u64>,
    /// Of them those that cannot be evicted.
    pub pinned: Option<u64>,
    /// `maxmemory`.
    pub limit: Option<u64>,
    /// Keys evicted a second.
    pub evictions_per_s: Option<u64>,
    /// Seconds that PostgreSQL may stay away.
    pub runway_s: Option<u64>,
}

impl Metrics {
    /// A transaction was committed.
    pub fn flushed(&self, tally: &Tally) {
        add(&self.applied, tally.applied);
        add(&self.recognised, tally.recognised);
        add(&self.buried, tally.buried);
        add(&self.collided, tally.collided);
        add(&self.rows, tally.rows);
        add(&self.flushes, 1);
    }

    /// Managed counters became clean.
    pub fn cleaned(&self, counters: u64) {
        add(&self.cleaned, counters);
    }

    /// Entries of plain producers were flushed by a managed pipeline.
    pub fn strangers(&self, entries: u64) {
        add(&self.strangers, entries);
    }

    /// Rows that a trigger had noted were invalidated.
    pub fn rows_invalidated(&self, rows: u64) {
        add(&self.rows_invalidated, rows);
    }

    /// All values of a shard were dropped.
    pub fn values_dropped(&self, values: u64) {
        add(&self.values_dropped, values);
    }

    /// Where the managed shards stand.
    pub fn managed(&self, state: ManagedState) {
        self.gate.set(state.is_open.map(u64::from));
        self.dirty.set(state.dirty);
    }

    /// What of Valkey's memory is left.
    pub fn told_room(&self, room: RoomState) {
        self.blind.set(room.blind);
        self.memory_used_bytes.set(room.used);
        self.memory_pinned_bytes.set(room.pinned);
        self.memory_limit_bytes.set(room.limit);
        self.evictions_per_s.set(room.evictions_per_s);
        self.runway_s.set(room.runway_s);
    }

    /// Entries were taken up again.
    pub fn reclaimed(&self, entries: usize) {
        add(&self.reclaimed, entries as u64);
    }

    /// Entries were dropped because somebody had settled them.
    pub fn dropped(&self, entries: usize) {
        add(&self.dropped, entries as u64);
    }

    /// Valkey lost entries before they were flushed.
    pub fn lost_unflushed(&self, entries: usize) {
        add(&self.lost_unflushed, entries as u64);
    }

    /// Valkey lost entries of which nobody can know whether they were flushed.
    pub fn lost_unknown(&self, entries: usize) {
        add(&self.lost_unknown, entries as u64);
    }

    /// Valkey lost entries after they were flushed.
    pub fn lost_flushed(&self, entries: usize) {
        add(&self.lost_flushed, entries as u64);
    }

    /// Entries were trimmed.
    pub fn trimmed(&self, entries: u64) {
        add(&self.trimmed, entries);
    }

    /// An acknowledgement was dropped.
    pub fn ack_dropped(&self) {
        add(&self.acks_dropped, 1);
    }

    /// How many streams this process reads alone.
    pub fn holds_leases(&self, held: usize) {
        self.lease.set(Some(held as u64));
    }

    /// A worker's flushes begin to fail.
    pub fn begins_to_fail(&self) {
        let one_more = |known: u64| Some(if known == Gauge::UNKNOWN { 1 } else { known + 1 });
        let _ = self.failing_workers.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
    }

    /// A worker's flushes work again.
    pub fn works_again(&self) {
        let one_less = |known: u64| Some(if known == Gauge::UNKNOWN { 0 } else { known.saturating_sub(1) });
        let _ = self.failing_workers.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
    }

    /// An operator has paused the pipeline, or it is paused no more.
    pub fn told_paused(&self, is_paused: bool) {
        self.paused.set(Some(u64::from(is_paused)));
    }

    /// Whether any worker's flushes are failing.
    pub fn is_failing(&self) -> bool {
        self.failing_workers.get().is_some_and(|workers| workers > 0)
    }

    /// Valkey told the backlog just now.
    pub fn told_backlog(&self, unsettled: Unsettled) {
        self.undelivered.set(unsettled.undelivered);
        self.pending.set(Some(unsettled.pending));
        self.age_ms.set(Some(unsettled.age_ms));
        self.backlog_read_ms_ago.set(Some(0));
        self.clock.settled_until.set(Some(now_ms().saturating_sub(unsettled.age_ms)));
    }

    /// So far is Valkey's clock ahead of this machine's; less than 0 if it is behind.
    pub fn valkey_is_ahead(&self, ms: i64) {
        self.clock.valkey_ahead_ms.store(ms, Ordering::Relaxed);
    }

    pub(super) fn valkey_ahead_ms(&self) -> i64 {
        self.clock.valkey_ahead_ms.load(Ordering::Relaxed)
    }

    /// One side waits for an operator, or does so no longer.
    pub fn is_halted(&self, side: Side, is_halted: bool) {
        let flag = match side {
            Side::Reading => &self.clock.reading_halted,
            Side::Flushing => &self.clock.flushing_halted,
        };
        flag.store(is_halted, Ordering::Relaxed);
    }

    /// PostgreSQL told what it keeps of this shard.
    pub fn told_kept(&self, ledger_rows: u64, dead_letters_open: u64) {
        self.ledger_rows.set(Some(ledger_rows));
        self.dead_letters_open.set(Some(dead_letters_open));
    }

    /// Valkey could not tell the backlog, and did so last this long ago: what was known grows older.
    pub fn backlog_unknown_for(&self, since_ms: u64, longer_ms: u64) {
        self.backlog_read_ms_ago.set(Some(since_ms));
        // The oldest entry, if there was one, is still there as far as anybody knows.
        if let Some(age) = self.age_ms.get().filter(|age| *age > 0) {
            self.age_ms.set(Some(age + longer_ms));
        }
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Snapshot {
    /// Entries that are not settled; none while nothing is known of them.
    pub fn backlog(&self) -> Option<u64> {
        match (self.undelivered, self.pending) {
            (None, None) => None,
            (undelivered, pending) => Some(undelivered.unwrap_or(0).saturating_add(pending.unwrap_or(0))),
        }
    }

    /// Whether something is wrong: flushes fail, an operator is needed, or Valkey cannot be asked.
    pub fn is_degraded(&self) -> bool {
        let above = |gauge: Option<u64>, limit| gauge.is_some_and(|value| value > limit);
        above(self.failing_workers, 0)
            || above(self.halted, 0)
            || above(self.backlog_read_ms_ago, UNKNOWN_IS_DEGRADED_MS)
    }

    /// Whether there is nothing to settle, as far as is known, and nothing fails.
    pub fn is_idle(&self) -> bool {
        let nothing = |gauge: Option<u64>| gauge.is_none_or(|count| count == 0);
        nothing(self.undelivered)
            && nothing(self.pending)
            && nothing(self.failing_workers)
            && self.undelivered.is_some()
            && nothing(self.backlog_read_ms_ago)
    }
}

#[cfg(test)]
mod tests {
    use super::super::contract::INSTRUMENTS;
    use super::*;

    #[test]
    fn a_snapshot_names_every_instrument_once() {
        let metrics = Metrics::default();
        metrics.flushed(&Tally { applied: 7, rows: 2, ..Tally::default() });
        metrics.told_backlog(Unsettled { undelivered: None, pending: 3, age_ms: 50 });
        let values: Vec<_> = metrics.snapshot().values().map(|(instrument, value)| (instrument.name, value)).collect();
        assert_eq!(values.len(), INSTRUMENTS.len());
        for known in
            [("applied", Some(7)), ("rows", Some(2)), ("flushes", Some(1)), ("pending", Some(3)), ("undelivered", None)]
        {
            assert_eq!(values.iter().filter(|value| **value == known).count(), 1, "{known:?}");
        }
        let mut names: Vec<_> = INSTRUMENTS.iter().map(|instrument| instrument.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), INSTRUMENTS.len());
    }

    #[test]
    fn only_a_pipeline_with_nothing_to_settle_and_nothing_wrong_is_idle() {
        let metrics = Metrics::default();
        assert!(!metrics.snapshot().is_idle(), "nothing is known yet");
        let empty = Unsettled { undelivered: Some(0), pending: 0, age_ms: 0 };
        metrics.told_backlog(empty);
        assert!(metrics.snapshot().is_idle());
        metrics.begins_to_fail();
        assert!(!metrics.snapshot().is_idle() && metrics.is_failing());
        metrics.works_again();
        assert!(metrics.snapshot().is_idle() && !metrics.is_failing());
        metrics.told_backlog(Unsettled { pending: 1, age_ms: 5, ..empty });
        assert!(!metrics.snapshot().is_idle());
        metrics.told_backlog(empty);
        metrics.backlog_unknown_for(10_000, 10_000);
        assert!(!metrics.snapshot().is_idle(), "Valkey cannot be asked");
        assert!(!metrics.snapshot().counted_since(&Snapshot::default()), "gauges are no progress");
    }

    #[test]
    fn what_fails_waits_for_an_operator_or_cannot_be_asked_is_degraded() {
        let metrics = Metrics::default();
        assert!(!metrics.snapshot().is_degraded(), "an outage that nobody has seen is none");
        metrics.is_halted(Side::Reading, true);
        metrics.is_halted(Side::Flushing, false);
        assert!(metrics.snapshot().is_degraded() && metrics.snapshot().halted == Some(1));
        metrics.is_halted(Side::Reading, false);
        metrics.backlog_unknown_for(UNKNOWN_IS_DEGRADED_MS, 1);
        assert!(!metrics.snapshot().is_degraded());
        metrics.backlog_unknown_for(UNKNOWN_IS_DEGRADED_MS + 1, 1);
        assert!(metrics.snapshot().is_degraded());
    }

    #[test]
    fn what_is_at_risk_is_all_since_everything_was_settled() {
        let metrics = Metrics::default();
        assert_eq!(metrics.snapshot().at_risk_ms, None);
        // The process's clock may not be that old.
        LazyLock::force(&EPOCH);
        metrics.told_backlog(Unsettled { undelivered: Some(0), pending: 0, age_ms: 0 });
        assert!(metrics.snapshot().at_risk_ms.is_some_and(|ms| ms < 60_000));
    }

    #[test]
    fn an_entry_grows_older_while_valkey_cannot_be_asked() {
        let metrics = Metrics::default();
        metrics.told_backlog(Unsettled { undelivered: Some(4), pending: 1, age_ms: 500 });
        metrics.backlog_unknown_for(10_000, 10_000);
        metrics.backlog_unknown_for(20_000, 10_000);
        let now = metrics.snapshot();
        assert_eq!((now.undelivered, now.pending, now.age_ms), (Some(4), Some(1), Some(20_500)));
        assert_eq!(now.backlog_read_ms_ago, Some(20_000));
    }
}
