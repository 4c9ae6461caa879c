//! Count: how many entries; where it names a field, how many have it.

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::retry::Fault;

/// How many for each row.
#[derive(Debug, Default)]
pub(crate) struct Counts(Vec<i64>);

impl<'a> Fold<'a> for Counts {
    fn meet(&mut self, row: usize, _: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        if self.0.len() <= row {
            self.0.resize(row + 1, 0);
        }
        self.0[row] += i64::from(datum.is_some());
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        packed.numbers(order.iter().map(|row| self.0.get(*row).copied()));
    }
}

/// As sums.
pub(crate) fn terms(sent: &Sent<'_>) -> Terms {
    super::sum::terms(sent)
}
