//! Compare: what entries make of a pipeline's empty tables, beside what a test expects. Pure.
//!
//! Takes a [`Case`] and its pipeline; gives every [`Difference`]. Fails where the test itself cannot be meant: with a place and what to write.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::cases::{Case, CaseRow, from_hex};
use crate::flow::batch::{Filling, Origin};
use crate::flow::outcome::{Filled, Holds, outcome};
use crate::flow::rows::Plan;
use crate::model::datum;
use crate::model::entry::{EntryId, Generation};
use crate::model::pipeline::{Pipeline, Table};
use crate::model::target::Kind;
use crate::telemetry::trace::Trace;

/// What is not as it is expected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Difference {
    /// A column holds something else.
    Value {
        /// The table.
        table: String,
        /// The row's keys.
        key: String,
        /// The column.
        column: String,
        /// What it is expected to hold; null for null.
        expected: Option<String>,
        /// What it holds; null for null.
        found: Option<String>,
    },
    /// A row is expected and not there.
    MissingRow {
        /// The table.
        table: String,
        /// The row's keys, or what is expected of it.
        key: String,
        /// Where it is expected: path:line.
        place: String,
    },
    /// A row is there and not expected.
    UnexpectedRow {
        /// The table.
        table: String,
        /// The row's columns.
        row: String,
    },
    /// An entry is buried, or not, or for another reason.
    Entry {
        /// Its number among the test's entries, from 1 on.
        entry: usize,
        /// The reason that is expected; null: that it lands.
        expected: Option<String>,
        /// The reason for which it is buried; null: it lands.
        found: Option<String>,
        /// Why it is buried, in one sentence.
        detail: Option<String>,
    },
    /// The entries together are more than a column holds.
    Fault {
        /// What.
        words: String,
    },
}

/// All differences of a test.
pub(super) fn compare(case: &Case, pipeline: &Pipeline, max_entry_bytes: usize) -> Result<Vec<Difference>, String> {
    let plan = Plan::of(pipeline).map_err(|no_zone| format!("{}: {no_zone}", case.place))?;
    let generation = Generation { run_id: "test".into(), replication_id: "test".into(), epoch: 0 };
    let origin = Origin { generation: Arc::new(generation), consumer: "test".into(), trace: Trace::default() };
    let mut filling = Filling::new(origin, max_entry_bytes);
    for entry in &case.entries {
        filling.push(entry.id, entry.strings.iter().map(Vec::as_slice));
        // An id that is not above the one before stands for a redelivery, or for another primary.
        filling.close_run();
    }
    let batch = filling.seal(false);
    let outcome = match outcome(&batch, pipeline, &plan) {
        Ok(outcome) => outcome,
        Err(fault) => return Ok(vec![Difference::Fault { words: fault.to_string() }]),
    };
    let mut differences = Vec::new();
    let buried = outcome.dead.iter().map(|(index, death)| {
        let dead = &batch.entries()[*index];
        (dead.id, batch.canonical(dead).strings().map(<[u8]>::to_vec).collect::<Vec<_>>(), death)
    });
    let buried: Vec<_> = buried.collect();
    for (n, entry) in case.entries.iter().enumerate() {
        let death = buried.iter().find(|(id, strings, _)| *id == entry.id && *strings == entry.strings).map(|b| b.2);
        let expected = case.dead.iter().find(|dead| dead.entry == n + 1).map(|dead| dead.reason.clone());
        let found = death.map(|death| death.reason.to_owned());
        if expected != found {
            let detail = death.map(|death| death.detail.clone());
            differences.push(Difference::Entry { entry: n + 1, expected, found, detail });
        }
    }
    let tables = places_of_rows(case, &outcome.tables)?;
    for (n, table) in outcome.tables.iter().enumerate() {
        // A test that speaks of some tables says nothing of the others.
        if let Some(rows) = tables.get(&n) {
            compare_table(table, rows, &mut differences)?;
        } else if case.rows.is_empty() {
            compare_table(table, &[], &mut differences)?;
        }
    }
    Ok(differences)
}

/// The expected rows of each table that the test speaks of.
fn places_of_rows<'c>(case: &'c Case, tables: &[Filled]) -> Result<BTreeMap<usize, Vec<&'c CaseRow>>, String> {
    let mut found: BTreeMap<usize, Vec<&CaseRow>> = BTreeMap::new();
    let names = || tables.iter().map(|table| table.table.to_string()).collect::<Vec<_>>().join(", ");
    for row in &case.rows {
        let place = match &row.table {
            None if tables.len() == 1 => 0,
            None => {
                return Err(format!("{}: the pipeline has several tables; add table = one of {}", row.place, names()));
            }
            Some(name) => {
                let named = Table::parse(name).ok();
                let place = tables.iter().position(|table| Some(&table.table) == named.as_ref());
                place.ok_or_else(|| {
                    format!("{}: the pipeline has no table {name:?}; name one of {}", row.place, names())
                })?
            }
        };
        found.entry(place).or_default().push(row);
    }
    Ok(found)
}

/// Expected columns of one row, each with its place among the table's and in its one spelling.
type Expected = Vec<(usize, Option<String>)>;

