//! Bisect: the search for entries that the table refuses, and the ruling on what it finds. Pure: time is an argument.
//!
//! Takes batches and what became of each attempt to flush a piece of them; gives the next piece to flush, and for an entry that
//! was refused alone whether it is to be buried or whether the table is the cause. It cannot fail.
//!
//! A refused piece is halved, and its halves go to the end of the work: healthy entries land first. An entry that is refused
//! alone gets a second chance when everything else has been tried. If it is refused again, [`Refusals`] rules: entries that are
//! refused while others land are poison; when nothing lands, or many different keys are refused and few entries land, the
//! table is the cause. Where nothing lands and the refused keys are few, it may be that the others are still on their way: that is in doubt for a
//! second, in which nothing is buried and new entries are flushed as ever. When the table is the cause, the pipeline is halted and probed with one entry at a time, a different one each time, at a growing
//! distance. One probe that lands ends the halt.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::bury::Burials;
use crate::retry::{Fault, Incident, Verdict};

/// Refusals that are looked at together: this many different keys are many, and this many refusals without a landing are enough.
/// One less is the most that is buried before a table that refuses everything is found out.
const MANY: usize = 8;
/// How long a refusal is remembered.
const REMEMBERED: Duration = Duration::from_secs(300);
/// How many refusals are remembered at the most.
const MOST_REFUSALS: usize = 1_000;
/// The distance between two probes of a halted pipeline: from, to. Doubled each time.
const PROBE_EVERY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long it is in doubt whose fault it is that a few keys are refused while nothing lands.
const DOUBT: Duration = Duration::from_secs(1);
/// A halt so soon after the last one goes on with the distance of that one.
const SAME_CAUSE: Duration = Duration::from_secs(60);

/// Entries on their way, all from one handoff.
#[derive(Debug)]
pub struct Piece {
    /// The entries.
    pub batch: Batch,
    /// Where they came from.
    pub ticket: Ticket,
}

/// Where a piece came from.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    /// The number of the handoff.
    pub handoff: u64,
    /// What had landed and what had been refused when the handoff was taken up.
    before: Totals,
    /// Whether it is one entry that was refused alone before.
    was_refused: bool,
}

/// Entries, since the pipeline was started.
#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    landed: u64,
    refused: u64,
}

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// Flush this piece.
    Flush(Piece),
    /// The pipeline is halted: wait so long at the most.
    Wait(Duration),
    /// Nothing is left.
    Nothing,
}

/// What becomes of a refused piece.
#[derive(Debug)]
pub enum Refused {
    /// It will be tried again, in smaller pieces or later.
    Later,
    /// This entry is poison.
    Poison(Piece),
    /// The table is the cause: the pipeline is halted, and the piece is kept.
    Halted,
}

/// The work of one settler.
#[derive(Debug, Default)]
pub struct Search {
    /// To be flushed, in this order.
    ready: VecDeque<Piece>,
    /// Single entries that were refused, to be tried when nothing else is ready.
    refused: VecDeque<Piece>,
    /// How many pieces of a handoff are unfinished.
    open: HashMap<u64, usize>,
}

impl Search {
    /// Takes up the batch of a handoff.
    pub fn add(&mut self, batch: Batch, handoff: u64, refusals: &Refusals) {
        self.open.insert(handoff, 1);
        self.ready.push_back(Piece { batch, ticket: Ticket { handoff, before: refusals.totals, was_refused: false } });
    }

    /// How many entries it holds.
    pub fn held(&self) -> usize {
        self.ready.iter().chain(&self.refused).map(|piece| piece.batch.len()).sum()
    }

