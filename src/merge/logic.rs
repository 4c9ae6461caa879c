//! And, or: whether all are true, whether one is. Neither order nor repetition matters.

use std::borrow::Cow;

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::retry::Fault;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    All,
    Any,
}

/// The answer for each row that any entry brought something for.
#[derive(Debug)]
pub(crate) struct Logic(Which, Vec<Option<bool>>);

impl Logic {
    /// And.
    pub(crate) fn all() -> Logic {
        Logic(Which::All, Vec::new())
    }

    /// Or.
    pub(crate) fn any() -> Logic {
        Logic(Which::Any, Vec::new())
    }
}

impl<'a> Fold<'a> for Logic {
    fn meet(&mut self, row: usize, _: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        if self.1.len() <= row {
            self.1.resize(row + 1, None);
        }
        let Some(new) = datum.and_then(Datum::text).map(|text| text == "true") else { return Ok(()) };
        let held = self.1[row].unwrap_or(self.0 == Which::All);
        self.1[row] = Some(match self.0 {
            Which::All => held && new,
            Which::Any => held || new,
        });
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        let word = |answer: bool| Cow::Borrowed(if answer { "true" } else { "false" });
        packed.texts(order.iter().map(|row| self.1[*row].map(word)));
    }
}

/// Its SQL. What is null says nothing.
pub(crate) fn terms(sent: &Sent<'_>, which: Which) -> Terms {
    let (aggregate, operator) = match which {
        Which::All => ("bool_and", "and"),
        Which::Any => ("bool_or", "or"),
    };
    let (column, expression) = (sent.column, format!("{}::boolean", sent.expressions[0]));
    let met = format!("coalesce(t.{column} {operator} excluded.{column}, t.{column}, excluded.{column})");
    Terms {
        folded: vec![format!("{aggregate}({expression})")],
        inserted: vec![(column.into(), expression)],
        merged: vec![(column.into(), met)],
    }
}
