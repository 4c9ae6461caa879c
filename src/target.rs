//! Target: does a pipeline's table fit what is written into it, and how are its keys told apart?
//!
//! Takes a pipeline; gives the form of its keys where the table fits, or everything that does not fit with the statements
//! that mend it ([`Unfit`]). Fails with what PostgreSQL says.

mod catalog;

use std::fmt;

use sqlx::postgres::PgConnection;

use self::catalog::{Column, Index, Relation};
use crate::model::pipeline::Pipeline;

/// How keys that are one to PostgreSQL are made one in a flush.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyForm {
    /// Keys are equal if, and only if, their bytes are: `text` and `varchar` under a deterministic collation.
    Bytes,
    /// PostgreSQL decides: the type, and collation, that a key is cast to before keys are compared.
    Typed(String),
}

/// What was found of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checked {
    /// It can be fed.
    Fits(KeyForm),
    /// It cannot.
    Unfit(Unfit),
}

/// Why a pipeline's table cannot be fed: everything that was found, each with what mends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// The table.
    pub table: String,
    /// One sentence each.
    pub findings: Vec<String>,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {}", self.table)?;
        match &self.findings[..] {
            [one] => write!(f, " {one}"),
            several => several.iter().try_for_each(|finding| write!(f, "\n  - {finding}")),
        }
    }
}

impl std::error::Error for Unfit {}

/// Makes sure that a pipeline's table is what its configuration says.
pub async fn check_table(connection: &mut PgConnection, pipeline: &Pipeline) -> Result<Checked, sqlx::Error> {
    let found = catalog::relation(connection, pipeline).await?;
    let table = pipeline.table.to_string();
    let findings = match &found {
        None => vec!["does not exist: create it, or run `tidegate migrate` for the default one".into()],
        Some(relation) if kind_refused(relation).is_some() => kind_refused(relation).into_iter().collect(),
        Some(relation) => findings(relation, pipeline),
    };
    Ok(match found {
        Some(relation) if findings.is_empty() => Checked::Fits(key_form(&relation, pipeline)),
        _ => Checked::Unfit(Unfit { table, findings }),
    })
}

/// What kind of relation cannot be upserted into at all; nothing else needs to be said of it.
fn kind_refused(relation: &Relation) -> Option<String> {
    let what = match relation.kind.as_str() {
        "r" | "p" => return None,
        "v" => "is a view: name the table behind it, for only a table has the unique index that an upsert needs",
        "m" => "is a materialized view, which cannot be written: name a table",
        "f" => {
            "is a foreign table: PostgreSQL cannot upsert into one, and two servers do not commit as one; name a local table"
        }
        _ => "is not a table",
    };
    Some(what.to_owned())
}

fn findings(relation: &Relation, pipeline: &Pipeline) -> Vec<String> {
    let mut findings = Vec::new();
    let table = &relation.sql_name;
    for rule in &relation.rules {
        findings.push(format!(
            "has the rule {rule}, and PostgreSQL upserts into no table with a rule: drop rule {rule} on {table}"
        ));
    }
    if relation.unlogged {
        findings.push(format!(
            "is unlogged, or a partition of it is: after a crash it is empty, and the ledger still says flushed: \
             alter table {table} set logged (each partition by itself)"
        ));
    }
    if relation.foreign_partitions {
        findings.push("has a partition that is a foreign table: PostgreSQL cannot upsert into it; detach it".into());
    }
    if relation.row_security {
        findings.push(format!(
            "has row security that applies to {role}: each policy could refuse or hide rows; \
             alter table {table} disable row level security, or alter role {role} bypassrls",
            role = relation.role
        ));
    }
    for column in &relation.mandatory {
        findings.push(format!(
            "has the column {column} that is NOT NULL without a default, so no row can be inserted: \
             alter table {table} alter column {column} set default …, or alter column {column} drop not null"
        ));
    }
    let column = |name: &str| relation.columns.iter().find(|c| c.name == name);
    let (key, value) = (column(pipeline.key.as_str()), column(pipeline.value.as_str()));
    for name in [Some(&pipeline.key), Some(&pipeline.value), pipeline.updated_at.as_ref()].into_iter().flatten() {
        match column(name.as_str()) {
            None => findings.push(format!("has no column {name}: add it, or correct the pipeline's configuration")),
            Some(column) => findings.extend(column_refused(table, column)),
        }
    }
    if let Some(key) = key {
        findings.extend(key_refused(table, key));
        if !relation.indexes.iter().any(Index::is_usable) {
            findings.push(no_index(table, key, &relation.indexes));
        }
    }
    findings.extend(value.and_then(|value| value_refused(table, value)));
    if let Some(stamp) = pipeline.updated_at.as_ref().and_then(|name| column(name.as_str()))
        && !matches!(stamp.base.as_str(), "pg_catalog.timestamptz" | "pg_catalog.timestamp")
    {
        findings.push(format!(
            "keeps the time of the last flush in {name}, which is {declared}: alter table {table} alter column {name} \
             type timestamptz using now(), or name another column",
            name = stamp.sql_name,
            declared = stamp.declared
        ));
    }
    findings.extend(privilege_missing(relation, pipeline));
    findings
}

