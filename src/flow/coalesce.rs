//! Coalesce: the entries of a batch become one delta a key, sorted by key. Pure.
//!
//! Takes a batch and its pipeline's plan; gives columns ready to be bound, and what is to be buried. It fails only where the sum of one
//! key's deltas leaves its range. Counters, one sum a key, are coalesced here, without a copy of any key; everything else in [`super::rows`].

use std::collections::HashMap;
use std::sync::Arc;

use super::batch::{Batch, Death};
use super::rows::{self, Plan};
use crate::merge::{Packed, sum};
use crate::model::row;
use crate::retry::Fault;

/// What a batch asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Coalesced<'a> {
    /// The rows, as columns ready to be bound.
    pub(super) columns: Columns<'a>,
    /// Indices of entries to bury, and why.
    pub dead: Vec<(usize, Arc<Death>)>,
}

/// Rows as columns, one behind the other: of texts and of numbers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Columns<'a> {
    /// Of counters.
    Counters {
        /// Distinct, in ascending order of their bytes.
        keys: Vec<&'a str>,
        /// One for each key.
        amounts: Vec<i64>,
    },
    /// Of any tables.
    Tables {
        /// How many rows each has.
        rows: Vec<usize>,
        packed: Packed<'a>,
    },
}

impl<'a> Coalesced<'a> {
    /// How many rows, in all tables together.
    pub fn rows(&self) -> usize {
        match &self.columns {
            Columns::Counters { keys, .. } => keys.len(),
            Columns::Tables { rows, .. } => rows.iter().sum(),
        }
    }
}

impl Batch {
    /// Coalesces the entries at these indices; what cannot be decoded is dead.
    pub fn coalesce(&self, plan: &Plan, indices: impl ExactSizeIterator<Item = usize>) -> Result<Coalesced<'_>, Fault> {
        let pipeline = match plan {
            Plan::Counter(pipeline) => pipeline,
            Plan::Tables(tables) => return rows::fold(self, tables, indices),
        };
        let mut sums: HashMap<&str, i64, foldhash::fast::RandomState> =
            HashMap::with_capacity_and_hasher(indices.len(), Default::default());
        let mut dead = Vec::new();
        for index in indices {
            let entry = &self.entries()[index];
            if let Some(death) = &entry.death {
                dead.push((index, death.clone()));
                continue;
            }
            match row::decode(self.canonical(entry), pipeline) {
                Ok(delta) => {
                    let total = sums.entry(delta.key).or_insert(0);
                    *total = sum::fold(*total, delta.amount).ok_or(Fault::SumOverflow)?;
                }
                Err(malformed) => dead.push((index, Arc::new(Death::from(malformed)))),
            }
        }
        // Sorted, so that two workers lock the rows they share in the same order.
        let mut deltas: Vec<(&str, i64)> = sums.into_iter().collect();
        deltas.sort_unstable();
        let (keys, amounts) = deltas.into_iter().unzip();
        Ok(Coalesced { columns: Columns::Counters { keys, amounts }, dead })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::Filling;
    use crate::flow::batch::tests::{batch, origin};
    use crate::model::entry::EntryId;
    use crate::model::pipeline::Pipeline;
    use proptest::prelude::*;

    fn plan() -> Plan {
        Plan::of(&Pipeline::counters()).expect("a plan")
    }

    fn counters(coalesced: Coalesced<'_>) -> (Vec<&str>, Vec<i64>) {
        match coalesced.columns {
            Columns::Counters { keys, amounts } => (keys, amounts),
            Columns::Tables { .. } => panic!("counters"),
        }
    }

    #[test]
    fn one_delta_a_key_sorted_by_key() {
        let b = batch(&[&[(1, "b", "1"), (2, "a", "5"), (3, "b", "-3")]]);
        let coalesced = b.coalesce(&plan(), 0..b.len()).expect("no overflow");
        assert_eq!(counters(coalesced), (vec!["a", "b"], vec![5, -2]));
    }

    #[test]
    fn what_cannot_be_decoded_is_dead_and_harms_no_neighbour() {
        let b = batch(&[&[(1, "a", "1"), (2, "a", "NaN"), (3, "a", "1")]]);
        let coalesced = b.coalesce(&plan(), 0..b.len()).expect("no overflow");
        assert_eq!(coalesced.dead.iter().map(|d| (d.0, d.1.reason)).collect::<Vec<_>>(), [(1, "bad_amount")]);
        assert_eq!(counters(coalesced).1, vec![2]);
    }

    #[test]
    fn a_sum_that_leaves_bigint_is_a_fault_and_not_a_wrong_number() {
        let max = i64::MAX.to_string();
        let b = batch(&[&[(1, "a", &max), (2, "a", "1")]]);
        assert_eq!(b.coalesce(&plan(), 0..b.len()), Err(Fault::SumOverflow));
    }

    proptest! {
        #[test]
        fn coalescing_is_the_sum_by_key_in_any_order(deltas in prop::collection::vec(("[a-d]", -1000i64..1000), 0..50)) {
            let mut filling = Filling::new(origin(), 1000);
            for (n, (key, amount)) in deltas.iter().enumerate() {
                let amount = amount.to_string();
                filling.push(EntryId { ms: n as u64, seq: 0 }, [b"id".as_slice(), key.as_bytes(), b"amount", amount.as_bytes()]);
            }
            let b = filling.seal(false);
            let got = b.coalesce(&plan(), 0..b.len()).expect("no overflow");
            let mut want = std::collections::BTreeMap::new();
            deltas.iter().for_each(|(key, amount)| *want.entry(key.as_str()).or_insert(0) += amount);
            let (keys, amounts) = counters(got);
            prop_assert_eq!(keys, want.keys().copied().collect::<Vec<_>>());
            prop_assert_eq!(amounts, want.values().copied().collect::<Vec<_>>());
        }
    }
}
