//! The load: deltas as a seed makes them, always the same ones. Pure.

use std::ops::RangeInclusive;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};

/// How deltas are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// How many different keys there are.
    pub keys: u64,
    /// How much more often low keys are drawn: the exponent of Zipf's law; none for all alike.
    pub skew: Option<f64>,
    /// Amounts.
    pub amounts: RangeInclusive<i64>,
    /// Lengths of ids, in bytes.
    pub id_bytes: RangeInclusive<usize>,
    /// Where it begins.
    pub seed: u64,
}

/// The words that ids are filled up with.
const FILL: &str = "/articles/2026/11/how-the-tide-came-in-and-went-out-again";

/// The longest id there can be.
pub const LONGEST_ID: usize = FILL.len() + 6;

impl Load {
    /// The deltas: a row's key, and an amount. Endless.
    pub fn deltas(&self) -> impl Iterator<Item = (String, i64)> + use<> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let load = self.clone();
        // Refused only without keys, or with a skew that is no number.
        let zipf = self.skew.and_then(|skew| Zipf::new(self.keys as f64, skew).ok());
        std::iter::repeat_with(move || {
            let key = match &zipf {
                Some(zipf) => zipf.sample(&mut random) as u64 - 1,
                None => random.random_range(0..load.keys),
            };
            (load.id(key), random.random_range(load.amounts.clone()))
        })
    }

    /// A key's id: always the same one, of a length of its own.
    fn id(&self, key: u64) -> String {
        let lengths = (self.id_bytes.end() - self.id_bytes.start() + 1) as u64;
        let spread = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let length = self.id_bytes.start() + (spread % lengths) as usize;
        let mut id = format!("{key:06}");
        id.extend(FILL.chars().take(length.saturating_sub(id.len())));
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(skew: Option<f64>) -> Load {
        Load { keys: 100, skew, amounts: 1..=9, id_bytes: 6..=40, seed: 7 }
    }

    #[test]
    fn the_same_seed_makes_the_same_deltas_within_their_limits() {
        for skew in [None, Some(1.0)] {
            let deltas: Vec<_> = load(skew).deltas().take(1_000).collect();
            assert!(deltas.iter().all(|(id, amount)| (6..=40).contains(&id.len()) && (1..=9).contains(amount)));
            assert_eq!(deltas, load(skew).deltas().take(1_000).collect::<Vec<_>>());
            assert_ne!(deltas, Load { seed: 8, ..load(skew) }.deltas().take(1_000).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_skewed_load_has_hot_keys_and_an_even_one_has_none() {
        let hottest = |skew| {
            let mut counts = std::collections::HashMap::new();
            load(skew).deltas().take(10_000).for_each(|(id, _)| *counts.entry(id).or_insert(0) += 1);
            counts.into_values().max().expect("some")
        };
        // A hundred keys: an even share is 100 of 10,000; by Zipf's law the first has a fifth of all.
        assert!(hottest(None) < 200);
        assert!(hottest(Some(1.0)) > 1_500);
    }
}