    /// The next piece to flush: all of it, or one entry as a probe of a halted pipeline.
    pub fn next(&mut self, refusals: &mut Refusals, now: Instant) -> Step {
        if self.ready.is_empty() && self.refused.is_empty() {
            return Step::Nothing;
        }
        let piece = match refusals.until_probe(now) {
            None => match (self.ready.pop_front(), refusals.in_doubt_for(now)) {
                // What was refused has its second chance when it is known what that says.
                (None, Some(wait)) if !wait.is_zero() => return Step::Wait(wait),
                (piece, _) => piece.or_else(|| self.refused.pop_front()),
            },
            Some(Duration::ZERO) => {
                refusals.probe_begins(now);
                self.probe()
            }
            Some(wait) => return Step::Wait(wait),
        };
        piece.map_or(Step::Nothing, Step::Flush)
    }

    /// One entry: of what was taken up last and has not been tried alone, else the one that was refused longest ago.
    fn probe(&mut self) -> Option<Piece> {
        let Some(Piece { batch, ticket }) = self.ready.pop_back() else { return self.refused.pop_front() };
        match batch.split(1) {
            Ok((first, rest)) => {
                // The rest goes to the other end, so that the next probe is of another batch if there is one.
                self.ready.push_front(Piece { batch: rest, ticket });
                *self.open.entry(ticket.handoff).or_default() += 1;
                Some(Piece { batch: first, ticket })
            }
            Err(batch) => Some(Piece { batch, ticket }),
        }
    }

    /// A piece of this handoff is settled. Says whether it was the last one.
    pub fn finished(&mut self, handoff: u64) -> bool {
        let Some(open) = self.open.get_mut(&handoff) else { return true };
        *open -= 1;
        let is_last = *open == 0;
        if is_last {
            self.open.remove(&handoff);
        }
        is_last
    }

    /// These parts of a piece come first, the last one at the head. One at least.
    pub fn put_back(&mut self, ticket: Ticket, parts: impl IntoIterator<Item = Batch>) {
        let open = self.open.entry(ticket.handoff).or_default();
        *open -= 1;
        for batch in parts {
            *open += 1;
            self.ready.push_front(Piece { batch, ticket });
        }
    }

    /// The piece was too much at once: its halves come next. One entry is tried again as it is.
    pub fn shrink(&mut self, Piece { batch, ticket }: Piece) {
        match batch.halve() {
            Ok((low, high)) => self.put_back(ticket, [high, low]),
            Err(alone) => self.put_back(ticket, [alone]),
        }
    }

    /// The table refused the piece. `key` stands for the key of a single entry.
    pub fn refused(
        &mut self,
        Piece { batch, ticket }: Piece,
        key: impl FnOnce(&Batch) -> u64,
        refusals: &mut Refusals,
        now: Instant,
    ) -> Refused {
        let alone = match batch.halve() {
            Ok((low, high)) => {
                self.ready.extend([low, high].map(|batch| Piece { batch, ticket }));
                *self.open.entry(ticket.handoff).or_default() += 1;
                return Refused::Later;
            }
            Err(alone) => alone,
        };
        let is_letter = alone.entries().iter().any(|entry| entry.death.is_some());
        let key = key(&alone);
        let piece = Piece { batch: alone, ticket: Ticket { was_refused: true, ..ticket } };
        if !ticket.was_refused {
            refusals.remember(key, ticket.before, now);
        }
        // Even as a dead letter it is refused: no entry can be the cause of that.
        let ruling = if is_letter { Ruling::Table } else { refusals.rule(now) };
        match ruling {
            // A probe proves nothing against its entry.
            Ruling::Poison if ticket.was_refused && !refusals.is_halted() => return Refused::Poison(piece),
            // Its second chance comes when everything else was tried.
            Ruling::Poison | Ruling::Doubt => {}
            Ruling::Table if refusals.is_halted() => {}
            Ruling::Table => {
                refusals.halt(Cause::Refusals, now);
                self.refused.push_back(piece);
                return Refused::Halted;
            }
        }
        self.refused.push_back(piece);
        Refused::Later
    }
}

/// Whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ruling {
    /// The entry's.
    Poison,
    /// The table's.
    Table,
    /// It is not known yet.
    Doubt,
}

