//! Definition: the SQL that makes a table for a target. Pure.
//!
//! Takes a [`Target`]; gives statements as somebody would write them, each name quoted only where SQL needs it. It cannot fail.

use crate::merge::Merge;
use crate::model::pipeline::{Identifier, Table};
use crate::model::target::{Kind, Target, ValueColumn};

/// How full pages are left, so that an updated row finds room beside its former version.
pub(super) const FILLFACTOR: u8 = 70;

/// Words that cannot be a column's or a table's name without quotes: those that PostgreSQL 18 calls reserved, and those that only name functions or types.
const RESERVED: &str = " all analyse analyze and any array as asc asymmetric authorization between bigint binary bit boolean both case cast \
    char character check coalesce collate collation column concurrently constraint create cross current_catalog current_date current_role \
    current_schema current_time current_timestamp current_user dec decimal default deferrable desc distinct do else end except exists extract \
    false fetch float for foreign freeze from full grant greatest group grouping having ilike in initially inner inout int integer intersect \
    interval into is isnull join json_array json_arrayagg json_exists json_object json_objectagg json_query json_scalar json_serialize \
    json_table json_value lateral leading least left like limit localtime localtimestamp merge_action national natural nchar none normalize \
    not notnull null nullif numeric offset on only or order out outer overlaps overlay placing position precision primary real references \
    returning right row select session_user setof similar smallint some substring symmetric system_user table tablesample then time timestamp \
    to trailing treat trim true union unique user using values varchar variadic verbose when where window with xmlattributes xmlconcat \
    xmlelement xmlexists xmlforest xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable ";

/// A name as SQL needs it, in quotes only where it must be.
pub fn sql_name(name: &Identifier) -> String {
    let text = name.as_str();
    let is_plain = !text.bytes().any(|byte| byte.is_ascii_uppercase()) && !RESERVED.contains(&format!(" {text} "));
    if is_plain { text.to_owned() } else { name.quoted() }
}

/// A table's name as SQL needs it.
pub fn sql_table(table: &Table) -> String {
    format!("{}.{}", sql_name(&table.schema), sql_name(&table.name))
}

/// The type that holds a field of this kind.
pub(super) fn type_of_kind(kind: Kind) -> String {
    match kind {
        // A scale in the column would round what the configuration lets through later.
        Kind::Numeric(_) => "numeric".into(),
        kind => kind.to_string(),
    }
}

/// The type that holds what an operator makes.
pub(super) fn type_of_value(value: &ValueColumn) -> String {
    match (value.merge, &value.field) {
        (Merge::Count, _) | (_, None) => "bigint".into(),
        (Merge::Distinct, _) => "bytea".into(),
        (_, Some(field)) => type_of_kind(field.kind),
    }
}

/// A value's column, as it is defined.
pub(super) fn value_definition(value: &ValueColumn) -> String {
    let zero = if value.merge.is_additive() { " not null default 0" } else { "" };
    format!("{} {}{zero}", sql_name(&value.column), type_of_value(value))
}

/// The columns of a target, each with its definition.
pub(super) fn columns(target: &Target) -> Vec<(&Identifier, String)> {
    let mut columns: Vec<(&Identifier, String)> = Vec::new();
    for key in &target.keys {
        columns.push((&key.column, format!("{} {} not null", sql_name(&key.column), type_of_kind(key.kind()))));
    }
    for value in &target.values {
        columns.push((&value.column, value_definition(value)));
        if let (Some(by), Some(holds)) = (&value.by, value.merge.needs_version())
            && !columns.iter().any(|(column, _)| *column == by)
        {
            columns.push((by, format!("{} {holds}", sql_name(by))));
        }
    }
    columns.extend(target.updated_at.iter().map(|column| (column, format!("{} timestamptz", sql_name(column)))));
    columns
}

/// The statement that makes the table: the keys are its primary key, and pages keep room for updated rows.
pub fn create_table(target: &Target) -> String {
    let columns: String = columns(target).into_iter().map(|(_, definition)| format!("    {definition},\n")).collect();
    let keys: Vec<String> = target.keys.iter().map(|key| sql_name(&key.column)).collect();
    format!(
        "create table {} (\n{columns}    primary key ({})\n) with (fillfactor = {FILLFACTOR})",
        sql_table(&target.table),
        keys.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::target::{Write, parse_keys, parse_values};

    #[test]
    fn a_table_has_its_keys_its_values_and_their_versions() {
        let target = Target {
            table: Table::parse("usage").expect("valid"),
            keys: parse_keys("tenant: uuid, day = day(at), user").expect("keys"),
            values: parse_values(
                "n = count(), Price = sum(price: numeric(2)), path = last(path) by v, host = last(host) by v",
            )
            .expect("values"),
            updated_at: Some(Identifier::parse("updated_at").expect("valid")),
            write: Write::Merge,
        };
        assert_eq!(
            create_table(&target),
            "create table public.usage (
    tenant uuid not null,
    day date not null,
    \"user\" text not null,
    n bigint not null default 0,
    \"Price\" numeric not null default 0,
    path text,
    v numeric,
    host text,
    updated_at timestamptz,
    primary key (tenant, day, \"user\")
) with (fillfactor = 70)"
        );
    }
}
