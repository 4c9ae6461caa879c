//! Statement: the one SQL statement that flushes a batch of a pipeline.
//!
//! Takes a pipeline and how its table orders keys; gives its statement's text, with every name quoted. It cannot fail.

use super::bury;
use crate::model::pipeline::Pipeline;
use crate::target::KeyOrder;

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

/// So many keys at least, and `tidegate.upsert_all` counts their rows: it takes 0.2 ms to plan the upsert anew, and saves 0.25 us a row.
pub(super) const MANY_KEYS: usize = 2_000;

/// How the rows that the table took are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Count {
    /// The statement counts what its upsert returns: planned once, costly for each row.
    Returned,
    /// A function runs the upsert and asks how many rows it touched. For keys in the order of their bytes only.
    Diagnosed,
}

/// The statement that flushes: ledger rows, then the table, then dead letters; all of it or nothing.
///
/// The table and the letters wait for `complete`, which waits for the ledger rows: a conflicting flush is met there, before
/// any row of the table is locked. It also proves that each lane still is this pipeline's, and in the end that every key reached
/// its row. Keys are distinct and sorted, and are inserted, so locked, in that order; where the table has an order of its own,
/// PostgreSQL makes them so.
pub(crate) fn statement(pipeline: &Pipeline, order: &KeyOrder, count: Count) -> String {
    let merged = match (order, count) {
        (KeyOrder::Bytes, Count::Diagnosed) => format!(
            "merged as materialized (
             select tidegate.upsert_all('{}', $8::text[], $9::int8[]) as ok where (select ok from complete))",
            // Names hold no quotes, so the text can stand in a literal.
            upsert(pipeline, "unnest($1::text[], $2::int8[]) as k (key, delta)"),
        ),
        (KeyOrder::Bytes, Count::Returned) => format!(
            "upserted as ({} returning 1),
         merged as materialized (
             select tidegate.all_reached((select count(*) from upserted), cardinality($8::text[])) as ok)",
            upsert(pipeline, "unnest($8::text[], $9::int8[]) as k (key, delta) where (select ok from complete)"),
        ),
        (KeyOrder::Typed(sql_type), _) => format!(
            "keyed as materialized (
             select d.key::{sql_type} as key, sum(d.delta)::int8 as delta
             from unnest($8::text[], $9::int8[]) as d (key, delta) group by 1 order by 1),
         upserted as ({} returning 1),
         merged as materialized (
             select tidegate.all_reached((select count(*) from upserted), (select count(*) from keyed)) as ok)",
            upsert(pipeline, "keyed k where (select ok from complete)"),
        ),
    };
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
         {merged},
         buried as ({letters})
         select (select ok from merged), (select count(*) from durable) from complete"
    )
}

/// The upsert into the pipeline's table of the rows (key, delta) of `k`.
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
        "insert into {table} as t ({key}, {value}{stamp}) select k.key, k.delta{now} from {rows}
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
        let sql = statement(&pipeline, &KeyOrder::Bytes, Count::Returned);
        assert!(sql.contains(r#"insert into "Select"."Table" as t ("Key", "Value")"#), "{sql}");
        assert!(sql.contains(r#"set "Value" = coalesce(t."Value", 0) + excluded."Value""#), "{sql}");
    }
}