/// What the table has refused and taken lately: the memory of all workers of one pipeline in one process.
#[derive(Debug, Default)]
pub struct Refusals {
    totals: Totals,
    refused: VecDeque<Refusal>,
    halt: Option<Halt>,
    /// Since when few keys are refused and nothing lands.
    in_doubt: Option<Instant>,
    /// The last halt's end, and its distance between probes.
    last_halt: Option<(Instant, Duration)>,
    /// What the operator is told of a halt, once for all workers.
    pub incident: Incident,
    /// What it is told of burials.
    pub burials: Burials,
    /// The last fault that halted the pipeline.
    fault: Option<Fault>,
}

/// One entry that was refused alone.
#[derive(Debug)]
struct Refusal {
    at: Instant,
    key: u64,
    /// What had landed and been refused when its batch was taken up.
    before: Totals,
}

/// A halted pipeline.
#[derive(Debug, Clone, Copy)]
struct Halt {
    cause: Cause,
    next_probe: Instant,
    every: Duration,
}

/// Why a pipeline is halted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The table refuses entries: only an entry that is applied shows that it takes them again.
    Refusals,
    /// A table, a right, a constraint is missing, say: any flush that is committed shows that it is back.
    Fault,
}

impl Refusals {
    /// A flush was committed, with so many entries applied.
    pub fn landed(&mut self, applied: u64, now: Instant) {
        self.totals.landed += applied;
        if applied > 0 {
            self.in_doubt = None;
        }
        if let Some(halt) = self.halt.take_if(|halt| applied > 0 || halt.cause == Cause::Fault) {
            self.last_halt = Some((now, halt.every));
        }
    }

    /// No entry is the cause: from now on the pipeline is probed with one entry at a time.
    pub fn halt(&mut self, cause: Cause, now: Instant) {
        let resumed = self.last_halt.filter(|(ended, _)| now.saturating_duration_since(*ended) < SAME_CAUSE);
        let every = resumed.map_or(PROBE_EVERY.0, |(_, every)| every);
        self.halt.get_or_insert(Halt { cause, next_probe: now + every, every });
    }

    /// This fault has halted the pipeline: whether to tell the operator.
    pub fn halted(&mut self, fault: &Fault, now: Instant) -> bool {
        self.fault = Some(fault.clone());
        self.incident.met(fault, now);
        self.incident.is_news(Verdict::Halt, now)
    }

    /// What has halted the pipeline, if it is halted.
    pub fn halted_by(&self) -> Option<&Fault> {
        self.fault.as_ref().filter(|_| self.is_halted())
    }

    /// Whether the pipeline is halted.
    pub fn is_halted(&self) -> bool {
        self.halt.is_some()
    }

    /// How long it will yet be in doubt whose fault the last refusals are; none if it is not.
    fn in_doubt_for(&self, now: Instant) -> Option<Duration> {
        self.in_doubt.map(|since| (since + DOUBT).saturating_duration_since(now))
    }

    /// How long until the next probe; none if the pipeline is not halted.
    fn until_probe(&self, now: Instant) -> Option<Duration> {
        self.halt.map(|halt| halt.next_probe.saturating_duration_since(now))
    }

    fn probe_begins(&mut self, now: Instant) {
        if let Some(halt) = &mut self.halt {
            halt.every = (halt.every * 2).min(PROBE_EVERY.1);
            halt.next_probe = now + halt.every;
        }
    }

    /// An entry was refused alone for the first time. `before`: the totals when its batch was taken up.
    fn remember(&mut self, key: u64, before: Totals, now: Instant) {
        self.totals.refused += 1;
        self.refused.push_back(Refusal { at: now, key, before });
        let is_old = |refusal: &Refusal| now.saturating_duration_since(refusal.at) > REMEMBERED;
        while self.refused.len() > MOST_REFUSALS || self.refused.front().is_some_and(is_old) {
            self.refused.pop_front();
        }
    }

