//! Which stream feeds which tables, by which keys, merged how.
//!
//! A pipeline is all that Tidegate knows of an application's data. Its names come from the configuration alone, never
//! from an entry: what a producer writes can select a row, and can never select a table or a column.

use std::fmt;
use std::sync::Arc;

use super::names;
use super::shard::shard_of;
use super::slot::hash_tag;
use super::target::{Field, KeyColumn, Kind, Part, Target, ValueColumn, Write};
use crate::merge::Merge;

/// One stream flowing into one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pipeline {
    /// What the ledger, the consumer group and the operator know it by.
    pub name: String,
    /// The stream it reads; with several shards, what their streams' names begin with.
    pub stream: String,
    /// How many streams there are.
    pub shards: u16,
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
    /// The tables it writes, where it is more than a counter a row; the first one is `table`. Then these say what is written, and not `key`, `value` and
    /// their fields.
    pub tables: Vec<Target>,
    /// What the names of its counters in Valkey begin with.
    pub counters: String,
    /// Who answers for the counters in Valkey. No part of what a flush is.
    pub mode: Mode,
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

/// Who answers for the values of a pipeline's counters in Valkey.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Its producers, with INCRBY: a counter that Valkey loses begins at zero again.
    #[default]
    Plain,
    /// Tidegate, with its functions: a counter may vanish at any time and is brought back exactly.
    Managed,
}

impl Pipeline {
    /// The default pipeline: sums the `amount` of each `id` in `flush:counters` into `public.counters`.
    pub fn counters() -> Pipeline {
        Pipeline {
            name: "counters".into(),
            stream: names::DEFAULT_STREAM.into(),
            shards: 1,
            table: Table { schema: Identifier::known("public"), name: Identifier::known("counters") },
            key: Identifier::known("id"),
            value: Identifier::known("value"),
            updated_at: Some(Identifier::known("updated_at")),
            key_field: "id".into(),
            value_field: "amount".into(),
            tables: Vec::new(),
            counters: names::DEFAULT_COUNTERS.into(),
            mode: Mode::Plain,
            delivery: Delivery::Group,
        }
    }

    /// Its shards.
    pub fn shards(&self) -> Vec<Shard> {
        (0..self.shards.max(1)).map(|number| self.shard(self.stream_of(number))).collect()
    }

    /// The shard that is this stream: one of its own, or one that it had when there were more or fewer.
    pub fn shard(&self, stream: String) -> Shard {
        Shard { pipeline: Arc::new(Pipeline { stream: stream.clone(), shards: 1, ..self.clone() }), stream }
    }

    /// The stream of a shard. One stream alone has the plain name.
    pub fn stream_of(&self, shard: u16) -> String {
        if self.shards > 1 { names::sharded(&self.stream, shard) } else { self.stream.clone() }
    }

    /// The counter of a key. It bears the hash tag of the stream that takes its deltas, so that both lie in one slot of a cluster; where
    /// that stream has none, they do not.
    pub fn counter_of(&self, id: &str) -> String {
        names::counter_below(&self.counters_of(shard_of(id, self.shards)), id)
    }

    /// Whether a counter and the stream that takes its deltas lie in one slot of a cluster: then one script can write both.
    pub fn is_in_one_slot(&self) -> bool {
        hash_tag(&self.stream_of(0)).is_some()
    }

    /// What the names of a shard's counters begin with.
    pub fn counters_of(&self, shard: u16) -> String {
        names::counters_beside(&self.counters, &self.stream_of(shard))
    }

    /// The keys of a shard whose counters Tidegate answers for.
    pub fn keys_of(&self, shard: u16) -> ShardKeys {
        let (stream, counters) = (self.stream_of(shard), self.counters_of(shard));
        let (index, state) = (names::dirty_index(&stream, &self.name), names::shard_state(&stream, &self.name));
        ShardKeys { stream, index, state, counters, group: self.group() }
    }

    /// Whether Tidegate answers for the values of its counters.
    pub fn is_managed(&self) -> bool {
        self.mode == Mode::Managed
    }

    /// Whether this stream is none of its shards, and was one when it had another number of them.
    pub fn had(&self, stream: &str) -> bool {
        let is_one = stream == self.stream || names::shard_number(&self.stream, stream).is_some();
        is_one && !(0..self.shards.max(1)).any(|number| self.stream_of(number) == stream)
    }

    /// Whether its own table has a counter a row: one text as the key, one sum as the value. Only then there is a counter in Valkey to each row.
    pub fn is_counter(&self) -> bool {
        self.tables.first().is_none_or(|first| *first == self.counter_target())
    }

    /// All tables it writes, in the order in which they are written.
    pub fn targets(&self) -> Vec<Target> {
        if self.tables.is_empty() { vec![self.counter_target()] } else { self.tables.clone() }
    }

