//! Contract: every metric, every field of the event `metrics`, and every event that programs may rely on, each declared once.
//!
//! Takes what the flow counts; gives [`Metrics`], one for each shard of a pipeline, and a [`Snapshot`] of them that can be compared, added
//! up, logged and exported by name. It cannot fail. `docs/telemetry.md` has the same tables, word for word: a test compares them, and
//! another one compares them with what a running daemon serves.
//!
//! Programs read the fields of an event, never its message: a message may change with every version.

use std::sync::atomic::{AtomicU64, Ordering};

use super::metrics::{Clock, Gauge};
pub use super::metrics::{ManagedState, RoomState, Side, Tally, Unsettled};
use super::recorder::Recorder;
use super::registry::Process;
use super::steps::Steps;
use crate::retry::Incidents;

/// How an instrument moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only up, from zero at the start of the process.
    Counter,
    /// Up and down, or unknown.
    Gauge,
}

/// One number of a shard, as the event `metrics` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instrument {
    /// The event's field.
    pub name: &'static str,
    /// How it moves.
    pub kind: Kind,
    /// What it counts.
    pub unit: &'static str,
    /// What it means.
    pub sentence: &'static str,
}

/// What tells the event `metrics` of one shard from that of another.
pub const LABELS: [&str; 3] = ["pipeline", "stream", "table"];

/// How the shards of a pipeline are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Together {
    Sum,
    Max,
    Min,
}

impl Together {
    /// One that is not known counts for nothing; where none is known the whole is not known.
    fn of(self, one: Option<u64>, other: Option<u64>) -> Option<u64> {
        match (one, other) {
            (Some(one), Some(other)) if self == Together::Sum => Some(one.saturating_add(other)),
            (Some(one), Some(other)) if self == Together::Min => Some(one.min(other)),
            (Some(one), Some(other)) => Some(one.max(other)),
            (one, other) => one.or(other),
        }
    }
}