    /// Rules whose fault the last refusals are.
    fn rule(&mut self, now: Instant) -> Ruling {
        let Some(first) = self.refused.len().checked_sub(MANY) else { return Ruling::Poison };
        // From when the first of the last few batches with a refused entry was taken up.
        let least = |of: fn(&Totals) -> u64| self.refused.range(first..).map(|refusal| of(&refusal.before)).min();
        let landed = self.totals.landed - least(|totals| totals.landed).unwrap_or(0);
        let refused = self.totals.refused - least(|totals| totals.refused).unwrap_or(0);
        let keys: HashSet<u64> = self.refused.iter().rev().take(refused as usize).map(|refusal| refusal.key).collect();
        let are_many = keys.len() >= MANY;
        if are_many && refused > landed {
            return Ruling::Table;
        }
        if landed > 0 {
            return Ruling::Poison;
        }
        // The same few keys again and again say less of the table than many: what else there is may be with another worker, or be read only now.
        let since = *self.in_doubt.get_or_insert(now);
        if now.saturating_duration_since(since) < DOUBT {
            return Ruling::Doubt;
        }
        self.in_doubt = None;
        Ruling::Table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::{Death, Filling, tests::origin};
    use crate::model::entry::EntryId;
    use proptest::prelude::*;

    /// A batch of entries of these keys: an entry's id is its place.
    fn batch(keys: &[&str]) -> Batch {
        let mut filling = Filling::new(origin(), 1000);
        for (ms, key) in (1..).zip(keys) {
            filling.push(EntryId { ms, seq: 0 }, [b"id".as_slice(), key.as_bytes(), b"amount", b"1"]);
        }
        filling.seal(false)
    }

    fn keys(batch: &Batch) -> Vec<String> {
        let key = |entry| batch.canonical(entry).strings().nth(1).map(|key| String::from_utf8_lossy(key).into_owned());
        batch.entries().iter().filter_map(key).collect()
    }

    /// A table: refuses entries whose key begins so. Counts what landed, what was buried, and transactions rolled back.
    #[derive(Default)]
    struct Table {
        refuses: Option<&'static str>,
        landed: Vec<String>,
        buried: Vec<String>,
        rollbacks: usize,
    }

    impl Table {
        /// Does steps until there is nothing to do, or the pipeline waits.
        fn work(&mut self, search: &mut Search, refusals: &mut Refusals, now: Instant) -> Option<Duration> {
            loop {
                let piece = match search.next(refusals, now) {
                    Step::Flush(piece) => piece,
                    Step::Wait(wait) => return Some(wait),
                    Step::Nothing => return None,
                };
                let is_letter = piece.batch.entries()[0].death.is_some();
                let refuses = |key: &String| self.refuses.is_some_and(|prefix| key.starts_with(prefix));
                if !is_letter && keys(&piece.batch).iter().any(refuses) {
                    self.rollbacks += 1;
                    let key = |batch: &Batch| batch.entries()[0].digest;
                    if let Refused::Poison(mut piece) = search.refused(piece, key, refusals, now) {
                        piece.batch.condemn(Death { reason: "refused_by_table", detail: String::new() });
                        search.put_back(piece.ticket, [piece.batch]);
                    }
                    continue;
                }
                let done = if is_letter { &mut self.buried } else { &mut self.landed };
                done.extend(keys(&piece.batch));
                if !is_letter {
                    refusals.landed(piece.batch.len() as u64, now);
                }
                search.finished(piece.ticket.handoff);
            }
        }
    }

    #[test]
    fn healthy_neighbours_land_before_anything_is_buried() {
        let (mut search, mut refusals) = (Search::default(), Refusals::default());
        let mut table = Table { refuses: Some("bad"), ..Table::default() };
        let bad: Vec<String> = (0..13).map(|n| format!("bad{n}")).collect();
        let all: Vec<&str> = (0..60).map(|_| "good").chain(bad.iter().map(String::as_str)).collect();
        search.add(batch(&all), 1, &refusals);
        assert_eq!(table.work(&mut search, &mut refusals, Instant::now()), None, "nothing is halted");
        assert_eq!((table.landed.len(), table.buried.len()), (60, 13));
        assert!(search.finished(1), "the handoff is done with");
    }

    #[test]
    fn a_table_that_refuses_everything_is_found_out_and_probed_ever_more_rarely() {
        for batch_size in [1, 10, 1000] {
            let (mut search, mut refusals) = (Search::default(), Refusals::default());
            let mut table = Table { refuses: Some(""), ..Table::default() };
            let (start, mut rollbacks_when_halted) = (Instant::now(), None);
            for second in 0..60 {
                let names: Vec<String> = (0..batch_size).map(|n| format!("k{second}-{n}")).collect();
                search.add(batch(&names.iter().map(String::as_str).collect::<Vec<_>>()), second, &refusals);
                table.work(&mut search, &mut refusals, start + Duration::from_secs(second));
                if refusals.is_halted() && rollbacks_when_halted.is_none() {
                    rollbacks_when_halted = Some(table.rollbacks);
                }
            }
            assert!(table.buried.len() < MANY, "{} buried", table.buried.len());
            let probes = table.rollbacks - rollbacks_when_halted.expect("halted");
            assert!(probes <= 6, "{probes} probes in a minute");
            // Mended: the next probe lands, and everything with it.
            table.refuses = None;
            table.work(&mut search, &mut refusals, start + Duration::from_secs(120));
            assert_eq!(table.landed.len() + table.buried.len(), 60 * batch_size as usize);
            assert!(!refusals.is_halted());
        }
    }

    #[test]
    fn a_table_that_began_to_refuse_after_good_times_is_found_out_as_fast() {
        let (mut search, mut refusals, now) = (Search::default(), Refusals::default(), Instant::now());
        let mut table = Table::default();
        for handoff in 0..1000 {
            search.add(batch(&["a", "b", "c"]), handoff, &refusals);
            table.work(&mut search, &mut refusals, now);
        }
        table.refuses = Some("");
        for handoff in 1000..1100 {
            search.add(batch(&["a", "b", "c"]), handoff, &refusals);
            table.work(&mut search, &mut refusals, now);
        }
        assert!(table.buried.len() < MANY, "{} buried", table.buried.len());
    }

    #[test]
    fn one_bad_key_with_a_fifth_of_the_traffic_never_halts_its_pipeline() {
        let (mut search, mut refusals, now) = (Search::default(), Refusals::default(), Instant::now());
        let mut table = Table { refuses: Some("full"), ..Table::default() };
        for handoff in 0..200 {
            search.add(batch(&["a", "b", "full", "c", "d"]), handoff, &refusals);
            assert_eq!(table.work(&mut search, &mut refusals, now), None);
        }
        assert_eq!((table.landed.len(), table.buried.len()), (800, 200));
    }

    #[test]
    fn a_probe_is_another_entry_each_time_so_that_one_bad_key_cannot_hold_a_healthy_pipeline() {
        let (mut search, mut refusals, start) = (Search::default(), Refusals::default(), Instant::now());
        let mut table = Table { refuses: Some("full"), ..Table::default() };
        // At night only the bad key is counted.
        for handoff in 0..20 {
            search.add(batch(&["full"]), handoff, &refusals);
            table.work(&mut search, &mut refusals, start);
        }
        assert!(table.buried.len() < MANY && !refusals.is_halted(), "in doubt nothing more is buried");
        table.work(&mut search, &mut refusals, start + DOUBT);
        assert!(table.buried.len() < MANY && refusals.is_halted(), "and not for long");
        // In the morning others come.
        search.add(batch(&["good", "good"]), 20, &refusals);
        table.work(&mut search, &mut refusals, start + Duration::from_secs(5));
        assert!(!refusals.is_halted());
        assert_eq!(
            (table.landed.len(), table.buried.len()),
            (2, 20),
            "and what is refused while others land is poison"
        );
    }

    #[test]
    fn a_few_bad_keys_halt_nothing_though_the_good_one_comes_last_and_is_another_workers() {
        let (mut refusals, mut now) = (Refusals::default(), Instant::now());
        let (mut first, mut second) = (Search::default(), Search::default());
        let mut table = Table { refuses: Some("bad"), ..Table::default() };
        for round in 0..20 {
            for n in 0..10 {
                first.add(batch(&[&*format!("bad{}", n % 5)]), 10 * round + n, &refusals);
            }
            let wait = table.work(&mut first, &mut refusals, now);
            assert_eq!((wait, refusals.is_halted()), (Some(DOUBT), false), "round {round}");
            // Just in time.
            now += DOUBT - Duration::from_millis(1);
            second.add(batch(&["good"]), round, &refusals);
            assert_eq!(table.work(&mut second, &mut refusals, now), None);
            assert_eq!(table.work(&mut first, &mut refusals, now), None);
        }
        assert_eq!((table.landed.len(), table.buried.len()), (20, 200));
    }

    #[test]
    fn a_dead_letter_that_is_refused_is_nobodys_fault_but_the_tables() {
        let (mut search, mut refusals, now) = (Search::default(), Refusals::default(), Instant::now());
        let mut letter = batch(&["a"]);
        letter.condemn(Death { reason: "bad_amount", detail: String::new() });
        search.add(letter, 1, &refusals);
        let Step::Flush(piece) = search.next(&mut refusals, now) else { panic!("a piece") };
        assert!(matches!(search.refused(piece, |_| 0, &mut refusals, now), Refused::Halted));
        assert_eq!(search.held(), 1);
    }

    #[test]
    fn a_halt_that_comes_again_soon_is_probed_as_rarely_as_before() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        refusals.halt(Cause::Fault, start);
        for _ in 0..4 {
            refusals.probe_begins(start);
        }
        refusals.landed(1, start);
        refusals.halt(Cause::Fault, start + Duration::from_secs(1));
        assert_eq!(refusals.until_probe(start + Duration::from_secs(1)), Some(Duration::from_secs(16)));
        refusals.landed(1, start);
        refusals.halt(Cause::Fault, start + Duration::from_secs(3600));
        assert_eq!(refusals.until_probe(start + Duration::from_secs(3600)), Some(PROBE_EVERY.0));
    }

