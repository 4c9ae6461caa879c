//! A batch: what one transaction flushes. Pure.
//!
//! Takes entries in runs as they are read; gives them sorted by id and distinct by (id, digest), cut in runs that are proven
//! contiguous, and in halves where that is asked for. It cannot fail.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::model::entry::{self, Canonical, EntryId, Generation, Malformed};
use crate::model::shortened::Shortened;
use crate::telemetry::trace::Trace;

/// Where a batch was read: by whom, and in which life of which server.
#[derive(Debug, Clone)]
pub struct Origin {
    /// What an acknowledgement must match.
    pub generation: Arc<Generation>,
    /// The consumer that holds the entries.
    pub consumer: Arc<str>,
    /// The batch's trace, where it is sampled.
    pub trace: Trace,
}

/// Entries held for one transaction.
#[derive(Debug, Clone)]
pub struct Batch {
    origin: Origin,
    /// The canonical bytes of all entries, one behind the other.
    bytes: Bytes,
    entries: Vec<Entry>,
    /// Index ranges over `entries`, ascending: in each all are of one lane, and no id of the stream lies between two neighbours.
    runs: Vec<Range<usize>>,
    careful: bool,
}

/// One entry of a batch.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its id.
    pub id: EntryId,
    /// Which of its worker's lanes it was read for.
    pub lane: u32,
    /// Its identity.
    pub digest: u64,
    bytes: Range<usize>,
    /// How long its canonical bytes were when it was read. More than it holds where it was shortened.
    full_bytes: u64,
    /// Set when it is to be buried, not applied.
    pub death: Option<Arc<Death>>,
}

impl Entry {
    /// How long its canonical bytes were when it was read.
    pub fn full_bytes(&self) -> u64 {
        self.full_bytes
    }

    /// Whether it holds only the beginning of its fields.
    pub fn is_shortened(&self) -> bool {
        self.full_bytes > self.bytes.len() as u64
    }
}

/// Why an entry is buried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// One word, for programs.
    pub reason: &'static str,
    /// One sentence, for people.
    pub detail: String,
}

impl From<Malformed> for Death {
    fn from(malformed: Malformed) -> Death {
        Death { reason: malformed.reason(), detail: malformed.to_string() }
    }
}

impl Batch {
    /// Its entries, sorted by (lane, id, digest), distinct.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many entries it holds.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many bytes it keeps in memory, those of other pieces of the same handoff included.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The runs proven contiguous: index ranges over the entries.
    pub fn runs(&self) -> &[Range<usize>] {
        &self.runs
    }

    /// Whether some of its entries may have been flushed already, so that the ledger must be asked first.
    pub fn is_careful(&self) -> bool {
        self.careful
    }

    /// Which lane the entries of one run are of; of a careful batch, all of them.
    pub fn lane_of(&self, run: &Range<usize>) -> usize {
        self.entries[run.start].lane as usize
    }

    /// Its lanes, ascending, each once.
    pub fn lanes(&self) -> Vec<usize> {
        let mut lanes: Vec<usize> = self.runs.iter().map(|run| self.lane_of(run)).collect();
        lanes.dedup();
        lanes
    }

