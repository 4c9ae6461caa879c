//! Distinct: about how many different values there were, as a HyperLogLog sketch in a `bytea`. Neither order nor repetition matters.
//!
//! A value's hash is XXH3 (64 bits, seed 0) of its canonical text. Its first 12 bits name one of 4,096 registers, which keeps the highest rank it has met:
//! how many zeros the other 52 bits begin with, and one. From the registers the number of different values is estimated with a standard error of
//! 1.04 / √4096 = 1.6 %, in at most 4,098 bytes a row: 14 bits would halve the error at four times the bytes, which PostgreSQL writes again for each
//! change of a row; with 10 bits a row would take 1 KB and err by 3.3 %. The format is in `docs/sketches.md` and `migrations/0010_operators.sql`; the
//! same set of values gives the same bytes, in memory as in PostgreSQL.

use std::borrow::Cow;

use xxhash_rust::xxh3::xxh3_64;

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::{self, Datum};
use crate::model::entry::EntryId;
use crate::retry::Fault;

/// So many bits of the hash name a register.
const PRECISION: u32 = 12;
/// How many registers a sketch has.
const REGISTERS: usize = 1 << PRECISION;
/// The highest rank: all bits behind the register's are zero.
const HIGHEST: usize = (u64::BITS - PRECISION + 1) as usize;
/// A sketch of more registers than this is dense.
const SPARSE: usize = 256;
/// What a sketch begins with: the version of the format, then its form.
const VERSION: u8 = 0xd1;
const IS_SPARSE: u8 = 0;
const IS_DENSE: u8 = 1;

/// For each row the registers that were touched.
#[derive(Debug, Default)]
pub(crate) struct Sketches(Vec<Touched>);

/// Registers, each with its rank in the lowest byte. What was added lately is neither sorted nor folded, so this is never more than a word an entry.
#[derive(Debug, Default)]
struct Touched {
    words: Vec<u32>,
    folded: usize,
}

impl Touched {
    fn add(&mut self, hash: u64) {
        let register = (hash >> (u64::BITS - PRECISION)) as u32;
        let rank = (hash << PRECISION).leading_zeros().min(u64::BITS - PRECISION) + 1;
        self.words.push(register << 8 | rank);
        if self.words.len() >= 2 * self.folded + 64 {
            self.fold();
        }
    }

    /// Each register once, ascending, with its highest rank.
    fn fold(&mut self) {
        self.words.sort_unstable();
        self.words.dedup_by(|later, kept| {
            let is_same = *later >> 8 == *kept >> 8;
            *kept = if is_same { *later } else { *kept };
            is_same
        });
        self.folded = self.words.len();
    }

    /// The sketch. None where nothing was touched.
    fn sketch(&mut self) -> Option<Vec<u8>> {
        self.fold();
        if self.words.is_empty() {
            return None;
        }
        if self.words.len() <= SPARSE {
            let registers = self.words.iter().flat_map(|word| word.to_be_bytes().into_iter().skip(1));
            return Some([VERSION, IS_SPARSE].into_iter().chain(registers).collect());
        }
        let mut dense = vec![0; 2 + REGISTERS];
        dense[..2].copy_from_slice(&[VERSION, IS_DENSE]);
        self.words.iter().for_each(|word| dense[2 + (*word >> 8) as usize] = *word as u8);
        Some(dense)
    }
}

impl<'a> Fold<'a> for Sketches {
    fn meet(&mut self, row: usize, _: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        if self.0.len() <= row {
            self.0.resize_with(row + 1, Touched::default);
        }
        if let Some(text) = datum.and_then(Datum::text) {
            self.0[row].add(xxh3_64(text.as_bytes()));
        }
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        packed.texts(order.iter().map(|row| self.0[*row].sketch().map(|sketch| Cow::Owned(datum::hex(&sketch)))));
    }
}

/// Its SQL.
pub(crate) fn terms(sent: &Sent<'_>) -> Terms {
    let (column, sketch) = (sent.column, format!("{}::bytea", sent.expressions[0]));
    let met =
        format!("coalesce(tidegate.distinct_merge(t.{column}, excluded.{column}), t.{column}, excluded.{column})");
    Terms {
        folded: vec![format!("tidegate.distinct_union({sketch})")],
        inserted: vec![(column.into(), sketch)],
        merged: vec![(column.into(), met)],
    }
}

/// About how many different values a sketch stands for; none if these bytes are no sketch. The same number as `tidegate.distinct_count` in PostgreSQL.
pub fn estimate(sketch: &[u8]) -> Option<u64> {
    let mut of_rank = [0usize; HIGHEST + 1];
    match sketch {
        [VERSION, IS_SPARSE, registers @ ..] if registers.len() % 3 == 0 && registers.len() <= 3 * SPARSE => {
            of_rank[0] = REGISTERS - registers.len() / 3;
            let mut least = 0;
            for register in registers.chunks_exact(3) {
                let number = usize::from(register[0]) << 8 | usize::from(register[1]);
                if number < least || number >= REGISTERS || register[2] == 0 {
                    return None;
                }
                least = number + 1;
                *of_rank.get_mut(usize::from(register[2]))? += 1;
            }
        }
        [VERSION, IS_DENSE, registers @ ..] if registers.len() == REGISTERS => {
            for rank in registers {
                *of_rank.get_mut(usize::from(*rank))? += 1;
            }
        }
        _ => return None,
    }
    if of_rank[0] == REGISTERS {
        return Some(0);
    }
    let all = REGISTERS as f64;
    let mut total = all * full(1.0 - of_rank[HIGHEST] as f64 / all);
    for registers in of_rank[1..HIGHEST].iter().rev() {
        total = (total + *registers as f64) * 0.5;
    }
    total += all * empty(of_rank[0] as f64 / all);
    Some((0.5 + all * all / (2.0 * std::f64::consts::LN_2) / total).floor() as u64)
}