    proptest! {
        #[test]
        fn every_entry_lands_or_is_buried_once_and_each_handoff_is_finished_once(
            batches in prop::collection::vec(prop::collection::vec(prop::bool::weighted(0.1), 1..40), 1..10),
        ) {
            let (mut search, mut refusals, now) = (Search::default(), Refusals::default(), Instant::now());
            let mut table = Table { refuses: Some("bad"), ..Table::default() };
            let (mut good, mut bad) = (0, 0);
            for (handoff, is_bad) in (0..).zip(&batches) {
                bad += is_bad.iter().filter(|is_bad| **is_bad).count();
                good += is_bad.iter().filter(|is_bad| !**is_bad).count();
                let names: Vec<&str> = is_bad.iter().map(|is_bad| if *is_bad { "bad" } else { "good" }).collect();
                search.add(batch(&names), handoff, &refusals);
                let mut at = now;
                while let Some(wait) = table.work(&mut search, &mut refusals, at) {
                    at += wait;
                    // Only a pipeline that nothing has landed in is halted; somebody puts it right.
                    table.refuses = None;
                }
                prop_assert!(search.open.is_empty());
            }
            prop_assert_eq!(table.landed.len() + table.buried.len(), good + bad);
            prop_assert!(table.buried.len() <= bad);
        }
    }
}
