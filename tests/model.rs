//! The protocol as a small model, explored exhaustively: workers that may stop anywhere, be killed or robbed by a peer, lost
//! replies, a group that is rewound or destroyed, failover with a lost tail, split brain, trimming, merging, compaction. The invariants hold
//! in every reachable state; and with one rule broken, a state in which they do not is found.
//!
//! Time does not exist here: a worker that is slow, stopped or a zombie is one whose next step comes late, and any worker may take
//! from any other at any moment. `cargo test --test model -- --nocapture` prints the number of states.

#![allow(clippy::print_stdout, reason = "what was explored is told")]

use std::collections::{BTreeMap, BTreeSet};

use stateright::{Checker, HasDiscoveries, Model, Property};

/// An entry: its stream id, and which increment it is (`op`). Both together are its digest.
type Entry = (u8, usize);

const WORKERS: usize = 2;
/// Entries in one read.
const COUNT: usize = 2;
/// Reads in one batch.
const SPANS: usize = 2;
/// More increments than any scenario has.
const OPS: usize = 4;
/// The property that is reached, and not kept: no counterexample.
const LIVE: &str = "everything is settled and acknowledged";

/// A rule that is broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    LedgerOff,
    LedgerApart,
    AckFirst,
    Watermark,
    BatchId,
    IdAlone,
    GroupAtEnd,
    DeletesConsumers,
    AckAnywhere,
    TrimsBlind,
    ZeroRows,
    NotDistinct,
    CompactsAtOnce,
    MergesWithoutDigests,
    MergeForgets,
    UnknownIsEmpty,
}

