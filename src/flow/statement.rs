//! Statement: the one SQL statement that flushes a batch of a pipeline.
//!
//! Takes a pipeline; gives its statement's text, with every name quoted. It cannot fail.

use super::bury;
use crate::model::pipeline::Pipeline;

/// Makes this transaction's COMMIT durable whatever the role, database or pooler has set; a stronger setting stays.
pub(super) const DURABLE: &str = "select set_config('synchronous_commit', 'on', true)
     where current_setting('synchronous_commit') in ('off', 'local', 'remote_write')";

/// The statement that flushes: ledger rows, then the table, then dead letters; all of it or nothing.
///
/// The table and the letters wait for `complete`, which waits for the ledger rows: a conflicting flush is met there, before
/// any row of the table is locked. Keys come sorted, and are inserted, so locked, in that order.
pub(crate) fn statement(pipeline: &Pipeline) -> String {
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
    let letters = bury::insert(10, "(select ok from complete)");
    format!(
        "with durable as ({DURABLE}),
         ledgered as (
             insert into tidegate.ledger (lane, ids, digests, digest_version, entries, consumer)
             select $1, numrange(r.first::numeric, r.last::numeric, '[]'), r.digests, $7, r.entries, $2
             from unnest($3::text[], $4::text[], $5::bytea[], $6::int4[]) as r (first, last, digests, entries)
             on conflict on constraint ledger_no_overlap do nothing
             returning 1),
         complete as materialized (
             select tidegate.all_or_nothing(
                 (select count(*) from ledgered), cardinality($3::text[])) as ok),
         merged as (
             insert into {table} as t ({key}, {value}{stamp})
             select d.key, d.delta{now} from unnest($8::text[], $9::int8[]) as d (key, delta)
             where (select ok from complete)
             on conflict ({key}) do update set {merged}{restamp}),
         buried as ({letters})
         select ok, (select count(*) from durable) from complete"
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
        let sql = statement(&pipeline);
        assert!(sql.contains(r#"insert into "Select"."Table" as t ("Key", "Value")"#), "{sql}");
        assert!(sql.contains(r#"set "Value" = coalesce(t."Value", 0) + excluded."Value")"#), "{sql}");
    }
}