    /// Where it was read.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The bytes of one of its entries.
    pub fn canonical(&self, entry: &Entry) -> Canonical<'_> {
        Canonical(&self.bytes[entry.bytes.clone()])
    }

    /// Two halves, each with its own contiguous runs. The batch itself if there is nothing to halve.
    pub fn halve(self) -> Result<(Batch, Batch), Batch> {
        let middle = self.len() / 2;
        self.split(middle)
    }

    /// The first `middle` entries and the rest, each with its own contiguous runs. The batch itself if one of them would be empty.
    pub fn split(mut self, middle: usize) -> Result<(Batch, Batch), Batch> {
        if middle == 0 || middle >= self.len() {
            return Err(self);
        }
        let high = Batch {
            origin: self.origin.clone(),
            bytes: self.bytes.clone(),
            entries: self.entries.split_off(middle),
            runs: self.runs.iter().filter_map(|s| shifted(s.start.max(middle)..s.end, middle)).collect(),
            careful: self.careful,
        };
        self.runs = self.runs.iter().filter_map(|s| shifted(s.start..s.end.min(middle), 0)).collect();
        Ok((self, high))
    }

    /// The runs that `chosen` names (ascending) go the careful way, each lane's as a batch of their own; the rest stays as it is.
    pub fn set_aside(self, chosen: &[usize]) -> (Batch, Vec<Batch>) {
        let (mut rest, mut aside) = (self.emptied(), Vec::<Batch>::new());
        for (index, run) in self.runs.iter().enumerate() {
            let part = if chosen.binary_search(&index).is_err() {
                &mut rest
            } else {
                let begun = aside.pop_if(|part| part.lane_of(&part.runs[0]) == self.lane_of(run));
                aside.push(begun.unwrap_or_else(|| Batch { careful: true, ..self.emptied() }));
                let last = aside.len() - 1;
                &mut aside[last]
            };
            let start = part.entries.len();
            part.entries.extend_from_slice(&self.entries[run.clone()]);
            part.runs.push(start..part.entries.len());
        }
        (rest, aside)
    }

    /// The entries at these indices (ascending), each in a run of its own, to be handled carefully.
    pub fn pick(&self, indices: &[usize]) -> Batch {
        let mut picked = self.emptied();
        picked.careful = true;
        picked.entries = indices.iter().map(|&i| self.entries[i].clone()).collect();
        picked.runs = (0..indices.len()).map(|i| i..i + 1).collect();
        picked
    }

    /// Every entry is to be buried, for this reason.
    pub fn condemn(&mut self, death: Death) {
        let death = Arc::new(death);
        self.entries.iter_mut().for_each(|entry| entry.death = Some(death.clone()));
    }

    fn emptied(&self) -> Batch {
        Batch {
            origin: self.origin.clone(),
            bytes: self.bytes.clone(),
            entries: Vec::new(),
            runs: Vec::new(),
            careful: self.careful,
        }
    }
}

/// A run seen from a later start; none if nothing of it is left.
fn shifted(run: Range<usize>, by: usize) -> Option<Range<usize>> {
    (run.start < run.end).then(|| run.start - by..run.end - by)
}

/// A batch being filled.
#[derive(Debug)]
pub struct Filling {
    origin: Origin,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    runs: Vec<Range<usize>>,
    open: usize,
    lane: u32,
    max_entry_bytes: usize,
}

impl Filling {
    /// Starts with nothing. Entries above `max_entry_bytes` will be buried.
    pub fn new(origin: Origin, max_entry_bytes: usize) -> Filling {
        Filling { origin, bytes: Vec::new(), entries: Vec::new(), runs: Vec::new(), open: 0, lane: 0, max_entry_bytes }
    }

    /// Makes room for so many entries and bytes, so that nothing is moved while it fills.
    pub fn make_room(&mut self, entries: usize, bytes: usize) {
        self.entries.reserve(entries);
        self.bytes.reserve(bytes + bytes / 8);
    }

    /// What follows is of this lane. Lanes must ascend, or the batch is a careful one.
    pub fn begin_lane(&mut self, lane: usize) {
        self.close_run();
        self.lane = lane as u32;
    }

    /// Adds an entry to the run that is open.
    #[inline]
    pub fn push<'a>(&mut self, id: EntryId, strings: impl IntoIterator<Item = &'a [u8]>) {
        let start = self.bytes.len();
        entry::write_canonical(&mut self.bytes, id, strings);
        let bytes = start..self.bytes.len();
        let digest = entry::digest(&self.bytes[bytes.clone()]);
        let death = (bytes.len() > self.max_entry_bytes).then(|| Arc::new(Death::from(Malformed::TooLarge)));
        let full_bytes = bytes.len() as u64;
        self.entries.push(Entry { id, lane: self.lane, digest, bytes, full_bytes, death });
    }

    /// Adds an entry that was too large to be held, to the run that is open. It will be buried.
    pub fn push_shortened(&mut self, entry: &Shortened) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&entry.canonical);
        let (bytes, death) = (start..self.bytes.len(), Some(Arc::new(Death::from(Malformed::TooLarge))));
        let Shortened { id, digest, full_bytes, .. } = *entry;
        self.entries.push(Entry { id, lane: self.lane, digest, bytes, full_bytes, death });
    }

    /// Adds only what an entry is recognised by, to the run that is open: for comparing with the ledger.
    pub fn push_identity(&mut self, id: EntryId, digest: u64) {
        let end = self.bytes.len();
        self.entries.push(Entry { id, lane: self.lane, digest, bytes: end..end, full_bytes: 0, death: None });
    }

    /// The entry pushed last is to be buried.
    pub fn condemn_last(&mut self, death: Death) {
        if let Some(last) = self.entries.last_mut() {
            last.death = Some(Arc::new(death));
        }
    }

    /// Closes the open run: nothing of the stream lies between its entries; nothing is known of what follows.
    pub fn close_run(&mut self) {
        if self.open < self.entries.len() {
            self.runs.push(self.open..self.entries.len());
            self.open = self.entries.len();
        }
    }

    /// How many entries it holds.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The id of the entry added last.
    pub fn last_id(&self) -> Option<EntryId> {
        self.entries.last().map(|entry| entry.id)
    }

    /// How many bytes its entries take.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The batch. `careful`: entries may have been flushed before, as with all that was claimed.
    pub fn seal(mut self, careful: bool) -> Batch {
        self.close_run();
        let mut batch =
            Batch { origin: self.origin, bytes: self.bytes.into(), entries: self.entries, runs: self.runs, careful };
        // One reader's runs ascend, unless the group was rewound between two of them.
        if !batch.entries.is_sorted_by(|a, b| (a.lane, a.id) < (b.lane, b.id)) {
            reorder(&mut batch);
        }
        batch
    }
}

