//! Coalesce: the entries of a batch become one delta a key, sorted by key. Pure.
//!
//! Takes a batch and its pipeline; gives columns ready to be bound, and what is to be buried. It fails only where the sum of one
//! key's deltas leaves the range of `bigint`.

use std::collections::HashMap;
use std::sync::Arc;

use super::batch::{Batch, Death};
use crate::model::pipeline::Pipeline;
use crate::model::row;
use crate::retry::Fault;

/// What a batch asks for, as columns ready to be bound.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Coalesced<'a> {
    /// Distinct, in ascending order of their bytes.
    pub keys: Vec<&'a str>,
    /// One for each key.
    pub amounts: Vec<i64>,
    /// Indices of entries to bury, and why.
    pub dead: Vec<(usize, Arc<Death>)>,
}

impl Batch {
    /// Coalesces the entries at these indices: one delta a key, sorted by key; what cannot be decoded is dead.
    pub fn coalesce(
        &self,
        pipeline: &Pipeline,
        indices: impl ExactSizeIterator<Item = usize>,
    ) -> Result<Coalesced<'_>, Fault> {
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
                    let sum = sums.entry(delta.key).or_insert(0);
                    *sum = pipeline.merge.fold(*sum, delta.amount).ok_or(Fault::SumOverflow)?;
                }
                Err(malformed) => dead.push((index, Arc::new(Death::from(malformed)))),
            }
        }
        // Sorted, so that two workers lock the rows they share in the same order.
        let mut deltas: Vec<(&str, i64)> = sums.into_iter().collect();
        deltas.sort_unstable();
        let (keys, amounts) = deltas.into_iter().unzip();
        Ok(Coalesced { keys, amounts, dead })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::Filling;
    use crate::flow::batch::tests::{batch, origin};
    use crate::model::entry::EntryId;
    use proptest::prelude::*;

    #[test]
    fn one_delta_a_key_sorted_by_key() {
        let b = batch(&[&[(1, "b", "1"), (2, "a", "5"), (3, "b", "-3")]]);
        let coalesced = b.coalesce(&Pipeline::counters(), 0..b.len()).expect("no overflow");
        assert_eq!((coalesced.keys, coalesced.amounts), (vec!["a", "b"], vec![5, -2]));
    }

    #[test]
    fn what_cannot_be_decoded_is_dead_and_harms_no_neighbour() {
        let b = batch(&[&[(1, "a", "1"), (2, "a", "NaN"), (3, "a", "1")]]);
        let coalesced = b.coalesce(&Pipeline::counters(), 0..b.len()).expect("no overflow");
        assert_eq!(coalesced.amounts, vec![2]);
        assert_eq!(coalesced.dead.iter().map(|d| (d.0, d.1.reason)).collect::<Vec<_>>(), [(1, "bad_amount")]);
    }

    #[test]
    fn a_sum_that_leaves_bigint_is_a_fault_and_not_a_wrong_number() {
        let max = i64::MAX.to_string();
        let b = batch(&[&[(1, "a", &max), (2, "a", "1")]]);
        assert_eq!(b.coalesce(&Pipeline::counters(), 0..b.len()), Err(Fault::SumOverflow));
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
            let got = b.coalesce(&Pipeline::counters(), 0..b.len()).expect("no overflow");
            let mut want = std::collections::BTreeMap::new();
            deltas.iter().for_each(|(key, amount)| *want.entry(key.as_str()).or_insert(0) += amount);
            prop_assert_eq!(got.keys, want.keys().copied().collect::<Vec<_>>());
            prop_assert_eq!(got.amounts, want.values().copied().collect::<Vec<_>>());
        }
    }
}
