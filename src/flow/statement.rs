//! Statement: the one SQL statement that flushes a batch of a pipeline.
//!
//! Takes a pipeline; gives its statement's text, with every name quoted. It cannot fail.

use super::bury;
use crate::lanes;
use crate::model::pipeline::Pipeline;
use crate::target::KeyForm;

/// Makes this transaction's COMMIT durable whatever the role, database or pooler has set; a stronger setting stays.
pub(super) const DURABLE: &str = "select set_config('synchronous_commit', 'on', true)
     where current_setting('synchronous_commit') in ('off', 'local', 'remote_write')";

/// The first parameter of the lane's identity in [`statement`], behind the letters.
const IDENTITY: usize = 16;

/// The statement that proves a lane's identity at the start of a transaction of several statements, and makes it durable.
pub(super) fn opening() -> String {
    format!("with durable as ({DURABLE}) select {}, (select count(*) from durable)", lanes::proof(2))
}

/// So many keys at least, and their rows are counted by `tidegate.upsert_every_row`: it takes 0.2 ms to plan the upsert
/// anew, and saves 0.25 us a row.
pub(super) const MANY: usize = 2_000;

/// How the rows that the table took are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Count {
    /// The statement counts what its upsert returns: planned once, dear for each row.
    Returned,
    /// A function runs the upsert and asks how many rows it touched. For keys told apart by their bytes only.
    Diagnosed,
}

/// The statement that flushes: ledger rows, then the table, then dead letters; all of it or nothing.
///
/// It proves in itself, and ends with an error otherwise, that the lane is still this pipeline's, that the ledger accepted
/// every row (so these entries are new), and that the table took every row.
///
/// The table and the letters wait for `complete`, which waits for the ledger rows: a conflicting flush is met there, before
/// any row of the table is locked. Rows are inserted, so locked, in the order of their keys: workers that share rows lock
/// them in the same order. Where bytes tell keys apart, they come distinct and sorted; otherwise PostgreSQL makes them so,
/// for only it knows which spellings are one key of such a type, and in which order they stand.
pub(crate) fn statement(pipeline: &Pipeline, form: &KeyForm, count: Count) -> String {
    // An identifier holds no quote, so the table's name can stand in a literal.
    let named = &pipeline.table;
    let merged = match (form, count) {
        (KeyForm::Typed(cast), _) => format!(
            "keyed as materialized (
             select d.key::{cast} as key, {} as delta
             from unnest($8::text[], $9::int8[]) as d (key, delta)
             where (select ok from complete)
             group by 1),
         upserted as (
             {}
             returning 1),
         merged as materialized (
             select tidegate.every_row((select count(*) from upserted), (select count(*) from keyed), '{named}') as ok)",
            pipeline.merge.aggregate("d.delta"),
            upsert(pipeline, "keyed as d where (select ok from complete) order by d.key"),
        ),
        (KeyForm::Bytes, Count::Returned) => format!(
            "upserted as (
             {}
             returning 1),
         merged as materialized (
             select tidegate.every_row((select count(*) from upserted), cardinality($8::text[]), '{named}') as ok)",
            upsert(pipeline, "unnest($8::text[], $9::int8[]) as d (key, delta) where (select ok from complete)"),
        ),
        (KeyForm::Bytes, Count::Diagnosed) => format!(
            "merged as materialized (
             select tidegate.upsert_every_row('{}', $8::text[], $9::int8[], '{named}') as ok
             where (select ok from complete))",
            upsert(pipeline, "unnest($1::text[], $2::int8[]) as d (key, delta)"),
        ),
    };
    let verified = lanes::proof(IDENTITY);
    let letters = bury::insert(10, "(select ok from complete)");
    format!(
        "with durable as ({DURABLE}),
         verified as materialized (select {verified} as ok),
         ledgered as (
             insert into tidegate.ledger (lane, ids, digests, digest_version, entries, consumer)
             select $1, numrange(r.first::numeric, r.last::numeric, '[]'), r.digests, $7, r.entries, $2
             from unnest($3::text[], $4::text[], $5::bytea[], $6::int4[]) as r (first, last, digests, entries)
             where (select ok from verified)
             on conflict on constraint ledger_no_overlap do nothing
             returning 1),
         complete as materialized (
             select tidegate.all_or_nothing(
                 (select count(*) from ledgered), cardinality($3::text[])) as ok),
         {merged},
         buried as ({letters})
         select ok, (select count(*) from durable) from merged"
    )
}

/// The upsert into the pipeline's table, of the rows (key, delta) of `d`.
fn upsert(pipeline: &Pipeline, rows: &str) -> String {
    let (key, value) = (pipeline.key.quoted(), pipeline.value.quoted());
    let table = format!("{}.{}", pipeline.table.schema.quoted(), pipeline.table.name.quoted());
    let merged = pipeline.merge.sql(&value);
    let (stamp, now, restamp) = match &pipeline.updated_at {
        Some(column) => {
            let column = column.quoted();
            (format!(", {column}"), ", now()", format!(", {column} = excluded.{column}"))
        }
        None => (String::new(), "", String::new()),
    };
    format!(
        "insert into {table} as t ({key}, {value}{stamp})
             select d.key, d.delta{now} from {rows}
             on conflict ({key}) do update set {merged}{restamp}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::pipeline::{Identifier, Table};

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
        let sql = statement(&pipeline, &KeyForm::Bytes, Count::Returned);
        assert!(sql.contains(r#"insert into "Select"."Table" as t ("Key", "Value")"#), "{sql}");
        assert!(sql.contains(r#"set "Value" = coalesce(t."Value", 0) + excluded."Value""#), "{sql}");
    }

    #[test]
    fn keys_of_a_type_are_grouped_and_ordered_by_postgresql_and_bytes_are_not() {
        let bytes = statement(&Pipeline::counters(), &KeyForm::Bytes, Count::Returned);
        assert!(!bytes.contains("keyed") && !bytes.contains("order by d.key"), "{bytes}");
        let typed = statement(&Pipeline::counters(), &KeyForm::Typed("pg_catalog.uuid".into()), Count::Returned);
        for part in ["d.key::pg_catalog.uuid as key, sum(d.delta) as delta", "group by 1", "order by d.key"] {
            assert!(typed.contains(part), "{typed}");
        }
    }
}