/// Declares the instruments: the table, the storage, the snapshot and the event, from one list.
macro_rules! instruments {
    (counters { $($counter:ident, $counter_unit:literal, $counter_sentence:literal;)* }
     gauges { $($gauge:ident, $together:ident, $gauge_unit:literal, $gauge_sentence:literal;)* }) => {
        /// Every field of the event `metrics`, in the order in which they are shown.
        pub const INSTRUMENTS: &[Instrument] = &[
            $(Instrument {
                name: stringify!($counter), kind: Kind::Counter, unit: $counter_unit, sentence: $counter_sentence,
            },)*
            $(Instrument {
                name: stringify!($gauge), kind: Kind::Gauge, unit: $gauge_unit, sentence: $gauge_sentence,
            },)*
        ];

        /// The instruments of one shard in one process.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $(pub(super) $counter: AtomicU64,)*
            $(pub(super) $gauge: Gauge,)*
            /// What the gauges are made of that grow by themselves.
            pub(super) clock: Clock,
            /// What its actors are at.
            pub steps: Steps,
            /// What its workers have met while reading.
            pub reading: Incidents,
            /// What its workers have met while flushing.
            pub flushing: Incidents,
            /// Where its durations and sizes are recorded.
            pub recorder: Recorder,
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
                let told = Snapshot {
                    $($counter: self.$counter.load(Ordering::Relaxed),)*
                    $($gauge: self.$gauge.get(),)*
                };
                Snapshot { at_risk_ms: self.clock.at_risk_ms(), halted: Some(self.clock.halted()), ..told }
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

            /// Adds the counters of another shard of the same pipeline.
            pub fn count_in(&mut self, other: &Snapshot) {
                $(self.$counter = self.$counter.saturating_add(other.$counter);)*
            }

            /// Puts the gauges of another shard of the same pipeline to these.
            pub fn take_in(&mut self, other: &Snapshot) {
                $(self.$gauge = Together::$together.of(self.$gauge, other.$gauge);)*
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
        undelivered, Sum, "entries", "entries that no worker has read yet; where Valkey cannot tell they are counted, above 100,000 estimated";
        pending, Sum, "entries", "entries read and not yet acknowledged";
        age_ms, Max, "milliseconds", "how long ago the oldest unsettled entry was added, 0 if there is none";
        at_risk_ms, Max, "milliseconds", "how long ago everything was settled for certain, at the most: a Valkey that is lost now takes the increments of so long with it";
        backlog_read_ms_ago, Max, "milliseconds", "how long ago Valkey was asked for its backlog: large while it cannot be asked";
        lease, Sum, "leases", "streams that this process reads alone; unknown where the delivery is `group`";
        dirty, Sum, "counters", "managed counters with deltas that are not settled, which Valkey cannot evict; unknown where the mode is `plain`";
        gate, Min, "gates", "1 while absent counters are brought back from PostgreSQL, 0 while they are not (a replay, an operator is waited for); unknown where the mode is `plain`";
        blind, Sum, "counters", "of the dirty counters those whose value is not in Valkey, as a sample tells; unknown where the mode is `plain`";
        memory_used_bytes, Max, "bytes", "memory that Valkey uses, as it told it last; of several primaries the one that uses most";
        memory_pinned_bytes, Max, "bytes", "of that what cannot be evicted, as a sample tells; unknown where the daemon may not measure keys";
        memory_limit_bytes, Min, "bytes", "Valkey's `maxmemory`; unknown where there is none";
        evictions_per_s, Max, "keys", "keys that Valkey evicted a second, over the last ten seconds";
        runway_s, Min, "seconds", "how long PostgreSQL may stay away at the rate of the last ten seconds before Valkey refuses increments; unknown without a `maxmemory`, while nothing is added, and where the daemon may not measure keys";
        failing_workers, Sum, "workers", "workers whose flushes are failing now";
        halted, Max, "pipelines", "1 while reading or flushing waits for an operator, else 0";
        paused, Max, "pipelines", "1 while an operator has paused the pipeline, else 0";
        ledger_rows, Sum, "rows", "rows that the ledger has of this stream, as PostgreSQL told it last";
        dead_letters_open, Sum, "letters", "dead letters that nobody has resolved, as PostgreSQL told it last";
    }
}

/// One counter of a pipeline.
pub type Count = fn(&Snapshot) -> u64;

/// What a metric is made of.
#[derive(Debug, Clone, Copy)]
pub enum Source {
    /// Counters of a pipeline; where there are several, each with its word for the label `outcome`.
    Counters(&'static [(&'static str, Count)]),
    /// A gauge of a pipeline. One that is not known is left out.
    Gauge(fn(&Snapshot) -> Option<f64>),
    /// Faults of a pipeline, counted by their code.
    Faults,
    /// One for each pipeline, whose labels are what it tells.
    Info,
    /// Something of the process.
    Process(fn(&Process) -> Vec<(&'static str, f64)>),
    /// Something that happened in the process, each time with an outcome.
    Happenings(fn(&Process) -> Vec<(&'static str, u64)>),
    /// What is recorded each time, sorted into buckets with these upper bounds.
    Histogram(&'static [f64]),
}

/// One metric, as it is exported over OTLP and scraped by Prometheus.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name over OTLP.
    pub name: &'static str,
    /// Its unit, as UCUM writes it.
    pub unit: &'static str,
    /// Its labels. Each has a bounded number of values: they come from the configuration, from a list here, or (`code`) have a limit.
    pub labels: &'static [&'static str],
    /// What it means.
    pub sentence: &'static str,
    /// What it is made of.
    pub source: Source,
}

impl Metric {
    /// What kind of metric it is, in one word.
    pub fn kind(&self) -> &'static str {
        match self.source {
            Source::Counters(_) | Source::Faults | Source::Happenings(_) => "counter",
            Source::Gauge(_) | Source::Info | Source::Process(_) => "gauge",
            Source::Histogram(_) => "histogram",
        }
    }

    /// Its name as Prometheus scrapes it: the unit is part of it, and counters end with `_total`.
    pub fn prometheus_name(&self) -> String {
        let unit = match self.unit {
            "s" => "_seconds",
            "By" => "_bytes",
            "1" => "_ratio",
            _ => "",
        };
        let total = if self.kind() == "counter" { "_total" } else { "" };
        format!("{}{unit}{total}", self.name.replace('.', "_"))
    }
}

/// Upper bounds in seconds, from 0.5 ms to 60 s.
pub const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Upper bounds of a number of entries.
const ENTRIES: &[f64] = &[1.0, 10.0, 100.0, 500.0, 1_000.0, 2_500.0, 5_000.0, 10_000.0, 20_000.0, 40_000.0, 100_000.0];
/// Upper bounds of how many entries there are for each row.
const RATIO: &[f64] = &[1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 25.0, 50.0, 100.0, 500.0, 1_000.0, 10_000.0];

const PIPELINE: &[&str] = &["pipeline"];
const WITH_OUTCOME: &[&str] = &["pipeline", "outcome"];
const NONE: &[&str] = &[];

fn count(value: Option<u64>) -> Option<f64> {
    value.map(|value| value as f64)
}

fn seconds(milliseconds: Option<u64>) -> Option<f64> {
    milliseconds.map(|value| value as f64 / 1000.0)
}

const fn counter(
    name: &'static str,
    unit: &'static str,
    from: &'static [(&'static str, Count)],
    sentence: &'static str,
) -> Metric {
    let labels = if from.len() > 1 { WITH_OUTCOME } else { PIPELINE };
    Metric { name, unit, labels, sentence, source: Source::Counters(from) }
}

