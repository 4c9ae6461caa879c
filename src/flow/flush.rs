//! Flush: a batch becomes rows, with its ledger rows, in one transaction.
//!
//! Takes a batch; gives a [`Settled`], the only thing that can be acknowledged, and nothing else makes one (I3). A failed
//! flush hands its batch back with the reason: nothing is cloned, nothing is lost.
//!
//! A fresh batch is one statement, and so one round trip in which a stopped worker cannot hold locks while it sleeps. A
//! careful batch first locks and reads the ledger's rows around it, so it is a transaction of several statements.

use std::sync::Arc;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection};

use super::batch::{Batch, Coalesced};
use super::bury::{self, Letters};
use super::ledger::{self, Findings, Lane, NewRows};
use crate::entry::{DIGEST_VERSION, EntryId, Generation};
use crate::metrics::Tally;
use crate::pipeline::{Merge, Pipeline};
use crate::postgres::Database;
use crate::retry::Fault;
use crate::failpoint;

/// How often a careful flush that meets concurrent ones starts over before it says so.
const RESTARTS: u32 = 20;

/// A pipeline's table and its place in the ledger, with the statement that feeds it.
#[derive(Debug, Clone)]
pub struct Target {
    lane: Lane,
    pipeline: Pipeline,
    statement: Arc<str>,
}

impl Target {
    /// Prepares the flush of a pipeline.
    pub fn new(pipeline: Pipeline, lane: Lane) -> Target {
        Target { lane, statement: statement(&pipeline).into(), pipeline }
    }

    /// Its place in the ledger.
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// The pipeline it belongs to.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }
}

/// Why a pipeline's table cannot be fed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It is not there, or this role cannot see it.
    #[error("table {0} does not exist: create it, or run `tidegate migrate` for the default one")]
    NoTable(String),
    /// It lacks a column.
    #[error("table {table} has no column {column}: add it, or name another one in the pipeline")]
    NoColumn {
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
    /// Without it an upsert cannot find its row.
    #[error("table {table} has no unique index on {column} alone: create unique index on {table} ({column})")]
    NoUniqueIndex {
        /// The table.
        table: String,
        /// The key's column.
        column: String,
    },
}

/// Makes sure that a pipeline's table is what its configuration says.
pub async fn check_table(connection: &mut PgConnection, pipeline: &Pipeline) -> Result<Result<(), Unfit>, sqlx::Error> {
    let table = pipeline.table.to_string();
    let columns: Option<Vec<String>> = sqlx::query_scalar(
        "select array(select attname::text from pg_attribute where attrelid = c.oid and attnum > 0 and not attisdropped)
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')",
    )
    .bind(pipeline.table.schema.as_str())
    .bind(pipeline.table.name.as_str())
    .fetch_optional(&mut *connection)
    .await?;
    let Some(columns) = columns else { return Ok(Err(Unfit::NoTable(table))) };
    for column in [Some(&pipeline.key), Some(&pipeline.value), pipeline.updated_at.as_ref()].into_iter().flatten() {
        if !columns.iter().any(|c| c == column.as_str()) {
            return Ok(Err(Unfit::NoColumn { table, column: column.to_string() }));
        }
    }
    let unique: bool = sqlx::query_scalar(
        "select exists (
             select from pg_index i
             join pg_class c on c.oid = i.indrelid join pg_namespace n on n.oid = c.relnamespace
             join pg_attribute a on a.attrelid = c.oid and a.attnum = i.indkey[0]
             where n.nspname = $1 and c.relname = $2 and a.attname = $3
               and i.indisunique and i.indisvalid and i.indimmediate and i.indnkeyatts = 1 and i.indpred is null)",
    )
    .bind(pipeline.table.schema.as_str())
    .bind(pipeline.table.name.as_str())
    .bind(pipeline.key.as_str())
    .fetch_one(connection)
    .await?;
    let column = pipeline.key.to_string();
    Ok(if unique { Ok(()) } else { Err(Unfit::NoUniqueIndex { table, column }) })
}

/// Entries whose effect is committed. Only this can be acknowledged, and only where it was read.
#[derive(Debug)]
pub struct Settled {
    generation: Arc<Generation>,
    ids: Vec<EntryId>,
    /// What happened to them.
    pub tally: Tally,
}

