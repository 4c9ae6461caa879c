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
