//! Surroundings: what of a table, beside its columns and indexes, keeps rows out, changes them or loses them. Pure.
//!
//! Takes a target and facts of the catalogs; gives findings. It cannot fail.

use super::Column;
use super::catalog::{Constraint, Relation};
use super::definition::{FILLFACTOR, create_table, sql_name};
use super::finding::Finding;
use crate::model::pipeline::Identifier;
use crate::model::target::{Target, Write};

/// There is no such table.
pub(super) fn missing(target: &Target) -> Finding {
    let schema = &target.table.schema;
    let schema = if schema.as_str() == "public" {
        String::new()
    } else {
        format!("create schema if not exists {}; ", sql_name(schema))
    };
    let what = "it does not exist: create it, or run `tidegate migrate` for the default one";
    Finding::refusal(what, schema + &create_table(target))
}

/// Why it is nothing that rows can be written to.
pub(super) fn unsuitable(relation: &Relation) -> Option<Finding> {
    let Relation { schema, role, .. } = relation;
    if !relation.is_schema_usable {
        let what = format!("this role may not use the schema {schema}");
        return Some(Finding::of_role(what, format!("grant usage on schema {schema} to {role}")));
    }
    let what = match relation.kind.as_str() {
        "r" | "p" if relation.is_temporary => {
            "it is temporary, and gone when its session ends: name a table that stays"
        }
        "r" | "p" => return None,
        "v" => "it is a view: name the table behind it",
        "m" => "it is a materialized view: name a table",
        "f" => {
            "it is a foreign table: its rows and the ledger could not be committed as one; name a table of this database"
        }
        _ => "it is no table: name one",
    };
    Some(Finding::refusal_alone(what))
}

/// The rights that the role lacks, in one statement; to read alone, or to write.
pub(super) fn rights(target: &Target, relation: &Relation, columns: &[Column], reads: bool) -> Option<Finding> {
    let of = |is_wanted: &dyn Fn(&Identifier) -> bool, has: fn(&Column) -> bool| -> Vec<&str> {
        let names = target.columns().into_iter().filter(|name| is_wanted(name));
        let found = names.filter_map(|name| columns.iter().find(|column| column.plain_name == name.as_str()));
        found.filter(|column| !has(column)).map(|column| column.name.as_str()).collect()
    };
    let is_key = |name: &Identifier| target.keys.iter().any(|key| key.column == *name);
    let is_stamp = |name: &Identifier| target.updated_at.as_ref() == Some(name);
    let inserts_only = target.write == Write::Insert;
    let select = of(&|name| is_key(name) || !inserts_only && !is_stamp(name), |column| column.can_select);
    let insert = of(&|_| !reads, |column| column.can_insert);
    let update = of(&|name| !reads && !inserts_only && !is_key(name), |column| column.can_update);
    let mut rights: Vec<String> = [("select", select), ("insert", insert), ("update", update)]
        .into_iter()
        .filter(|(_, columns)| !columns.is_empty())
        .map(|(right, columns)| format!("{right} ({})", columns.join(", ")))
        .collect();
    if !reads && target.write == Write::DeleteZero && !relation.can_delete {
        rights.push("delete".into());
    }
    let rights = rights.join(", ");
    let Relation { name, role, .. } = relation;
    (!rights.is_empty()).then(|| {
        Finding::of_role(
            format!("this role lacks the right to {rights}"),
            format!("grant {rights} on {name} to {role}"),
        )
    })
}

/// What hides, redirects, drops or loses rows.
pub(super) fn dangers(target: &Target, relation: &Relation) -> Vec<Finding> {
    let Relation { name: table, role, .. } = relation;
    let mut findings = Vec::new();
    let of_delete = relation.rules_of_delete.iter().filter(|_| target.write == Write::DeleteZero);
    for rule in relation.rules.iter().chain(of_delete) {
        let what = format!(
            "rule {rule} may drop or redirect rows, and PostgreSQL does not upsert where there is one; use a trigger if you need one"
        );
        findings.push(Finding::refusal(what, format!("drop rule {rule} on {table}")));
    }
    for lost in &relation.not_logged {
        let what = if lost == table {
            "it is not logged, and empty after a crash".into()
        } else {
            format!("its partition {lost} is not logged, and empty after a crash")
        };
        findings.push(Finding::refusal(what, format!("alter table {lost} set logged")));
    }
    for elsewhere in &relation.foreign {
        let what = format!(
            "its partition {elsewhere} is on another server: its rows and the ledger could not be committed as one"
        );
        findings.push(Finding::refusal(what, format!("alter table {table} detach partition {elsewhere}")));
    }
    if relation.is_row_security_active {
        let what = "row security applies to this role and may hide or refuse rows";
        let fix = if relation.is_row_security_forced {
            format!("alter table {table} no force row level security")
        } else {
            format!("alter role {role} bypassrls")
        };
        findings.push(Finding::refusal(what, fix));
    }
    if relation.is_distributed && target.write != Write::Merge {
        let what = "it is distributed over servers, where nothing but write = \"merge\" can be a flush: write that";
        findings.push(Finding::refusal_alone(what));
    }
    if target.write != Write::Insert {
        for table in &relation.without_identity {
            let what = format!(
                "{table} publishes updates to subscribers and has no replica identity, so PostgreSQL refuses to update it"
            );
            findings.push(Finding::refusal(what, format!("alter table {table} replica identity full")));
        }
    }
    for child in &relation.children {
        let what =
            format!("{child} inherits from it: its rows are not met by an upsert, so a query may find a key in both");
        findings.push(Finding::warning(what, format!("alter table {child} no inherit {table}")));
    }
    for table in &relation.without_default {
        let what = format!(
            "{table} is partitioned and has no default partition: rows without a partition become dead letters"
        );
        findings
            .push(Finding::warning(what, format!("create table {} partition of {table} default", default_name(table))));
    }
    for table in &relation.without_remainder {
        let what = format!(
            "{table} is partitioned by a hash, and a remainder has no partition: rows of that one become dead letters; create it"
        );
        findings.push(Finding::warning_alone(what));
    }
    findings
}

