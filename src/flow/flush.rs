//! Flush: a batch becomes rows, with its ledger rows, in one transaction.
//!
//! Takes a batch; gives a [`Settled`], the only thing that can be acknowledged, and nothing else makes one (I3). A failed
//! flush hands its batch back with the reason: nothing is cloned, nothing is lost.
//!
//! A fresh batch is one statement, and so one round trip in which a stopped worker cannot hold locks while it sleeps. A
//! careful batch first locks and reads the ledger's rows around it, so it is a transaction of several statements.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;
use tokio::sync::Notify;

use super::batch::{Batch, Origin};
use super::bury::{self, Letters};
use super::coalesce::{Coalesced, Columns};
use super::judge::{self, Findings};
use super::ledger::{self, NewRows};
use super::rows::{NoZone, Plan};
use super::statement::{Count, DIAGNOSED_FROM, IN_TURN, preamble, statement};
use super::turn::{MANY_ROWS, Turn};
use crate::failpoint;
use crate::lanes::{self, Identity, LaneId, Record, Unregistered};
use crate::model::entry::{DIGEST_VERSION, EntryId, Generation};
use crate::model::pipeline::Pipeline;
use crate::postgres::{Database, Session};
use crate::retry::Fault;
use crate::target::Fit;
use crate::telemetry::contract::Tally;
use crate::telemetry::trace::Trace;

/// The code with which `tidegate.verify_lane` ends a statement.
const LANE_GONE: &str = "TG002";
/// How often a careful flush that meets concurrent ones starts over before it says so.
const RESTARTS: u32 = 20;

/// How a pipeline's entries become rows: its plan, and the statements that feed its tables.
#[derive(Debug, Clone)]
pub struct Statements {
    plan: Plan,
    usual: Arc<str>,
    /// The same for many rows, where there is another one.
    of_many: Option<Arc<str>>,
}

impl Statements {
    /// Of a pipeline whose tables fit so, in their order.
    pub fn of(pipeline: &Pipeline, fits: &[Fit]) -> Result<Statements, NoZone> {
        let tables: Vec<_> = pipeline.targets().into_iter().zip(fits.iter().cloned()).collect();
        let [usual, of_many] = [Count::Returned, Count::Diagnosed].map(|count| statement(&tables, count));
        let of_many = (of_many != usual).then(|| of_many.into());
        Ok(Statements { plan: Plan::of(pipeline)?, usual: usual.into(), of_many })
    }
}

/// What a ledger row costs to be kept is what so many digests cost.
const LEDGER_ROW_IN_ENTRIES: u64 = 8;

/// A pipeline's table and one shard's place in the ledger, with the statements that feed the table.
#[derive(Debug, Clone)]
pub struct Lane {
    /// Another number after PostgreSQL was restored to a time before the lane; all clones share it.
    id: Arc<AtomicI32>,
    identity: Identity,
    pipeline: Pipeline,
    statements: Statements,
    turn: Turn,
    /// A dead letter larger than this is shortened.
    letter_bytes: usize,
    /// Rung when something of it was acknowledged: where counters are managed, some of them may be clean now. All clones share it.
    acknowledged: Arc<Notify>,
    /// How much of it was flushed, or recognised. All clones share it.
    settled: Arc<AtomicU64>,
}

impl Lane {
    /// Prepares the flush of a pipeline's shard, in the turn of its table.
    pub fn new(
        pipeline: Pipeline,
        statements: Statements,
        id: LaneId,
        identity: Identity,
        turn: Turn,
        letter_bytes: usize,
    ) -> Lane {
        let (id, acknowledged, settled) = (Arc::new(AtomicI32::new(id)), Arc::default(), Arc::default());
        Lane { id, identity, statements, pipeline, turn, letter_bytes, acknowledged, settled }
    }

    /// Its place in the ledger.
    pub fn id(&self) -> LaneId {
        self.id.load(Ordering::Relaxed)
    }

    /// Registers again what PostgreSQL no longer knows: it was restored to an earlier time. Refused where the ledger tells of another
    /// configuration; then another daemon has taken the pipeline over.
    pub async fn register_again(&self, database: &Database) -> Result<Result<(), Unregistered>, Fault> {
        let (alone, others_alive) = (std::slice::from_ref(&self.identity), BTreeSet::from([0]));
        let register = async |c: &mut PgConnection| lanes::register(c, alone, &others_alive, Record::Yes).await;
        let registered = database.run(register).await?;
        Ok(registered.map(|ids| ids.into_iter().for_each(|id| self.id.store(id, Ordering::Relaxed))))
    }

    /// In whose turn it flushes.
    pub fn turn(&self) -> &Turn {
        &self.turn
    }

    /// The Valkey deployment that its entries come from.
    pub fn source(&self) -> &str {
        &self.identity.source
    }

    /// Rung when something of it was acknowledged.
    pub fn acknowledged(&self) -> &Notify {
        &self.acknowledged
    }

    /// How its entries become rows.
    pub fn plan(&self) -> &Plan {
        &self.statements.plan
    }

    /// How much of it this process has settled, for whoever takes care of what that leaves: in entries, where each flush counts as a few more.
    pub fn settled(&self) -> u64 {
        self.settled.load(Ordering::Relaxed)
    }