/// How often what may happen.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    entries: usize,
    kills: u8,
    rewinds: u8,
    lost_replies: u8,
    promotion: Promotion,
    caretaker: bool,
    broken: Broken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promotion {
    Never,
    /// The old primary is gone when the new one comes.
    Failover,
    /// Both are alive for as long as it pleases.
    SplitBrain,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Server {
    serving: bool,
    stream: Vec<Entry>,
    last_id: u8,
    delivered: u8,
    pending: BTreeMap<u8, usize>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Row {
    first: u8,
    last: u8,
    /// None: compacted.
    digests: Option<BTreeSet<Entry>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
enum Phase {
    #[default]
    Idle,
    Held,
    /// Sabotaged: the data is committed, its ledger row is not.
    HalfCommitted,
    Committed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Worker {
    server: usize,
    /// Where its batch was read: its generation.
    origin: usize,
    /// Stretches that were proven contiguous.
    spans: Vec<Vec<Entry>>,
    careful: bool,
    phase: Phase,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct State {
    servers: [Server; 2],
    workers: [Worker; WORKERS],
    ledger: Vec<Row>,
    applied: [u8; OPS],
    letters: [u8; OPS],
    trimmed: BTreeSet<usize>,
    produced: usize,
    kills: u8,
    rewinds: u8,
    lost_replies: u8,
    promoted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Produce(usize),
    Read(usize),
    LoseReply(usize),
    Claim(usize, usize),
    Flush(usize),
    Ack(usize),
    Kill(usize),
    Rewind(usize),
    Destroy(usize),
    Replicate,
    Promote,
    Demote,
    Reconnect(usize),
    Trim(usize),
    Merge(usize),
    Compact(usize),
}

impl Row {
    fn of(stretch: &[Entry]) -> Row {
        let (first, last) = (stretch[0].0, stretch[stretch.len() - 1].0);
        Row { first, last, digests: Some(stretch.iter().copied().collect()) }
    }
}

impl Worker {
    fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.spans.iter().flatten().copied()
    }

    fn are_contiguous(&self, a: Entry, b: Entry) -> bool {
        self.spans.iter().any(|span| span.windows(2).any(|pair| pair == [a, b]))
    }
}

impl State {
    fn row_of(&self, id: u8) -> Option<usize> {
        self.ledger.iter().position(|row| row.first <= id && id <= row.last)
    }

    /// Delivers what comes next to a worker, as XREADGROUP does.
    fn deliver(&mut self, w: usize) -> Option<Vec<Entry>> {
        let server = &mut self.servers[self.workers[w].server];
        let next = server.stream.iter().filter(|entry| entry.0 > server.delivered);
        let run: Vec<Entry> = next.take(COUNT).copied().collect();
        server.delivered = run.last()?.0;
        server.pending.extend(run.iter().map(|entry| (entry.0, w)));
        Some(run)
    }

    fn acknowledge(&mut self, w: usize, at: usize) {
        let ids: Vec<u8> = self.workers[w].entries().map(|entry| entry.0).collect();
        self.servers[at].pending.retain(|id, _| !ids.contains(id));
    }

    fn is_settled(&self, op: usize) -> bool {
        self.applied[op] > 0 || self.letters[op] > 0
    }

    fn apply(&mut self, entries: impl IntoIterator<Item = Entry>) {
        entries.into_iter().for_each(|entry| self.applied[entry.1] += 1);
    }

    /// One transaction; or, with a rule broken, whatever comes of that.
    fn flush(&mut self, w: usize, broken: Broken) {
        let worker = self.workers[w].clone();
        let mut ledger = self.ledger.clone();
        let mut refused = 0;
        for row in worker.spans.iter().map(|span| Row::of(span)) {
            let meets = |other: &Row| row.first <= other.last && other.first <= row.last;
            if ledger.iter().any(meets) { refused += 1 } else { ledger.push(row) }
        }
        let mut phase = Phase::Committed;
        match broken {
            _ if worker.phase == Phase::HalfCommitted => self.ledger = ledger,
            Broken::LedgerOff => self.apply(worker.entries()),
            Broken::BatchId => {
                let rows: Vec<Row> = worker.spans.iter().map(|span| Row::of(span)).collect();
                if !rows.iter().any(|row| self.ledger.contains(row)) {
                    self.apply(worker.entries());
                    self.ledger.extend(rows);
                }
            }
            _ if worker.careful => self.flush_carefully(&worker, broken),
            // The careful way is the next step.
            _ if refused > 0 && (broken != Broken::ZeroRows || refused == worker.spans.len()) => {
                self.workers[w].careful = true;
                return;
            }
            _ => {
                self.apply(worker.entries());
                if broken == Broken::LedgerApart {
                    phase = Phase::HalfCommitted;
                } else {
                    self.ledger = ledger;
                }
            }
        }
        self.ledger.sort_by_key(|row| row.first);
        self.workers[w].phase = phase;
    }

    /// Entry by entry.
    fn flush_carefully(&mut self, worker: &Worker, broken: Broken) {
        let mut entries: Vec<Entry> = worker.entries().collect();
        entries.sort_unstable();
        if broken != Broken::NotDistinct {
            entries.dedup();
        }
        let mark = self.ledger.iter().map(|row| row.last).max().unwrap_or(0);
        let (mut stretches, mut amended): (Vec<Vec<Entry>>, Vec<(usize, Entry)>) = (Vec::new(), Vec::new());
        for entry in entries {
            if broken == Broken::Watermark && entry.0 <= mark {
                continue;
            }
            let Some(met) = self.row_of(entry.0) else {
                self.apply([entry]);
                let goes_on = stretches.last().and_then(|stretch| stretch.last()).is_some_and(|&last| {
                    last == entry
                        || worker.are_contiguous(last, entry)
                            && !self.ledger.iter().any(|row| last.0 < row.first && row.last < entry.0)
                });
                match stretches.last_mut() {
                    Some(stretch) if goes_on => stretch.push(entry),
                    _ => stretches.push(vec![entry]),
                }
                continue;
            };
            match &self.ledger[met].digests {
                Some(digests) if broken == Broken::IdAlone || digests.contains(&entry) => {}
                None if broken != Broken::UnknownIsEmpty => {
                    if self.servers[worker.origin].pending.contains_key(&entry.0) {
                        self.letters[entry.1] += 1;
                    }
                }
                _ => {
                    self.apply([entry]);
                    amended.push((met, entry));
                }
            }
        }
        for (met, entry) in amended {
            self.ledger[met].digests.get_or_insert_default().insert(entry);
        }
        self.ledger.extend(stretches.iter().map(|stretch| Row::of(stretch)));
    }

    /// Two neighbouring rows below the frontier of a server's group become one with the digests of both. None: there are no such.
    fn merge(&mut self, s: usize, broken: Broken) -> Option<()> {
        let server = &self.servers[s];
        let frontier = server.pending.keys().next().copied().unwrap_or(u8::MAX).min(server.delivered + 1);
        let below = |row: &Row| row.last < frontier && row.digests.is_some();
        let at = self.ledger.windows(2).position(|pair| pair.iter().all(below))?;
        let [mut digests, others] = [at, at + 1].map(|n| self.ledger[n].digests.clone().unwrap_or_default());
        if broken != Broken::MergeForgets {
            digests.extend(others);
        }
        let digests = (broken != Broken::MergesWithoutDigests).then_some(digests);
        let merged = Row { first: self.ledger[at].first, last: self.ledger[at + 1].last, digests };
        self.ledger.splice(at..at + 2, [merged]);
        Some(())
    }

    /// Rows below everything that can come back become one. None: there are none.
    fn compact(&mut self, s: usize, at_once: bool) -> Option<()> {
        let server = &self.servers[s];
        let ends = [server.stream.first().map(|e| e.0), server.pending.keys().next().copied(), Some(server.delivered)];
        // The margin: no worker sleeps for so long.
        let asleep = self.workers.iter().filter(|worker| worker.phase != Phase::Idle).flat_map(Worker::entries);
        let needed = ends.into_iter().flatten().chain(asleep.map(|entry| entry.0));
        let floor = if at_once { u8::MAX } else { needed.min()? };
        let old = self.ledger.iter().take_while(|row| row.last < floor).count();
        if !self.ledger[..old].iter().any(|row| row.digests.is_some()) {
            return None;
        }
        let merged = Row { first: self.ledger[0].first, last: self.ledger[old - 1].last, digests: None };
        self.ledger.splice(..old, [merged]);
        Some(())
    }
}

impl Model for Scenario {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State::default();
        state.servers[0].serving = true;
        vec![state]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        use Action::*;
        for s in 0..2 {
            actions.extend([Produce(s), Rewind(s), Destroy(s), Trim(s), Merge(s), Compact(s)]);
        }
        for w in 0..WORKERS {
            actions.extend([Read(w), LoseReply(w), Flush(w), Ack(w), Kill(w), Reconnect(w)]);
            actions.extend((0..WORKERS).map(|owner| Claim(w, owner)));
        }
        actions.extend([Replicate, Promote, Demote]);
    }

    fn next_state(&self, old: &State, action: Action) -> Option<State> {
        let mut state = old.clone();
        let serves = |w: usize| old.servers[old.workers[w].server].serving;
        let when = |holds: bool| holds.then_some(());
        match action {
            Action::Produce(s) => {
                when(old.servers[s].serving && old.produced < self.entries)?;
                let server = &mut state.servers[s];
                server.last_id += 1;
                server.stream.push((server.last_id, old.produced));
                state.produced += 1;
            }
            Action::Read(w) => {
                let worker = &old.workers[w];
                let goes_on = worker.phase == Phase::Held && !worker.careful && worker.spans.len() < SPANS;
                when(serves(w) && (worker.phase == Phase::Idle || goes_on && worker.origin == worker.server))?;
                let run = state.deliver(w)?;
                let worker = &mut state.workers[w];
                worker.spans.push(run);
                (worker.phase, worker.origin) = (Phase::Held, worker.server);
            }
            Action::LoseReply(w) => {
                when(serves(w) && old.lost_replies < self.lost_replies && old.workers[w].phase == Phase::Idle)?;
                state.deliver(w)?;
                state.lost_replies += 1;
            }
            Action::Claim(w, owner) => {
                when(serves(w) && old.workers[w].phase == Phase::Idle)?;
                let s = old.workers[w].server;
                let server = &mut state.servers[s];
                let theirs = server.stream.iter().filter(|entry| server.pending.get(&entry.0) == Some(&owner));
                let spans: Vec<Vec<Entry>> = theirs.map(|entry| vec![*entry]).collect();
                when(!spans.is_empty())?;
                server.pending.extend(spans.iter().map(|span| (span[0].0, w)));
                state.workers[w] = Worker { server: s, origin: s, spans, careful: true, phase: Phase::Held };
            }
            Action::Flush(w) => {
                when(matches!(old.workers[w].phase, Phase::Held | Phase::HalfCommitted))?;
                state.flush(w, self.broken);
            }
            Action::Ack(w) => {
                let worker = &old.workers[w];
                let early = self.broken == Broken::AckFirst && worker.phase == Phase::Held;
                when(early || worker.phase == Phase::Committed)?;
                let anywhere = self.broken == Broken::AckAnywhere;
                if serves(w) && (worker.origin == worker.server || anywhere) {
                    state.acknowledge(w, worker.server);
                }
                if !early {
                    state.workers[w] = Worker { server: worker.server, ..Worker::default() };
                }
            }
            Action::Kill(w) => {
                when(old.kills < self.kills)?;
                state.kills += 1;
                let s = old.workers[w].server;
                state.workers[w] = Worker { server: s, ..Worker::default() };
                if self.broken == Broken::DeletesConsumers {
                    state.servers[s].pending.retain(|_, owner| *owner != w);
                }
            }
            Action::Rewind(s) => {
                when(old.servers[s].serving && old.rewinds < self.rewinds && old.servers[s].delivered > 0)?;
                state.rewinds += 1;
                state.servers[s].delivered = 0;
            }
            Action::Destroy(s) => {
                when(old.servers[s].serving && old.rewinds < self.rewinds)?;
                state.rewinds += 1;
                let server = &mut state.servers[s];
                server.pending.clear();
                server.delivered = if self.broken == Broken::GroupAtEnd { server.last_id } else { 0 };
            }
            Action::Replicate => {
                when(self.promotion != Promotion::Never && !old.promoted)?;
                state.servers[1] = Server { serving: false, ..old.servers[0].clone() };
            }
            Action::Promote => {
                when(self.promotion != Promotion::Never && !old.promoted)?;
                state.promoted = true;
                state.servers[1].serving = true;
                state.servers[0].serving = self.promotion == Promotion::SplitBrain;
            }
            Action::Demote => {
                when(old.promoted && old.servers[0].serving)?;
                state.servers[0].serving = false;
            }
            Action::Reconnect(w) => {
                when(old.workers[w].server == 0 && old.servers[1].serving)?;
                state.workers[w].server = 1;
            }
            Action::Trim(s) => {
                when(self.caretaker && old.servers[s].serving)?;
                let server = &mut state.servers[s];
                let oldest = server.pending.keys().next().copied().unwrap_or(u8::MAX);
                let needed = if self.broken == Broken::TrimsBlind { u8::MAX } else { oldest.min(server.delivered + 1) };
                let (cut, kept): (Vec<Entry>, Vec<Entry>) = server.stream.iter().partition(|entry| entry.0 < needed);
                server.stream = kept;
                state.trimmed.extend(cut.iter().map(|entry| entry.1));
            }
            Action::Merge(s) => {
                when(old.servers[s].serving)?;
                state.merge(s, self.broken)?;
            }
            Action::Compact(s) => {
                when(self.caretaker && old.servers[s].serving)?;
                state.compact(s, self.broken == Broken::CompactsAtOnce)?;
            }
        }
        (state != *old).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is applied twice", |_, state: &State| {
                state.applied.iter().all(|times| *times < 2)
            }),
            Property::always("applied if and only if the ledger holds it (I1)", |_, state: &State| {
                let digests = || state.ledger.iter().filter_map(|row| row.digests.as_ref()).flatten();
                let compacted = state.ledger.iter().any(|row| row.digests.is_none());
                let held: BTreeSet<usize> = digests().map(|entry| entry.1).collect();
                (0..OPS).all(|op| state.applied[op] > 0 || !held.contains(&op))
                    && (compacted || (0..OPS).all(|op| state.applied[op] == 0 || held.contains(&op)))
            }),
            Property::always("ranges never overlap (I2)", |_, state: &State| {
                state.ledger.windows(2).all(|pair| pair[0].last < pair[1].first)
            }),
            Property::always("what left the pending list is settled (I3, I6)", |_, state: &State| {
                state.servers.iter().filter(|server| server.serving).all(|server| {
                    let left = |e: &&Entry| e.0 <= server.delivered && !server.pending.contains_key(&e.0);
                    server.stream.iter().filter(left).all(|entry| state.is_settled(entry.1))
                })
            }),
            Property::always("what was trimmed is settled (I5)", |_, state: &State| {
                state.trimmed.iter().all(|op| state.is_settled(*op))
            }),
            Property::always(
                "nothing is left to people's judgement without need",
                |scenario: &Scenario, state: &State| {
                    scenario.promotion != Promotion::Never || state.letters == [0; OPS]
                },
            ),
            Property::sometimes(LIVE, |scenario: &Scenario, state: &State| {
                state.produced == scenario.entries
                    && (0..state.produced).all(|op| state.is_settled(op))
                    && state.servers.iter().all(|server| server.pending.is_empty())
            }),
        ]
    }
}

