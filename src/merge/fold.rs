//! Fold: what every operator does in memory, and what it says in SQL.
//!
//! In memory an operator holds one folded delta for each row of a batch ([`Fold`]) and hands them over as columns ([`Packed`]). In SQL it says how such a
//! column is folded once more where PostgreSQL finds that two spellings are one key, how it becomes a new row's value, and how it meets the value of a row
//! that is there ([`Terms`]).

use std::borrow::Cow;

use super::{Merge, count, distinct, extreme, first, jsonb_merge, last, logic, set_if_null, sum};
use crate::model::datum::Datum;
use crate::model::entry::EntryId;
use crate::model::target::Kind;
use crate::retry::Fault;

/// One value column of a batch: a folded delta for each row.
pub(crate) trait Fold<'a> {
    /// An entry brings this for a row; none where it lacks the field, which it may. Rows are numbered from zero in the order in which they are met
    /// first. Fails where the folded delta leaves its range.
    fn meet(&mut self, row: usize, id: EntryId, datum: Option<Datum<'a>>) -> Result<(), Fault>;

    /// Hands the rows over, in this order: exactly the columns that [`Merge::sends`] names.
    fn pack(&mut self, order: &[usize], packed: &mut Packed<'a>);
}

/// What kind of array a column travels in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Array {
    /// `text[]`.
    Texts,
    /// `bigint[]`.
    Numbers,
}

/// The columns of a batch, one behind the other, in the two arrays that a flush sends.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Packed<'a> {
    /// All columns of [`Array::Texts`].
    pub(crate) texts: Vec<Option<Cow<'a, str>>>,
    /// All columns of [`Array::Numbers`].
    pub(crate) numbers: Vec<Option<i64>>,
}

impl<'a> Packed<'a> {
    /// A column of texts, a row each.
    pub(crate) fn texts(&mut self, column: impl Iterator<Item = Option<Cow<'a, str>>>) {
        self.texts.extend(column);
    }

    /// A column of numbers, a row each.
    pub(crate) fn numbers(&mut self, column: impl Iterator<Item = Option<i64>>) {
        self.numbers.extend(column);
    }
}

/// What an operator's SQL is made of. All names are quoted.
#[derive(Debug, Clone)]
pub(crate) struct Sent<'s> {
    /// The table's column.
    pub(crate) column: &'s str,
    /// The column of the version, where there is one.
    pub(crate) by: Option<&'s str>,
    /// The type of the table's column, with its modifier.
    pub(crate) sql_type: &'s str,
    /// How the field is read.
    pub(crate) kind: Kind,
    /// What was sent, as expressions of the types `text` or `bigint`.
    pub(crate) expressions: &'s [String],
}

/// What an operator says in SQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    /// What was sent for several spellings of one key, folded: an aggregate for each expression.
    pub(crate) folded: Vec<String>,
    /// The columns of a new row, each with its value.
    pub(crate) inserted: Vec<(String, String)>,
    /// What the columns of the row `t` become when `excluded` would have been inserted, each with its value.
    pub(crate) merged: Vec<(String, String)>,
}

