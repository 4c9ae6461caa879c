//! Merge: how a delta meets the value that is there. One operator a file.
//!
//! An operator has two halves that must agree: one in memory, where a batch is folded to one delta a row (`Fold`, used by `flow::rows`), and
//! one in SQL, where that delta meets the row (`Terms`, used by `flow::statement`). The law, tested against PostgreSQL in
//! `tests/it/operators.rs`: folding in memory and then merging gives what merging one by one gives, in any grouping.

#[cfg(feature = "daemon")]
mod count;
#[cfg(feature = "daemon")]
pub mod distinct;
#[cfg(feature = "daemon")]
mod extreme;
#[cfg(feature = "daemon")]
mod first;
#[cfg(feature = "daemon")]
pub(crate) mod fold;
#[cfg(feature = "daemon")]
mod jsonb_merge;
#[cfg(feature = "daemon")]
mod last;
#[cfg(feature = "daemon")]
mod logic;
#[cfg(feature = "daemon")]
mod set_if_null;
#[cfg(feature = "daemon")]
pub(crate) mod sum;

#[cfg(feature = "daemon")]
pub(crate) use self::fold::{Array, Fold, Packed, Sent, Terms};
use crate::model::target::Kind;

/// An operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Merge {
    /// `value + delta`.
    Sum,
    /// How many entries.
    Count,
    /// The least.
    Min,
    /// The greatest.
    Max,
    /// That of the newest entry, by its id.
    Last,
    /// That of the oldest entry, by its id.
    First,
    /// The one that is flushed first.
    SetIfNull,
    /// Whether all are true.
    And,
    /// Whether one is true.
    Or,
    /// A JSON object in which each key has the value of the newest entry that named it.
    JsonbMerge,
    /// About how many different ones there are.
    Distinct,
}

impl Merge {
    /// Each with its word in the configuration.
    const ALL: [(&'static str, Merge); 11] = [
        ("sum", Merge::Sum),
        ("count", Merge::Count),
        ("min", Merge::Min),
        ("max", Merge::Max),
        ("last", Merge::Last),
        ("first", Merge::First),
        ("set_if_null", Merge::SetIfNull),
        ("and", Merge::And),
        ("or", Merge::Or),
        ("jsonb_merge", Merge::JsonbMerge),
        ("distinct", Merge::Distinct),
    ];

    /// The operator of this word.
    pub fn parse(word: &str) -> Option<Merge> {
        Merge::ALL.into_iter().find(|(known, _)| *known == word).map(|(_, merge)| merge)
    }

    /// All words.
    pub fn words() -> Vec<&'static str> {
        Merge::ALL.iter().map(|(word, _)| *word).collect()
    }

    /// Its word in the configuration.
    pub fn name(self) -> &'static str {
        Merge::ALL.iter().find(|(_, known)| *known == self).map_or("", |(word, _)| word)
    }

    /// How its field is read where nothing is said.
    pub fn usual_kind(self) -> Kind {
        match self {
            Merge::Sum | Merge::Min | Merge::Max => Kind::Bigint,
            Merge::And | Merge::Or => Kind::Boolean,
            Merge::JsonbMerge => Kind::Jsonb,
            Merge::Count | Merge::Last | Merge::First | Merge::SetIfNull | Merge::Distinct => Kind::Text,
        }
    }

    /// Whether it can merge what such a field holds; the error says why not and what to write.
    pub fn accepts(self, kind: Kind) -> Result<(), String> {
        let accepted: &[Kind] = match (self, kind) {
            (Merge::Sum | Merge::Min | Merge::Max, Kind::Numeric(_)) => return Ok(()),
            (Merge::Sum, _) => &[Kind::Bigint],
            (Merge::Min | Merge::Max, _) => &[Kind::Bigint, Kind::Date, Kind::Timestamptz],
            (Merge::And | Merge::Or, _) => &[Kind::Boolean],
            (Merge::JsonbMerge, _) => &[Kind::Jsonb],
            (Merge::Distinct, Kind::Jsonb) => {
                return Err(
                    "distinct does not take a jsonb, which can be written in many ways; write a field of type text"
                        .into(),
                );
            }
            (Merge::Last | Merge::First | Merge::SetIfNull | Merge::Count | Merge::Distinct, _) => return Ok(()),
        };
        if accepted.contains(&kind) {
            return Ok(());
        }
        let mut words: Vec<String> = accepted.iter().map(ToString::to_string).collect();
        if !accepted.contains(&Kind::Boolean) && self != Merge::JsonbMerge {
            words.insert(1, "numeric".into());
        }
        Err(format!("{} does not take a {kind}; write a field of type {}", self.name(), words.join(" or ")))
    }

    /// The type of the column that says how old the value is, where it needs one.
    pub fn needs_version(self) -> Option<&'static str> {
        match self {
            Merge::Last | Merge::First => Some("numeric"),
            Merge::JsonbMerge => Some("jsonb"),
            _ => None,
        }
    }

    /// Whether zero means that nothing is left.
    pub fn is_additive(self) -> bool {
        matches!(self, Merge::Sum | Merge::Count)
    }
}

/// How many different values a sketch stands for, about; it is a `bytea` as text. None: it is no sketch.
#[cfg(feature = "daemon")]
pub(crate) fn estimated(sketch: &str) -> Option<u64> {
    let digits = sketch.strip_prefix("\\x")?.as_bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |pair: &[u8]| u8::try_from(digit(pair[0])? * 16 + digit(*pair.get(1)?)?).ok();
    distinct::estimate(&digits.chunks(2).map(byte).collect::<Option<Vec<u8>>>()?)
}