/// The name of a table's default partition, as SQL needs it.
fn default_name(table: &str) -> String {
    const SUFFIX: &str = "_default";
    let (body, quote) = table.strip_suffix('"').map_or((table, ""), |body| (body, "\""));
    // A name of PostgreSQL has 63 bytes at the most; longer ones are cut.
    let start = body.rfind('.').map_or(0, |at| at + 1);
    let room = start + 63 - SUFFIX.len();
    let body = match body.char_indices().map(|(at, _)| at).take_while(|at| *at <= room).last() {
        Some(end) if body.len() > room => &body[..end],
        _ => body,
    };
    format!("{body}{SUFFIX}{quote}")
}

/// CHECKs and foreign keys.
pub(super) fn constraints(target: &Target, relation: &Relation, constraints: &[Constraint]) -> Vec<Finding> {
    let table = &relation.name;
    let is_value = |plain: &String| {
        let versions = target.values.iter().filter_map(|value| value.by.as_ref());
        target.values.iter().map(|value| &value.column).chain(versions).any(|column| column.as_str() == plain)
    };
    let is_written = |plain: &String| target.columns().iter().any(|column| column.as_str() == plain);
    let mut findings = Vec::new();
    for Constraint { kind, name, owner, definition, columns } in constraints {
        let refuses = "rows that it refuses become dead letters";
        match kind.as_str() {
            "c" if columns.iter().any(is_value) => {
                let what = format!(
                    "the constraint {name} {definition} meets what a batch makes of a row, and batches do not always land in the order of the stream: {refuses}; \
                     docs/guarantees.md, \"constraints on the value\", says how to keep the order"
                );
                findings.push(Finding::warning(what, format!("alter table {table} drop constraint {name}")));
            }
            "d" if columns.iter().any(is_value) => {
                let what = format!(
                    "the constraint {name} {definition} of the domain {owner} meets what a batch makes of a row: {refuses}"
                );
                findings.push(Finding::warning(what, format!("alter domain {owner} drop constraint {name}")));
            }
            "f" if columns.iter().any(is_written) => {
                let what = format!("the foreign key {name} {definition} is looked up for each row: {refuses}");
                findings.push(Finding::warning(what, format!("alter table {table} drop constraint {name}")));
            }
            "r" if target.write == Write::DeleteZero => {
                let what = format!(
                    "{owner} refers to it by {name}: a row in which nothing is left may not be deleted, or takes rows of {owner} with it"
                );
                findings.push(Finding::warning(what, format!("alter table {owner} drop constraint {name}")));
            }
            _ => {}
        }
    }
    findings
}

/// Triggers that run before a row is written.
pub(super) fn triggers(triggers: &[(String, String)]) -> Vec<Finding> {
    let finding = |(name, table): &(String, String)| {
        let what = format!(
            "the trigger {name} runs before each row of {table} is written and may change or drop it; a dropped row halts the pipeline"
        );
        Finding::warning(what, format!("alter table {table} disable trigger {name}"))
    };
    triggers.iter().map(finding).collect()
}

/// What makes updates of rows cheap.
pub(super) fn upkeep(target: &Target, relation: &Relation) -> Vec<Finding> {
    if target.write == Write::Insert {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let mut advise = |tables: &[String], what: &str, change: &str| {
        let (Some(first), more) = (tables.first(), tables.len().saturating_sub(1)) else { return };
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let all: Vec<String> = tables.iter().map(|table| format!("alter table {table} {change}")).collect();
        findings.push(Finding::advice(format!("{first}{more} {what}"), all.join("; ")));
    };
    advise(
        &relation.full,
        "fills its pages to the last byte, so an updated row rarely finds room beside its former version, and all indexes are written",
        &format!("set (fillfactor = {FILLFACTOR})"),
    );
    advise(
        &relation.never_vacuumed,
        "is left alone by autovacuum, and grows with each update",
        "reset (autovacuum_enabled)",
    );
    advise(
        &relation.large,
        "has a million rows or more and is vacuumed when a fifth of it is dead, as a small table is",
        "set (autovacuum_vacuum_scale_factor = 0.02)",
    );
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_partition_has_a_name_of_at_most_63_bytes() {
        assert_eq!(default_name("public.usage"), "public.usage_default");
        assert_eq!(default_name("public.\"Usage\""), "public.\"Usage_default\"");
        let long = format!("public.{}", "x".repeat(63));
        assert_eq!(default_name(&long).len(), "public.".len() + 63);
    }
}