const fn gauge(
    name: &'static str,
    unit: &'static str,
    from: fn(&Snapshot) -> Option<f64>,
    sentence: &'static str,
) -> Metric {
    Metric { name, unit, labels: PIPELINE, sentence, source: Source::Gauge(from) }
}

const fn histogram(
    name: &'static str,
    unit: &'static str,
    labels: &'static [&'static str],
    bounds: &'static [f64],
    sentence: &'static str,
) -> Metric {
    Metric { name, unit, labels, sentence, source: Source::Histogram(bounds) }
}

const fn process(
    name: &'static str,
    unit: &'static str,
    labels: &'static [&'static str],
    from: fn(&Process) -> Vec<(&'static str, f64)>,
    sentence: &'static str,
) -> Metric {
    Metric { name, unit, labels, sentence, source: Source::Process(from) }
}

/// The time of a flush.
pub const FLUSH_DURATION: &str = "tidegate.flush.duration";
/// The age of a batch's oldest entry when it was committed.
pub const ENTRY_AGE: &str = "tidegate.entry.age";
/// The time of an acknowledgement.
pub const ACK_DURATION: &str = "tidegate.ack.duration";
/// The wait for a turn.
pub const TURN_DURATION: &str = "tidegate.turn.duration";
/// The entries of a flush.
pub const BATCH_ENTRIES: &str = "tidegate.batch.entries";
/// The entries for each row of a flush.
pub const BATCH_COALESCING: &str = "tidegate.batch.coalescing";

