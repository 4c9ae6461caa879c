//! Which stream feeds which table, by which key, merged how.
//!
//! A pipeline is all that Tidegate knows of an application's data. Its names come from the configuration alone, never
//! from an entry: what a producer writes can select a row, and can never select a table or a column.

use std::fmt;
use std::sync::Arc;

use super::names;
use crate::merge::Merge;

/// One stream flowing into one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pipeline {
    /// What the ledger, the consumer group and the operator know it by.
    pub name: String,
    /// The stream it reads.
    pub stream: String,
    /// The table it writes.
    pub table: Table,
    /// The column that identifies a row; it needs a unique index of its own.
    pub key: Identifier,
    /// The column that a delta is merged into.
    pub value: Identifier,
    /// The column that takes the time of the last flush, if there is one.
    pub updated_at: Option<Identifier>,
    /// The entry's field that holds the row's key.
    pub key_field: String,
    /// The entry's field that holds the delta.
    pub value_field: String,
    /// How a delta meets the value that is there.
    pub merge: Merge,
    /// How its entries are given out. No part of what a flush is: it may differ between daemons and change while they run.
    pub delivery: Delivery,
}

/// How a stream's entries are given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Delivery {
    /// By its consumer group: any number of workers share it, and Valkey keeps a mark for each entry until it is settled.
    #[default]
    Group,
    /// To one process at a time, which reads on from the group's position: Valkey keeps one position, and nothing for each entry.
    Exclusive,
}

impl Pipeline {
    /// The default pipeline: sums the `amount` of each `id` in `flush:counters` into `public.counters`.
    pub fn counters() -> Pipeline {
        Pipeline {
            name: "counters".into(),
            stream: names::DEFAULT_STREAM.into(),
            table: Table { schema: Identifier::known("public"), name: Identifier::known("counters") },
            key: Identifier::known("id"),
            value: Identifier::known("value"),
            updated_at: Some(Identifier::known("updated_at")),
            key_field: "id".into(),
            value_field: "amount".into(),
            merge: Merge::Sum,
            delivery: Delivery::Group,
        }
    }

    /// Its shards: one, as long as a pipeline has one stream.
    pub fn shards(&self) -> Vec<Shard> {
        vec![Shard { pipeline: Arc::new(self.clone()), number: 0, stream: self.stream.clone() }]
    }

    /// What defines a flush beside names and table, for the ledger and for people: columns, fields, merge operator.
    pub fn mapping(&self) -> String {
        let updated_at = self.updated_at.as_ref().map_or("-", Identifier::as_str);
        format!(
            "key={} value={} updated_at={updated_at} key_field={:?} value_field={:?} merge={}",
            self.key,
            self.value,
            self.key_field,
            self.value_field,
            self.merge.name()
        )
    }

    /// Its consumer group.
    pub fn group(&self) -> String {
        names::group(&self.name)
    }
}

impl Delivery {
    /// Its word in the configuration.
    pub fn word(self) -> &'static str {
        match self {
            Delivery::Group => "group",
            Delivery::Exclusive => "exclusive",
        }
    }
}

/// One stream of a pipeline: what a ledger lane stands for, and what one worker reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// The pipeline.
    pub pipeline: Arc<Pipeline>,
    /// Which of its streams, from 0.
    pub number: u16,
    /// The stream's key in Valkey.
    pub stream: String,
}

/// A table, always named with its schema, so that no `search_path` can redirect it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table {
    /// The schema it lives in.
    pub schema: Identifier,
    /// Its name within the schema.
    pub name: Identifier,
}

impl Table {
    /// Reads `schema.table`, or `table` alone for one in `public`.
    pub fn parse(text: &str) -> Result<Table, BadIdentifier> {
        let (schema, name) = text.split_once('.').unwrap_or(("public", text));
        Ok(Table { schema: Identifier::parse(schema)?, name: Identifier::parse(name)? })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// A name that may stand in SQL: `[A-Za-z_][A-Za-z0-9_]{0,62}`, nothing else.
///
/// [`Display`](fmt::Display) gives the plain name, for people; [`Identifier::quoted`] the one for SQL.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identifier(String);

impl Identifier {
    /// PostgreSQL cuts longer names off, and a name that is cut off names something else.
    const MAX_LENGTH: usize = 63;

    /// Accepts a plain name. Nothing is ever "already quoted": a quote is refused like any other foreign character.
    pub fn parse(text: &str) -> Result<Identifier, BadIdentifier> {
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        let goes_on_well = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if starts_well && goes_on_well && text.len() <= Self::MAX_LENGTH {
            Ok(Identifier(text.to_owned()))
        } else {
            Err(BadIdentifier(text.to_owned()))
        }
    }

    /// A name from this source code.
    fn known(name: &'static str) -> Identifier {
        Identifier(name.into())
    }

    /// The name as SQL wants it: in double quotes, so that case and keywords are taken as they are.
    pub fn quoted(&self) -> String {
        format!("\"{}\"", self.0.replace('"', "\"\""))
    }

    /// The plain name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name that may not stand in SQL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no plain SQL name: use a letter or underscore, then letters, digits or underscores, 63 at most")]
pub struct BadIdentifier(pub String);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn foreign_characters_are_refused_however_they_are_dressed() {
        for bad in ["", "1a", "a b", "a\"b", "\"a\"", "a;drop table x", "a.b", "é", "a\0", "a-b"] {
            assert!(Identifier::parse(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(Identifier::parse(&"a".repeat(63)).is_ok());
        assert!(Identifier::parse(&"a".repeat(64)).is_err());
    }

    #[test]
    fn a_table_without_a_schema_is_in_public() {
        assert_eq!(Table::parse("counters"), Table::parse("public.counters"));
        assert!(Table::parse("a.b.c").is_err());
    }

    proptest! {
        #[test]
        fn quoting_is_injective_and_yields_one_quoted_name(a in "[A-Za-z_][A-Za-z0-9_]{0,62}", b in "[A-Za-z_][A-Za-z0-9_]{0,62}") {
            let (x, y) = (Identifier::parse(&a).expect("valid"), Identifier::parse(&b).expect("valid"));
            prop_assert_eq!(a == b, x.quoted() == y.quoted());
            prop_assert_eq!(x.quoted(), format!("\"{a}\""));
        }

        #[test]
        fn what_parses_is_what_the_rule_says(text in ".{0,70}") {
            let rule = text.len() <= 63
                && text.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            prop_assert_eq!(Identifier::parse(&text).is_ok(), rule);
        }
    }
}