impl Settled {
    /// Where they were read.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// Their ids.
    pub fn ids(&self) -> &[EntryId] {
        &self.ids
    }
}

/// A flush that succeeded.
#[derive(Debug)]
pub struct Flushed {
    /// What can be acknowledged.
    pub settled: Settled,
    /// What the ledger covers and cannot judge: left alone.
    pub unjudgeable: Option<Batch>,
}

/// A flush that did not. The batch comes back as it was.
#[derive(Debug)]
pub struct Failed {
    /// What was to be flushed.
    pub batch: Batch,
    /// Why it was not.
    pub why: Why,
}

/// Why a flush did not succeed.
#[derive(Debug)]
pub enum Why {
    /// The ledger refused: these spans may have been flushed before. Nothing of the batch was done.
    Refused(Vec<usize>),
    /// Something went wrong. Nothing of the batch was done, unless PostgreSQL was lost: then that is unknown.
    Fault(Fault),
}

/// Flushes a batch, by the way it calls for.
pub async fn flush(database: &Database, target: &Target, batch: Batch) -> Result<Flushed, Failed> {
    let result = if batch.is_careful() {
        flush_careful(database, target, &batch).await
    } else {
        flush_fresh(database, target, &batch).await
    };
    result.map_err(|why| Failed { batch, why })
}

/// One statement. Either every run is new and all of it is committed, or nothing is.
async fn flush_fresh(database: &Database, target: &Target, batch: &Batch) -> Result<Flushed, Why> {
    failpoint::reached("flush.parsed");
    let rows = NewRows::of(batch, batch.spans());
    let coalesced = batch.coalesce(&target.pipeline, 0..batch.len()).map_err(Why::Fault)?;
    let tally = tally(batch.len(), &coalesced, &Findings::default());
    let applied = database.run(async |c| apply(c, target, batch, rows, coalesced).await);
    match failpoint::during("flush.sent", applied).await {
        Ok(()) => {
            let ids = batch.entries().iter().map(|e| e.id).collect();
            let settled = Settled { generation: batch.origin().generation.clone(), ids, tally };
            Ok(Flushed { settled, unjudgeable: None })
        }
        Err(fault) if is_refusal(&fault) => {
            let spans = database.run(async |c| ledger::collisions(c, target.lane, batch).await).await;
            Err(spans.map_or_else(Why::Fault, Why::Refused))
        }
        Err(fault) => Err(Why::Fault(fault)),
    }
}

/// One transaction, in this order of locks: ledger rows locked, ascending; rows inserted, ascending; the table; letters.
async fn flush_careful(database: &Database, target: &Target, batch: &Batch) -> Result<Flushed, Why> {
    for _ in 0..RESTARTS {
        match database.transact(async |c| examine_and_apply(c, target, batch).await).await {
            Ok(Ok(flushed)) => return Ok(flushed),
            // A row of the ledger was committed, or compacted away, after it was looked for: look again.
            Err(fault) if is_refusal(&fault) => continue,
            Ok(Err(fault)) | Err(fault) => return Err(Why::Fault(fault)),
        }
    }
    Err(Why::Fault(Fault::StillRefused))
}

async fn examine_and_apply(
    connection: &mut PgConnection,
    target: &Target,
    batch: &Batch,
) -> Result<Result<Flushed, Fault>, sqlx::Error> {
    let begun = connection.begin_with("begin isolation level read committed");
    let mut transaction = failpoint::during("careful.begin", begun).await?;
    failpoint::reached("careful.begun");
    sqlx::query(DURABLE).execute(&mut *transaction).await?;
    let locked = ledger::lock_met(&mut transaction, target.lane, batch);
    let rows = failpoint::during("careful.ledger", locked).await?;
    let findings = ledger::examine(batch, &rows);
    failpoint::reached("careful.judged");
    let coalesced = match batch.coalesce(&target.pipeline, findings.new.iter().copied()) {
        Ok(coalesced) => coalesced,
        Err(fault) => {
            transaction.rollback().await?;
            return Ok(Err(fault));
        }
    };
    let tally = tally(findings.new.len(), &coalesced, &findings);
    if !findings.new.is_empty() {
        ledger::amend(&mut transaction, target.lane, batch, &rows, &findings.amended).await?;
        let rows = NewRows::of(batch, &findings.stretches);
        failpoint::during("careful.upsert", apply(&mut transaction, target, batch, rows, coalesced)).await?;
        failpoint::reached("careful.upserted");
    }
    failpoint::during("careful.commit", transaction.commit()).await?;
    let mut handled: Vec<usize> = findings.known.iter().chain(&findings.new).copied().collect();
    handled.sort_unstable();
    let ids = handled.iter().map(|&i| batch.entries()[i].id).collect();
    Ok(Ok(Flushed {
        settled: Settled { generation: batch.origin().generation.clone(), ids, tally },
        unjudgeable: (!findings.unjudgeable.is_empty()).then(|| batch.pick(&findings.unjudgeable)),
    }))
}

