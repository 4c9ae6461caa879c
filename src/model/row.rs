//! Row: what an entry asks for, as the key of a row and a delta. Pure.
//!
//! Takes an entry and its pipeline; gives a [`Delta`], or the reason why the entry cannot be flushed ([`Malformed`]). It fails
//! only in that way: no bytes make it panic.

use super::entry::{Canonical, Malformed};
use super::pipeline::Pipeline;

/// What an entry asks for: this much more on this row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta<'a> {
    /// The row's key: text without NUL.
    pub key: &'a str,
    /// What is added.
    pub amount: i64,
}

/// The row's key and the delta it asks for.
pub fn decode<'a>(entry: Canonical<'a>, pipeline: &Pipeline) -> Result<Delta<'a>, Malformed> {
    let (mut key, mut amount) = (None, None);
    for (name, value) in entry.fields() {
        let slot = if name == pipeline.key_field.as_bytes() {
            &mut key
        } else if name == pipeline.value_field.as_bytes() {
            &mut amount
        } else {
            continue;
        };
        if slot.replace(value).is_some() {
            return Err(Malformed::FieldTwice);
        }
    }
    let key = std::str::from_utf8(key.ok_or(Malformed::NoKey)?).map_err(|_| Malformed::KeyNotText)?;
    if key.contains('\0') {
        return Err(Malformed::KeyNotText);
    }
    let amount = parse_amount(amount.ok_or(Malformed::NoAmount)?)?;
    Ok(Delta { key, amount })
}

/// A whole number as `INCRBY` takes it: an optional minus, then digits.
pub(crate) fn parse_amount(text: &[u8]) -> Result<i64, Malformed> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(Malformed::AmountNotANumber);
    }
    let negative = digits.len() < text.len();
    digits
        .iter()
        .try_fold(0i64, |sum, digit| {
            let digit = i64::from(digit - b'0');
            let sum = sum.checked_mul(10)?;
            if negative { sum.checked_sub(digit) } else { sum.checked_add(digit) }
        })
        .ok_or(Malformed::AmountTooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::entry::{EntryId, write_canonical};
    use proptest::prelude::*;

    fn decode(strings: &[&[u8]]) -> Result<(String, i64), Malformed> {
        let mut bytes = Vec::new();
        write_canonical(&mut bytes, EntryId { ms: 7, seq: 1 }, strings.iter().copied());
        super::decode(Canonical(&bytes), &Pipeline::counters()).map(|d| (d.key.to_owned(), d.amount))
    }

    #[test]
    fn a_plain_entry_asks_for_its_amount_on_its_row() {
        assert_eq!(decode(&[b"id", b"a", b"amount", b"-3"]), Ok(("a".into(), -3)));
        assert_eq!(decode(&[b"amount", b"007", b"op", b"x", b"id", b""]), Ok(("".into(), 7)));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_reason() {
        assert_eq!(decode(&[]), Err(Malformed::NoKey));
        assert_eq!(decode(&[b"id", b"a"]), Err(Malformed::NoAmount));
        assert_eq!(decode(&[b"id", b"a\0b", b"amount", b"1"]), Err(Malformed::KeyNotText));
        assert_eq!(decode(&[b"id", b"\xff", b"amount", b"1"]), Err(Malformed::KeyNotText));
        assert_eq!(decode(&[b"id", b"a", b"id", b"b", b"amount", b"1"]), Err(Malformed::FieldTwice));
        for bad in ["", "-", "+1", "1.0", "NaN", "1e3", " 1", "0x1", "--1"] {
            assert_eq!(decode(&[b"id", b"a", b"amount", bad.as_bytes()]), Err(Malformed::AmountNotANumber), "{bad:?}");
        }
        assert_eq!(decode(&[b"id", b"a", b"amount", b"9223372036854775808"]), Err(Malformed::AmountTooLarge));
        assert_eq!(decode(&[b"id", b"a", b"amount", b"-9223372036854775808"]), Ok(("a".into(), i64::MIN)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(bytes: Vec<u8>) {
            let _ = super::decode(Canonical(&bytes), &Pipeline::counters());
        }

        #[test]
        fn every_amount_of_64_bits_is_read_back(amount: i64) {
            prop_assert_eq!(decode(&[b"id", b"a", b"amount", amount.to_string().as_bytes()]), Ok(("a".into(), amount)));
        }
    }
}
