//! Target: a table that a pipeline writes, and what each of its columns is made of. Pure.
//!
//! Takes the texts `keys` and `values` of the configuration; gives columns, each with the field of the entry that feeds it. Fails with the end of a
//! sentence that says what to write. An entry never names a column: what is written here is all that a stream can reach.
//!
//! ```text
//! keys   = "tenant: uuid, day = day(at, Europe/Berlin)"
//! values = "requests = count(), bytes = sum(bytes), slowest = max(ms?), path = last(path) by path_version"
//! ```

mod parse;

use std::fmt;

use super::pipeline::{Identifier, Table};
use crate::merge::Merge;

#[cfg(feature = "daemon")]
pub(crate) use self::parse::is_field_name;
pub use self::parse::{parse_keys, parse_values};

/// A table and what is written into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The table.
    pub table: Table,
    /// The columns that identify a row; together they need a unique index.
    pub keys: Vec<KeyColumn>,
    /// The columns that deltas are merged into.
    pub values: Vec<ValueColumn>,
    /// The column that takes the time of the last flush, if there is one.
    pub updated_at: Option<Identifier>,
    /// What becomes of rows.
    pub write: Write,
}

/// What becomes of the rows that a batch asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Write {
    /// They are inserted, or merged into those that are there.
    #[default]
    Merge,
    /// They are inserted; those that are there stay as they are.
    Insert,
    /// They are inserted or merged, and deleted when all their sums and counts are zero.
    DeleteZero,
}

/// A key column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyColumn {
    /// The column.
    pub column: Identifier,
    /// What it holds.
    pub part: Part,
}

/// What a key column is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A field of the entry, as this kind.
    Field(String, Kind),
    /// The beginning of the stretch of time that a moment lies in.
    Bucket {
        /// How long a stretch is.
        unit: Unit,
        /// The field that holds the moment; none: when the entry was added, by its id.
        field: Option<String>,
        /// The time zone whose days and hours count, by its IANA name.
        zone: String,
    },
}

/// A value column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueColumn {
    /// The column.
    pub column: Identifier,
    /// How a delta meets what is there.
    pub merge: Merge,
    /// The field that feeds it; `count()` needs none.
    pub field: Option<Field>,
    /// The column that says how old the value is, where the operator asks for one.
    pub by: Option<Identifier>,
}

/// A field of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// How its bytes are read.
    pub kind: Kind,
    /// Whether an entry may lack it.
    pub is_optional: bool,
}

/// How a field's bytes are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// UTF-8 without NUL, as it is; where the column is of another type PostgreSQL reads it.
    Text,
    /// A whole number of 64 bits.
    Bigint,
    /// A decimal number of any length, with at most so many digits behind the point if that is said.
    Numeric(Option<u16>),
    /// A uuid in any spelling.
    Uuid,
    /// A day: `2026-11-27`.
    Date,
    /// A moment: RFC 3339, or milliseconds since 1970.
    Timestamptz,
    /// true or false.
    Boolean,
    /// Bytes, as they are.
    Bytea,
    /// An address, or a network's address with its length.
    Inet,
    /// A JSON object.
    Jsonb,
}

/// How long a stretch of time is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    /// A minute, as a `timestamptz`.
    Minute,
    /// An hour, as a `timestamptz`.
    Hour,
    /// A day, as a `date`.
    Day,
    /// A week that begins on Monday, as a `date`.
    Week,
    /// A month, as a `date`.
    Month,
}

impl Unit {
    const ALL: [(&'static str, Unit); 5] = [
        ("minute", Unit::Minute),
        ("hour", Unit::Hour),
        ("day", Unit::Day),
        ("week", Unit::Week),
        ("month", Unit::Month),
    ];

    /// What its column holds.
    pub fn kind(self) -> Kind {
        match self {
            Unit::Minute | Unit::Hour => Kind::Timestamptz,
            Unit::Day | Unit::Week | Unit::Month => Kind::Date,
        }
    }
}

impl Kind {
    /// The words for it; `numeric` may be followed by a scale in parentheses.
    const ALL: [(&'static str, Kind); 10] = [
        ("text", Kind::Text),
        ("bigint", Kind::Bigint),
        ("numeric", Kind::Numeric(None)),
        ("uuid", Kind::Uuid),
        ("date", Kind::Date),
        ("timestamptz", Kind::Timestamptz),
        ("boolean", Kind::Boolean),
        ("bytea", Kind::Bytea),
        ("inet", Kind::Inet),
        ("jsonb", Kind::Jsonb),
    ];

    fn parse(word: &str) -> Result<Kind, String> {
        if let Some(scale) = word.strip_prefix("numeric(").and_then(|rest| rest.strip_suffix(')')) {
            let scale = scale.trim().parse().ok().filter(|scale| *scale <= 1000);
            return scale.map(|scale| Kind::Numeric(Some(scale))).ok_or_else(|| {
                format!("{word:?} names no number of digits behind the point: write numeric(2), or numeric")
            });
        }
        let found = Kind::ALL.into_iter().find(|(known, _)| *known == word);
        found.map(|(_, kind)| kind).ok_or_else(|| {
            let known: Vec<&str> = Kind::ALL.iter().map(|(word, _)| *word).collect();
            format!("{word:?} is no type of a field: write one of {}", known.join(", "))
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Numeric(Some(scale)) => write!(f, "numeric({scale})"),
            kind => f.write_str(Kind::ALL.iter().find(|(_, known)| known == kind).map_or("", |(word, _)| word)),
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Unit::ALL.iter().find(|(_, known)| known == self).map_or("", |(word, _)| word))
    }
}

impl KeyColumn {
    /// What its column is sent as.
    pub fn kind(&self) -> Kind {
        match &self.part {
            Part::Field(_, kind) => *kind,
            Part::Bucket { unit, .. } => unit.kind(),
        }
    }
}

impl fmt::Display for KeyColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.part {
            Part::Field(name, kind) => write!(f, "{} = {name}: {kind}", self.column),
            Part::Bucket { unit, field, zone } => {
                write!(f, "{} = {unit}({}, {zone})", self.column, field.as_deref().unwrap_or_default())
            }
        }
    }
}

impl fmt::Display for ValueColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}(", self.column, self.merge.name())?;
        if let Some(Field { name, kind, is_optional }) = &self.field {
            write!(f, "{name}{}: {kind}", if *is_optional { "?" } else { "" })?;
        }
        f.write_str(")")?;
        self.by.as_ref().map_or(Ok(()), |by| write!(f, " by {by}"))
    }
}

