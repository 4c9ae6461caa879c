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

/// The statement that flushes: ledger rows, then the table, then dead letters; all of it or nothing.
///
/// It proves in itself, and ends with an error otherwise, that the lane is still this pipeline's, that the ledger accepted
/// every row (so these entries are new), and that the table took every row.
///
/// The table and the letters wait for `complete`, which waits for the ledger rows: a conflicting flush is met there, before
/// any row of the table is locked. Rows are inserted, so locked, in the order of their keys: workers that share rows lock
/// them in the same order. Where bytes tell keys apart, they come distinct and sorted; otherwise PostgreSQL makes them so,
/// for only it knows which spellings are one key of such a type, and in which order they stand.
pub(crate) fn statement(pipeline: &Pipeline, form: &KeyForm) -> String {
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
    let (keyed, rows, order, sent) = match form {
        KeyForm::Bytes => {
            (String::new(), "unnest($8::text[], $9::int8[]) as d (key, delta)", "", "cardinality($8::text[])")
        }
        KeyForm::Typed(cast) => (
            format!(
                "keyed as materialized (
             select d.key::{cast} as key, {} as delta
             from unnest($8::text[], $9::int8[]) as d (key, delta)
             where (select ok from complete)
             group by 1),
         ",
                pipeline.merge.aggregate("d.delta")
            ),
            "keyed as d",
            "order by d.key",
            "(select count(*) from keyed)",
        ),
    };
    let verified = lanes::proof(IDENTITY);
    let letters = bury::insert(10, "(select ok from complete)");
    // An identifier holds no quote, so the table's name can stand in a literal.
    let named = &pipeline.table;
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
         {keyed}merged as (
             insert into {table} as t ({key}, {value}{stamp})
             select d.key, d.delta{now} from {rows}
             where (select ok from complete)
             {order}
             on conflict ({key}) do update set {merged}{restamp}
             returning 1),
         buried as ({letters})
         select tidegate.every_row((select count(*) from merged), {sent}, '{named}'),
                (select count(*) from durable)"
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
        let sql = statement(&pipeline, &KeyForm::Bytes);
        assert!(sql.contains(r#"insert into "Select"."Table" as t ("Key", "Value")"#), "{sql}");
        assert!(sql.contains(r#"set "Value" = coalesce(t."Value", 0) + excluded."Value""#), "{sql}");
    }

    #[test]
    fn keys_of_a_type_are_grouped_and_ordered_by_postgresql_and_bytes_are_not() {
        let bytes = statement(&Pipeline::counters(), &KeyForm::Bytes);
        assert!(!bytes.contains("keyed") && !bytes.contains("order by d.key"), "{bytes}");
        let typed = statement(&Pipeline::counters(), &KeyForm::Typed("pg_catalog.uuid".into()));
        for part in ["d.key::pg_catalog.uuid as key, sum(d.delta) as delta", "group by 1", "order by d.key"] {
            assert!(typed.contains(part), "{typed}");
        }
    }
}
