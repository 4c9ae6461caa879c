//! Outcome: what a batch makes of empty tables, row by row, as text. Pure.
//!
//! Takes a batch and its pipeline; gives the rows of each table and what is to be buried. A folded batch that meets an empty table is the table's content, by
//! the operators' law, so nothing of SQL is repeated here. It fails only where a folded delta leaves its range.
//!
//! Keys are compared by what was read of the entry: where a column compares otherwise (`citext`, a collation without regard to case, text for another type)
//! PostgreSQL makes fewer rows of them.

use std::sync::Arc;

use super::batch::{Batch, Death};
use super::coalesce::Columns;
use super::rows::Plan;
use super::statement::arrays;
use crate::merge::{Array, Merge};
use crate::model::pipeline::{Identifier, Pipeline, Table};
use crate::model::target::{Kind, Target, Write};
use crate::retry::Fault;

/// What a batch makes of empty tables.
#[derive(Debug)]
pub struct Outcome {
    /// The tables, in the pipeline's order.
    pub tables: Vec<Filled>,
    /// Indices of entries that are to be buried, and why.
    pub dead: Vec<(usize, Arc<Death>)>,
}

/// A table and its rows.
#[derive(Debug)]
pub struct Filled {
    /// The table.
    pub table: Table,
    /// How many of the columns, from the first on, are keys.
    pub keys: usize,
    /// Keys, then values, each with its version behind it where it has one.
    pub columns: Vec<(Identifier, Holds)>,
    /// Of each column a text; none is null.
    pub rows: Vec<Vec<Option<String>>>,
}

/// What a column's texts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// What [`crate::model::datum::read`] makes of this kind.
    Kind(Kind),
    /// The id of an entry as a number, or, of a JSON object, of the entry of each of its keys.
    Version,
    /// How many different ones there are, about.
    Estimate,
}

/// What this batch makes of empty tables.
pub fn outcome(batch: &Batch, pipeline: &Pipeline, plan: &Plan) -> Result<Outcome, Fault> {
    let coalesced = batch.coalesce(plan, 0..batch.len())?;
    let targets = pipeline.targets();
    let mut tables: Vec<Filled> = targets.iter().map(Filled::of).collect();
    match coalesced.columns {
        Columns::Counters { keys, amounts } => {
            let rows = keys.into_iter().zip(amounts);
            tables[0].rows = rows.map(|(key, amount)| vec![Some(key.to_owned()), Some(amount.to_string())]).collect();
        }
        Columns::Tables { rows, packed } => {
            // How many rows each table has stands in front, where there are several.
            let (mut texts, mut numbers) = (0, if rows.len() > 1 { rows.len() } else { 0 });
            for ((table, target), rows) in tables.iter_mut().zip(&targets).zip(rows) {
                table.rows = vec![Vec::new(); rows];
                for array in arrays(target) {
                    for row in &mut table.rows {
                        let text = match array {
                            Array::Texts => packed.texts.get(texts).cloned().flatten().map(|text| text.into_owned()),
                            Array::Numbers => {
                                packed.numbers.get(numbers).copied().flatten().map(|number| number.to_string())
                            }
                        };
                        match array {
                            Array::Texts => texts += 1,
                            Array::Numbers => numbers += 1,
                        }
                        row.push(text);
                    }
                }
                table.finish(target);
            }
        }
    }
    Ok(Outcome { tables, dead: coalesced.dead })
}

impl Filled {
    fn of(target: &Target) -> Filled {
        let mut columns: Vec<(Identifier, Holds)> =
            target.keys.iter().map(|key| (key.column.clone(), Holds::Kind(key.kind()))).collect();
        for value in &target.values {
            let holds = match (value.merge, &value.field) {
                (Merge::Count, _) | (_, None) => Holds::Kind(Kind::Bigint),
                (Merge::Distinct, _) => Holds::Estimate,
                (_, Some(field)) => Holds::Kind(field.kind),
            };
            columns.push((value.column.clone(), holds));
            columns.extend(value.by.clone().map(|by| (by, Holds::Version)));
        }
        Filled { table: target.table.clone(), keys: target.keys.len(), columns, rows: Vec::new() }
    }