/// One Valkey: rewound or destroyed, workers killed, replies lost, the stream trimmed, the ledger merged and compacted.
const ONE: Scenario = Scenario {
    entries: 2,
    kills: 1,
    rewinds: 2,
    lost_replies: 1,
    promotion: Promotion::Never,
    caretaker: true,
    broken: Broken::Nothing,
};
/// The primary is lost with the tail that was not replicated.
const FAILOVER: Scenario = Scenario { rewinds: 0, lost_replies: 0, promotion: Promotion::Failover, ..ONE };
/// Both primaries give the same ids to different entries, and have workers.
const SPLIT_BRAIN: Scenario =
    Scenario { entries: 3, promotion: Promotion::SplitBrain, kills: 0, caretaker: false, ..FAILOVER };

fn holds(name: &str, scenario: Scenario) {
    let checker = scenario.checker().threads(2).spawn_bfs().join();
    println!("{name}: {} states, {} steps deep", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

#[test]
fn the_invariants_hold_with_one_valkey() {
    holds("one Valkey", ONE);
}

#[test]
fn the_invariants_hold_over_a_failover_that_loses_the_tail() {
    holds("failover", FAILOVER);
}

#[test]
fn the_invariants_hold_in_a_split_brain() {
    holds("split brain", SPLIT_BRAIN);
}

#[test]
fn each_broken_rule_is_found() {
    for (broken, scenario) in [
        (Broken::LedgerOff, ONE),
        (Broken::LedgerApart, ONE),
        (Broken::AckFirst, ONE),
        (Broken::Watermark, ONE),
        (Broken::BatchId, ONE),
        (Broken::GroupAtEnd, ONE),
        (Broken::DeletesConsumers, ONE),
        (Broken::TrimsBlind, ONE),
        (Broken::ZeroRows, ONE),
        (Broken::NotDistinct, ONE),
        (Broken::CompactsAtOnce, ONE),
        (Broken::MergesWithoutDigests, ONE),
        (Broken::MergeForgets, ONE),
        (Broken::UnknownIsEmpty, FAILOVER),
        (Broken::IdAlone, SPLIT_BRAIN),
        (Broken::AckAnywhere, SPLIT_BRAIN),
    ] {
        let checker =
            Scenario { broken, ..scenario }.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let found = checker.discoveries().into_iter().find(|(name, _)| *name != LIVE);
        let Some((invariant, path)) = found else { panic!("{broken:?} was not found") };
        println!("{broken:?}: not {invariant:?} after {:?}", path.into_actions());
    }
}