fn compare_table(table: &Filled, rows: &[&CaseRow], differences: &mut Vec<Difference>) -> Result<(), String> {
    let name = table.table.to_string();
    let found: Vec<Vec<Option<String>>> = table.rows.iter().map(|row| spelled_row(table, row)).collect();
    let mut is_met = vec![false; found.len()];
    for row in rows {
        let expected = expected_row(table, row)?;
        let key = described(table, expected.iter().filter(|(column, _)| *column < table.keys).cloned());
        let is_it =
            |found: &Vec<Option<String>>| expected.iter().all(|(c, text)| *c >= table.keys || found[*c] == *text);
        let Some(at) = (0..found.len()).find(|at| is_it(&found[*at])) else {
            differences.push(Difference::MissingRow { table: name.clone(), key, place: row.place.clone() });
            continue;
        };
        if std::mem::replace(&mut is_met[at], true) {
            return Err(format!("{}: the row {key} is expected twice; write it once", row.place));
        }
        for (column, text) in &expected {
            if found[at][*column] != *text {
                differences.push(Difference::Value {
                    table: name.clone(),
                    key: key.clone(),
                    column: table.columns[*column].0.to_string(),
                    expected: text.clone(),
                    found: found[at][*column].clone(),
                });
            }
        }
    }
    for (row, _) in found.iter().zip(is_met).filter(|(_, is_met)| !is_met) {
        let row = described(table, row.iter().cloned().enumerate());
        differences.push(Difference::UnexpectedRow { table: name.clone(), row });
    }
    Ok(())
}

fn expected_row(table: &Filled, row: &CaseRow) -> Result<Expected, String> {
    let place = &row.place;
    let mut expected = Vec::new();
    for (name, bytes) in &row.columns {
        let Some(column) = table.columns.iter().position(|(column, _)| column.as_str() == name) else {
            let names: Vec<&str> = table.columns.iter().map(|(column, _)| column.as_str()).collect();
            return Err(format!(
                "{place}: {} has no column {name:?} that entries fill; its columns are {}",
                table.table,
                names.join(", ")
            ));
        };
        let spelled = bytes.as_ref().map(|bytes| spelled_expected(table.columns[column].1, bytes)).transpose();
        expected.push((column, spelled.map_err(|why| format!("{place}: the column {name} {why}"))?));
    }
    if let Some((missing, _)) =
        table.columns[..table.keys].iter().enumerate().find(|(n, _)| !expected.iter().any(|(column, _)| column == n))
    {
        return Err(format!(
            "{place}: the row lacks the key column {}; rows are told apart by their keys",
            table.columns[missing].0
        ));
    }
    expected.sort_by_key(|(column, _)| *column);
    Ok(expected)
}

/// As `a=1, b=null`.
fn described(table: &Filled, columns: impl Iterator<Item = (usize, Option<String>)>) -> String {
    let one = |(column, text): (usize, Option<String>)| {
        format!("{}={}", table.columns[column].0, text.as_deref().unwrap_or("null"))
    };
    columns.map(one).collect::<Vec<_>>().join(", ")
}

/// What was found, in the one spelling in which it is compared.
fn spelled_row(table: &Filled, row: &[Option<String>]) -> Vec<Option<String>> {
    let spelled = |((_, holds), text): (&(_, Holds), &Option<String>)| {
        let text = text.as_ref()?;
        Some(match holds {
            Holds::Kind(Kind::Bytea) => text.clone(),
            Holds::Estimate => {
                crate::merge::estimated(text).map_or_else(|| "no sketch".into(), |estimate| estimate.to_string())
            }
            Holds::Version => json_spelled(text).unwrap_or_else(|| text.clone()),
            Holds::Kind(kind) => spelled(*kind, text.as_bytes()).unwrap_or_else(|_| text.clone()),
        })
    };
    table.columns.iter().zip(row).map(spelled).collect()
}

/// What is expected, in the same spelling. The error ends a sentence that begins with the column's name.
fn spelled_expected(holds: Holds, bytes: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(bytes);
    match holds {
        // Bytes of any kind, or as PostgreSQL shows them.
        Holds::Kind(Kind::Bytea) => match text.ok().and_then(|text| from_hex(text.strip_prefix("\\x")?)) {
            Some(shown) => spelled(Kind::Bytea, &shown),
            None => spelled(Kind::Bytea, bytes),
        },
        Holds::Kind(kind) => spelled(kind, bytes),
        Holds::Estimate => spelled(Kind::Bigint, bytes),
        Holds::Version => {
            let text = text.map_err(|_| "is no text".to_owned())?;
            let id = text.parse::<EntryId>().map(|id| id.number().to_string());
            Ok(id.ok().or_else(|| json_spelled(text)).unwrap_or_else(|| text.to_owned()))
        }
    }
}

fn spelled(kind: Kind, bytes: &[u8]) -> Result<String, String> {
    // However many digits a field may have, a sum may be any.
    let kind = if let Kind::Numeric(_) = kind { Kind::Numeric(None) } else { kind };
    let text = datum::read(kind, bytes)?.text().unwrap_or_default().into_owned();
    match kind {
        Kind::Jsonb => json_spelled(&text).ok_or_else(|| "is no JSON object".into()),
        _ => Ok(text),
    }
}

/// JSON with sorted keys and without blanks; none if it is none.
fn json_spelled(text: &str) -> Option<String> {
    // A number alone would lose its last digits.
    let value: serde_json::Value =
        serde_json::from_str(text).ok().filter(|value: &serde_json::Value| !value.is_number())?;
    // Its maps are sorted.
    Some(value.to_string())
}
