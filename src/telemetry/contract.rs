//! Contract: every instrument and every event that programs may rely on, each declared once.
//!
//! Takes what the flow counts; gives [`Metrics`], one for each pipeline, and a [`Snapshot`] of them that can be compared,
//! logged and exported by name. It cannot fail. `docs/telemetry.md` has the same tables, word for word: a test compares them.
//!
//! Programs read the fields of an event, never its message: a message may change with every version.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::retry::Incidents;

/// How an instrument moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only up, from zero at the start of the process.
    Counter,
    /// Up and down, or unknown.
    Gauge,
}

/// One number of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instrument {
    /// Its name, here and in every place where it is shown.
    pub name: &'static str,
    /// How it moves.
    pub kind: Kind,
    /// What it counts.
    pub unit: &'static str,
    /// What it means.
    pub sentence: &'static str,
}

/// What tells the instruments of one pipeline from those of another.
pub const LABELS: [&str; 3] = ["pipeline", "stream", "table"];

/// Declares the instruments: the table, the storage, the snapshot and the event, from one list.
macro_rules! instruments {
    (counters { $($counter:ident, $counter_unit:literal, $counter_sentence:literal;)* }
     gauges { $($gauge:ident, $gauge_unit:literal, $gauge_sentence:literal;)* }) => {
        /// Every instrument, in the order in which they are shown.
        pub const INSTRUMENTS: &[Instrument] = &[
            $(Instrument {
                name: stringify!($counter), kind: Kind::Counter, unit: $counter_unit, sentence: $counter_sentence,
            },)*
            $(Instrument {
                name: stringify!($gauge), kind: Kind::Gauge, unit: $gauge_unit, sentence: $gauge_sentence,
            },)*
        ];

        /// The instruments of one pipeline in one process.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($counter: AtomicU64,)*
            $($gauge: Gauge,)*
            /// What its workers have met while reading.
            pub reading: Incidents,
            /// What its workers have met while flushing.
            pub flushing: Incidents,
        }

        /// The instruments at one moment. A gauge that is not known is none.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Snapshot {
            $(#[doc = $counter_sentence] pub $counter: u64,)*
            $(#[doc = $gauge_sentence] pub $gauge: Option<u64>,)*
        }

        impl Metrics {
            /// The instruments now.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot {
                    $($counter: self.$counter.load(Ordering::Relaxed),)*
                    $($gauge: self.$gauge.get(),)*
                }
            }
        }

        impl Snapshot {
            /// Every instrument with its value.
            pub fn values(&self) -> impl Iterator<Item = (&'static Instrument, Option<u64>)> {
                INSTRUMENTS.iter().zip([$(Some(self.$counter),)* $(self.$gauge,)*])
            }

            /// Whether any counter differs.
            pub fn counted_since(&self, before: &Snapshot) -> bool {
                $(self.$counter != before.$counter ||)* false
            }

            /// Writes the event `metrics`, every instrument a field; one that is not known is left out.
            pub fn log(&self, pipeline: &str, stream: &str, table: &str) {
                tracing::info!(
                    event = "metrics", pipeline, stream, table,
                    $($counter = self.$counter,)* $($gauge = self.$gauge,)*
                    "so far"
                );
            }
        }
    };
}

instruments! {
    counters {
        applied, "entries", "entries whose delta was added to the table";
        recognised, "entries", "entries found in the ledger: redeliveries that would have counted twice";
        buried, "entries", "entries kept as dead letters";
        collided, "entries", "entries applied although the ledger covers their id: other content under a used id";
        rows, "rows", "table rows written";
        flushes, "transactions", "transactions committed";
        reclaimed, "entries", "entries taken over from dead consumers, or found again after a lost reply";
        dropped, "entries", "entries that could not be judged and that somebody had settled";
        lost_unflushed, "entries", "entries that Valkey lost before they were flushed: the table lacks them";
        lost_unknown, "entries", "entries that Valkey lost, whose id lies within a range of flushed ones: most likely the table has them, and nobody can know";
        lost_flushed, "entries", "entries that Valkey lost after they were flushed: the table has them";
        trimmed, "entries", "entries trimmed from the stream";
        cleaned, "counters", "managed counters that became clean: Valkey may evict them";
        strangers, "entries", "entries of a managed pipeline that came from a plain producer: the value of their counter was dropped";
        values_dropped, "counters", "values that were dropped because all of the shard were in doubt (a replay, a Valkey that lost entries)";
        rows_invalidated, "rows", "cached rows that were invalidated because the trigger tidegate.touched had noted them; counted by the first pipeline";
        acks_dropped, "acknowledgements", "acknowledgements not sent because the connection had changed; the entries come again and are recognised";
    }
    gauges {
        undelivered, "entries", "entries that no worker has read yet; unknown where Valkey cannot tell";
        pending, "entries", "entries read and not yet acknowledged";
        age_ms, "milliseconds", "how long ago the oldest unsettled entry was added, 0 if there is none";
        backlog_read_ms_ago, "milliseconds", "how long ago Valkey was asked for the three above: large while it cannot be asked";
        lease, "leases", "1 while this process reads the stream alone, 0 while it stands by; unknown where the delivery is `group`";
        dirty, "counters", "managed counters with deltas that are not settled, which Valkey cannot evict; unknown where the mode is `plain`";
        gate, "gates", "1 while absent counters are brought back from PostgreSQL, 0 while they are not (a replay, an operator is waited for); unknown where the mode is `plain`";
        failing_workers, "workers", "workers whose flushes are failing now";
    }
}

