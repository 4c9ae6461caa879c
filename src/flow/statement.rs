//! Statement: the one SQL statement that flushes a batch of a pipeline.
//!
//! Takes a pipeline's tables and how each orders its keys; gives the statement's text, with every name quoted. It cannot fail.
//!
//! The columns of all tables travel in two arrays, one of texts and one of numbers, column behind column (`merge::fold::Packed`). So the
//! statement has the same parameters whatever the tables are like. Where there are several tables, how many rows each has stands first among the numbers.

use super::bury;
use crate::merge::{Array, Sent, Terms};
use crate::model::target::{Kind, Target, Write};
use crate::target::{Fit, Writing};

/// Makes this transaction's COMMIT durable whatever the role, database or pooler has set; a stronger setting stays.
const DURABLE: &str = "select set_config('synchronous_commit', 'on', true)
     where current_setting('synchronous_commit') in ('off', 'local', 'remote_write')";

/// The last parameters of the statement: the numbers and the streams of its lanes.
const LANES: usize = LETTERS + bury::COLUMNS;
/// Where the letters' columns start.
const LETTERS: usize = 12;

/// What a careful transaction begins with: it is durable, and lane $1 is this pipeline's, or it ends here. Before anything is judged:
/// the rows of another pipeline's lane would tell of other entries.
pub(super) fn preamble() -> String {
    format!(
        "with durable as ({DURABLE}) select tidegate.verify_lane($1, $2::text[], $3), (select count(*) from durable)"
    )
}

/// Runs a flush's statement, which is $2, in the turn of slot $1; its own parameters follow.
pub(super) const IN_TURN: &str =
    "call tidegate.flush_in_turn($1, $2, $3::int4[], $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18,
     $19, $20, $21, $22, $23, $24)";

/// From so many rows on `tidegate.write_rows` counts them: it takes 0.2 ms to plan the upsert anew, and saves 0.25 us a row.
pub(super) const DIAGNOSED_FROM: usize = 2_000;

/// How the rows that a table took are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Count {
    /// The statement counts what its upsert returns: planned once, costly for each row.
    Returned,
    /// A function runs the upsert and asks how many rows it touched. Only where the worker has sorted the keys and made them distinct.
    Diagnosed,
}

/// A table with how it orders its keys.
pub(crate) type Fitted = (Target, Fit);

/// The statement that flushes: ledger rows, then the tables, then dead letters; all of it or nothing.
///
/// The tables and the letters wait for `complete`, which waits for the ledger rows: a conflicting flush is met there, before
/// any row of a table is locked. It also proves that each lane still is this pipeline's, and in the end that every key reached
/// its row. Tables are written one after the other, and keys, which are distinct and sorted, are inserted, so locked, in that order; where a table has an
/// order of its own, PostgreSQL makes them so.
pub(crate) fn statement(tables: &[Fitted], count: Count) -> String {
    let packings = Packing::of(tables, "$8::text[]", "$9::int8[]");
    let (mut written, mut before) = (Vec::new(), "complete".to_owned());
    for (n, packing) in packings.iter().enumerate() {
        written.push(packing.written(n, count, &before, || Packing::of(tables, "$1", "$2").swap_remove(n)));
        before = format!("merged_{n}");
    }
    let written = written.join(",\n         ");
    let letters = bury::insert(LETTERS, "(select ok from complete)");
    let (lane, stream) = (LANES, LANES + 1);
    format!(
        "with durable as ({DURABLE}),
         verified as materialized (
             select bool_and(tidegate.verify_lane(v.lane, array[$10[1], $10[2], v.stream, $10[3]], $11)) as ok
             from unnest(${lane}::int4[], ${stream}::text[]) as v (lane, stream)),
         ledgered as (
             insert into tidegate.ledger (lane, ids, digests, digest_version, entries, consumer)
             select r.lane, numrange(r.first::numeric, r.last::numeric, '[]'), r.digests, $7, r.entries, $2
             from unnest($1::int4[], $3::text[], $4::text[], $5::bytea[], $6::int4[]) as r (lane, first, last, digests, entries)
             on conflict on constraint ledger_no_overlap do nothing
             returning 1),
         complete as materialized (
             select case when (select ok from verified) then tidegate.all_or_nothing(
                 (select count(*) from ledgered), cardinality($3::text[])) end as ok),
         {written},
         buried as ({letters})
         select (select ok from {before}), (select count(*) from durable) from complete"
    )
}

