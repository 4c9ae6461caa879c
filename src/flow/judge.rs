//! Judge: what the ledger says of each entry of a batch. Pure.
//!
//! Takes a batch whose entries may have been flushed before, and the ledger's rows around it; gives for each entry whether it
//! is settled, new, or cannot be judged. The digests decide, entry by entry (I2, I4). It cannot fail.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::batch::Batch;
use crate::model::entry::EntryId;

/// A ledger row, as found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its first id.
    pub first: EntryId,
    /// Its last id.
    pub last: EntryId,
    /// The digests of the entries it stands for; none if it cannot judge.
    pub digests: Option<HashSet<u64>>,
    /// How many entries it stands for.
    pub entries: i32,
    /// How many of them were reported lost upstream.
    pub lost: i32,
}

/// What the ledger says of the entries of a batch: indices into it, ascending.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Settled before: only the acknowledgement is missing.
    pub known: Vec<usize>,
    /// In a row that cannot tell.
    pub unjudgeable: Vec<usize>,
    /// Never settled: to be applied now.
    pub new: Vec<usize>,
    /// The new ones outside every row, in contiguous new_runs: each becomes a row.
    pub new_runs: Vec<Range<usize>>,
    /// The new ones inside a row (by the row's index): new content under a used id. Their digests join that row's.
    pub amended: BTreeMap<usize, Vec<usize>>,
}

/// Judges a batch against the rows around it, which must ascend and not overlap.
pub fn examine(batch: &Batch, rows: &[Found]) -> Findings {
    let mut findings = Findings::default();
    let mut row = 0;
    for run in batch.runs() {
        // The stretch that the next new entry continues, if nothing has come between.
        let mut open = None;
        for index in run.clone() {
            let entry = &batch.entries()[index];
            while rows.get(row).is_some_and(|r| r.last < entry.id) {
                row += 1;
                open = None;
            }
            match rows.get(row).filter(|r| r.first <= entry.id) {
                Some(found) => {
                    open = None;
                    match &found.digests {
                        None => findings.unjudgeable.push(index),
                        Some(digests) if digests.contains(&entry.digest) => {
                            findings.known.push(index);
                        }
                        Some(_) => {
                            findings.new.push(index);
                            findings.amended.entry(row).or_default().push(index);
                        }
                    }
                }
                None => {
                    findings.new.push(index);
                    let stretch = *open.get_or_insert_with(|| {
                        findings.new_runs.push(index..index);
                        findings.new_runs.len() - 1
                    });
                    findings.new_runs[stretch].end = index + 1;
                }
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::{Filling, tests::origin};
    use proptest::prelude::*;

    fn id(ms: u64) -> EntryId {
        EntryId { ms, seq: 0 }
    }

    /// A batch of contiguous runs of ids; the content is the same everywhere.
    fn batch(runs: &[&[u64]]) -> Batch {
        let mut filling = Filling::new(origin(), 1000);
        for run in runs {
            run.iter().for_each(|ms| filling.push(id(*ms), [b"id".as_slice(), b"a"]));
            filling.close_run();
        }
        filling.seal(true)
    }

    /// A row that holds the digests of these entries of the batch.
    fn row(first: u64, last: u64, batch: &Batch, known: &[u64]) -> Found {
        let digests = batch.entries().iter().filter(|e| known.contains(&e.id.ms)).map(|e| e.digest).collect();
        Found { first: id(first), last: id(last), digests: Some(digests), entries: known.len() as i32, lost: 0 }
    }

    #[test]
    fn with_no_row_around_each_span_is_one_new_row() {
        let findings = examine(&batch(&[&[1, 2, 3], &[7, 8]]), &[]);
        assert_eq!(findings.new_runs, [0..3, 3..5]);
        assert_eq!(findings.new, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn what_a_row_knows_is_settled_and_the_rest_is_new() {
        let b = batch(&[&[1, 2, 3, 4, 5]]);
        let findings = examine(&b, &[row(2, 3, &b, &[2, 3])]);
        assert_eq!(findings.known, [1, 2]);
        assert_eq!(findings.new_runs, [0..1, 3..5]);
    }

    #[test]
    fn a_new_range_is_cut_at_a_row_even_if_no_entry_of_the_batch_is_in_it() {
        let b = batch(&[&[1, 5]]);
        assert_eq!(examine(&b, &[row(3, 3, &b, &[])]).new_runs, [0..1, 1..2]);
    }

    #[test]
    fn new_content_under_a_used_id_is_applied_and_joins_the_row() {
        let b = batch(&[&[1, 2, 3]]);
        let findings = examine(&b, &[row(1, 3, &b, &[1, 3])]);
        assert_eq!((findings.known, findings.new), (vec![0, 2], vec![1]));
        assert_eq!(findings.amended, BTreeMap::from([(0, vec![1])]));
        assert!(findings.new_runs.is_empty());
    }

    #[test]
    fn a_row_without_digests_cannot_judge() {
        let b = batch(&[&[1, 2]]);
        let compacted = Found { digests: None, ..row(1, 1, &b, &[]) };
        let findings = examine(&b, &[compacted]);
        assert_eq!((findings.unjudgeable, findings.new), (vec![0], vec![1]));
    }

    proptest! {
        #[test]
        fn every_entry_is_judged_once_and_no_new_row_meets_an_old_one(
            ids in prop::collection::btree_set(0u64..60, 1..30),
            cuts in prop::collection::btree_set(0u64..60, 0..10),
            known in prop::collection::btree_set(0u64..60, 0..40),
        ) {
            let all: Vec<u64> = ids.iter().copied().collect();
            let runs: Vec<&[u64]> = all.chunks(4).collect();
            let b = batch(&runs);
            // Rows from each second pair of cuts: disjoint and ascending.
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let known: Vec<u64> = known.into_iter().collect();
            let rows: Vec<Found> = cuts.as_chunks::<2>().0.iter().map(|[a, z]| {
                let inside: Vec<u64> = known.iter().copied().filter(|k| a <= k && k <= z).collect();
                row(*a, *z, &b, &inside)
            }).collect();
            let f = examine(&b, &rows);
            let mut seen: Vec<usize> = f.known.iter().chain(&f.new).chain(&f.unjudgeable).copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..b.len()).collect::<Vec<_>>());
            let covered = |ms: u64| rows.iter().any(|r| r.first.ms <= ms && ms <= r.last.ms);
            for &i in &f.known { prop_assert!(covered(b.entries()[i].id.ms) && known.contains(&b.entries()[i].id.ms)); }
            let in_new_runs: usize = f.new_runs.iter().map(|s| s.len()).sum();
            let in_rows: usize = f.amended.values().map(Vec::len).sum();
            prop_assert_eq!(in_new_runs + in_rows, f.new.len());
            for s in &f.new_runs {
                let (first, last) = (b.entries()[s.start].id.ms, b.entries()[s.end - 1].id.ms);
                prop_assert!(rows.iter().all(|r| last < r.first.ms || r.last.ms < first));
                prop_assert!(b.runs().iter().any(|run| run.start <= s.start && s.end <= run.end));
            }
        }
    }
}
