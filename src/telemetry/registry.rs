//! Registry: what the process shows of itself, in one place: metrics, health and later pages read it.
//!
//! Takes the shards at work and the phase that the process is in; gives them put together by pipeline, and what is true of the process. It
//! cannot fail. Counters of a shard that a reload has taken away are kept, so that none ever goes down.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::contract::{Metrics, Snapshot};
use super::health::Phase;
use super::log;
use super::recorder::Labels;
use crate::postgres::Database;

/// What is put together is used again for so long: one scrape asks for it once for each metric.
const FRESH_FOR: Duration = Duration::from_millis(20);

/// A number that somebody keeps elsewhere, such as how many flushes wait for a turn.
pub type Shown = Arc<AtomicU64>;

/// See the module. Its clones are one.
#[derive(Debug, Clone)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    reloads_followed: AtomicU64,
    reloads_refused: AtomicU64,
    /// PostgreSQL's account of the ledger; `u64::MAX` while it is not known.
    ledger_bytes: AtomicU64,
    findings: [AtomicU64; 3],
}

#[derive(Debug)]
struct State {
    /// When the acceptance of each finding ends.
    acceptances: Vec<(&'static str, Timestamp)>,
    phase: Phase,
    has_started: bool,
    shards: Vec<Shard>,
    /// Counted by shards that are at work no more.
    former: Vec<Shard>,
    turns_waiting: Vec<Shown>,
    database: Option<Database>,
    /// A step that lasts longer than this is stuck.
    stuck_after: Duration,
    groups: Option<(Instant, Arc<Vec<Group>>)>,
}

/// One shard's numbers, and what tells it from others now: a reload may change its table or delivery while it counts on.
#[derive(Debug, Clone)]
pub struct Shard {
    /// What tells it from others.
    pub labels: Labels,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// How many streams it stands for: what one worker reads of many it counts together.
    pub streams: usize,
}

/// The shards of one pipeline put together; or one shard, where metrics tell streams apart.
#[derive(Debug, Clone)]
pub struct Group {
    /// What tells it from others.
    pub labels: Labels,
    /// Its numbers.
    pub now: Snapshot,
    /// Its faults: side, code, how many.
    pub faults: Vec<(&'static str, String, u64)>,
    /// Whether it is at work, and not only remembered.
    pub is_at_work: bool,
}

/// What is true of the process.
#[derive(Debug, Clone, Default)]
pub struct Process {
    /// Streams that it works on.
    pub shards: usize,
    /// Flushes that wait for their turn.
    pub turns_waiting: u64,
    /// Connections to PostgreSQL at work.
    pub connections_used: usize,
    /// Connections to PostgreSQL at rest.
    pub connections_idle: usize,
    /// The ledger's size in bytes; none while it is not known.
    pub ledger_bytes: Option<u64>,
    /// How long the longest step has lasted.
    pub oldest_step: Duration,
    /// Reloads that were followed.
    pub reloads_followed: u64,
    /// Reloads that were refused.
    pub reloads_refused: u64,
    /// Panics, in whatever thread or task.
    pub panics: u64,
    /// Findings of the doctor that keep a daemon from starting, and are there: accepted, no longer accepted, and not accepted.
    pub findings: [u64; 3],
    /// When the acceptance of each of them ends that is accepted.
    pub acceptances: Vec<(&'static str, Timestamp)>,
}

impl Default for Registry {
    fn default() -> Registry {
        let state = State {
            acceptances: Vec::new(),
            phase: Phase::Starting,
            has_started: false,
            shards: Vec::new(),
            former: Vec::new(),
            turns_waiting: Vec::new(),
            database: None,
            stuck_after: Duration::MAX,
            groups: None,
        };
        Registry(Arc::new(Inner {
            state: Mutex::new(state),
            reloads_followed: AtomicU64::new(0),
            reloads_refused: AtomicU64::new(0),
            ledger_bytes: AtomicU64::new(u64::MAX),
            findings: Default::default(),
        }))
    }
}

impl Registry {
    /// These shards are at work from now on, and no others.
    pub fn at_work(&self, shards: Vec<Shard>, turns_waiting: Vec<Shown>, database: Database, stuck_after: Duration) {
        let mut state = self.lock();
        let is_in = |some: &[Shard], one: &Shard| some.iter().any(|other| Arc::ptr_eq(&other.metrics, &one.metrics));
        let before = std::mem::take(&mut state.shards);
        state.former.extend(before);
        state.former.retain(|former| !is_in(&shards, former));
        (state.shards, state.turns_waiting) = (shards, turns_waiting);
        (state.database, state.stuck_after) = (Some(database), stuck_after);
        (state.phase, state.has_started, state.groups) = (Phase::Running, true, None);
    }

    /// The process is in another phase.
    pub fn enter(&self, phase: Phase) {
        self.lock().phase = phase;
    }

    /// The phase it is in.
    pub fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Whether its workers were started once.
    pub fn has_started(&self) -> bool {
        self.lock().has_started
    }

