//! An entry: its id, its fields, its digest. Pure.
//!
//! Takes the bytes of an entry as they came from the stream; gives their canonical form and its digest. It cannot fail: no
//! bytes make it panic.

use std::fmt;
use std::str::FromStr;

use xxhash_rust::xxh3::xxh3_64;

/// The version of [`digest`]: stored beside digests, so that a later one cannot be mistaken for this one.
pub const DIGEST_VERSION: i16 = 1;

/// An entry's id in its stream: milliseconds and a sequence number. Not an identity: see [`digest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EntryId {
    /// The server's clock when the entry was added, in milliseconds since 1970.
    pub ms: u64,
    /// Tells entries of one millisecond apart.
    pub seq: u64,
}

impl EntryId {
    /// The lowest.
    pub const MIN: EntryId = EntryId { ms: 0, seq: 0 };
    /// The highest.
    pub const MAX: EntryId = EntryId { ms: u64::MAX, seq: u64::MAX };

    /// The id as one number, ms · 2^64 + seq: the ledger's form. Its order is the ids' order.
    pub fn number(self) -> u128 {
        (u128::from(self.ms) << 64) | u128::from(self.seq)
    }

    /// The inverse of [`EntryId::number`].
    pub fn from_number(number: u128) -> EntryId {
        EntryId { ms: (number >> 64) as u64, seq: number as u64 }
    }

    /// Reads an id as Valkey writes it: digits, a hyphen, digits.
    pub fn from_bytes(text: &[u8]) -> Option<EntryId> {
        let hyphen = text.iter().position(|b| *b == b'-')?;
        Some(EntryId { ms: digits(&text[..hyphen])?, seq: digits(&text[hyphen + 1..])? })
    }

    /// The id right after this one; the highest has none.
    pub fn next(self) -> Option<EntryId> {
        self.number().checked_add(1).map(EntryId::from_number)
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

impl FromStr for EntryId {
    type Err = BadEntryId;

    fn from_str(text: &str) -> Result<EntryId, BadEntryId> {
        EntryId::from_bytes(text.as_bytes()).ok_or_else(|| BadEntryId(text.to_owned()))
    }
}

/// A number of digits alone, at least one.
fn digits(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

/// A text that is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no entry id: write milliseconds-sequence, such as 1700000000000-0")]
pub struct BadEntryId(String);

/// One life of one connection to one server. What was read in one is acknowledged in it or not at all (I3).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Generation {
    /// The server process.
    pub run_id: String,
    /// The history of writes it stands for.
    pub replication_id: String,
    /// The connection, counted within this process.
    pub epoch: u64,
}

/// Writes the canonical bytes of an entry behind `out`: id, then each field's name and value with its length in front.
///
/// This form is what is digested and what is carried from read to flush: one copy, one pass, no allocation per entry.
/// All numbers are little-endian; lengths are 32 bits wide (a Valkey string has at most 512 MiB).
#[inline]
pub fn write_canonical<'a>(out: &mut Vec<u8>, id: EntryId, strings: impl IntoIterator<Item = &'a [u8]>) {
    out.extend_from_slice(&id.ms.to_le_bytes());
    out.extend_from_slice(&id.seq.to_le_bytes());
    for string in strings {
        out.extend_from_slice(&(string.len() as u32).to_le_bytes());
        out.extend_from_slice(string);
    }
}

/// The identity of an entry: XXH3 (64 bits, seed 0) over its canonical bytes.
///
/// A stream id alone is no identity: two primaries alive at once mint the same ids for different content.
pub fn digest(canonical: &[u8]) -> u64 {
    xxh3_64(canonical)
}

/// An entry in its canonical bytes.
#[derive(Debug, Clone, Copy)]
pub struct Canonical<'a>(pub &'a [u8]);

impl<'a> Canonical<'a> {
    /// Its id; the lowest where these are no canonical bytes.
    pub fn id(self) -> EntryId {
        let number = |at: usize| self.0.get(at..).and_then(<[u8]>::first_chunk).map(|bytes| u64::from_le_bytes(*bytes));
        EntryId { ms: number(0).unwrap_or_default(), seq: number(8).unwrap_or_default() }
    }

