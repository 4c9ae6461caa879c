//! Table: a pipeline proposed from a table that is there. Pure.
//!
//! Takes the table's outline; gives a draft that fits it as it is. Fails where nothing identifies a row, or nothing can be merged.

use super::draft::Draft;
use crate::merge::Merge;
use crate::model::pipeline::{Identifier, Table};
use crate::model::target::{Field, KeyColumn, Kind, Part, ValueColumn};
use crate::target::definition::{sql_name, sql_table};
use crate::target::{Outline, OutlineColumn};

/// What its version's name ends with.
pub(super) const VERSION: &str = "_version";

/// Columns that take the time of the last flush, by their usual names.
const STAMPS: [&str; 4] = ["updated_at", "modified_at", "last_updated", "flushed_at"];

/// A pipeline for this table. The error says what to do.
pub(super) fn draft(name: &str, stream: &str, table: &Table, outline: &Outline) -> Result<Draft, String> {
    let column = |name: &str| outline.columns.iter().find(|column| column.name == name);
    let keys = keys(outline).ok_or_else(|| {
        format!(
            "{table} has no unique index of columns that an entry could name: create unique index on {} (…), over the columns that identify a row",
            sql_table(table)
        )
    })?;
    let made_from =
        format!("Made from the table {table}: entries of the stream have a field for each column, by its name.");
    let mut draft = Draft::of(name, stream, table, made_from);
    for (name, column) in keys.iter().filter_map(|name| Some((identifier(name)?, column(name)?))) {
        match column.kind {
            Kind::Date => draft.of_keys.push(format!(
                "{name}: where entries have a moment instead of a day, write {name} = day(at, UTC), or week or month, with the field of the moment; \
                 {name} = day() takes the time at which the entry was added."
            )),
            Kind::Timestamptz => draft.of_keys.push(format!("{name}: for a row an hour or a minute write {name} = hour(at, UTC) or minute(at, UTC).")),
            _ => {}
        }
        let kind = if let Kind::Jsonb = column.kind { Kind::Text } else { column.kind };
        draft.keys.push(KeyColumn { part: Part::Field(name.to_string(), kind), column: name });
    }
    for column in outline.columns.iter().filter(|column| !keys.contains(&column.name)) {
        value(&mut draft, outline, column);
    }
    if draft.values.is_empty() {
        return Err(format!(
            "{table} has no column beside its keys that entries can be merged into: alter table {} add column entries bigint not null default 0",
            sql_table(table)
        ));
    }
    Ok(draft)
}

fn identifier(name: &str) -> Option<Identifier> {
    Identifier::parse(name).ok()
}

/// The primary key, or the first unique index, whose columns entries can name.
fn keys(outline: &Outline) -> Option<Vec<String>> {
    let is_named = |name: &String| {
        identifier(name).is_some() && outline.columns.iter().any(|column| column.name == *name && !column.is_made)
    };
    outline.unique.iter().find(|columns| columns.iter().all(is_named)).cloned()
}

/// Adds a column's value, or what is to be chosen.
fn value(draft: &mut Draft, outline: &Outline, column: &OutlineColumn) {
    let OutlineColumn { name: plain, sql_type, kind, .. } = column;
    let Some(name) = identifier(plain) else {
        return draft.of_values.push(format!("The column {plain:?} is left out: its name is no plain SQL name."));
    };
    if column.is_made {
        return;
    }
    let is_time = *kind == Kind::Timestamptz || sql_type.starts_with("timestamp");
    if is_time && draft.updated_at.is_none() && STAMPS.contains(&plain.as_str()) {
        draft.updated_at = Some(name);
        return;
    }
    // A version belongs to its value.
    if plain.strip_suffix(VERSION).is_some_and(|of| outline.columns.iter().any(|column| column.name == of)) {
        return;
    }
    let version = |wanted: &str| {
        let by = format!("{plain}{VERSION}");
        let has = outline.columns.iter().any(|column| column.name == by && column.sql_type == wanted);
        identifier(&by).filter(|_| has)
    };
    let required = column.refuses_null;
    let (merge, by) = match kind {
        Kind::Bigint | Kind::Numeric(_) => (Merge::Sum, None),
        Kind::Date | Kind::Timestamptz => (Merge::Max, None),
        Kind::Boolean => (Merge::Or, None),
        Kind::Jsonb if version("jsonb").is_some() => (Merge::JsonbMerge, version("jsonb")),
        _ if version("numeric").is_some() => (Merge::Last, version("numeric")),
        _ => (Merge::SetIfNull, None),
    };
    let choice = match merge {
        Merge::Sum => {
            format!("{name}: sum adds; write min or max to keep an extreme, or {name} = count() to count entries.")
        }
        Merge::Max => format!("{name}: max keeps the latest; write min for the first."),
        Merge::Or => format!("{name}: or says whether one entry was true; write and for all."),
        Merge::SetIfNull => {
            let holds = if *kind == Kind::Jsonb { "numeric, or jsonb for jsonb_merge" } else { "numeric" };
            let by = identifier(&format!("{plain}{VERSION}")).map_or_else(|| "a column".into(), |by| sql_name(&by));
            let left = if required { "set_if_null keeps what is flushed first" } else { "it is left out" };
            format!(
                "{name} ({sql_type}): {left}. For the newest value add the column {by} of type {holds} and write {name} = last({name}{}) by {by}.",
                typed(*kind)
            )
        }
        _ => String::new(),
    };
    if !choice.is_empty() {
        draft.of_values.push(choice);
    }
    // Without a version only the flush that comes first decides, which few want: it stays out unless a row cannot do without.
    if merge == Merge::SetIfNull && (!required || column.has_default) {
        return;
    }
    let field = Field {
        name: name.to_string(),
        kind: *kind,
        is_optional: !required || merge.is_additive() && column.has_default,
    };
    draft.values.push(ValueColumn { column: name, merge, field: Some(field), by });
}

fn typed(kind: Kind) -> String {
    if kind == Kind::Text { String::new() } else { format!(": {kind}") }
}
