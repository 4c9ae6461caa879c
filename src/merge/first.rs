//! First: the value of the oldest entry, by its id. A column holds that id as a number, so a newer entry that arrives earlier does not stay.

use super::fold::{Fold, Packed, Sent, Terms};
use super::last::{guarded, keep, pack};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::retry::Fault;

/// Of each row the oldest value and its entry's id.
#[derive(Debug, Default)]
pub(crate) struct Oldest<'a>(Vec<Option<(EntryId, Datum<'a>)>>);

impl<'a> Fold<'a> for Oldest<'a> {
    fn meet(&mut self, row: usize, id: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        keep(&mut self.0, row, id, datum, |held, new| new < held);
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        pack(&mut self.0, order, packed);
    }
}

/// Its SQL.
pub(crate) fn terms(sent: &Sent<'_>) -> Terms {
    guarded(sent, "<", "asc")
}
