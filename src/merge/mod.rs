//! Merge: how a delta meets the value that is there. One operator a file.
//!
//! An operator has two halves that must agree: one in memory, where a batch is coalesced to one delta a key
//! ([`crate::flow::batch`]), and one in SQL, where that delta meets the row ([`crate::flow::statement`]).

pub mod sum;

/// An operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Merge {
    /// `value + delta`.
    #[default]
    Sum,
}

impl Merge {
    /// Its name, as the ledger records it.
    pub fn name(self) -> &'static str {
        match self {
            Merge::Sum => "sum",
        }
    }

    /// Folds two deltas of one key into one; none if the result leaves the operator's range.
    pub fn fold(self, a: i64, b: i64) -> Option<i64> {
        match self {
            Merge::Sum => sum::fold(a, b),
        }
    }

    /// The assignment of an upsert: `value` is the column, quoted; the row is `t`, the delta `excluded`.
    pub fn sql(self, value: &str) -> String {
        match self {
            Merge::Sum => sum::sql(value),
        }
    }

    /// The aggregate that folds several deltas of one key into one.
    pub fn aggregate(self, delta: &str) -> String {
        match self {
            Merge::Sum => sum::aggregate(delta),
        }
    }
}