/// What registers that are full say, by how many are not: Ertl's τ.
fn full(mut x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return 0.0;
    }
    let (mut y, mut z) = (1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        let before = z;
        y *= 0.5;
        z -= (1.0 - x) * (1.0 - x) * y;
        if z == before {
            return z / 3.0;
        }
    }
}

/// What registers that are empty say, by how many are: Ertl's σ.
fn empty(mut x: f64) -> f64 {
    let (mut y, mut z) = (1.0, x);
    loop {
        x *= x;
        let before = z;
        z += x * y;
        y += y;
        if z == before {
            return z;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sketch_of(values: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Vec<u8> {
        let mut touched = Touched::default();
        values.into_iter().for_each(|value| touched.add(xxh3_64(value.as_ref())));
        touched.sketch().unwrap_or_else(|| vec![VERSION, IS_SPARSE])
    }

    #[test]
    fn the_hash_and_the_bytes_are_those_that_the_format_promises() {
        assert_eq!(xxh3_64(b""), 0x2d06_8005_38d3_94c2);
        assert_eq!(xxh3_64(b"a"), 0xe6c6_32b6_1e96_4e1f);
        assert_eq!(xxh3_64(b"abc"), 0x78af_5f94_892f_3950);
        // Register 0x2d0; the bits behind it begin 0110.
        assert_eq!(sketch_of([""]), [0xd1, 0, 0x02, 0xd0, 2]);
        assert_eq!(sketch_of(["", "a", "abc"]), [0xd1, 0, 0x02, 0xd0, 2, 0x07, 0x8a, 1, 0x0e, 0x6c, 2]);
    }

    #[test]
    fn a_sketch_is_sparse_up_to_256_registers_and_dense_from_then_on() {
        let mut touched = Touched::default();
        (0..256u64).for_each(|register| touched.add(register << 52));
        let sparse = touched.sketch().expect("registers");
        assert_eq!((sparse.len(), sparse[1], sparse[4]), (770, IS_SPARSE, 53), "a hash of zeros has the highest rank");
        touched.add(256 << 52);
        let dense = touched.sketch().expect("registers");
        assert_eq!((dense.len(), dense[1], dense[2 + 256], dense[2 + 257]), (4098, IS_DENSE, 53, 0));
    }

    #[test]
    fn an_estimate_errs_by_a_few_standard_errors_at_most_over_the_whole_range() {
        assert_eq!(estimate(&sketch_of(Vec::<&[u8]>::new())), Some(0));
        for count in [1u64, 2, 10, 100, 300, 1_000, 3_000, 10_000, 20_000, 100_000, 1_000_000] {
            let values = (0..count).map(|n| format!("visitor-{n}"));
            let got = estimate(&sketch_of(values)).expect("a sketch") as f64;
            let error = (got - count as f64) / count as f64;
            assert!(error.abs() < 4.0 * 0.01625, "{count}: {got}, off by {:.1} %", 100.0 * error);
        }
    }

    #[test]
    fn what_is_no_sketch_has_no_estimate() {
        let dense = |rank: u8| [vec![VERSION, IS_DENSE], vec![rank; REGISTERS]].concat();
        for foreign in [&b""[..], b"\xd1", b"\xd1\x02", b"\xd1\x00a", b"\xd1\x00\x10\x00\x01", b"\xd1\x00\x00\x00\x00"]
        {
            assert_eq!(estimate(foreign), None, "{foreign:?}");
        }
        assert_eq!(estimate(b"\xd1\x00\x00\x02\x01\x00\x01\x01"), None, "not ascending");
        assert_eq!((estimate(&dense(54)), estimate(&dense(255))), (None, None));
        assert!(estimate(&dense(53)).is_some() && estimate(&dense(52)).is_some());
    }

    proptest! {
        #[test]
        fn a_set_has_one_sketch(values in prop::collection::vec(0u32..3_000, 1..2_000), cut in 0usize..2_000) {
            let bytes = |n: &u32| n.to_be_bytes();
            let whole = sketch_of(values.iter().map(bytes));
            let mut turned = values.clone();
            turned.rotate_left(cut % values.len());
            turned.extend_from_slice(&values[..cut.min(values.len())]);
            prop_assert_eq!(&whole, &sketch_of(turned.iter().map(bytes)));
        }

        #[test]
        fn no_bytes_make_the_estimate_panic(bytes in prop::collection::vec(any::<u8>(), 0..40), form in 0u8..2) {
            let _ = estimate(&bytes);
            let _ = estimate(&[vec![VERSION, form], bytes].concat());
        }
    }
}