/// What no column that is written may be.
fn column_refused(table: &str, column: &Column) -> Option<String> {
    let name = &column.sql_name;
    if column.generated {
        return Some(format!("computes {name} itself (generated): name a column that can be written"));
    }
    column
        .identity_always
        .then(|| format!("gives {name} out itself: alter table {table} alter column {name} set generated by default"))
}

/// Types whose input drops a part of the key without an error, so that two keys would become one row.
fn key_refused(table: &str, key: &Column) -> Option<String> {
    let Column { sql_name: name, declared, .. } = key;
    matches!(
        key.base.as_str(),
        "pg_catalog.name" | "pg_catalog.char" | "pg_catalog.float4" | "pg_catalog.float8" | "pg_catalog.money"
    )
    .then(|| {
        format!(
            "has the key {name} of type {declared}, which does not keep every key apart: \
             alter table {table} alter column {name} type text"
        )
    })
}

/// Types that cannot hold every sum exactly. Where a sum is too large for an exact one, PostgreSQL says so.
fn value_refused(table: &str, value: &Column) -> Option<String> {
    let Column { sql_name: name, declared, .. } = value;
    let exact = match value.base.as_str() {
        "pg_catalog.int2" | "pg_catalog.int4" | "pg_catalog.int8" => true,
        "pg_catalog.numeric" => value.typmod < 0 || numeric_scale(value.typmod) >= 0,
        _ => false,
    };
    (!exact).then(|| {
        format!(
            "has the value {name} of type {declared}, which cannot hold every sum exactly: \
             alter table {table} alter column {name} type bigint using {name}::numeric::bigint"
        )
    })
}

/// The scale in a type modifier of `numeric`: its lowest 11 bits, signed (PostgreSQL, numeric.c).
fn numeric_scale(typmod: i32) -> i32 {
    (((typmod - 4) & 0x7ff) ^ 1024) - 1024
}

fn no_index(table: &str, key: &Column, indexes: &[Index]) -> String {
    let near: Vec<String> =
        indexes.iter().filter_map(|i| Some(format!("{} does not serve: {}", i.name, i.flaw?))).collect();
    let near = if near.is_empty() { String::new() } else { format!(" ({})", near.join("; ")) };
    format!("has no unique index on {key} alone{near}: create unique index on {table} ({key})", key = key.sql_name)
}

fn privilege_missing(relation: &Relation, pipeline: &Pipeline) -> Vec<String> {
    let (mut missing, role) = (Vec::new(), &relation.role);
    if !relation.schema_usage {
        missing.push(format!(
            "cannot be reached by {role}: grant usage on schema {} to {role}",
            pipeline.table.schema.quoted()
        ));
    }
    let lacks = |name: &str| {
        let is_key = name == pipeline.key.as_str();
        let is_value = name == pipeline.value.as_str();
        relation
            .columns
            .iter()
            .any(|c| c.name == name && (!c.insert || (!c.update && !is_key) || (!c.select && (is_key || is_value))))
    };
    let stamp = pipeline.updated_at.as_ref().map(|name| name.as_str());
    if [Some(pipeline.key.as_str()), Some(pipeline.value.as_str()), stamp].into_iter().flatten().any(lacks) {
        missing.push(format!("is not open to {role}: grant select, insert, update on {} to {role}", relation.sql_name));
    }
    missing
}

