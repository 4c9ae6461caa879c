//! Indexes: the one that makes a row of a key unique, and those that stand in its way. Pure.
//!
//! Takes a target and the table's indexes; gives findings. It cannot fail.
//!
//! `insert … on conflict (keys)` takes every unique index on exactly these columns for the one that is meant, whatever it compares by; so one that compares in
//! another way, or later, is refused even beside a good one.

use super::Column;
use super::catalog::{Index, Relation};
use super::finding::Finding;
use crate::model::target::{Target, Write};

/// What the table's indexes mean for a target.
pub(super) fn findings(target: &Target, relation: &Relation, columns: &[Column], indexes: &[Index]) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(of_keys(target, relation, columns, indexes));
    for index in indexes.iter().filter(|index| !is_on_keys(target, index)) {
        findings.extend(of_another(target, relation, columns, index));
    }
    if target.write != Write::Insert {
        findings.extend(indexes.iter().filter_map(|index| of_updates(target, relation, columns, index)));
    }
    findings
}

/// A column as SQL names it.
fn named<'a>(columns: &'a [Column], plain: &'a str) -> &'a str {
    columns.iter().find(|column| column.plain_name == plain).map_or(plain, |column| &column.name)
}

fn key_list(target: &Target, columns: &[Column]) -> String {
    target.keys.iter().map(|key| named(columns, key.column.as_str())).collect::<Vec<_>>().join(", ")
}

/// Whether its columns are exactly the keys, in any order.
fn is_on_keys(target: &Target, index: &Index) -> bool {
    let keys = || target.keys.iter().map(|key| key.column.as_str());
    index.is_unique
        && index.columns.len() == target.keys.len()
        && keys().all(|key| index.columns.iter().any(|c| c == key))
}

fn of_keys(target: &Target, relation: &Relation, columns: &[Column], indexes: &[Index]) -> Vec<Finding> {
    let (table, keys) = (&relation.name, key_list(target, columns));
    let create = format!("create unique index on {table} ({keys})");
    let mut findings = Vec::new();
    let mut has_one = false;
    for index in indexes.iter().filter(|index| is_on_keys(target, index)) {
        let name = &index.name;
        if index.is_partial {
            // Not taken for the one that is meant, so it does no harm beside a good one.
            continue;
        }
        if !index.is_valid {
            let (what, fix) =
                (format!("the unique index {name} on {keys} is not valid"), format!("drop index {name}; {create}"));
            findings.push(Finding::refusal(what, fix));
        } else if !index.is_immediate {
            let what =
                format!("the unique index {name} on {keys} is deferrable, so it cannot tell which row an entry is for");
            let fix = match &index.constraint {
                Some((constraint, kind)) => {
                    let kind = if kind == "p" { "primary key" } else { "unique" };
                    format!(
                        "alter table {table} drop constraint {constraint}, add constraint {constraint} {kind} ({keys})"
                    )
                }
                None => format!("drop index {name}; {create}"),
            };
            findings.push(Finding::refusal(what, fix));
        } else if index.compares_otherwise {
            let what = format!(
                "the unique index {name} on {keys} has a collation or an operator class for which other keys are equal than for the columns"
            );
            findings.push(Finding::refusal(what, format!("drop index {name}; {create}")));
        } else {
            has_one = true;
            continue;
        }
        // What corrects it makes an index that will do.
        has_one = true;
    }
    let outside: Vec<&str> = (relation.partitioned_by.iter().map(String::as_str))
        .filter(|column| !target.keys.iter().any(|key| key.column.as_str() == *column))
        .collect();
    if relation.kind == "p" && !outside.is_empty() {
        let by = outside.iter().map(|column| if column.is_empty() { "an expression" } else { named(columns, column) });
        let by = by.collect::<Vec<_>>().join(", ");
        findings.push(Finding::refusal_alone(format!(
            "it is partitioned by {by}, which is not among the keys, so it can have no unique index on {keys} alone: add the column to keys, \
             or partition the table by one of {keys}"
        )));
    } else if !has_one {
        findings.push(Finding::refusal(format!("it has no unique index on {keys} alone"), create));
    }
    findings
}

/// What another unique index, or an exclusion constraint, does to rows.
///
/// One that can be broken only by the values of rows is a warning: the row that breaks it becomes a dead letter, which somebody may want. One that lets a second
/// key in never is refused: nearly all entries would be dead letters.
fn of_another(target: &Target, relation: &Relation, columns: &[Column], index: &Index) -> Option<Finding> {
    if !index.is_unique && !index.is_exclusion {
        return None;
    }
    let (table, name) = (&relation.name, &index.name);
    let fix = match &index.constraint {
        Some((constraint, _)) => format!("alter table {table} drop constraint {constraint}"),
        None => format!("drop index {name}"),
    };
    if index.is_exclusion {
        let what = format!("the exclusion constraint {name} may refuse rows: those become dead letters");
        return Some(Finding::warning(what, fix));
    }
    let is_key = |plain: &str| target.keys.iter().any(|key| key.column.as_str() == plain);
    // All keys and more: a row of another key never meets it.
    if target.keys.iter().all(|key| index.columns.iter().any(|column| column == key.column.as_str())) {
        return None;
    }
    let is_written = |plain: &str| target.columns().iter().any(|name| name.as_str() == plain);
    let column = |plain: &str| columns.iter().find(|column| column.plain_name == plain);
    let differs = |plain: &String| {
        let Some(column) = column(plain).filter(|_| !is_written(plain)) else { return false };
        column.is_default_different || !column.has_default && !index.is_null_a_value
    };
    // A column that nobody writes is null in each row, or a number of its own.
    if index.columns.iter().any(differs) {
        return None;
    }
    let list = index.columns.iter().map(|plain| if plain.is_empty() { "an expression" } else { named(columns, plain) });
    let list = list.collect::<Vec<_>>().join(", ");
    let is_narrower =
        !index.is_partial && index.columns.iter().all(|plain| is_key(plain) || !plain.is_empty() && !is_written(plain));
    if is_narrower {
        let what = format!("the unique index {name} on {list} lets in one row only of those that differ in other keys");
        return Some(Finding::refusal(what, fix));
    }
    let what = format!("the unique index {name} on {list} may refuse rows: those become dead letters");
    Some(Finding::warning(what, fix))
}

/// Whether an update of a value costs an entry in every index of the table.
fn of_updates(target: &Target, relation: &Relation, columns: &[Column], index: &Index) -> Option<Finding> {
    if !index.prevents_hot {
        return None;
    }
    let keys: Vec<&str> = target.keys.iter().map(|key| key.column.as_str()).collect();
    let updated = target
        .columns()
        .into_iter()
        .find(|name| !keys.contains(&name.as_str()) && index.touches.iter().any(|touched| touched == name.as_str()))?;
    let (table, name) = (&relation.name, &index.name);
    let what = format!(
        "the index {name} looks at {}, which each flush changes, so each update of a row also writes to all indexes: drop it if no query needs it",
        named(columns, updated.as_str())
    );
    let drop = match &index.constraint {
        Some((constraint, _)) => format!("alter table {table} drop constraint {constraint}"),
        None => format!("drop index {name}"),
    };
    let fix = if is_on_keys(target, index) {
        format!("create unique index on {table} ({}); {drop}", key_list(target, columns))
    } else {
        drop
    };
    Some(Finding::advice(what, fix))
}