/// Something that happened, told in the log with `event = name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The value of its field `event`.
    pub name: &'static str,
    /// Its other fields that programs may rely on.
    pub fields: &'static str,
    /// When it is told.
    pub sentence: &'static str,
}

/// Every event that programs may rely on.
pub const EVENTS: &[Event] = &[
    event("running", "workers, pipelines, valkey, postgres, version", "the workers start; again after each reload"),
    event(
        "metrics",
        "pipeline, stream, table, every instrument",
        "every 10 s while a pipeline is not idle, and always at a stop",
    ),
    event("recognised", "pipeline, entries", "redelivered entries were found in the ledger, and not added again"),
    event("buried", "pipeline, entries", "entries became dead letters"),
    event("reclaimed", "pipeline, entries, gone", "entries were taken over from a dead consumer, or found again"),
    event("lost_upstream", "pipeline, entries, flushed", "Valkey lost entries; flushed: `no`, `yes`, or `unknown`"),
    event(
        "values_dropped",
        "pipeline, stream, why, values",
        "all values of a managed shard were in doubt and were dropped; they are brought back when they are needed",
    ),
    event("lease_held", "pipeline, stream", "this process reads the stream alone from now on"),
    event("lease_waits", "pipeline, stream", "another process reads the stream: this one stands by"),
    event("lease_lost", "pipeline, stream", "another process has taken the stream over"),
    event(
        "reads_alone",
        "pipeline, stream, from",
        "all that the group gave out is settled: reading alone begins behind `from`",
    ),
    event("displaced", "pipeline, stream, why", "reading alone was given up and begins again at the group's position"),
    event(
        "interrupted",
        "pipeline, stream, fault, advice, lasted_ms",
        "reading or flushing waits for a server; again every 30 s",
    ),
    event("halted", "pipeline, stream, fault, advice", "reading or flushing waits for an operator; again every 30 s"),
    event("resumed", "pipeline, stream, lasted_ms", "what was interrupted or halted works again"),
    event(
        "reloaded",
        "",
        "a SIGHUP was followed: the workers settle what they hold and start with the new configuration",
    ),
    event("reload_refused", "refusal", "a SIGHUP was not followed: the configuration before it stays in force"),
    event("stopped", "phase", "the end: `settled`, or `left pending`"),
];

const fn event(name: &'static str, fields: &'static str, sentence: &'static str) -> Event {
    Event { name, fields, sentence }
}

/// A number that may be unknown.
#[derive(Debug)]
struct Gauge(AtomicU64);

impl Gauge {
    /// No gauge reaches this value.
    const UNKNOWN: u64 = u64::MAX;

    fn get(&self) -> Option<u64> {
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

/// Where a managed shard stands, as Valkey told it; none where it cannot be asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ManagedState {
    /// Whether absent counters are brought back.
    pub is_open: Option<bool>,
    /// How many counters have deltas that are not settled.
    pub dirty: Option<u64>,
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

    /// Where a managed shard stands.
    pub fn managed(&self, state: ManagedState) {
        self.gate.set(state.is_open.map(u64::from));
        self.dirty.set(state.dirty);
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

    /// Whether this process reads the stream alone.
    pub fn holds_lease(&self, is_held: bool) {
        self.lease.set(Some(is_held.into()));
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