/// Runs the pipeline's statement.
async fn apply(
    connection: &mut PgConnection,
    target: &Target,
    batch: &Batch,
    rows: NewRows,
    coalesced: Coalesced<'_>,
) -> Result<(), sqlx::Error> {
    let letters = Letters::of(batch, &coalesced.dead);
    let buries = !coalesced.dead.is_empty();
    let query = sqlx::query(AssertSqlSafe(target.statement.clone()))
        .bind(target.lane)
        .bind(&*batch.origin().consumer)
        .bind(rows.first)
        .bind(rows.last)
        .bind(rows.digests)
        .bind(rows.entries)
        .bind(DIGEST_VERSION)
        .bind(coalesced.keys)
        .bind(coalesced.amounts);
    let sent = letters.bind(query).execute(connection);
    if buries {
        failpoint::during("bury.sent", sent).await?
    } else {
        sent.await?
    };
    Ok(())
}

/// Buries entries that the ledger covers and cannot judge. The batch comes back where that fails.
pub async fn bury_covered(database: &Database, target: &Target, batch: Batch) -> Result<Settled, Failed> {
    let buried = database.run(async |c| bury::bury(c, target.lane, &batch).await);
    match failpoint::during("bury.covered", buried).await {
        Ok(()) => {
            let tally = Tally { buried: batch.len() as u64, ..Tally::default() };
            let ids = batch.entries().iter().map(|e| e.id).collect();
            Ok(Settled { generation: batch.origin().generation.clone(), ids, tally })
        }
        Err(fault) => Err(Failed { batch, why: Why::Fault(fault) }),
    }
}

fn tally(new: usize, coalesced: &Coalesced<'_>, findings: &Findings) -> Tally {
    Tally {
        applied: (new - coalesced.dead.len()) as u64,
        recognised: findings.known.len() as u64,
        buried: coalesced.dead.len() as u64,
        collided: findings.amended.values().map(|indices| indices.len() as u64).sum(),
        rows: coalesced.keys.len() as u64,
    }
}

fn is_refusal(fault: &Fault) -> bool {
    matches!(fault, Fault::Postgres { sqlstate, .. } if sqlstate == ledger::REFUSED)
}

/// Makes this transaction's COMMIT durable whatever the role, database or pooler has set; a stronger setting stays.
const DURABLE: &str = "select set_config('synchronous_commit', 'on', true)
     where current_setting('synchronous_commit') in ('off', 'local', 'remote_write')";

/// The statement that flushes: ledger rows, then the table, then dead letters; all of it or nothing.
///
/// The table and the letters wait for `complete`, which waits for the ledger rows: a conflicting flush is met there, before
/// any row of the table is locked. Keys come sorted, and are inserted, so locked, in that order.
fn statement(pipeline: &Pipeline) -> String {
    let (key, value) = (pipeline.key.quoted(), pipeline.value.quoted());
    let table = format!("{}.{}", pipeline.table.schema.quoted(), pipeline.table.name.quoted());
    let merged = match pipeline.merge {
        Merge::Sum => format!("{value} = t.{value} + excluded.{value}"),
    };
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
    use crate::pipeline::{Identifier, Table};

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
        assert!(sql.contains(r#"set "Value" = t."Value" + excluded."Value")"#), "{sql}");
    }
}