/// How one table's columns lie in the two arrays.
struct Packing<'t> {
    target: &'t Target,
    fit: &'t Fit,
    /// How many rows it has.
    rows: String,
    /// Its columns, as arrays.
    arrays: Vec<String>,
}

/// The arrays that a table's columns travel in, keys first.
pub(super) fn arrays(target: &Target) -> Vec<Array> {
    let of_key = |kind| if kind == Kind::Bigint { Array::Numbers } else { Array::Texts };
    let keys = target.keys.iter().map(|key| of_key(key.kind()));
    keys.chain(target.values.iter().flat_map(|value| value.merge.sends(value.kind()).iter().copied())).collect()
}

impl<'t> Packing<'t> {
    /// Of all tables, in arrays of these names.
    fn of(tables: &'t [Fitted], texts: &str, numbers: &str) -> Vec<Packing<'t>> {
        let is_alone = tables.len() == 1;
        // What lies before a column, as an expression: so many columns of so many rows.
        let mut before = [Vec::<String>::new(), if is_alone { vec![] } else { vec![tables.len().to_string()] }];
        let place = |array| usize::from(array == Array::Numbers);
        let mut packings = Vec::new();
        for (n, (target, fit)) in tables.iter().enumerate() {
            let columns = arrays(target);
            let of = |array| columns.iter().filter(|column| **column == array).count();
            let (of_texts, of_numbers) = (of(Array::Texts), of(Array::Numbers));
            let rows = match (is_alone, of_texts) {
                (false, _) => format!("({numbers})[{}]", n + 1),
                (true, 0) => format!("(cardinality({numbers}) / {of_numbers})"),
                (true, 1) => format!("cardinality({texts})"),
                (true, _) => format!("(cardinality({texts}) / {of_texts})"),
            };
            let mut seen = [0usize; 2];
            let arrays = columns.iter().map(|array| {
                let (name, of) = if *array == Array::Texts { (texts, of_texts) } else { (numbers, of_numbers) };
                if is_alone && of == 1 {
                    return name.to_owned();
                }
                let place = place(*array);
                let skipped: Vec<String> =
                    before[place].iter().cloned().chain([format!("{} * {rows}", seen[place])]).collect();
                seen[place] += 1;
                let skipped = skipped.join(" + ");
                format!("({name})[{skipped} + 1 : {skipped} + {rows}]")
            });
            let arrays = arrays.collect();
            before[0].push(format!("{of_texts} * {rows}"));
            before[1].push(format!("{of_numbers} * {rows}"));
            packings.push(Packing { target, fit, rows, arrays });
        }
        packings
    }

    /// The common table expressions that write it and say so as `merged_<n>`, once `before` is so. `inner`: the same in the arrays that a function gets.
    fn written(&self, n: usize, count: Count, before: &str, inner: impl Fn() -> Packing<'t>) -> String {
        let (source, names) = (self.source(), self.names());
        let condition = format!("(select ok from {before})");
        let (keyed, rows, wanted) = if self.fit.is_grouped {
            let keyed = format!("keyed_{n} as materialized ({}),\n         ", self.grouped(&source, &names));
            (keyed, format!("keyed_{n} k"), format!("(select count(*) from keyed_{n})"))
        } else {
            (String::new(), format!("{source} as k ({})", names.join(", ")), self.rows.clone())
        };
        let afterwards = self.target.write == Write::DeleteZero;
        let is_cheaper = count == Count::Diagnosed && !self.fit.is_grouped && self.target.write == Write::Merge;
        if afterwards || is_cheaper || self.fit.writing != Writing::Upsert {
            let inner = inner();
            let (source, names) = (inner.source(), inner.names());
            let rows = match self.fit.is_grouped {
                true => format!("({}) k", inner.grouped(&source, &names)),
                false => format!("{source} as k ({})", names.join(", ")),
            };
            let deletion = if afterwards { literal(&inner.deletion(&source, &names)) } else { "null".into() };
            let (function, texts) = match self.fit.writing {
                Writing::UpdateThenInsert => {
                    ("write_checked_rows", inner.update_then_insert(&rows).map(|sql| literal(&sql)).join(", "))
                }
                Writing::Upsert | Writing::UpsertAlone => ("write_rows", literal(&inner.upsert(&rows))),
            };
            return format!(
                "{keyed}merged_{n} as materialized (
             select tidegate.{function}({texts}, $8::text[], $9::int8[], {wanted}, {deletion}) as ok where {condition})"
            );
        }
        let reached = match self.target.write {
            // Of those that were there before, nothing is returned.
            Write::Insert => format!("select count(*) >= 0 as ok from upserted_{n}"),
            Write::Merge | Write::DeleteZero => {
                format!("select tidegate.all_reached((select count(*) from upserted_{n}), {wanted}) as ok")
            }
        };
        format!(
            "{keyed}upserted_{n} as ({} where {condition}{} returning 1),
         merged_{n} as materialized ({reached})",
            self.insertion(&rows),
            self.conflict()
        )
    }

