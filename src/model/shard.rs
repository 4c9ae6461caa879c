//! Shard: which of a pipeline's streams a key's deltas go to.
//!
//! Takes a key and how many streams there are; gives a number from 0. Every producer in every language computes the same
//! (docs/sharding.md), so that a key has one stream, and flushes of different streams never meet on a row. Pure.

/// The shard of a key: the CRC-32 of its bytes (the one of zlib, PNG and Ethernet), modulo the number of shards.
pub fn shard_of(key: &str, shards: u16) -> u16 {
    if shards <= 1 {
        return 0;
    }
    // Below the number of shards, so it fits.
    (crc32fast::hash(key.as_bytes()) % u32::from(shards)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Computed by another program: see docs/sharding.md.
    const VECTORS: &str = include_str!("../../docs/shards.tsv");

    #[test]
    fn the_shards_of_the_vectors_are_those_of_every_language() {
        let mut lines = VECTORS.lines();
        assert_eq!(lines.next(), Some("key\tcrc32\tof 2\tof 4\tof 16\tof 1000"));
        let mut count = 0;
        for line in lines {
            let fields: Vec<&str> = line.split('\t').collect();
            for (shards, expected) in [2, 4, 16, 1000].into_iter().zip(&fields[2..]) {
                assert_eq!(shard_of(fields[0], shards).to_string(), *expected, "{line}");
            }
            count += 1;
        }
        assert_eq!(count, 17);
    }

    proptest! {
        #[test]
        fn every_key_has_a_shard_and_one_shard_has_them_all(key in ".*", shards in 1u16..) {
            prop_assert!(shard_of(&key, shards) < shards);
            prop_assert_eq!(shard_of(&key, 1), 0);
        }
    }
}