/// Sorts, makes distinct, and joins runs that overlap: two contiguous runs that meet are one.
fn reorder(batch: &mut Batch) {
    batch.careful = true;
    let place = |entry: &Entry| (entry.lane, entry.id);
    let mut bounds: Vec<_> =
        batch.runs.iter().map(|s| (place(&batch.entries[s.start]), place(&batch.entries[s.end - 1]))).collect();
    bounds.sort_unstable();
    batch.entries.sort_by_key(|e| (e.lane, e.id, e.digest));
    batch.entries.dedup_by_key(|e| (e.lane, e.id, e.digest));
    let mut joined: Vec<((u32, EntryId), (u32, EntryId))> = Vec::new();
    for (first, last) in bounds {
        match joined.last_mut() {
            Some(before) if first <= before.1 => before.1 = before.1.max(last),
            _ => joined.push((first, last)),
        }
    }
    let index =
        |at| (batch.entries.partition_point(|e| place(e) < at), batch.entries.partition_point(|e| place(e) <= at));
    batch.runs = joined.iter().map(|(first, last)| index(*first).0..index(*last).1).collect();
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::flow::rows::Plan;
    use crate::model::pipeline::Pipeline;
    use proptest::prelude::*;

    pub(crate) fn origin() -> Origin {
        let generation = Generation { run_id: "r".into(), replication_id: "p".into(), epoch: 1 };
        Origin { generation: Arc::new(generation), consumer: "c".into(), trace: Trace::default() }
    }

    /// A batch of runs of (id, key, amount).
    pub(crate) fn batch(runs: &[&[(u64, &str, &str)]]) -> Batch {
        let mut filling = Filling::new(origin(), 1000);
        for run in runs {
            for (ms, key, amount) in *run {
                let strings: [&[u8]; 4] = [b"id", key.as_bytes(), b"amount", amount.as_bytes()];
                filling.push(EntryId { ms: *ms, seq: 0 }, strings);
            }
            filling.close_run();
        }
        filling.seal(false)
    }

    fn ids(batch: &Batch) -> Vec<u64> {
        batch.entries().iter().map(|e| e.id.ms).collect()
    }

    #[test]
    fn an_entry_above_the_limit_is_condemned_with_all_its_bytes() {
        let long = "x".repeat(2000);
        let b = batch(&[&[(1, &long, "1")]]);
        assert_eq!(b.entries()[0].death.as_ref().map(|d| d.reason), Some("oversized"));
        assert!(b.canonical(&b.entries()[0]).strings().any(|s| s == long.as_bytes()));
    }

    #[test]
    fn an_entry_that_was_shortened_keeps_its_digest_and_its_length_and_is_condemned() {
        let mut filling = Filling::new(origin(), 1000);
        let id = EntryId { ms: 1, seq: 0 };
        let mut canonical = Vec::new();
        entry::write_canonical(&mut canonical, id, [b"id".as_slice(), b"a", b"padding", b"xx"]);
        filling.push_shortened(&Shortened { id, digest: 42, full_bytes: 300_000_000, canonical });
        let mut b = filling.seal(true);
        // Whatever else it is to be buried for, it stays shortened.
        b.condemn(Death::from(Malformed::Deadly));
        let entry = &b.entries()[0];
        assert_eq!((entry.digest, entry.full_bytes(), entry.is_shortened()), (42, 300_000_000, true));
        assert!(entry.death.is_some());
        assert_eq!(b.canonical(entry).strings().last(), Some(b"xx".as_slice()));
    }

    #[test]
    fn the_same_entry_twice_counts_once_and_makes_the_batch_careful() {
        let b =
            batch(&[&[(1, "a", "1"), (2, "a", "1"), (3, "a", "1")], &[(2, "a", "1"), (3, "a", "1"), (4, "a", "1")]]);
        assert_eq!(ids(&b), [1, 2, 3, 4]);
        assert_eq!(b.runs(), std::slice::from_ref(&(0..4)));
        assert!(b.is_careful());
    }

    #[test]
    fn two_contents_under_one_id_are_two_entries() {
        let b = batch(&[&[(1, "a", "1")], &[(1, "b", "1")]]);
        assert_eq!(ids(&b), [1, 1]);
        let plan = Plan::of(&Pipeline::counters()).expect("a plan");
        let coalesced = b.coalesce(&plan, 0..2).expect("no overflow");
        assert_eq!(coalesced.rows(), 2);
    }

    #[test]
    fn a_run_that_is_set_aside_leaves_the_others_as_they_were() {
        let b = batch(&[&[(1, "a", "1"), (2, "a", "1")], &[(5, "a", "1")], &[(8, "a", "1")]]);
        let (rest, aside) = b.set_aside(&[1]);
        assert_eq!((ids(&rest), rest.runs().to_vec(), rest.is_careful()), (vec![1, 2, 8], vec![0..2, 2..3], false));
        assert_eq!((aside.len(), ids(&aside[0]), aside[0].is_careful()), (1, vec![5], true));
    }

    #[test]
    fn what_is_set_aside_is_a_careful_batch_for_each_lane() {
        let mut filling = Filling::new(origin(), 1000);
        for (lane, ids) in [(0, [1, 2]), (3, [1, 2]), (7, [2, 3])] {
            filling.begin_lane(lane);
            for ms in ids {
                filling.push(EntryId { ms, seq: 0 }, [b"id".as_slice(), b"a", b"amount", b"1"]);
                filling.close_run();
            }
        }
        let b = filling.seal(false);
        assert_eq!((b.is_careful(), b.lanes()), (false, vec![0, 3, 7]));
        let (rest, aside) = b.set_aside(&[1, 2, 3, 5]);
        assert_eq!((rest.lanes(), ids(&rest)), (vec![0, 7], vec![1, 2]));
        let aside: Vec<_> = aside.iter().map(|b| (b.lanes(), ids(b), b.is_careful())).collect();
        assert_eq!(aside, [(vec![0], vec![2], true), (vec![3], vec![1, 2], true), (vec![7], vec![3], true)]);
    }

    proptest! {
        #[test]
        fn halving_loses_nothing_and_never_widens_a_run(lengths in prop::collection::vec(1usize..6, 1..6)) {
            let mut filling = Filling::new(origin(), 1000);
            let mut ms = 0;
            for length in &lengths {
                for _ in 0..*length {
                    ms += 1;
                    filling.push(EntryId { ms, seq: 0 }, [b"id".as_slice(), b"a", b"amount", b"1"]);
                }
                filling.close_run();
                ms += 1;
            }
            let whole = filling.seal(false);
            let neighbours = |b: &Batch| -> Vec<(u64, u64)> {
                b.runs().iter().flat_map(|s| b.entries()[s.clone()].windows(2).map(|w| (w[0].id.ms, w[1].id.ms))).collect()
            };
            let (all, proven) = (ids(&whole), neighbours(&whole));
            if let Ok((low, high)) = whole.halve() {
                let mut together = ids(&low);
                together.extend(ids(&high));
                prop_assert_eq!(together, all);
                for pair in neighbours(&low).into_iter().chain(neighbours(&high)) {
                    prop_assert!(proven.contains(&pair));
                }
                let covered = |b: &Batch| b.runs().iter().map(|s| s.len()).sum::<usize>();
                prop_assert_eq!((covered(&low), covered(&high)), (low.len(), high.len()));
            }
        }

    }
}