    fn source(&self) -> String {
        format!("unnest({})", self.arrays.join(", "))
    }

    fn names(&self) -> Vec<String> {
        (0..self.arrays.len()).map(|n| format!("c{n}")).collect()
    }

    /// The rows, keys read, sorted and made distinct by PostgreSQL.
    fn grouped(&self, source: &str, names: &[String]) -> String {
        let keys = self.target.keys.len();
        let mut columns: Vec<String> =
            self.fit.keys.iter().zip(names).map(|(kind, name)| format!("d.{name}::{kind} as {name}")).collect();
        let sent: Vec<String> = names[keys..].iter().map(|name| format!("d.{name}")).collect();
        let folded = self.terms(&sent).into_iter().flat_map(|terms| terms.folded);
        columns.extend(folded.zip(&names[keys..]).map(|(folded, name)| format!("{folded} as {name}")));
        let order: Vec<String> = (1..=keys).map(|n| n.to_string()).collect();
        let (columns, order) = (columns.join(", "), order.join(", "));
        format!("select {columns} from {source} as d ({}) group by {order} order by {order}", names.join(", "))
    }

    /// What each value says in SQL when this was sent for all of them.
    fn terms(&self, sent: &[String]) -> Vec<Terms> {
        let mut rest = sent;
        let values = self.target.values.iter().zip(&self.fit.values);
        values
            .map(|(value, sql_type)| {
                let kind = value.kind();
                let (expressions, behind) = rest.split_at(value.merge.sends(kind).len());
                rest = behind;
                let (column, by) = (value.column.quoted(), value.by.as_ref().map(|by| by.quoted()));
                value.merge.terms(&Sent { column: &column, by: by.as_deref(), sql_type, kind, expressions })
            })
            .collect()
    }

    fn of_rows(&self) -> Vec<Terms> {
        let keys = self.target.keys.len();
        self.terms(&(keys..self.arrays.len()).map(|n| format!("k.c{n}")).collect::<Vec<_>>())
    }

    /// What is proposed for each row of `k`: its columns, each with its value.
    fn proposed(&self) -> Vec<(String, String)> {
        let key = |(n, key): (usize, &crate::model::target::KeyColumn)| {
            let kind = &self.fit.keys[n];
            let read =
                if self.fit.is_grouped || kind == "text" { format!("k.c{n}") } else { format!("k.c{n}::{kind}") };
            (key.column.quoted(), read)
        };
        let mut columns: Vec<(String, String)> = self.target.keys.iter().enumerate().map(key).collect();
        columns.extend(distinct(self.of_rows().into_iter().flat_map(|terms| terms.inserted)));
        columns.extend(self.target.updated_at.as_ref().map(|column| (column.quoted(), "now()".to_owned())));
        columns
    }

