//! Target: a table that a pipeline writes, and what each of its columns is made of. Pure.
//!
//! Takes the texts `keys` and `values` of the configuration; gives columns, each with the field of the entry that feeds it. Fails with the end of a
//! sentence that says what to write. An entry never names a column: what is written here is all that a stream can reach.
//!
//! ```text
//! keys   = "tenant: uuid, day = day(at, Europe/Berlin)"
//! values = "requests = count(), bytes = sum(bytes), slowest = max(ms?), path = last(path) by path_version"
//! ```

use std::fmt;

use super::pipeline::{Identifier, Table};
use crate::merge::Merge;

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

/// Reads the key columns. The error ends a sentence that begins with the key's name.
pub fn parse_keys(text: &str) -> Result<Vec<KeyColumn>, String> {
    items(text)?.into_iter().map(parse_key).collect()
}

/// Reads the value columns. The error ends a sentence that begins with the key's name.
pub fn parse_values(text: &str) -> Result<Vec<ValueColumn>, String> {
    items(text)?.into_iter().map(parse_value).collect()
}

/// The parts between commas, those in parentheses left together.
fn items(text: &str) -> Result<Vec<&str>, String> {
    let (mut depth, mut start, mut found) = (0usize, 0, Vec::new());
    for (at, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => {
                depth = depth.checked_sub(1).ok_or_else(|| format!("has a ) too many behind {:?}", &text[start..at]))?
            }
            ',' if depth == 0 => {
                found.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if depth > 0 {
        return Err(format!("lacks a ) in {:?}", &text[start..]));
    }
    found.push(&text[start..]);
    // A comma behind the last one is no mistake.
    let found: Vec<&str> = found.into_iter().map(str::trim).collect();
    let (last, rest) = found.split_last().unwrap_or((&"", &[]));
    let wanted = if last.is_empty() && !rest.is_empty() { rest } else { &found[..] };
    match wanted.iter().any(|item| item.is_empty()) {
        true => Err("has nothing between two commas".into()),
        false => Ok(wanted.to_vec()),
    }
}

/// `column`, `column: type`, `column = field: type` or `column = unit(field, zone)`.
fn parse_key(item: &str) -> Result<KeyColumn, String> {
    let (column, source) = match item.split_once('=') {
        Some((column, source)) => (column.trim(), source.trim()),
        None => (item.split(':').next().unwrap_or_default().trim(), item),
    };
    let column = identifier(column, item)?;
    let part = match call(source) {
        Some((word, arguments)) if !source.contains(':') => {
            let unit = Unit::ALL.into_iter().find(|(known, _)| *known == word);
            let (_, unit) = unit.ok_or_else(|| {
                format!("has {word}() in {item:?}, which is no stretch of time: write minute, hour, day, week or month")
            })?;
            let mut arguments = arguments.split(',').map(str::trim);
            let field = arguments.next().filter(|field| !field.is_empty());
            let zone = arguments.next().filter(|zone| !zone.is_empty()).unwrap_or("UTC").to_owned();
            if arguments.next().is_some() {
                return Err(format!("has more than a field and a time zone in {item:?}"));
            }
            Part::Bucket { unit, field: field.map(|field| field_name(field, item)).transpose()?, zone }
        }
        _ => {
            let (name, kind) = typed(source, Kind::Text)?;
            if kind == Kind::Jsonb {
                return Err(format!("has a jsonb in {item:?}, which cannot be a key: write text"));
            }
            Part::Field(field_name(name, item)?, kind)
        }
    };
    Ok(KeyColumn { column, part })
}

/// `column = operator(field?: type) by version`.
fn parse_value(item: &str) -> Result<ValueColumn, String> {
    let shape =
        || format!("has {item:?}, which is no value: write column = operator(field), such as bytes = sum(bytes)");
    let (column, rest) = item.split_once('=').ok_or_else(shape)?;
    let column = identifier(column.trim(), item)?;
    let close = rest.rfind(')').ok_or_else(shape)?;
    let (source, by) = (rest[..=close].trim(), rest[close + 1..].trim());
    let by = match by.strip_prefix("by ") {
        Some(by) => Some(identifier(by.trim(), item)?),
        None if by.is_empty() => None,
        None => {
            return Err(format!(
                "has {by:?} behind the operator in {item:?}: write by and the column of the version, or nothing"
            ));
        }
    };
    let (word, argument) = call(source).ok_or_else(shape)?;
    let merge = Merge::parse(word).ok_or_else(|| {
        format!("has {word}() in {item:?}, which is no operator: write one of {}", Merge::words().join(", "))
    })?;
    let field = if argument.trim().is_empty() {
        None
    } else {
        let (name, kind) = typed(argument, merge.usual_kind())?;
        let (name, is_optional) = name.strip_suffix('?').map_or((name, false), |name| (name.trim(), true));
        // Entries that lack it are not counted.
        let is_optional = is_optional || merge == Merge::Count;
        Some(Field { name: field_name(name, item)?, kind, is_optional })
    };
    match (&field, merge) {
        (None, Merge::Count) => {}
        (None, _) => return Err(format!("has no field in {item:?}: write {word}(field)")),
        (Some(field), _) => merge.accepts(field.kind).map_err(|why| format!("has {item:?}: {why}"))?,
    }
    match (&by, merge.needs_version()) {
        (None, Some(holds)) => {
            return Err(format!("lacks a version in {item:?}: write {word}(…) by and a column of type {holds}"));
        }
        (Some(_), None) => return Err(format!("has a version in {item:?}, which {word} does not need: leave it out")),
        _ => {}
    }
    Ok(ValueColumn { column, merge, field, by })
}

/// `word(arguments)`.
fn call(source: &str) -> Option<(&str, &str)> {
    let (word, rest) = source.split_once('(')?;
    Some((word.trim(), rest.strip_suffix(')')?))
}

/// `name: type`, or `name` of the usual one.
fn typed(source: &str, usual: Kind) -> Result<(&str, Kind), String> {
    match source.split_once(':') {
        Some((name, word)) => Ok((name.trim(), Kind::parse(word.trim())?)),
        None => Ok((source.trim(), usual)),
    }
}

fn identifier(name: &str, item: &str) -> Result<Identifier, String> {
    Identifier::parse(name).map_err(|bad| format!("has no column in {item:?}: {bad}"))
}

/// Whether `keys` and `values` can name a field so.
pub(crate) fn is_field_name(name: &str) -> bool {
    let is_sound = !name.is_empty() && name.len() <= 512 && !name.contains(['(', ')', ',', '?', '=', ':']);
    is_sound && !name.contains(|c: char| c.is_control() || c.is_whitespace())
}

fn field_name(name: &str, item: &str) -> Result<String, String> {
    match is_field_name(name) {
        true => Ok(name.to_owned()),
        false => Err(format!(
            "has no field in {item:?}: write the name of the entry's field, without blanks, ( ) , ? = or :"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(text: &str) -> String {
        parse_keys(text).map_or_else(|why| format!("! {why}"), |keys| listed(&keys))
    }

    fn values(text: &str) -> String {
        parse_values(text).map_or_else(|why| format!("! {why}"), |values| listed(&values))
    }

    #[test]
    fn keys_are_fields_of_a_type_or_stretches_of_time() {
        assert_eq!(keys("id"), "id = id: text");
        assert_eq!(
            keys("tenant: uuid,\n day = day(at, Europe/Berlin),"),
            "tenant = tenant: uuid, day = day(at, Europe/Berlin)"
        );
        assert_eq!(keys("h=hour(), price = p: numeric(2)"), "h = hour(, UTC), price = p: numeric(2)");
        for (bad, why) in [
            ("", "nothing between"),
            ("a,,b", "nothing between"),
            ("a b", "no column"),
            ("a = fortnight(x)", "no stretch of time"),
            ("a: money", "no type of a field"),
            ("a: jsonb", "cannot be a key"),
            ("a = day(x, UTC, y)", "more than a field"),
            ("a = day(x", "lacks a )"),
            ("a)", "too many"),
            ("a: numeric(x)", "no number of digits"),
            ("a = x y", "no field"),
        ] {
            assert!(keys(bad).starts_with("! ") && keys(bad).contains(why), "{bad}: {}", keys(bad));
        }
    }

    #[test]
    fn values_are_operators_over_fields() {
        assert_eq!(
            values("n = count(), b = sum(bytes), m = max(at?: timestamptz), p = last(path) by pv"),
            "n = count(), b = sum(bytes: bigint), m = max(at?: timestamptz), p = last(path: text) by pv"
        );
        for (bad, why) in [
            ("b", "no value"),
            ("b = sum", "no value"),
            ("b = avg(x)", "no operator"),
            ("b = sum()", "no field"),
            ("b = sum(x: uuid)", "sum"),
            ("b = last(x)", "lacks a version"),
            ("b = sum(x) by v", "does not need"),
            ("b = sum(x) as v", "behind the operator"),
        ] {
            assert!(values(bad).starts_with("! ") && values(bad).contains(why), "{bad}: {}", values(bad));
        }
    }

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

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in "[a-z(),:=? 0-9]{0,60}|.{0,40}") {
            let _ = (parse_keys(&text), parse_values(&text));
        }

        #[test]
        fn what_is_printed_is_read_back(column in "[a-z_]{1,8}", field in "[a-z.-]{1,8}", kind in 0usize..9, unit in 0usize..5) {
            let typed = KeyColumn { column: Identifier::parse(&column).expect("valid"), part: Part::Field(field.clone(), Kind::ALL[kind].1) };
            let part = Part::Bucket { unit: Unit::ALL[unit].1, field: Some(field), zone: "UTC".into() };
            let bucket = KeyColumn { part, ..typed.clone() };
            let all = vec![typed, bucket];
            prop_assert_eq!(parse_keys(&listed(&all)), Ok(all));
        }
    }
}
