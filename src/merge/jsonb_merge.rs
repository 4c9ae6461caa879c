//! Jsonb merge: each key of the object has the value of the newest entry that named it. A second column, a `jsonb` too, holds for each key the id of that
//! entry, so older entries that arrive later never win.

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::retry::Fault;

/// Of each row the newest value of each key.
#[derive(Debug, Default)]
pub(crate) struct Objects;

impl<'a> Fold<'a> for Objects {
    fn meet(&mut self, _: usize, _: EntryId, _: Option<Datum<'a>>) -> Result<(), Fault> {
        Ok(())
    }

    fn pack(&mut self, _: &[usize], _: &mut Packed<'a>) {}
}

/// Its SQL.
pub(crate) fn terms(_: &Sent<'_>) -> Terms {
    Terms { folded: vec![], inserted: vec![], merged: vec![] }
}