    /// A reload was followed, or refused.
    pub fn reloaded(&self, is_followed: bool) {
        let count = if is_followed { &self.0.reloads_followed } else { &self.0.reloads_refused };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// PostgreSQL told the ledger's size.
    pub fn told_ledger_bytes(&self, bytes: u64) {
        self.0.ledger_bytes.store(bytes, Ordering::Relaxed);
    }

    /// So many findings of the doctor keep a daemon from starting, and are there: accepted, no longer accepted, and not accepted; and when
    /// the acceptance of each ends that is accepted.
    pub fn told_findings(&self, counts: [u64; 3], ends: Vec<(&'static str, Timestamp)>) {
        self.lock().acceptances = ends;
        self.0.findings.iter().zip(counts).for_each(|(told, count)| told.store(count, Ordering::Relaxed));
    }

    /// The pipelines, sorted by name.
    pub fn groups(&self) -> Arc<Vec<Group>> {
        let (now, mut state) = (Instant::now(), self.lock());
        if let Some((at, groups)) = &state.groups
            && now.saturating_duration_since(*at) < FRESH_FOR
        {
            return groups.clone();
        }
        let groups = Arc::new(put_together(&state.shards, &state.former));
        state.groups = Some((now, groups.clone()));
        groups
    }

    /// What is asked for next is how things stand then, however soon that is.
    pub(super) fn look_again(&self) {
        self.lock().groups = None;
    }

    /// What is true of the process.
    pub fn process(&self) -> Process {
        let state = self.lock();
        let (connections_used, connections_idle) = state.database.as_ref().map_or((0, 0), Database::open_connections);
        Process {
            shards: state.shards.iter().map(|shard| shard.streams).sum(),
            turns_waiting: state.turns_waiting.iter().map(|waiting| waiting.load(Ordering::Relaxed)).sum(),
            connections_used,
            connections_idle,
            ledger_bytes: Some(self.0.ledger_bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes != u64::MAX),
            oldest_step: longest(&state.shards, Instant::now()).map_or(Duration::ZERO, |(_, lasted)| lasted),
            reloads_followed: self.0.reloads_followed.load(Ordering::Relaxed),
            reloads_refused: self.0.reloads_refused.load(Ordering::Relaxed),
            panics: log::panics(),
            findings: self.0.findings.each_ref().map(|told| told.load(Ordering::Relaxed)),
            acceptances: state.acceptances.clone(),
        }
    }

    /// A step that has lasted for so long that its actor must be stuck, if there is one: what, and for how long.
    pub fn stuck(&self, now: Instant) -> Option<(&'static str, Duration)> {
        let state = self.lock();
        longest(&state.shards, now).filter(|(_, lasted)| *lasted > state.stuck_after)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever held it did nothing but look and replace.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn longest(shards: &[Shard], now: Instant) -> Option<(&'static str, Duration)> {
    shards.iter().filter_map(|shard| shard.metrics.steps.longest(now)).max_by_key(|(_, lasted)| *lasted)
}

fn put_together(shards: &[Shard], former: &[Shard]) -> Vec<Group> {
    let mut groups = BTreeMap::<(&str, &str), Group>::new();
    for (shard, is_at_work) in shards.iter().map(|shard| (shard, true)).chain(former.iter().map(|shard| (shard, false)))
    {
        let Shard { labels, metrics, .. } = shard;
        let stream = if labels.per_stream { labels.stream.as_str() } else { "" };
        let now = metrics.snapshot();
        let faults = [("reading", &metrics.reading), ("flushing", &metrics.flushing)];
        let faults = faults
            .into_iter()
            .flat_map(|(side, incidents)| incidents.counts().into_iter().map(move |(code, count)| (side, code, count)));
        let group = groups.entry((&labels.pipeline, stream)).or_insert_with(|| Group {
            labels: labels.clone(),
            now: Snapshot::default(),
            faults: Vec::new(),
            is_at_work,
        });
        group.now.count_in(&now);
        if is_at_work {
            group.now.take_in(&now);
            group.is_at_work = true;
        }
        for (side, code, count) in faults {
            match group.faults.iter_mut().find(|known| known.0 == side && known.1 == code) {
                Some(known) => known.2 += count,
                None => group.faults.push((side, code, count)),
            }
        }
    }
    groups.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::super::contract::{Tally, Unsettled};
    use super::*;
    use crate::retry::Fault;

    fn shard(stream: &str, per_stream: bool, applied: u64) -> Shard {
        let labels = Labels { pipeline: "p".into(), stream: stream.into(), per_stream, ..Labels::default() };
        let metrics = Arc::new(Metrics::of(labels.clone()));
        metrics.flushed(&Tally { applied, ..Tally::default() });
        Shard { labels, metrics, streams: 1 }
    }

    #[test]
    fn shards_of_a_pipeline_are_put_together_and_former_ones_only_count() {
        let (one, other, gone) = (shard("s:{0}", false, 3), shard("s:{1}", false, 4), shard("s:{2}", false, 5));
        let told = |undelivered, age_ms| Unsettled { undelivered: Some(undelivered), pending: 1, age_ms };
        one.metrics.told_backlog(told(10, 700));
        other.metrics.told_backlog(told(20, 900));
        gone.metrics.told_backlog(told(1_000, 60_000));
        one.metrics.flushing.incident().met(&Fault::PostgresLost("gone".into()), Instant::now());
        other.metrics.flushing.incident().met(&Fault::PostgresLost("gone".into()), Instant::now());
        let groups = put_together(&[one, other], &[gone]);
        assert_eq!(groups.len(), 1);
        let now = groups[0].now;
        assert_eq!((now.applied, now.undelivered, now.pending, now.age_ms), (12, Some(30), Some(2), Some(900)));
        assert_eq!(groups[0].faults, [("flushing", "postgres_lost".to_owned(), 2)]);
    }

    #[test]
    fn streams_are_told_apart_where_that_is_asked_for() {
        let groups = put_together(&[shard("s:{0}", true, 3), shard("s:{1}", true, 4)], &[]);
        let of: Vec<_> = groups.iter().map(|group| (group.labels.stream.as_str(), group.now.applied)).collect();
        assert_eq!(of, [("s:{0}", 3), ("s:{1}", 4)]);
    }
}