    /// The insertion of the rows of `k`, without a condition and without what becomes of conflicts.
    fn insertion(&self, rows: &str) -> String {
        let (names, values): (Vec<String>, Vec<String>) = self.proposed().into_iter().unzip();
        format!("insert into {} as t ({}) select {} from {rows}", self.table(), names.join(", "), values.join(", "))
    }

    /// What becomes of rows that are there.
    fn conflict(&self) -> String {
        let keys: Vec<String> = self.target.keys.iter().map(|key| key.column.quoted()).collect();
        let keys = keys.join(", ");
        match self.target.write {
            Write::Insert => format!(" on conflict ({keys}) do nothing"),
            Write::Merge | Write::DeleteZero => format!(" on conflict ({keys}) do update set {}", self.merged()),
        }
    }

    /// What is assigned to a row `t` that is there, when this is proposed as `excluded`.
    fn merged(&self) -> String {
        let restamp = self.target.updated_at.as_ref().map(|column| {
            let column = column.quoted();
            (column.clone(), format!("excluded.{column}"))
        });
        let merged = distinct(self.of_rows().into_iter().flat_map(|terms| terms.merged)).into_iter().chain(restamp);
        merged.map(|(column, value)| format!("{column} = {value}")).collect::<Vec<_>>().join(", ")
    }

    /// Three statements: lock the rows that are there, in the order of their keys; update them; insert those that are not.
    fn update_then_insert(&self, rows: &str) -> [String; 3] {
        let table = self.table();
        let columns: Vec<String> = self.proposed().iter().map(|(name, value)| format!("{value} as {name}")).collect();
        let proposed = format!("(select {} from {rows}) as excluded", columns.join(", "));
        let keys = || self.target.keys.iter().map(|key| key.column.quoted());
        let same = keys().map(|key| format!("t.{key} = excluded.{key}")).collect::<Vec<_>>().join(" and ");
        let order = keys().map(|key| format!("t.{key}")).collect::<Vec<_>>().join(", ");
        [
            format!("select from {table} t join {proposed} on {same} order by {order} for no key update of t"),
            format!("update {table} t set {} from {proposed} where {same}", self.merged()),
            {
                let names: Vec<String> = self.proposed().into_iter().map(|(name, _)| name).collect();
                let names = names.join(", ");
                format!(
                    "insert into {table} as t ({names}) select {names} from {proposed} where not exists (select from {table} t where {same}){}",
                    self.conflict()
                )
            },
        ]
    }

    fn upsert(&self, rows: &str) -> String {
        self.insertion(rows) + &self.conflict()
    }

    /// Deletes those of the rows in which nothing is left.
    fn deletion(&self, source: &str, names: &[String]) -> String {
        let keys = self.target.keys.iter().zip(&self.fit.keys).zip(names);
        let same = keys.map(|((key, kind), name)| format!("t.{} = k.{name}::{kind}", key.column.quoted()));
        let additive = self.target.values.iter().filter(|value| value.merge.is_additive());
        let nothing = additive.map(|value| format!("coalesce(t.{}, 0) = 0", value.column.quoted()));
        let conditions: Vec<String> = same.chain(nothing).collect();
        format!(
            "delete from {} t using {source} as k ({}) where {}",
            self.table(),
            names.join(", "),
            conditions.join(" and ")
        )
    }

    fn table(&self) -> String {
        self.target.table.quoted()
    }
}

/// A column that two values share is written once.
fn distinct(columns: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
    let mut kept: Vec<(String, String)> = Vec::new();
    for column in columns {
        if !kept.iter().any(|(name, _)| *name == column.0) {
            kept.push(column);
        }
    }
    kept
}

