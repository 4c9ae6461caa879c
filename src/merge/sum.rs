//! Sum: `value + delta`. Order does not matter, repetition does, and the ledger is there for the repetition.

use std::borrow::Cow;

use bigdecimal::BigDecimal;

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::model::target::Kind;
use crate::retry::Fault;

/// Folds two deltas of one key into one; none if their sum leaves the range of 64 bits.
pub(crate) fn fold(a: i64, b: i64) -> Option<i64> {
    a.checked_add(b)
}

/// What the row's value becomes: `value` is the column, quoted. Where nothing is, the delta is the value.
pub(crate) fn sql(value: &str) -> String {
    format!("coalesce(t.{value}, 0) + excluded.{value}")
}

/// Of whole numbers, or of decimals.
pub(crate) fn fold_of<'a>(kind: Kind) -> Box<dyn Fold<'a> + Send + 'a> {
    match kind {
        Kind::Numeric(_) => Box::new(Decimals::default()),
        _ => Box::new(Wholes::default()),
    }
}

/// Sums of 64 bits. A row that no entry brought anything for has the sum 0.
#[derive(Debug, Default)]
struct Wholes(Vec<i64>);

impl<'a> Fold<'a> for Wholes {
    fn meet(&mut self, row: usize, _: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        if self.0.len() <= row {
            self.0.resize(row + 1, 0);
        }
        let Some(Datum::Number(delta)) = datum else { return Ok(()) };
        self.0[row] = fold(self.0[row], delta).ok_or(Fault::SumOverflow)?;
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        packed.numbers(order.iter().map(|row| Some(self.0[*row])));
    }
}

/// Exact decimal sums.
#[derive(Debug, Default)]
struct Decimals(Vec<BigDecimal>);

impl<'a> Fold<'a> for Decimals {
    fn meet(&mut self, row: usize, _: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        if self.0.len() <= row {
            self.0.resize(row + 1, BigDecimal::default());
        }
        if let Some(delta) = datum.as_ref().and_then(Datum::decimal) {
            self.0[row] += delta;
        }
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        packed.texts(order.iter().map(|row| Some(Cow::Owned(self.0[*row].to_plain_string()))));
    }
}

/// Its SQL. PostgreSQL's own sum of bigint is a numeric, so it cannot overflow; the row's column may.
pub(crate) fn terms(sent: &Sent<'_>) -> Terms {
    let expression = match sent.kind {
        Kind::Numeric(_) => format!("{}::numeric", sent.expressions[0]),
        _ => sent.expressions[0].clone(),
    };
    Terms {
        folded: vec![format!("sum({expression})")],
        inserted: vec![(sent.column.into(), expression)],
        merged: vec![(sent.column.into(), sql(sent.column))],
    }
}
