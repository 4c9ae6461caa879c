//! Set if null: a value stays once it is there. Of several the one that is flushed first stays; `first` is the one that is sure of the order.

use std::borrow::Cow;

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::retry::Fault;

/// Of each row the value that was met first.
#[derive(Debug, Default)]
pub(crate) struct Firsts<'a>(Vec<Option<Cow<'a, str>>>);

impl<'a> Fold<'a> for Firsts<'a> {
    fn meet(&mut self, row: usize, _: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        if self.0.len() <= row {
            self.0.resize(row + 1, None);
        }
        if self.0[row].is_none() {
            self.0[row] = datum.and_then(Datum::text);
        }
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        packed.texts(order.iter().map(|row| self.0[*row].take()));
    }
}

/// Its SQL.
pub(crate) fn terms(sent: &Sent<'_>) -> Terms {
    let (column, value) = (sent.column, &sent.expressions[0]);
    Terms {
        folded: vec![format!("(array_agg({value}) filter (where {value} is not null))[1]")],
        inserted: vec![(column.into(), format!("{value}::{}", sent.sql_type))],
        merged: vec![(column.into(), format!("coalesce(t.{column}, excluded.{column})"))],
    }
}