impl Merge {
    /// Begins with no rows. `kind`: how the field is read.
    pub(crate) fn fold<'a>(self, kind: Kind) -> Box<dyn Fold<'a> + Send + 'a> {
        match self {
            Merge::Sum => sum::fold_of(kind),
            Merge::Count => Box::new(count::Counts::default()),
            Merge::Min => extreme::fold_of(kind, extreme::Which::Least),
            Merge::Max => extreme::fold_of(kind, extreme::Which::Greatest),
            Merge::Last => Box::new(last::Newest::default()),
            Merge::First => Box::new(first::Oldest::default()),
            Merge::SetIfNull => Box::new(set_if_null::Firsts::default()),
            Merge::And => Box::new(logic::Logic::all()),
            Merge::Or => Box::new(logic::Logic::any()),
            Merge::JsonbMerge => Box::new(jsonb_merge::Objects::default()),
            Merge::Distinct => Box::new(distinct::Sketches::default()),
        }
    }

    /// The columns that a value travels in.
    pub(crate) fn sends(self, kind: Kind) -> &'static [Array] {
        match (self, kind) {
            (Merge::Count, _) | (Merge::Sum | Merge::Min | Merge::Max, Kind::Bigint) => &[Array::Numbers],
            (Merge::Last | Merge::First | Merge::JsonbMerge, _) => &[Array::Texts, Array::Texts],
            _ => &[Array::Texts],
        }
    }

    /// Its SQL.
    pub(crate) fn terms(self, sent: &Sent<'_>) -> Terms {
        match self {
            Merge::Sum => sum::terms(sent),
            Merge::Count => count::terms(sent),
            Merge::Min => extreme::terms(sent, extreme::Which::Least),
            Merge::Max => extreme::terms(sent, extreme::Which::Greatest),
            Merge::Last => last::terms(sent),
            Merge::First => first::terms(sent),
            Merge::SetIfNull => set_if_null::terms(sent),
            Merge::And => logic::terms(sent, logic::Which::All),
            Merge::Or => logic::terms(sent, logic::Which::Any),
            Merge::JsonbMerge => jsonb_merge::terms(sent),
            Merge::Distinct => distinct::terms(sent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::datum;
    use proptest::prelude::*;

    /// Texts of a kind, two of each value.
    fn texts(kind: Kind) -> &'static [&'static str] {
        match kind {
            Kind::Bigint => &["-5", "7", "07"],
            Kind::Numeric(_) => &["-0.5", "7", "7.00"],
            Kind::Date => &["2026-11-27", "0001-01-01"],
            Kind::Timestamptz => &["2026-11-27T08:00:00Z", "1795766400000", "1969-01-01T00:00:00Z"],
            Kind::Boolean => &["t", "true", "0"],
            Kind::Uuid => &["6ba7b810-9dad-11d1-80b4-00c04fd430c8", "6BA7B810-9DAD-11D1-80B4-00C04FD430C8"],
            Kind::Inet => &["10.0.0.1", "10.0.0.1/32", "::1"],
            Kind::Jsonb => &["{}", "{\"a\":1}", "{\"a\":null,\"b\":[1.10]}"],
            Kind::Text | Kind::Bytea => &["a", "b", ""],
        }
    }

    fn folded<'a>(merge: Merge, kind: Kind, met: &[(usize, EntryId, Option<&'a str>)], order: &[usize]) -> Packed<'a> {
        let (mut fold, mut packed) = (merge.fold(kind), Packed::default());
        for (row, id, text) in met {
            let datum = text.map(|text| datum::read(kind, text.as_bytes()).expect("of its kind"));
            fold.meet(*row, *id, datum).expect("in its range");
        }
        fold.pack(order, &mut packed);
        packed
    }

    proptest! {
        #[test]
        fn what_is_folded_does_not_depend_on_the_order(
            picks in prop::collection::vec((0usize..3, prop::option::of(0usize..3)), 3..20), turn in 0usize..20,
        ) {
            let kinds = [Kind::Text, Kind::Bigint, Kind::Numeric(None), Kind::Uuid, Kind::Date, Kind::Timestamptz, Kind::Boolean,
                Kind::Bytea, Kind::Inet, Kind::Jsonb];
            for merge in Merge::words().into_iter().filter_map(Merge::parse).filter(|merge| *merge != Merge::SetIfNull) {
                for kind in kinds.into_iter().filter(|kind| merge.accepts(*kind).is_ok()) {
                    let texts = texts(kind);
                    // Rows are numbered in the order in which they are met.
                    let mut met: Vec<_> = (0..3).map(|row| (row, EntryId { ms: row as u64, seq: 9 }, None)).collect();
                    met.extend(picks.iter().enumerate().map(|(n, (row, text))| {
                        (*row, EntryId { ms: 100 + n as u64, seq: 0 }, text.map(|text| texts[text % texts.len()]))
                    }));
                    let mut turned = met.clone();
                    turned[3..].rotate_left(turn % picks.len());
                    let one = folded(merge, kind, &met, &[0, 1, 2]);
                    prop_assert_eq!(&one, &folded(merge, kind, &turned, &[0, 1, 2]), "{} of {}", merge.name(), kind);
                    let columns = merge.sends(kind);
                    let of = |array| columns.iter().filter(|column| **column == array).count();
                    prop_assert_eq!((one.texts.len(), one.numbers.len()), (3 * of(Array::Texts), 3 * of(Array::Numbers)));
                }
            }
        }
    }
}