/// A text of ours as a literal.
fn literal(sql: &str) -> String {
    format!("'{}'", sql.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::pipeline::{Identifier, Pipeline, Table};
    use crate::model::target::{parse_keys, parse_values};

    fn plain(target: &Target) -> Fit {
        let kinds = target.keys.iter().map(|key| key.kind().to_string()).collect();
        let values =
            target.values.iter().map(|value| value.field.as_ref().map_or("bigint".into(), |f| f.kind.to_string()));
        Fit { keys: kinds, values: values.collect(), is_grouped: false, writing: Writing::Upsert }
    }

    fn target(table: &str, keys: &str, values: &str, write: Write) -> Target {
        let (keys, values) = (parse_keys(keys).expect("keys"), parse_values(values).expect("values"));
        Target { table: Table::parse(table).expect("valid"), keys, values, updated_at: None, write }
    }

    #[test]
    fn every_name_of_a_pipeline_stands_quoted_in_its_statement() {
        let name = |n: &str| Identifier::parse(n).expect("valid");
        let pipeline = Pipeline {
            table: Table { schema: name("Select"), name: name("Table") },
            key: name("Key"),
            value: name("Value"),
            updated_at: None,
            ..Pipeline::counters()
        };
        let target = pipeline.targets().swap_remove(0);
        let fit = Fit {
            keys: vec!["text".into()],
            values: vec!["bigint".into()],
            is_grouped: false,
            writing: Writing::Upsert,
        };
        let sql = statement(&[(target, fit)], Count::Returned);
        assert!(sql.contains(r#"insert into "Select"."Table" as t ("Key", "Value") select k.c0, k.c1 from unnest($8::text[], $9::int8[]) as k (c0, c1)"#), "{sql}");
        assert!(sql.contains(r#"set "Value" = coalesce(t."Value", 0) + excluded."Value""#), "{sql}");
    }

    #[test]
    fn a_distributed_table_stands_in_no_statement_with_others() {
        let target = target("public.usage", "x: uuid", "n = count()", Write::Merge);
        let fit = Fit { writing: Writing::UpsertAlone, ..plain(&target) };
        let grouped = Fit { is_grouped: true, ..fit.clone() };
        for (fit, count) in [(&fit, Count::Returned), (&fit, Count::Diagnosed), (&grouped, Count::Returned)] {
            let sql = statement(&[(target.clone(), fit.clone())], count);
            // What stands between quotes is executed by itself.
            let outside: String = sql.split('\'').step_by(2).collect();
            assert!(!outside.contains("usage") && sql.contains("usage"), "{sql}");
        }
    }

    #[test]
    fn columns_lie_one_behind_the_other_and_tables_too() {
        let first = target("a", "x: uuid, y: bigint", "n = count(), p = last(p) by v", Write::Merge);
        let second = target("b", "z", "s = sum(s)", Write::Merge);
        let tables: Vec<Fitted> = [first, second].into_iter().map(|target| (target.clone(), plain(&target))).collect();
        let [one, two] = &Packing::of(&tables, "t", "n")[..] else { panic!("two tables") };
        assert_eq!(one.rows, "(n)[1]");
        assert_eq!(one.arrays[0], "(t)[0 * (n)[1] + 1 : 0 * (n)[1] + (n)[1]]");
        assert_eq!(one.arrays[1], "(n)[2 + 0 * (n)[1] + 1 : 2 + 0 * (n)[1] + (n)[1]]");
        assert_eq!(one.arrays[4], "(t)[2 * (n)[1] + 1 : 2 * (n)[1] + (n)[1]]");
        assert_eq!(two.arrays[0], "(t)[3 * (n)[1] + 0 * (n)[2] + 1 : 3 * (n)[1] + 0 * (n)[2] + (n)[2]]");
        assert_eq!(two.arrays[1], "(n)[2 + 2 * (n)[1] + 0 * (n)[2] + 1 : 2 + 2 * (n)[1] + 0 * (n)[2] + (n)[2]]");
    }
}