impl ValueColumn {
    /// How its field is read; text where it has none, which is so for `count()`.
    pub fn kind(&self) -> Kind {
        self.field.as_ref().map_or(Kind::Text, |field| field.kind)
    }
}

impl Write {
    /// Its word in the configuration.
    pub fn word(self) -> &'static str {
        match self {
            Write::Merge => "merge",
            Write::Insert => "insert",
            Write::DeleteZero => "delete_zero",
        }
    }
}

impl Target {
    /// What defines it for the ledger, beside the table: everything that decides what an entry's effect is.
    pub fn mapping(&self) -> String {
        let updated_at = self.updated_at.as_ref().map_or("-", Identifier::as_str);
        format!(
            "keys=\"{}\" values=\"{}\" updated_at={updated_at} write={}",
            listed(&self.keys),
            listed(&self.values),
            self.write.word()
        )
    }

    /// Its columns, each once, in the order in which they are written.
    pub fn columns(&self) -> Vec<&Identifier> {
        let mut columns: Vec<&Identifier> = self.keys.iter().map(|key| &key.column).collect();
        for value in &self.values {
            columns.push(&value.column);
            columns.extend(value.by.as_ref().filter(|by| !columns.contains(by)));
        }
        columns.extend(&self.updated_at);
        columns
    }

    /// The fields of an entry that feed it.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        let of_keys = self.keys.iter().filter_map(|key| match &key.part {
            Part::Field(name, _) => Some(name.as_str()),
            Part::Bucket { field, .. } => field.as_deref(),
        });
        of_keys.chain(self.values.iter().filter_map(|value| value.field.as_ref().map(|field| field.name.as_str())))
    }

    /// What contradicts itself in it, as the end of a sentence that begins with the pipeline's name.
    pub fn contradiction(&self) -> Option<String> {
        let names: Vec<&Identifier> = (self.keys.iter().map(|key| &key.column))
            .chain(self.values.iter().map(|value| &value.column))
            .chain(&self.updated_at)
            .collect();
        if let Some(twice) = names.iter().enumerate().find(|(n, name)| names[..*n].contains(name)) {
            return Some(format!("uses the column {} twice; give each value a column of its own", twice.1));
        }
        for value in &self.values {
            let Some(by) = &value.by else { continue };
            if names.contains(&by) {
                return Some(format!("uses the column {by} as a value and as a version; write another one behind by"));
            }
            let sharers = || self.values.iter().filter(|other| other.by.as_ref() == Some(by));
            let is_alike = |other: &ValueColumn| {
                other.merge == value.merge && other.field.as_ref().is_none_or(|field| !field.is_optional)
            };
            if sharers().count() > 1 && (value.merge == Merge::JsonbMerge || !sharers().all(is_alike)) {
                return Some(format!(
                    "shares the version {by} between values that do not change together; only values of the same operator whose fields each \
                     entry has may share one, so write another one behind by"
                ));
            }
        }
        if self.write == Write::DeleteZero
            && let Some(value) = self.values.iter().find(|value| !value.merge.is_additive())
        {
            return Some(format!(
                "has write = \"delete_zero\" and the value {}, which would be forgotten with its row; only sums and counts may stand in it, so write \
                 \"merge\"",
                value.column
            ));
        }
        None
    }
}

/// As the configuration writes them, separated by commas.
fn listed(items: &[impl fmt::Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_contradicts_itself_is_said() {
        let target = |keys: &str, values: &str, write| Target {
            table: Table::parse("t").expect("valid"),
            keys: parse_keys(keys).expect("keys"),
            values: parse_values(values).expect("values"),
            updated_at: None,
            write,
        };
        let said = |keys, values, write| target(keys, values, write).contradiction().unwrap_or_default();
        assert_eq!(said("a", "b = sum(x), p = last(p) by v, q = last(q) by v", Write::Merge), "");
        assert!(said("a, a", "b = sum(x)", Write::Merge).contains("column a twice"));
        assert!(said("a", "a = sum(x)", Write::Merge).contains("column a twice"));
        assert!(said("a", "p = last(p) by a", Write::Merge).contains("as a value and as a version"));
        assert!(said("a", "p = last(p) by v, q = first(q) by v", Write::Merge).contains("do not change together"));
        assert!(said("a", "p = last(p) by v, q = last(q?) by v", Write::Merge).contains("do not change together"));
        let behind_another = "n = count(), p = last(p) by v, q = first(q) by v";
        assert!(said("a", behind_another, Write::Merge).contains("do not change together"));
        let objects = "n = count(), p = jsonb_merge(p) by v, q = jsonb_merge(q) by v";
        assert!(said("a", objects, Write::Merge).contains("do not change together"));
        assert!(
            said("a", "n = count(), m = max(x)", Write::DeleteZero).contains("the value m, which would be forgotten")
        );
    }
}
