//! An entry that is too large to be held: digested while it passes, and only its beginning kept. Pure.
//!
//! Takes its id and its strings piece by piece; gives its digest, the same as of the whole, its length and the beginnings of its
//! strings. It cannot fail.

use xxhash_rust::xxh3::Xxh3;

use super::entry::EntryId;

/// What a string costs beside its bytes, in memory and on the wire. Of an entry, or a dead letter, that may take so many bytes no more
/// strings are kept than could be held if all were empty.
pub const STRING_BYTES: usize = 32;

/// How many strings are kept at the most where so many bytes are: an even number, so that a name keeps its value.
pub fn most_strings(bytes: usize) -> usize {
    (bytes / STRING_BYTES / 2 * 2).max(2)
}

/// An entry of which only the beginning was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortened {
    /// Its id.
    pub id: EntryId,
    /// Its identity: the digest of all its canonical bytes.
    pub digest: u64,
    /// How many canonical bytes it had.
    pub full_bytes: u64,
    /// The beginnings of its strings, in canonical form.
    pub canonical: Vec<u8>,
}

/// An entry that passes.
pub struct Passing {
    id: EntryId,
    hash: Box<Xxh3>,
    full_bytes: u64,
    canonical: Vec<u8>,
    /// How many strings are still to be kept, and bytes of them.
    strings: u64,
    bytes: u64,
    /// How many bytes of the string under way are still to be kept.
    of_string: usize,
}

impl std::fmt::Debug for Passing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passing").field("id", &self.id).field("full_bytes", &self.full_bytes).finish_non_exhaustive()
    }
}

impl Passing {
    /// Begins: the entry has so many strings, and `kept` bytes of them are kept at the most.
    pub fn new(id: EntryId, strings: u64, kept: usize) -> Passing {
        let strings = strings.min(most_strings(kept) as u64);
        let mut passing = Passing {
            id,
            hash: Box::default(),
            full_bytes: 0,
            canonical: Vec::new(),
            strings,
            bytes: kept as u64,
            of_string: 0,
        };
        for part in [id.ms, id.seq] {
            passing.digest(&part.to_le_bytes());
            passing.canonical.extend_from_slice(&part.to_le_bytes());
        }
        passing
    }

    /// The next string begins, and has so many bytes. It may keep its share of what is left.
    pub fn string(&mut self, length: u64) {
        self.digest(&(length as u32).to_le_bytes());
        if self.strings == 0 {
            return;
        }
        let kept = length.min(self.bytes / self.strings);
        (self.strings, self.bytes, self.of_string) = (self.strings - 1, self.bytes - kept, kept as usize);
        self.canonical.extend_from_slice(&(kept as u32).to_le_bytes());
    }

    /// Some more bytes of that string.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.digest(bytes);
        let kept = self.of_string.min(bytes.len());
        self.canonical.extend_from_slice(&bytes[..kept]);
        self.of_string -= kept;
    }

    /// It has passed.
    pub fn finish(self) -> Shortened {
        let Passing { id, hash, full_bytes, canonical, .. } = self;
        Shortened { id, digest: hash.digest(), full_bytes, canonical }
    }

    fn digest(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.full_bytes += bytes.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::entry::{Canonical, digest, write_canonical};
    use proptest::prelude::*;

    fn pass(strings: &[Vec<u8>], kept: usize) -> Shortened {
        let mut passing = Passing::new(EntryId { ms: 7, seq: 1 }, strings.len() as u64, kept);
        for string in strings {
            passing.string(string.len() as u64);
            string.chunks(3).for_each(|piece| passing.bytes(piece));
        }
        passing.finish()
    }

    #[test]
    fn short_fields_leave_their_share_to_the_long_one() {
        let strings = [b"id".to_vec(), b"a".to_vec(), b"padding".to_vec(), vec![b'x'; 5000]];
        let shortened = pass(&strings, 1000);
        let kept: Vec<_> = Canonical(&shortened.canonical).strings().collect();
        assert_eq!(kept[..3], [&b"id"[..], b"a", b"padding"]);
        assert_eq!(kept[3].len(), 1000 - 10);
    }

    proptest! {
        #[test]
        fn what_has_passed_has_the_digest_of_the_whole_and_keeps_its_beginning(
            strings: Vec<Vec<u8>>, kept in 64usize..2000,
        ) {
            let id = EntryId { ms: 7, seq: 1 };
            let mut whole = Vec::new();
            write_canonical(&mut whole, id, strings.iter().map(Vec::as_slice));
            let shortened = pass(&strings, kept);
            prop_assert_eq!((shortened.digest, shortened.full_bytes), (digest(&whole), whole.len() as u64));
            let beginnings: Vec<_> = Canonical(&shortened.canonical).strings().collect();
            prop_assert!(beginnings.iter().zip(&strings).all(|(kept, whole)| whole.starts_with(kept)));
            prop_assert_eq!(beginnings.len(), strings.len().min(most_strings(kept)));
            prop_assert!(beginnings.iter().map(|string| string.len()).sum::<usize>() <= kept);
        }
    }
}