    /// Rows in which nothing is left go; a version that two values share is a column once.
    fn finish(&mut self, target: &Target) {
        if target.write == Write::DeleteZero {
            let additive: Vec<usize> = (self.columns.iter().enumerate())
                .filter(|(_, (column, _))| target.values.iter().any(|v| v.column == *column && v.merge.is_additive()))
                .map(|(n, _)| n)
                .collect();
            let is_zero =
                |text: &Option<String>| text.as_ref().is_none_or(|text| text.bytes().all(|b| b"-0.".contains(&b)));
            self.rows.retain(|row| !additive.iter().all(|column| row.get(*column).is_none_or(is_zero)));
        }
        for column in (0..self.columns.len()).rev() {
            if self.columns[..column].iter().any(|(name, _)| *name == self.columns[column].0) {
                self.columns.remove(column);
                self.rows.iter_mut().for_each(|row| {
                    if column < row.len() {
                        row.remove(column);
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::Filling;
    use crate::flow::batch::tests::origin;
    use crate::model::entry::EntryId;
    use crate::model::target::{parse_keys, parse_values};

    fn target(table: &str, keys: &str, values: &str, write: Write) -> Target {
        let (keys, values) = (parse_keys(keys).expect("keys"), parse_values(values).expect("values"));
        Target { table: Table::parse(table).expect("valid"), keys, values, updated_at: None, write }
    }

    fn rows(tables: Vec<Target>, entries: &[&[&str]]) -> Vec<Vec<String>> {
        let pipeline = Pipeline { tables, ..Pipeline::counters() };
        let plan = Plan::of(&pipeline).expect("a plan");
        let mut filling = Filling::new(origin(), 1 << 20);
        for (n, fields) in entries.iter().enumerate() {
            filling.push(EntryId { ms: n as u64 + 1, seq: 0 }, fields.iter().map(|field| field.as_bytes()));
        }
        let batch = filling.seal(false);
        let outcome = outcome(&batch, &pipeline, &plan).expect("in range");
        let row = |row: &Vec<Option<String>>| {
            row.iter().map(|text| text.as_deref().unwrap_or("null")).collect::<Vec<_>>().join(" ")
        };
        outcome.tables.iter().map(|table| table.rows.iter().map(row).collect()).collect()
    }

    #[test]
    fn every_table_has_its_rows_with_their_versions() {
        let by_user = target("a", "user, n: bigint", "s = sum(n), p = last(p?) by v, q = max(n)", Write::Merge);
        let by_path = target("b", "p2 = user", "c = count(), first = first(n: bigint) by v", Write::Merge);
        let entries: [&[&str]; 3] =
            [&["user", "x", "n", "5", "p", "/a"], &["user", "x", "n", "5", "p", "/b"], &["user", "y", "n", "7"]];
        let two = EntryId { ms: 2, seq: 0 }.number().to_string();
        let (one, three) = (EntryId { ms: 1, seq: 0 }.number(), EntryId { ms: 3, seq: 0 }.number());
        let found = rows(vec![by_user, by_path], &entries);
        assert_eq!(found[0], [format!("x 5 10 /b {two} 5"), "y 7 7 null null 7".into()]);
        assert_eq!(found[1], [format!("x 2 5 {one}"), format!("y 1 7 {three}")]);
    }

    #[test]
    fn a_shared_version_is_one_column_and_what_is_zero_is_deleted() {
        let shared = target("a", "k", "p = last(p) by v, q = last(q) by v", Write::Merge);
        let one = EntryId { ms: 1, seq: 0 }.number();
        assert_eq!(rows(vec![shared], &[&["k", "x", "p", "1", "q", "2"]])[0], [format!("x 1 {one} 2")]);
        let zero = target("a", "k", "s = sum(n), d = sum(m: numeric), x = max(n)", Write::DeleteZero);
        let entries: [&[&str]; 3] =
            [&["k", "x", "n", "5", "m", "0.5"], &["k", "x", "n", "-5", "m", "-0.50"], &["k", "y", "n", "1", "m", "0"]];
        assert_eq!(rows(vec![zero], &entries)[0].len(), 1);
    }
}
