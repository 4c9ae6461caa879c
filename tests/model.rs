//! The protocol as a small model, explored exhaustively: workers that may stop anywhere, be killed or robbed by a peer, lost
//! replies, a group that is rewound or destroyed, failover with a lost tail, split brain, trimming, merging, compaction; delivery by
//! the group, exclusive, and both at once. The invariants hold in every reachable state; and with one rule broken, a state in which
//! they do not is found.
//!
//! Time does not exist here: a worker that is slow, stopped or a zombie is one whose next step comes late, and any worker may take
//! from any other at any moment. Nor does the lease of exclusive delivery: at any moment any worker may believe that it holds it, so
//! what holds here does not rest on it. PostgreSQL is never restored to the past. `cargo test --test model -- --nocapture` prints the
//! number of states, where workers that change places make no new one.

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
/// Batches under way in one session of a worker that reads alone.
const BATCHES: usize = 2;
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
    UnknownIsSettled,
    MovesOnReading,
    MovesOverGaps,
    MovesBlind,
    MovesAnywhere,
}

/// How often what may happen.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    entries: usize,
    workers: usize,
    kills: u8,
    rewinds: u8,
    lost_replies: u8,
    promotion: Promotion,
    caretaker: bool,
    delivery: Delivery,
    broken: Broken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivery {
    Group,
    /// A worker reads as a member of the group or alone, and may change whenever it holds nothing.
    Either,
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
    /// The group's position.
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
enum Phase {
    #[default]
    Held,
    /// Sabotaged: the data is committed, its ledger row is not.
    HalfCommitted,
    Committed,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
struct Batch {
    /// Stretches that were proven contiguous.
    spans: Vec<Vec<Entry>>,
    careful: bool,
    phase: Phase,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
struct Worker {
    server: usize,
    /// Where it read what it holds, or began to read alone: its generation.
    origin: usize,
    /// It reads alone: the position that it saw, or has moved the group to.
    expected: Option<u8>,
    /// In the order in which they were read.
    batches: Vec<Batch>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct State {
    servers: [Server; 2],
    workers: [Worker; WORKERS],
    ledger: Vec<Row>,
    applied: [u8; OPS],
    /// Kept once.
    letters: [bool; OPS],
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
    /// To read alone, from the group's position on.
    Begin(usize),
    Read(usize),
    /// What is read begins a batch, though the one before has room.
    ReadApart(usize),
    LoseReply(usize),
    Claim(usize, usize),
    Flush(usize, usize),
    Ack(usize),
    /// The group's position, over what was read alone and is settled.
    Move(usize),
    /// Reading alone ends: displaced, stopped, or the reply to a move was lost.
    Leave(usize),
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

impl Server {
    /// What comes next behind an id.
    fn read_on(&self, from: u8) -> Option<Vec<Entry>> {
        let next = self.stream.iter().filter(|entry| entry.0 > from);
        let run: Vec<Entry> = next.take(COUNT).copied().collect();
        (!run.is_empty()).then_some(run)
    }
}

impl Batch {
    fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.spans.iter().flatten().copied()
    }

    fn last_id(&self) -> Option<u8> {
        self.entries().last().map(|entry| entry.0)
    }

    fn are_contiguous(&self, a: Entry, b: Entry) -> bool {
        self.spans.iter().any(|span| span.windows(2).any(|pair| pair == [a, b]))
    }

    /// Whether what is read next may join it.
    fn has_room(&self) -> bool {
        self.phase == Phase::Held && !self.careful && self.spans.len() < SPANS
    }
}

impl Worker {
    fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.batches.iter().flat_map(Batch::entries)
    }

    /// It holds nothing and reads in neither way.
    fn is_idle(&self) -> bool {
        self.expected.is_none() && self.batches.is_empty()
    }

    /// Forgets everything but where it is connected.
    fn begin_anew(&mut self) {
        *self = Worker { server: self.server, ..Worker::default() };
    }
}

impl State {
    /// Workers are alike: of two states that differ only in which is which, one stands for both.
    fn representative(&self) -> State {
        let mut state = self.clone();
        let first_owner = state.servers.iter().find_map(|server| server.pending.values().next().copied()).unwrap_or(0);
        if (&state.workers[0], first_owner) > (&state.workers[1], 0) {
            state.workers.swap(0, 1);
            let owners = state.servers.iter_mut().flat_map(|server| server.pending.values_mut());
            owners.for_each(|owner| *owner = 1 - *owner);
        }
        state
    }

    fn row_of(&self, id: u8) -> Option<usize> {
        self.ledger.iter().position(|row| row.first <= id && id <= row.last)
    }

    /// Delivers what comes next to a worker, as XREADGROUP does.
    fn deliver(&mut self, w: usize) -> Option<Vec<Entry>> {
        let server = &mut self.servers[self.workers[w].server];
        let run = server.read_on(server.delivered)?;
        server.delivered = run.last()?.0;
        server.pending.extend(run.iter().map(|entry| (entry.0, w)));
        Some(run)
    }

    /// Gives a worker that reads alone what comes behind its cursor, as XREAD does: nothing is marked, and the position stays.
    fn read_alone(&mut self, w: usize, expected: u8, broken: Broken) -> Option<Vec<Entry>> {
        let worker = &mut self.workers[w];
        let cursor = worker.batches.last().and_then(Batch::last_id).unwrap_or(expected);
        let run = self.servers[worker.server].read_on(cursor)?;
        if broken == Broken::MovesOnReading {
            self.servers[worker.server].delivered = run.last()?.0;
            worker.expected = run.last().map(|entry| entry.0);
        }
        Some(run)
    }

    /// Moves the group's position over what a worker that reads alone has settled, from its first batch on; or looks whether it
    /// still is where that worker left it. Where anything is not as it believes, nothing is moved and it begins anew.
    fn move_position(&mut self, w: usize, broken: Broken) -> Option<()> {
        let worker = &mut self.workers[w];
        let server = &mut self.servers[worker.server];
        let is_same_server = server.serving && (worker.origin == worker.server || broken == Broken::MovesAnywhere);
        let is_there = worker.expected? == server.delivered || broken == Broken::MovesBlind;
        if !is_same_server || !is_there {
            worker.begin_anew();
            return Some(());
        }
        let is_committed = |batch: &Batch| batch.phase == Phase::Committed;
        let settled = match broken {
            Broken::MovesOverGaps => worker.batches.iter().rposition(is_committed).map_or(0, |last| last + 1),
            _ => worker.batches.iter().take_while(|batch| is_committed(batch)).count(),
        };
        let to = worker.batches.drain(..settled).next_back()?.last_id()?;
        worker.expected = Some(to);
        // Never back, even if it is blind.
        server.delivered = server.delivered.max(to);
        Some(())
    }

    fn acknowledge(&mut self, w: usize, at: usize) {
        let ids: Vec<u8> = self.workers[w].entries().map(|entry| entry.0).collect();
        self.servers[at].pending.retain(|id, _| !ids.contains(id));
    }

    fn is_settled(&self, op: usize) -> bool {
        self.applied[op] > 0 || self.letters[op]
    }

    fn apply(&mut self, entries: impl IntoIterator<Item = Entry>) {
        entries.into_iter().for_each(|entry| self.applied[entry.1] += 1);
    }

    /// One transaction; or, with a rule broken, whatever comes of that.
    fn flush(&mut self, w: usize, n: usize, broken: Broken) {
        let batch = self.workers[w].batches[n].clone();
        let mut ledger = self.ledger.clone();
        let mut refused = 0;
        for row in batch.spans.iter().map(|span| Row::of(span)) {
            let meets = |other: &Row| row.first <= other.last && other.first <= row.last;
            if ledger.iter().any(meets) { refused += 1 } else { ledger.push(row) }
        }
        let mut phase = Phase::Committed;
        match broken {
            _ if batch.phase == Phase::HalfCommitted => self.ledger = ledger,
            Broken::LedgerOff => self.apply(batch.entries()),
            Broken::BatchId => {
                let rows: Vec<Row> = batch.spans.iter().map(|span| Row::of(span)).collect();
                if !rows.iter().any(|row| self.ledger.contains(row)) {
                    self.apply(batch.entries());
                    self.ledger.extend(rows);
                }
            }
            _ if batch.careful => self.flush_carefully(w, &batch, broken),
            // The careful way is the next step.
            _ if refused > 0 && (broken != Broken::ZeroRows || refused == batch.spans.len()) => {
                self.workers[w].batches[n].careful = true;
                return;
            }
            _ => {
                self.apply(batch.entries());
                if broken == Broken::LedgerApart {
                    phase = Phase::HalfCommitted;
                } else {
                    self.ledger = ledger;
                }
            }
        }
        self.ledger.sort_by_key(|row| row.first);
        self.workers[w].batches[n].phase = phase;
    }

    /// Entry by entry.
    fn flush_carefully(&mut self, w: usize, batch: &Batch, broken: Broken) {
        let mut entries: Vec<Entry> = batch.entries().collect();
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
                        || batch.are_contiguous(last, entry)
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
                    // What was read alone is never pending, and lies behind the position: nobody has said that it is settled.
                    let alone = self.workers[w].expected.is_some() && broken != Broken::UnknownIsSettled;
                    if alone || self.servers[self.workers[w].origin].pending.contains_key(&entry.0) {
                        self.letters[entry.1] = true;
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
        let asleep = self.workers.iter().flat_map(Worker::entries);
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

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        use Action::*;
        let mut may = |action: Action, when: bool| {
            if when {
                actions.push(action);
            }
        };
        for (s, server) in state.servers.iter().enumerate().filter(|(_, server)| server.serving) {
            may(Produce(s), state.produced < self.entries);
            may(Rewind(s), state.rewinds < self.rewinds && server.delivered > 0);
            may(Destroy(s), state.rewinds < self.rewinds);
            may(Trim(s), self.caretaker);
            may(Merge(s), true);
            may(Compact(s), self.caretaker);
        }
        for (w, worker) in state.workers.iter().enumerate().take(self.workers) {
            let serves = state.servers[worker.server].serving;
            let is_idle = serves && worker.is_idle();
            let goes_on = serves && worker.origin == worker.server;
            let has_room = worker.batches.last().is_some_and(Batch::has_room);
            may(Begin(w), is_idle && self.delivery == Delivery::Either);
            if worker.expected.is_some() {
                may(Read(w), goes_on && (has_room || worker.batches.len() < BATCHES));
                may(ReadApart(w), goes_on && has_room && worker.batches.len() < BATCHES);
                may(Move(w), true);
                may(Leave(w), true);
            } else {
                may(Read(w), is_idle || goes_on && has_room);
                may(LoseReply(w), is_idle && state.lost_replies < self.lost_replies);
                (0..WORKERS).for_each(|owner| may(Claim(w, owner), is_idle));
                let early = |batch: &Batch| self.broken == Broken::AckFirst && batch.phase == Phase::Held;
                let may_ack = |batch: &Batch| early(batch) || batch.phase == Phase::Committed;
                may(Ack(w), worker.batches.first().is_some_and(may_ack));
            }
            for (n, batch) in worker.batches.iter().enumerate() {
                may(Flush(w, n), batch.phase != Phase::Committed);
            }
            may(Kill(w), state.kills < self.kills);
            may(Reconnect(w), worker.server == 0 && state.servers[1].serving);
        }
        let may_promote = self.promotion != Promotion::Never && !state.promoted;
        may(Replicate, may_promote);
        may(Promote, may_promote);
        may(Demote, state.promoted && state.servers[0].serving);
    }

    fn next_state(&self, old: &State, action: Action) -> Option<State> {
        let mut state = old.clone();
        match action {
            Action::Produce(s) => {
                let server = &mut state.servers[s];
                server.last_id += 1;
                server.stream.push((server.last_id, old.produced));
                state.produced += 1;
            }
            Action::Begin(w) => {
                let worker = &mut state.workers[w];
                worker.origin = worker.server;
                worker.expected = Some(old.servers[worker.server].delivered);
            }
            Action::Read(w) | Action::ReadApart(w) => {
                let run = match old.workers[w].expected {
                    Some(expected) => state.read_alone(w, expected, self.broken)?,
                    None => state.deliver(w)?,
                };
                let worker = &mut state.workers[w];
                worker.origin = worker.server;
                match worker.batches.last_mut() {
                    Some(batch) if batch.has_room() && action == Action::Read(w) => batch.spans.push(run),
                    _ => worker.batches.push(Batch { spans: vec![run], ..Batch::default() }),
                }
            }
            Action::LoseReply(w) => {
                state.deliver(w)?;
                state.lost_replies += 1;
            }
            Action::Claim(w, owner) => {
                let s = old.workers[w].server;
                let server = &mut state.servers[s];
                let theirs = server.stream.iter().filter(|entry| server.pending.get(&entry.0) == Some(&owner));
                let spans: Vec<Vec<Entry>> = theirs.map(|entry| vec![*entry]).collect();
                (!spans.is_empty()).then_some(())?;
                server.pending.extend(spans.iter().map(|span| (span[0].0, w)));
                let batch = Batch { spans, careful: true, ..Batch::default() };
                state.workers[w] = Worker { server: s, origin: s, expected: None, batches: vec![batch] };
            }
            Action::Flush(w, n) => state.flush(w, n, self.broken),
            Action::Ack(w) => {
                let worker = &old.workers[w];
                let anywhere = self.broken == Broken::AckAnywhere;
                if old.servers[worker.server].serving && (worker.origin == worker.server || anywhere) {
                    state.acknowledge(w, worker.server);
                }
                if worker.batches[0].phase == Phase::Committed {
                    state.workers[w].begin_anew();
                }
            }
            Action::Move(w) => state.move_position(w, self.broken)?,
            Action::Leave(w) => state.workers[w].begin_anew(),
            Action::Kill(w) => {
                state.kills += 1;
                state.workers[w].begin_anew();
                if self.broken == Broken::DeletesConsumers {
                    state.servers[old.workers[w].server].pending.retain(|_, owner| *owner != w);
                }
            }
            Action::Rewind(s) => {
                state.rewinds += 1;
                state.servers[s].delivered = 0;
            }
            Action::Destroy(s) => {
                state.rewinds += 1;
                let server = &mut state.servers[s];
                server.pending.clear();
                server.delivered = if self.broken == Broken::GroupAtEnd { server.last_id } else { 0 };
            }
            Action::Replicate => state.servers[1] = Server { serving: false, ..old.servers[0].clone() },
            Action::Promote => {
                state.promoted = true;
                state.servers[1].serving = true;
                state.servers[0].serving = self.promotion == Promotion::SplitBrain;
            }
            Action::Demote => state.servers[0].serving = false,
            Action::Reconnect(w) => state.workers[w].server = 1,
            Action::Trim(s) => {
                let server = &mut state.servers[s];
                let oldest = server.pending.keys().next().copied().unwrap_or(u8::MAX);
                let needed = if self.broken == Broken::TrimsBlind { u8::MAX } else { oldest.min(server.delivered + 1) };
                let (cut, kept): (Vec<Entry>, Vec<Entry>) = server.stream.iter().partition(|entry| entry.0 < needed);
                server.stream = kept;
                state.trimmed.extend(cut.iter().map(|entry| entry.1));
            }
            Action::Merge(s) => state.merge(s, self.broken)?,
            Action::Compact(s) => state.compact(s, self.broken == Broken::CompactsAtOnce)?,
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
            Property::always("what left the pending list is settled (I3, I6, E1)", |_, state: &State| {
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
                    scenario.promotion != Promotion::Never || state.letters == [false; OPS]
                },
            ),
            Property::sometimes(LIVE, |scenario: &Scenario, state: &State| {
                state.produced == scenario.entries
                    && (0..state.produced).all(|op| state.is_settled(op))
                    && state.servers.iter().all(|server| server.pending.is_empty())
                    && state.servers.iter().all(|server| !server.serving || server.delivered == server.last_id)
            }),
        ]
    }
}

/// One Valkey: rewound or destroyed, workers killed, replies lost, the stream trimmed, the ledger merged and compacted.
const ONE: Scenario = Scenario {
    entries: 2,
    workers: WORKERS,
    kills: 1,
    rewinds: 2,
    lost_replies: 1,
    promotion: Promotion::Never,
    caretaker: true,
    delivery: Delivery::Group,
    broken: Broken::Nothing,
};
/// The primary is lost with the tail that was not replicated.
const FAILOVER: Scenario = Scenario { rewinds: 0, lost_replies: 0, promotion: Promotion::Failover, ..ONE };
/// Both primaries give the same ids to different entries, and have workers.
const SPLIT_BRAIN: Scenario =
    Scenario { entries: 3, promotion: Promotion::SplitBrain, kills: 0, caretaker: false, ..FAILOVER };

/// The same with exclusive delivery beside that by the group.
const ONE_EXCLUSIVE: Scenario = Scenario { delivery: Delivery::Either, ..ONE };
const FAILOVER_EXCLUSIVE: Scenario = Scenario { delivery: Delivery::Either, kills: 0, ..FAILOVER };
const SPLIT_BRAIN_EXCLUSIVE: Scenario = Scenario { delivery: Delivery::Either, entries: 2, ..SPLIT_BRAIN };
/// Ids come again of which the ledger holds no digests any more.
const FORGOTTEN_IDS: Scenario = Scenario { entries: 3, workers: 1, ..FAILOVER_EXCLUSIVE };

fn holds(name: &str, scenario: Scenario) {
    let checker = scenario.checker().threads(2).symmetry_fn(State::representative).spawn_dfs().join();
    println!("{name}: {} states", checker.unique_state_count());
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
fn the_invariants_hold_with_exclusive_delivery() {
    holds("one Valkey, exclusive", ONE_EXCLUSIVE);
}

#[test]
fn the_invariants_hold_with_exclusive_delivery_over_a_failover() {
    holds("failover, exclusive", FAILOVER_EXCLUSIVE);
    holds("forgotten ids, exclusive", FORGOTTEN_IDS);
}

#[test]
fn the_invariants_hold_with_exclusive_delivery_in_a_split_brain() {
    holds("split brain, exclusive", SPLIT_BRAIN_EXCLUSIVE);
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
        (Broken::MovesOnReading, ONE_EXCLUSIVE),
        (Broken::MovesOverGaps, ONE_EXCLUSIVE),
        (Broken::MovesBlind, ONE_EXCLUSIVE),
        (Broken::MovesAnywhere, FAILOVER_EXCLUSIVE),
        (Broken::MovesAnywhere, SPLIT_BRAIN_EXCLUSIVE),
        (Broken::UnknownIsSettled, FORGOTTEN_IDS),
    ] {
        let checker =
            Scenario { broken, ..scenario }.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let found = checker.discoveries().into_iter().find(|(name, _)| *name != LIVE);
        let Some((invariant, path)) = found else { panic!("{broken:?} was not found") };
        println!("{broken:?}: not {invariant:?} after {:?}", path.into_actions());
    }
}