/// Every metric, in the order in which they are documented.
#[rustfmt::skip] // a table
pub const METRICS: &[Metric] = &[
    gauge("tidegate.backlog.entries", "{entry}", |now| count(now.backlog()),
        "entries that no worker has read yet, and entries read and not yet acknowledged"),
    gauge("tidegate.entries.undelivered", "{entry}", |now| count(now.undelivered),
        "of the backlog: entries that no worker has read yet; where Valkey cannot tell they are counted, above 100,000 estimated"),
    gauge("tidegate.entries.pending", "{entry}", |now| count(now.pending),
        "of the backlog: entries read and not yet acknowledged"),
    gauge("tidegate.oldest_unsettled.age", "s", |now| seconds(now.age_ms),
        "how long ago the oldest unsettled entry was added, 0 if there is none"),
    gauge("tidegate.at_risk", "s", |now| seconds(now.at_risk_ms),
        "how long ago everything was settled for certain, at the most: a Valkey that is lost now takes the increments of so long with it"),
    gauge("tidegate.backlog.read.age", "s", |now| seconds(now.backlog_read_ms_ago),
        "how long ago Valkey was asked for its backlog: large while it cannot be asked"),
    gauge("tidegate.halted", "", |now| count(now.halted),
        "1 while reading or flushing waits for an operator, else 0"),
    gauge("tidegate.paused", "", |now| count(now.paused.or(Some(0))),
        "1 while an operator has paused the pipeline, else 0"),
    gauge("tidegate.degraded", "", |now| Some(if now.is_degraded() { 1.0 } else { 0.0 }),
        "1 while flushes fail, the pipeline is halted, or Valkey cannot be asked, else 0"),
    gauge("tidegate.workers.failing", "{worker}", |now| count(now.failing_workers.or(Some(0))),
        "workers whose flushes are failing now"),
    gauge("tidegate.leases.held", "{lease}", |now| count(now.lease),
        "streams that this process reads alone; absent where the delivery is `group`"),
    gauge("tidegate.dead_letters.open", "{letter}", |now| count(now.dead_letters_open),
        "dead letters that nobody has resolved, as PostgreSQL told it last"),
    gauge("tidegate.ledger.rows", "{row}", |now| count(now.ledger_rows),
        "rows that the ledger has of this pipeline, as PostgreSQL told it last"),
    counter("tidegate.entries.settled", "{entry}", &[
            ("applied", |now| now.applied), ("recognised", |now| now.recognised),
            ("buried", |now| now.buried), ("dropped", |now| now.dropped)],
        "entries that are done with: added to the table, found in the ledger, kept as dead letters, or dropped because they could not be judged and somebody had settled them"),
    counter("tidegate.entries.collided", "{entry}", &[("", |now| now.collided)],
        "entries applied although the ledger covers their id: other content under a used id"),
    counter("tidegate.entries.reclaimed", "{entry}", &[("", |now| now.reclaimed)],
        "entries taken over from dead consumers, or found again after a lost reply"),
    counter("tidegate.entries.lost", "{entry}", &[
            ("unflushed", |now| now.lost_unflushed), ("unknown", |now| now.lost_unknown), ("flushed", |now| now.lost_flushed)],
        "entries that Valkey lost: before they were flushed, where nobody can know, or after they were flushed"),
    counter("tidegate.entries.trimmed", "{entry}", &[("", |now| now.trimmed)],
        "entries trimmed from the stream"),
    counter("tidegate.rows.written", "{row}", &[("", |now| now.rows)],
        "table rows written"),
    counter("tidegate.flushes", "{transaction}", &[("", |now| now.flushes)],
        "transactions committed"),
    gauge("tidegate.managed.dirty", "{counter}", |now| count(now.dirty),
        "managed counters with deltas that are not settled, which Valkey cannot evict; absent where the mode is `plain`"),
    gauge("tidegate.managed.gate", "", |now| count(now.gate),
        "1 while absent counters are brought back from PostgreSQL, 0 while those of any shard are not; absent where the mode is `plain`"),
    gauge("tidegate.managed.blind", "{counter}", |now| count(now.blind),
        "of the dirty counters those whose value is not in Valkey, as a sample tells; absent where the mode is `plain`"),
    gauge("tidegate.valkey.memory.used", "By", |now| count(now.memory_used_bytes),
        "memory that Valkey uses, as it told it last; of several primaries the one that uses most"),
    gauge("tidegate.valkey.memory.pinned", "By", |now| count(now.memory_pinned_bytes),
        "of that what cannot be evicted, as a sample tells; absent where the daemon may not measure keys"),
    gauge("tidegate.valkey.memory.limit", "By", |now| count(now.memory_limit_bytes),
        "Valkey's `maxmemory`; absent where there is none"),
    gauge("tidegate.valkey.eviction.rate", "{key}", |now| count(now.evictions_per_s),
        "keys that Valkey evicted a second, over the last ten seconds"),
    gauge("tidegate.valkey.runway", "s", |now| count(now.runway_s),
        "how long PostgreSQL may stay away at the rate of the last ten seconds before Valkey refuses increments; absent without a `maxmemory`, while nothing is added, and where the daemon may not measure keys"),
    counter("tidegate.managed.cleaned", "{counter}", &[("", |now| now.cleaned)],
        "managed counters that became clean: Valkey may evict them"),
    counter("tidegate.managed.strangers", "{entry}", &[("", |now| now.strangers)],
        "entries of a managed pipeline that came from a plain producer: the value of their counter was dropped"),
    counter("tidegate.managed.values.dropped", "{counter}", &[("", |now| now.values_dropped)],
        "values that were dropped because all of the shard were in doubt"),
    counter("tidegate.cache.rows.invalidated", "{row}", &[("", |now| now.rows_invalidated)],
        "cached rows that were invalidated because the trigger tidegate.touched had noted them; counted by the first pipeline"),
    counter("tidegate.acks.dropped", "{acknowledgement}", &[("", |now| now.acks_dropped)],
        "acknowledgements not sent because the connection had changed; the entries come again and are recognised"),
    Metric { name: "tidegate.faults", unit: "{fault}", labels: &["pipeline", "side", "code"], source: Source::Faults, sentence:
        "errors of the servers, by side (`reading`, `flushing`) and code: PostgreSQL's SQLSTATE, the first word of Valkey's reply, or `valkey_lost`, `postgres_lost` and the like; beyond 64 codes `other`" },
    histogram(FLUSH_DURATION, "s", WITH_OUTCOME, SECONDS,
        "time of one flush, its wait for a turn and a connection included, by outcome: `committed`, `refused` by the ledger, or `failed`"),
    histogram(ENTRY_AGE, "s", PIPELINE, SECONDS,
        "age of the oldest entry of each batch when it was committed, by Valkey's clock"),
    histogram(ACK_DURATION, "s", PIPELINE, SECONDS,
        "time to acknowledge one flush's entries, or to move the group's position over them"),
    histogram(TURN_DURATION, "s", PIPELINE, SECONDS,
        "time that a flush of many rows waited for its turn within this process"),
    histogram(BATCH_ENTRIES, "{entry}", PIPELINE, ENTRIES,
        "entries of one committed flush"),
    histogram(BATCH_COALESCING, "1", PIPELINE, RATIO,
        "entries applied for each table row that a committed flush wrote"),
    Metric { name: "tidegate.pipeline.info", unit: "", labels: &["pipeline", "table", "delivery"], source: Source::Info, sentence:
        "always 1: which table the pipeline writes, and how its streams are delivered" },
    process("tidegate.shards", "{shard}", NONE, |process| vec![("", process.shards as f64)],
        "streams that this process works on"),
    process("tidegate.turns.waiting", "{flush}", NONE, |process| vec![("", process.turns_waiting as f64)],
        "flushes that wait for their turn within this process"),
    process("tidegate.postgres.connections", "{connection}", &["state"], |process| {
            vec![("used", process.connections_used as f64), ("idle", process.connections_idle as f64)] },
        "connections to PostgreSQL that are open"),
    process("tidegate.ledger.size", "By", NONE, |process| process.ledger_bytes.map(|bytes| ("", bytes as f64)).into_iter().collect(),
        "bytes of the ledger with its index, all pipelines of the database together, as PostgreSQL told it last"),
    process("tidegate.oldest_step.age", "s", NONE, |process| vec![("", process.oldest_step.as_secs_f64())],
        "how long the actor that is longest at one step has been at it, 0 while all rest; far above the time-outs it is stuck"),
    process("tidegate.findings", "{finding}", &["accepted"], |process| {
            ["in_force", "expired", "no"].into_iter().zip(process.findings.map(|count| count as f64)).collect() },
        "findings of the doctor that keep `run` from starting and are there while this process runs, by whether `[[doctor.accept]]` accepts them: `in_force`, `expired`, or `no`"),
    process("tidegate.acceptance.until.timestamp", "s", &["finding"], |process| {
            process.acceptances.iter().map(|(finding, end)| (*finding, end.as_second() as f64)).collect() },
        "when `[[doctor.accept]]` no longer accepts a finding that is there, in seconds since 1970: from then on `run` refuses to start; absent where nothing is accepted, and when it is over"),
    Metric { name: "tidegate.reloads", unit: "{reload}", labels: &["outcome"], source: Source::Happenings(|process| {
            vec![("followed", process.reloads_followed), ("refused", process.reloads_refused)] }), sentence:
        "times that the configuration was read again, by outcome" },
    Metric { name: "tidegate.panics", unit: "{panic}", labels: NONE, source: Source::Happenings(|process| vec![("", process.panics)]), sentence:
        "panics of this process, each of them a bug: the events `panicked` and `task_died` say where and what followed" },
];

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
    event("listening", "address, paths", "metrics and health are served on the admin port"),
    event("not_listening", "address, error", "the admin port is taken or not allowed; it is tried again every 2 s"),
    event(
        "metrics",
        "pipeline, stream, table, every instrument",
        "every 10 s while a pipeline is not idle, and always at a stop",
    ),
    event("recognised", "pipeline, entries", "redelivered entries were found in the ledger, and not added again"),
    event(
        "buried",
        "pipeline, entries",
        "entries became dead letters; once a second at the most, with how many since it was said last",
    ),
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
    event("paused", "pipeline", "an operator has paused the pipeline: its workers read nothing"),
    event("unpaused", "pipeline", "the pipeline was resumed, or its pause has run out"),
    event(
        "reloaded",
        "changes, after_restart",
        "a SIGHUP was followed: the workers settle what they hold and start with the new configuration",
    ),
    event("reload_refused", "refusal", "a SIGHUP was not followed: the configuration before it stays in force"),
    event(
        "console_action",
        "action, about, operator, dry_run, outcome, error",
        "somebody has paused, resumed, redriven, discarded, reopened or audited something in the console",
    ),
    event("console_refused", "attempts", "a wrong token was sent to the console; once in 10 s at the most"),
    event(
        "accepted",
        "finding, until, reason, found",
        "at the start, and where a reload changes it: the configuration accepts a finding of the doctor with which `run` would not start; found: whether it is there",
    ),
    event(
        "acceptance_ends_soon",
        "finding, until, reason, evidence",
        "once, 7 days before the time ends for which a finding is accepted that is there, or at a start within them: no daemon starts with it afterwards",
    ),
    event(
        "acceptance_expired",
        "finding, until, reason, evidence",
        "once: the time for which a finding was accepted is over, and it is still there; the daemon goes on, and will not start again",
    ),
    event(
        "not_accepted",
        "finding, evidence",
        "once: a finding with which `run` would not start has come while the daemon runs; it goes on, and will not start again",
    ),
    event(
        "panicked",
        "thread, at, message",
        "a panic, which is a bug: where it was, and what it said; with `backtrace` where RUST_BACKTRACE is set",
    ),
    event(
        "task_died",
        "task, cause, deaths",
        "a worker or another task has panicked, and is started again; after ten `deaths` in a row, each within a minute, the process ends with exit code 1",
    ),
    event("stopped", "phase", "the end: `settled`, or `left pending`"),
];

const fn event(name: &'static str, fields: &'static str, sentence: &'static str) -> Event {
    Event { name, fields, sentence }
}