    fn counter_target(&self) -> Target {
        let field = Field { name: self.value_field.clone(), kind: Kind::Bigint, is_optional: false };
        Target {
            table: self.table.clone(),
            keys: vec![KeyColumn { column: self.key.clone(), part: Part::Field(self.key_field.clone(), Kind::Text) }],
            values: vec![ValueColumn { column: self.value.clone(), merge: Merge::Sum, field: Some(field), by: None }],
            updated_at: self.updated_at.clone(),
            write: Write::Merge,
        }
    }

    /// What defines a flush beside names and table, for the ledger and for people: columns, fields, merge operators, further tables.
    pub fn mapping(&self) -> String {
        if let [first, others @ ..] = &self.tables[..] {
            let also = others.iter().map(|target| format!(" also {}: {}", target.table, target.mapping()));
            return first.mapping() + &also.collect::<String>();
        }
        let updated_at = self.updated_at.as_ref().map_or("-", Identifier::as_str);
        format!(
            "key={} value={} updated_at={updated_at} key_field={:?} value_field={:?} merge=sum",
            self.key, self.value, self.key_field, self.value_field
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
    /// The pipeline, as if this were its only stream.
    pub pipeline: Arc<Pipeline>,
    /// The stream's key in Valkey.
    pub stream: String,
}

/// The keys of one shard whose counters Tidegate answers for; in a cluster all of them lie in one slot, where there are several shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardKeys {
    /// Its stream.
    pub stream: String,
    /// Its dirty counters: a hash, each with the id of its last entry.
    pub index: String,
    /// What is known of it: a hash.
    pub state: String,
    /// What the names of its counters begin with.
    pub counters: String,
    /// The consumer group whose frontier tells what is settled.
    pub group: String,
}

impl ShardKeys {
    /// The key of a counter's value.
    pub fn counter(&self, id: &str) -> String {
        names::counter_below(&self.counters, id)
    }

    /// The key of the lease to bring it.
    pub fn lease(&self, id: &str) -> String {
        names::counter_lease(&self.counters, id)
    }

    /// The id of a counter of this shard, by the key of its value.
    pub fn id_of<'a>(&self, counter: &'a str) -> Option<&'a str> {
        counter.strip_prefix(&self.counters)?.strip_prefix(':')
    }
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

    /// Both names as SQL wants them.
    pub fn quoted(&self) -> String {
        format!("{}.{}", self.schema.quoted(), self.name.quoted())
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
    fn shards_have_names_of_their_own_and_one_alone_has_the_plain_one() {
        let of = |shards| Pipeline { shards, ..Pipeline::counters() };
        let streams = |shards| of(shards).shards().into_iter().map(|shard| shard.stream).collect::<Vec<_>>();
        assert_eq!(streams(1), ["flush:counters"]);
        assert_eq!(streams(3), ["flush:counters:{0}", "flush:counters:{1}", "flush:counters:{2}"]);
        assert_eq!((of(1).counter_of("a"), of(4).counter_of("a")), ("counter:a".into(), "counter:{3}:a".into()));
        let tagged = Pipeline { stream: "flush:{likes}".into(), ..of(1) };
        assert_eq!((tagged.counter_of("a"), tagged.is_in_one_slot()), ("counter:{likes}:a".into(), true));
        assert!(of(2).is_in_one_slot() && !of(1).is_in_one_slot());
        assert!(of(2).had("flush:counters") && of(2).had("flush:counters:{2}") && of(1).had("flush:counters:{0}"));
        for other in
            ["flush:counters:{1}", "flush:counters:{x}", "flush:other", "flush:counters:{01}", "flush:counters:1"]
        {
            assert!(!of(2).had(other), "{other}");
        }
    }

    #[test]
    fn all_keys_of_a_shard_bear_its_tag_and_a_former_shard_keeps_its_counters() {
        let pipeline = Pipeline { shards: 4, ..Pipeline::counters() };
        let keys = pipeline.keys_of(3);
        let all = [&keys.stream, &keys.index, &keys.state, &keys.counter("a"), &keys.lease("a")].map(String::clone);
        assert!(all.iter().all(|key| key.split('{').nth(1).is_some_and(|rest| rest.starts_with("3}"))), "{all:?}");
        assert_eq!(keys.id_of("counter:{3}:a:b"), Some("a:b"));
        assert_eq!(pipeline.shard("flush:counters:{3}".into()).pipeline.keys_of(0), keys);
        let one = Pipeline::counters();
        assert_eq!(one.shard("flush:counters:{3}".into()).pipeline.counter_of("a"), "counter:{3}:a");
        assert_eq!(pipeline.shard("flush:counters".into()).pipeline.counter_of("a"), "counter:a");
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