    /// Its strings in order: name, value, name, value …
    pub fn strings(self) -> impl Iterator<Item = &'a [u8]> {
        let mut rest = self.0.get(16..).unwrap_or_default();
        std::iter::from_fn(move || {
            let (length, behind) = rest.split_first_chunk::<4>()?;
            let (string, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            rest = behind;
            Some(string)
        })
    }

    /// Its fields in order.
    pub fn fields(self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        let mut strings = self.strings();
        std::iter::from_fn(move || Some((strings.next()?, strings.next()?)))
    }
}

/// Why an entry cannot be flushed, as far as its bytes alone tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The key's field is missing.
    #[error("the field with the row's key is missing")]
    NoKey,
    /// The key cannot be a PostgreSQL text.
    #[error("the row's key is not UTF-8 text without NUL")]
    KeyNotText,
    /// The amount's field is missing.
    #[error("the field with the amount is missing")]
    NoAmount,
    /// The amount is something else than digits.
    #[error("the amount is not a whole decimal number")]
    AmountNotANumber,
    /// The amount has digits only, and too many.
    #[error("the amount does not fit into 64 bits")]
    AmountTooLarge,
    /// Which of the two is meant cannot be known.
    #[error("a field that is needed stands twice")]
    FieldTwice,
    /// Too large to be carried.
    #[error("the entry is larger than batch.max_entry_bytes")]
    TooLarge,
    /// Every process that took it died.
    #[error("every process that took the entry died before it was settled")]
    Deadly,
    /// The ledger no longer tells whether it was flushed.
    #[error("the ledger no longer tells whether the entry was flushed")]
    Unjudgeable,
}

impl Malformed {
    /// The word that `tidegate.dead_letters.reason` holds for it.
    pub fn reason(self) -> &'static str {
        match self {
            Malformed::NoKey => "missing_key",
            Malformed::KeyNotText => "bad_key",
            Malformed::NoAmount => "missing_amount",
            Malformed::AmountNotANumber => "bad_amount",
            Malformed::AmountTooLarge => "amount_overflow",
            Malformed::FieldTwice => "duplicate_field",
            Malformed::TooLarge => "oversized",
            Malformed::Deadly => "kills_the_process",
            Malformed::Unjudgeable => "cannot_be_judged",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(strings: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_canonical(&mut bytes, EntryId { ms: 7, seq: 1 }, strings.iter().copied());
        bytes
    }

    #[test]
    fn the_digest_of_version_1_never_changes() {
        let bytes = entry(&[b"id", b"a", b"amount", b"1"]);
        assert_eq!(digest(&bytes), 0xe1e0_8b3b_4833_6058);
    }

    #[test]
    fn where_one_string_ends_and_the_next_begins_is_part_of_the_digest() {
        assert_ne!(digest(&entry(&[b"ab", b"c"])), digest(&entry(&[b"a", b"bc"])));
        assert_ne!(digest(&entry(&[b"a", b""])), digest(&entry(&[b"", b"a"])));
    }

    proptest! {
        #[test]
        fn an_id_survives_the_ledger_and_its_own_text(ms: u64, seq: u64) {
            let id = EntryId { ms, seq };
            prop_assert_eq!(EntryId::from_number(id.number()), id);
            prop_assert_eq!(id.to_string().parse::<EntryId>(), Ok(id));
            prop_assert_eq!(id.number().to_string().parse::<u128>().ok(), Some(id.number()));
        }

        #[test]
        fn the_order_of_numbers_is_the_order_of_ids(a: (u64, u64), b: (u64, u64)) {
            let (a, b) = (EntryId { ms: a.0, seq: a.1 }, EntryId { ms: b.0, seq: b.1 });
            prop_assert_eq!(a.cmp(&b), a.number().cmp(&b.number()));
        }

        #[test]
        fn any_strings_survive_the_canonical_form(strings: Vec<Vec<u8>>) {
            let bytes = entry(&strings.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let back: Vec<Vec<u8>> = Canonical(&bytes).strings().map(<[u8]>::to_vec).collect();
            prop_assert_eq!(back, strings);
        }

    }
}