    fn has_settled(&self, entries: usize) {
        self.settled.fetch_add(entries as u64 + LEDGER_ROW_IN_ENTRIES, Ordering::Relaxed);
    }

    /// The pipeline it belongs to.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }
}

/// Entries whose effect is committed. Only this can be acknowledged, and only where it was read.
#[derive(Debug)]
pub struct Settled {
    generation: Arc<Generation>,
    ids: Vec<EntryId>,
    trace: Trace,
    /// What happened to them.
    pub tally: Tally,
}

impl Settled {
    /// Only for who has committed the effect of these entries of the batch.
    fn of(batch: &Batch, ids: Vec<EntryId>, tally: Tally) -> Settled {
        let Origin { generation, trace, .. } = batch.origin();
        Settled { generation: generation.clone(), ids, trace: trace.clone(), tally }
    }

    /// The trace of the batch they were read in.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

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
    /// The ledger refused: these runs may have been flushed before. Nothing of the batch was done.
    Refused(Vec<usize>),
    /// A lane is not registered as this pipeline's any more. Nothing of the batch was done.
    LaneGone(Fault),
    /// Something went wrong. Nothing of the batch was done, unless PostgreSQL was lost: then that is unknown.
    Fault(Fault),
}

/// Flushes a batch, by the way it calls for; gives it back either way. `lanes`: those that its entries may be of, all of one pipeline.
pub async fn flush(database: &Database, lanes: &[Lane], batch: Batch) -> Result<(Flushed, Batch), Failed> {
    let result = match (batch.is_careful(), &batch.lanes()[..]) {
        (false, _) => flush_fresh(database, lanes, &batch).await,
        (true, [_]) => flush_careful(database, lanes, &batch).await,
        // Each lane's rows are looked at by themselves.
        (true, _) => Err(Why::Refused((0..batch.runs().len()).collect())),
    };
    match result {
        Ok(flushed) => {
            for run in batch.runs() {
                lanes[batch.lane_of(run)].has_settled(run.len());
            }
            Ok((flushed, batch))
        }
        Err(why) => Err(Failed { batch, why }),
    }
}

/// One statement. Either every run is new and all of it is committed, or nothing is.
async fn flush_fresh(database: &Database, lanes: &[Lane], batch: &Batch) -> Result<Flushed, Why> {
    failpoint::reached("flush.parsed");
    let (first, id) = (&lanes[0], |lane: usize| lanes[lane].id());
    let rows = NewRows::of(batch, batch.runs(), id);
    let coalesced = batch.coalesce(first.plan(), 0..batch.len()).map_err(Why::Fault)?;
    let tally = tally(batch.len(), &coalesced, &Findings::default());
    let has_many = coalesced.rows() >= MANY_ROWS;
    let _turn = if has_many { Some(first.turn.in_process().await) } else { None };
    let among = first.turn.among_processes(database.address()).filter(|_| has_many);
    let applied =
        database.run_top(async |c, is_top| apply(c, lanes, batch, rows, coalesced, among.filter(|_| is_top)).await);
    match failpoint::during("flush.sent", applied).await {
        Ok(()) => {
            let ids = batch.entries().iter().map(|e| e.id).collect();
            let settled = Settled::of(batch, ids, tally);
            Ok(Flushed { settled, unjudgeable: None })
        }
        Err(fault) if is_refusal(&fault) => {
            let runs = database.run(async |c| ledger::collisions(c, batch, id).await).await;
            Err(runs.map_or_else(Why::Fault, Why::Refused))
        }
        Err(fault) => Err(why(fault)),
    }
}

/// One transaction, in this order of locks: ledger rows locked, ascending; rows inserted, ascending; the table; letters.
async fn flush_careful(database: &Database, lanes: &[Lane], batch: &Batch) -> Result<Flushed, Why> {
    for _ in 0..RESTARTS {
        match database.transact(async |c| examine_and_apply(c, lanes, batch).await).await {
            Ok(Ok(flushed)) => return Ok(flushed),
            // A row of the ledger was committed, or compacted away, after it was looked for: look again.
            Err(fault) if is_refusal(&fault) => continue,
            Ok(Err(fault)) | Err(fault) => return Err(why(fault)),
        }
    }
    Err(Why::Fault(Fault::StillRefused))
}