/// How the keys of a table that fits are told apart: as its unique index does it.
fn key_form(relation: &Relation, pipeline: &Pipeline) -> KeyForm {
    let key = relation.columns.iter().find(|c| c.name == pipeline.key.as_str());
    let usable = || relation.indexes.iter().filter(|i| i.is_usable());
    // Of two indexes the one that takes more keys for equal decides.
    let index = usable().find(|i| !i.deterministic).or_else(|| usable().next());
    let (Some(key), Some(index)) = (key, index) else { return KeyForm::Bytes };
    if matches!(key.base.as_str(), "pg_catalog.text" | "pg_catalog.varchar") && index.deterministic {
        return KeyForm::Bytes;
    }
    let collate = index.collation.as_ref().map_or_else(String::new, |collation| format!(" collate {collation}"));
    KeyForm::Typed(format!("{}{collate}", key.cast))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, base: &str) -> Column {
        Column {
            name: name.into(),
            sql_name: name.into(),
            declared: base.into(),
            base: format!("pg_catalog.{base}"),
            typmod: -1,
            cast: format!("pg_catalog.{base}"),
            generated: false,
            identity_always: false,
            insert: true,
            update: true,
            select: true,
        }
    }

    fn index(deterministic: bool) -> Index {
        Index { name: "counters_pkey".into(), flaw: None, deterministic, collation: None }
    }

    fn relation(key: &str, value: &str) -> Relation {
        Relation {
            kind: "r".into(),
            sql_name: "public.counters".into(),
            role: "tide".into(),
            schema_usage: true,
            unlogged: false,
            foreign_partitions: false,
            row_security: false,
            rules: Vec::new(),
            mandatory: Vec::new(),
            columns: vec![column("id", key), column("value", value), column("updated_at", "timestamptz")],
            indexes: vec![index(true)],
        }
    }

    #[test]
    fn types_that_hold_every_sum_are_taken_and_others_refused_with_the_statement_that_mends_them() {
        for good in ["int2", "int4", "int8", "numeric"] {
            assert_eq!(findings(&relation("text", good), &Pipeline::counters()), Vec::<String>::new(), "{good}");
        }
        for bad in ["float4", "float8", "money", "text"] {
            let found = findings(&relation("text", bad), &Pipeline::counters());
            assert!(found.len() == 1 && found[0].contains("alter column value type bigint"), "{found:?}");
        }
    }

    #[test]
    fn a_numeric_that_rounds_whole_numbers_is_refused() {
        // numeric(5,-2), numeric(5,2) and numeric(3,5), as PostgreSQL encodes them.
        let typmod = |precision: i32, scale: i32| ((precision << 16) | (scale & 0x7ff)) + 4;
        for (precision, scale) in [(5, -2), (5, 2), (3, 5), (1000, 0), (1000, -1000)] {
            assert_eq!(numeric_scale(typmod(precision, scale)), scale);
            let mut relation = relation("text", "numeric");
            relation.columns[1].typmod = typmod(precision, scale);
            assert_eq!(findings(&relation, &Pipeline::counters()).is_empty(), scale >= 0, "({precision},{scale})");
        }
    }

    #[test]
    fn everything_that_does_not_fit_is_said_at_once() {
        let mut relation = relation("name", "float8");
        relation.row_security = true;
        relation.unlogged = true;
        relation.columns[1].select = false;
        relation.indexes[0].flaw = Some("it is partial");
        let found = findings(&relation, &Pipeline::counters());
        assert_eq!(found.len(), 6, "{found:#?}");
        let said = Unfit { table: "public.counters".into(), findings: found }.to_string();
        assert_eq!(said.lines().count(), 7, "{said}");
        for part in ["grant select, insert, update on public.counters to tide", "it is partial", "bypassrls"] {
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn bytes_tell_keys_apart_only_where_the_unique_index_does_so() {
        let form = |relation: &Relation| key_form(relation, &Pipeline::counters());
        assert_eq!(form(&relation("text", "int8")), KeyForm::Bytes);
        assert_eq!(form(&relation("uuid", "int8")), KeyForm::Typed("pg_catalog.uuid".into()));
        let mut both = relation("text", "int8");
        both.indexes.push(Index { collation: Some("public.ci".into()), ..index(false) });
        assert_eq!(form(&both), KeyForm::Typed("pg_catalog.text collate public.ci".into()));
    }
}
