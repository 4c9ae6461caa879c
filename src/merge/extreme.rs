//! Min and max: the least and the greatest. Neither order nor repetition matters.

use std::borrow::Cow;

use bigdecimal::BigDecimal;

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::model::target::Kind;
use crate::retry::Fault;

/// Which of two stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Least,
    Greatest,
}

impl Which {
    fn keeps<T: PartialOrd>(self, held: &T, new: &T) -> bool {
        match self {
            Which::Least => held <= new,
            Which::Greatest => held >= new,
        }
    }
}

/// Of whole numbers, of decimals, or of texts that are ordered as what they stand for: days and moments.
pub(crate) fn fold_of<'a>(kind: Kind, which: Which) -> Box<dyn Fold<'a> + Send + 'a> {
    match kind {
        Kind::Bigint => Box::new(Extremes::<i64>(which, Vec::new())),
        Kind::Numeric(_) => Box::new(Extremes::<BigDecimal>(which, Vec::new())),
        _ => Box::new(Extremes::<Cow<'a, str>>(which, Vec::new())),
    }
}

/// The extreme of each row that any entry brought something for.
struct Extremes<T>(Which, Vec<Option<T>>);

/// What can be an extreme.
trait Ordered<'a>: PartialOrd + Sized {
    fn of(datum: Datum<'a>) -> Option<Self>;
    fn pack(column: impl Iterator<Item = Option<Self>>, packed: &mut Packed<'a>);
}

impl<'a> Ordered<'a> for i64 {
    fn of(datum: Datum<'a>) -> Option<i64> {
        datum.number()
    }

    fn pack(column: impl Iterator<Item = Option<i64>>, packed: &mut Packed<'a>) {
        packed.numbers(column);
    }
}

impl<'a> Ordered<'a> for BigDecimal {
    fn of(datum: Datum<'a>) -> Option<BigDecimal> {
        datum.decimal()
    }

    fn pack(column: impl Iterator<Item = Option<BigDecimal>>, packed: &mut Packed<'a>) {
        packed.texts(column.map(|decimal| decimal.map(|decimal| Cow::Owned(decimal.to_plain_string()))));
    }
}

impl<'a> Ordered<'a> for Cow<'a, str> {
    fn of(datum: Datum<'a>) -> Option<Cow<'a, str>> {
        datum.text()
    }

    fn pack(column: impl Iterator<Item = Option<Cow<'a, str>>>, packed: &mut Packed<'a>) {
        packed.texts(column);
    }
}

impl<'a, T: Ordered<'a>> Fold<'a> for Extremes<T> {
    fn meet(&mut self, row: usize, _: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        if self.1.len() <= row {
            self.1.resize_with(row + 1, || None);
        }
        if let Some(new) = datum.and_then(T::of) {
            let held = &mut self.1[row];
            if !held.as_ref().is_some_and(|held| self.0.keeps(held, &new)) {
                *held = Some(new);
            }
        }
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        let held = &mut self.1;
        T::pack(order.iter().map(|row| held[*row].take()), packed);
    }
}

/// Its SQL: `least` and `greatest` pass over what is null.
pub(crate) fn terms(sent: &Sent<'_>, which: Which) -> Terms {
    let (aggregate, function) = match which {
        Which::Least => ("min", "least"),
        Which::Greatest => ("max", "greatest"),
    };
    let expression = format!("{}::{}", sent.expressions[0], sent.sql_type);
    let column = sent.column;
    Terms {
        folded: vec![format!("{aggregate}({expression})")],
        inserted: vec![(column.into(), expression)],
        merged: vec![(column.into(), format!("{function}(t.{column}, excluded.{column})"))],
    }
}
