//! Sum: `value + delta`. Order does not matter, repetition does, and the ledger is there for the repetition.

use crate::model::entry::Malformed;

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

/// Folds two deltas of one key into one; none if their sum leaves the range of 64 bits.
pub fn fold(a: i64, b: i64) -> Option<i64> {
    a.checked_add(b)
}

/// What the row's value becomes: `value` is the column, quoted. Where nothing is, the delta is the value.
pub fn sql(value: &str) -> String {
    format!("{value} = coalesce(t.{value}, 0) + excluded.{value}")
}

/// The deltas of one key, folded by PostgreSQL: where several spellings are one key. It cannot overflow; the row's column may.
pub fn aggregate(delta: &str) -> String {
    format!("sum({delta})")
}