async fn examine_and_apply(
    session: &mut Session,
    lanes: &[Lane],
    batch: &Batch,
) -> Result<Result<Flushed, Fault>, sqlx::Error> {
    let lane = &lanes[batch.lane_of(&batch.runs()[0])];
    let mut transaction = failpoint::during("careful.begin", session.begin()).await?;
    failpoint::reached("careful.begun");
    let (names, mapping) = (lane.identity.names(), &lane.identity.mapping);
    let begin = sqlx::query(AssertSqlSafe(preamble())).bind(lane.id()).bind(&names[..]).bind(mapping);
    begin.execute(&mut *transaction).await?;
    let locked = ledger::lock_met(&mut transaction, lane.id(), batch);
    let rows = failpoint::during("careful.ledger", locked).await?;
    let findings = judge::examine(batch, &rows);
    failpoint::reached("careful.judged");
    let coalesced = match batch.coalesce(lane.plan(), findings.new.iter().copied()) {
        Ok(coalesced) => coalesced,
        Err(fault) => {
            transaction.rollback().await?;
            return Ok(Err(fault));
        }
    };
    let tally = tally(findings.new.len(), &coalesced, &findings);
    if !findings.new.is_empty() {
        ledger::amend(&mut transaction, lane.id(), batch, &rows, &findings.amended).await?;
        let rows = NewRows::of(batch, &findings.new_runs, |_| lane.id());
        failpoint::during("careful.upsert", apply(&mut transaction, lanes, batch, rows, coalesced, None)).await?;
        failpoint::reached("careful.upserted");
    }
    failpoint::during("careful.commit", transaction.commit()).await?;
    let mut handled: Vec<usize> = findings.known.iter().chain(&findings.new).copied().collect();
    handled.sort_unstable();
    let ids = handled.iter().map(|&i| batch.entries()[i].id).collect();
    Ok(Ok(Flushed {
        settled: Settled::of(batch, ids, tally),
        unjudgeable: (!findings.unjudgeable.is_empty()).then(|| batch.pick(&findings.unjudgeable)),
    }))
}

/// Runs the pipeline's statement; in turn among processes, where that is asked for.
async fn apply(
    connection: &mut PgConnection,
    lanes: &[Lane],
    batch: &Batch,
    rows: NewRows,
    coalesced: Coalesced<'_>,
    turn: Option<i32>,
) -> Result<(), sqlx::Error> {
    let Lane { identity, statements, letter_bytes, .. } = &lanes[0];
    let of_batch: Vec<&Lane> = batch.lanes().into_iter().map(|lane| &lanes[lane]).collect();
    let letters = Letters::of(batch, &coalesced.dead, *letter_bytes, |lane| lanes[lane].id());
    let buries = !coalesced.dead.is_empty();
    let of_many = statements.of_many.as_ref().filter(|_| coalesced.rows() >= DIAGNOSED_FROM);
    let statement = of_many.unwrap_or(&statements.usual).clone();
    let query = match turn {
        None => sqlx::query(AssertSqlSafe(statement)),
        Some(slot) => sqlx::query(IN_TURN).bind(slot).bind(statement.to_string()),
    };
    let query = query
        .bind(rows.lanes)
        .bind(&*batch.origin().consumer)
        .bind(rows.first)
        .bind(rows.last)
        .bind(rows.digests)
        .bind(rows.entries)
        .bind(DIGEST_VERSION);
    let query = bind_columns(coalesced.columns, query).bind(identity.of_pipeline()).bind(&identity.mapping);
    let query = letters.bind(query);
    let query = query.bind(of_batch.iter().map(|lane| lane.id()).collect::<Vec<LaneId>>());
    let sent = query.bind(of_batch.iter().map(|lane| &*lane.identity.stream).collect::<Vec<_>>()).execute(connection);
    if buries {
        failpoint::during("bury.sent", sent).await?
    } else {
        sent.await?
    };
    Ok(())
}

/// Binds the two arrays in which the rows travel.
pub(super) fn bind_columns<'q>(
    columns: Columns<'q>,
    query: Query<'q, sqlx::Postgres, PgArguments>,
) -> Query<'q, sqlx::Postgres, PgArguments> {
    match columns {
        Columns::Counters { keys, amounts } => query.bind(keys).bind(amounts),
        Columns::Tables { packed, .. } => query.bind(packed.texts).bind(packed.numbers),
    }
}

/// Buries entries of one lane that the ledger covers and cannot judge. The batch comes back where that fails.
pub async fn bury_covered(database: &Database, lane: &Lane, batch: Batch) -> Result<Settled, Failed> {
    lane.has_settled(batch.len());
    let buried = database.run(async |c| bury::bury(c, lane.id(), &lane.identity, &batch, lane.letter_bytes).await);
    match failpoint::during("bury.covered", buried).await {
        Ok(()) => {
            let tally = Tally { buried: batch.len() as u64, ..Tally::default() };
            let ids = batch.entries().iter().map(|e| e.id).collect();
            Ok(Settled::of(&batch, ids, tally))
        }
        Err(fault) => Err(Failed { batch, why: why(fault) }),
    }
}

fn tally(new: usize, coalesced: &Coalesced<'_>, findings: &Findings) -> Tally {
    Tally {
        applied: (new - coalesced.dead.len()) as u64,
        recognised: findings.known.len() as u64,
        buried: coalesced.dead.len() as u64,
        collided: findings.amended.values().map(|indices| indices.len() as u64).sum(),
        rows: coalesced.rows() as u64,
    }
}

fn why(fault: Fault) -> Why {
    match &fault {
        Fault::Postgres { sqlstate, .. } if sqlstate == LANE_GONE => Why::LaneGone(fault),
        _ => Why::Fault(fault),
    }
}

fn is_refusal(fault: &Fault) -> bool {
    matches!(fault, Fault::Postgres { sqlstate, .. } if sqlstate == ledger::REFUSED)
}
