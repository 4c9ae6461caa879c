//! Last: the value of the newest entry, by its id. A column holds that id as a number, so an older entry that arrives later never wins.

use std::borrow::Cow;

use super::fold::{Fold, Packed, Sent, Terms};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::retry::Fault;

/// Of each row the newest value and its entry's id.
#[derive(Debug, Default)]
pub(crate) struct Newest<'a>(Vec<Option<(EntryId, Datum<'a>)>>);

impl<'a> Fold<'a> for Newest<'a> {
    fn meet(&mut self, row: usize, id: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault> {
        keep(&mut self.0, row, id, datum, |held, new| new > held);
        Ok(())
    }

    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>) {
        pack(&mut self.0, order, packed);
    }
}

/// Holds the value whose id wins over the one that is held.
pub(super) fn keep<'a>(
    rows: &mut Vec<Option<(EntryId, Datum<'a>)>>,
    row: usize,
    id: EntryId,
    datum: Option<Datum<'a>>,
    wins: impl Fn(EntryId, EntryId) -> bool,
) {
    if rows.len() <= row {
        rows.resize_with(row + 1, || None);
    }
    if let Some(datum) = datum
        && rows[row].as_ref().is_none_or(|(held, _)| wins(*held, id))
    {
        rows[row] = Some((id, datum));
    }
}

/// The values, and behind them the ids as numbers.
pub(super) fn pack<'a>(rows: &mut [Option<(EntryId, Datum<'a>)>], order: &[usize], packed: &mut Packed<'a>) {
    let ids: Vec<_> = order.iter().map(|row| rows[*row].as_ref().map(|(id, _)| *id)).collect();
    packed.texts(order.iter().map(|row| rows[*row].take().and_then(|(_, datum)| datum.text())));
    packed.texts(ids.into_iter().map(|id| id.map(|id| Cow::Owned(id.number().to_string()))));
}

/// Its SQL.
pub(crate) fn terms(sent: &Sent<'_>) -> Terms {
    guarded(sent, ">", "desc")
}

/// A value with the id it came with: it replaces the one that is there when its id compares so.
pub(super) fn guarded(sent: &Sent<'_>, compares: &str, order: &str) -> Terms {
    let [value, version] = sent.expressions else { return Terms { folded: vec![], inserted: vec![], merged: vec![] } };
    let (column, by, kind) = (sent.column, sent.by.unwrap_or_default(), sent.sql_type);
    let wins = format!("excluded.{by} is not null and (t.{by} is null or excluded.{by} {compares} t.{by})");
    let of_winner = |what: &str| {
        format!("(array_agg({what} order by {version}::numeric {order}) filter (where {version} is not null))[1]")
    };
    Terms {
        folded: vec![of_winner(value), of_winner(version)],
        inserted: vec![(column.into(), format!("{value}::{kind}")), (by.into(), format!("{version}::numeric"))],
        merged: vec![
            (column.into(), format!("case when {wins} then excluded.{column} else t.{column} end")),
            (by.into(), format!("case when {wins} then excluded.{by} else t.{by} end")),
        ],
    }
}
