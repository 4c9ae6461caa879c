//! Redrive: dead letters, again, after the table or the mapping was corrected.
//!
//! Takes letters of one lane; applies their deltas by the statement that flushes, and marks them as resolved, in one transaction. Gives what
//! became of each; one that cannot be applied still stays as it was, with the reason. Fails with what PostgreSQL says, and then nothing of it
//! has happened.
//!
//! The ledger has held these entries since they were buried (I1), so no row is added to it: a replay recognises them before and after. A
//! letter counts once because it is locked, found open, applied and marked in one transaction; the mark stays, so it is neither buried nor
//! redriven again.
//!
//! A redrive locks its letters first, ascending, and the table's rows by ascending key. A flush inserts letters and waits for none, so
//! this order and the flush's cannot form a circle.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sqlx::error::DatabaseError;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Connection, Row};

use super::batch::{Batch, Filling, Origin};
use super::flush::bind_columns;
use super::rows::{NoZone, Plan};
use super::statement::{Count, preamble, statement};
use crate::lanes::{Identity, LaneId};
use crate::model::entry::{DIGEST_VERSION, EntryId, Generation};
use crate::model::pipeline::Pipeline;
use crate::postgres::{Database, Session, refusal};
use crate::retry::{Fault, Verdict, judge};
use crate::target::Fit;
use crate::telemetry::trace::Trace;

/// Which letter of a lane.
pub type LetterId = (EntryId, u64);

/// Whether what was done stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is committed.
    Commit,
    /// Everything is done, and rolled back: for a true account of what would happen.
    Rehearse,
}

/// What became of a letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Its delta is in the table, and it is resolved.
    Redriven,
    /// It cannot be applied, for this reason, and is as it was.
    Refused(String),
    /// It is not there, or somebody else has resolved it.
    NotOpen,
}

/// Redrives letters of one lane.
#[derive(Debug)]
pub struct Redrive {
    lane: LaneId,
    identity: Identity,
    plan: Plan,
    statement: Arc<str>,
    resolution: String,
}

impl Redrive {
    /// For this lane; `resolution` is kept in each letter that lands.
    pub fn new(
        pipeline: &Pipeline,
        fits: &[Fit],
        lane: LaneId,
        identity: Identity,
        resolution: String,
    ) -> Result<Redrive, NoZone> {
        let tables: Vec<_> = pipeline.targets().into_iter().zip(fits.iter().cloned()).collect();
        let (plan, statement) = (Plan::of(pipeline)?, statement(&tables, Count::Returned).into());
        Ok(Redrive { lane, identity, plan, statement, resolution })
    }

    /// Redrives these letters, in one transaction.
    pub async fn redrive(
        &self,
        database: &Database,
        letters: &[LetterId],
        mode: Mode,
    ) -> Result<Vec<(LetterId, Outcome)>, Fault> {
        let found = database.transact(async |session| self.exchange(session, letters, mode).await).await?;
        let outcome = |id: &LetterId| (*id, found.get(id).cloned().unwrap_or(Outcome::NotOpen));
        Ok(letters.iter().map(outcome).collect())
    }

    async fn exchange(
        &self,
        session: &mut Session,
        letters: &[LetterId],
        mode: Mode,
    ) -> Result<HashMap<LetterId, Outcome>, sqlx::Error> {
        let mut transaction = session.begin().await?;
        let begin = sqlx::query(AssertSqlSafe(preamble())).bind(self.lane);
        begin.bind(&self.identity.names()[..]).bind(&self.identity.mapping).execute(&mut *transaction).await?;
        let (batch, mut outcomes) = self.lock(&mut transaction, letters).await?;
        let mut landed: Vec<usize> = Vec::new();
        let mut work = vec![self.sound(&batch, &mut outcomes)];
        while let Some(part) = work.pop() {
            if part.is_empty() {
                continue;
            }
            let refused = match self.apply(&mut transaction, &batch, &part).await? {
                Ok(()) => {
                    landed.extend(part);
                    continue;
                }
                Err(Cause::Sum) => Fault::SumOverflow,
                Err(Cause::Table(error)) => match refusal(&*error) {
                    refused if judge(&refused, 1).verdict == Verdict::Split => refused,
                    // No letter is the cause: the transaction ends, and nothing has happened.
                    _ => return Err(sqlx::Error::Database(error)),
                },
            };
            match part.len() {
                1 => drop(outcomes.insert(identity(&batch, part[0]), Outcome::Refused(refused.to_string()))),
                // The lower keys first.
                many => work.extend([part[many / 2..].to_vec(), part[..many / 2].to_vec()]),
            }
        }
        self.resolve(&mut transaction, &batch, &landed).await?;
        outcomes.extend(landed.iter().map(|&index| (identity(&batch, index), Outcome::Redriven)));
        match mode {
            Mode::Commit => transaction.commit().await?,
            Mode::Rehearse => transaction.rollback().await?,
        }
        Ok(outcomes)
    }

    /// Locks those that are open, ascending; gives them as a batch, and those that cannot be applied whatever the table is like.
    async fn lock(
        &self,
        connection: &mut PgConnection,
        letters: &[LetterId],
    ) -> Result<(Batch, HashMap<LetterId, Outcome>), sqlx::Error> {
        let (ids, digests) = columns(letters.iter().copied());
        let rows = sqlx::query(
            "select d.id::text, d.digest, d.fields, d.shortened
             from unnest($2::text[], $3::int8[]) as w (id, digest)
             join tidegate.dead_letters d on d.lane = $1 and d.id = w.id::numeric and d.digest = w.digest
             where d.resolved_at is null
             order by d.id, d.digest
             for update of d",
        )
        .bind(self.lane)
        .bind(ids)
        .bind(digests)
        .fetch_all(connection)
        .await?;
        let generation = Generation { run_id: String::new(), replication_id: String::new(), epoch: 0 };
        let origin = Origin { generation: Arc::new(generation), consumer: "redrive".into(), trace: Trace::default() };
        let (mut filling, mut outcomes, mut told) = (Filling::new(origin, usize::MAX), HashMap::new(), Vec::new());
        for row in &rows {
            let Letter { id, digest, fields, shortened } = letter(row)?;
            if shortened {
                let why = "only the beginning of its fields was kept (dead_letters.max_bytes): its digest shows what it was, its bytes are gone";
                outcomes.insert((id, digest), Outcome::Refused(why.into()));
                continue;
            }
            filling.push(id, fields.iter().map(Vec::as_slice));
            told.push((id, digest));
        }
        let batch = filling.seal(true);
        let kept: HashSet<LetterId> = (0..batch.len()).map(|index| identity(&batch, index)).collect();
        for letter in told.iter().filter(|letter| !kept.contains(letter)) {
            let why = "its fields are not those that were buried: they do not have its digest";
            outcomes.insert(*letter, Outcome::Refused(why.into()));
        }
        // What has another digest than any letter that was locked is none of them.
        let told: HashSet<LetterId> = told.into_iter().collect();
        let genuine: Vec<usize> = (0..batch.len()).filter(|&index| told.contains(&identity(&batch, index))).collect();
        Ok((batch.pick(&genuine), outcomes))
    }

    /// Those that ask for something now, in the order of their keys; why the others still do not.
    fn sound(&self, batch: &Batch, outcomes: &mut HashMap<LetterId, Outcome>) -> Vec<usize> {
        let mut sound: Vec<(Vec<u8>, usize)> = Vec::new();
        for (index, entry) in batch.entries().iter().enumerate() {
            match self.plan.key_of(batch.canonical(entry)) {
                Ok(key) => sound.push((key, index)),
                Err(death) => {
                    outcomes.insert(
                        identity(batch, index),
                        Outcome::Refused(format!("{} ({})", death.detail, death.reason)),
                    );
                }
            }
        }
        sound.sort_unstable();
        sound.into_iter().map(|(_, index)| index).collect()
    }

    /// Applies these, or leaves everything as it was before and says why.
    async fn apply(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
        part: &[usize],
    ) -> Result<Result<(), Cause>, sqlx::Error> {
        let Ok(coalesced) = batch.coalesce(&self.plan, part.iter().copied()) else { return Ok(Err(Cause::Sum)) };
        let mut savepoint = connection.begin().await?;
        let none: [&str; 0] = [];
        // The flush's own statement, with nothing for the ledger and nothing to bury.
        let query = sqlx::query(AssertSqlSafe(self.statement.to_string()))
            .bind(Vec::<LaneId>::new())
            .bind("redrive")
            .bind(&none[..])
            .bind(&none[..])
            .bind(Vec::<Vec<u8>>::new())
            .bind(Vec::<i32>::new())
            .bind(DIGEST_VERSION);
        let query = bind_columns(coalesced.columns, query);
        let query = query.bind(self.identity.of_pipeline()).bind(&self.identity.mapping);
        let query = super::bury::Letters::default().bind(query);
        let query = query.bind(vec![self.lane]).bind(vec![&*self.identity.stream]);
        match query.execute(&mut *savepoint).await {
            Ok(_) => {
                savepoint.commit().await?;
                Ok(Ok(()))
            }
            Err(sqlx::Error::Database(error)) => {
                savepoint.rollback().await?;
                Ok(Err(Cause::Table(error)))
            }
            Err(error) => Err(error),
        }
    }

    /// Marks those that have landed. They are locked, so all of them are still open.
    async fn resolve(&self, connection: &mut PgConnection, batch: &Batch, landed: &[usize]) -> Result<(), sqlx::Error> {
        let (ids, digests) = columns(landed.iter().map(|&index| identity(batch, index)));
        let marked = sqlx::query(
            "update tidegate.dead_letters d set resolved_at = now(), resolution = $4
             from unnest($2::text[], $3::int8[]) as w (id, digest)
             where d.lane = $1 and d.id = w.id::numeric and d.digest = w.digest and d.resolved_at is null",
        )
        .bind(self.lane)
        .bind(ids)
        .bind(digests)
        .bind(&self.resolution)
        .execute(connection)
        .await?;
        if marked.rows_affected() == landed.len() as u64 {
            Ok(())
        } else {
            Err(sqlx::Error::Protocol("a locked dead letter was not there to be marked".into()))
        }
    }
}

/// Why a part was not applied.
enum Cause {
    /// Its sum leaves the range.
    Sum,
    /// PostgreSQL refused it.
    Table(Box<dyn DatabaseError>),
}

struct Letter {
    id: EntryId,
    digest: u64,
    fields: Vec<Vec<u8>>,
    shortened: bool,
}

fn letter(row: &PgRow) -> Result<Letter, sqlx::Error> {
    let id: String = row.try_get(0)?;
    let number = id.parse().map_err(|e| sqlx::Error::Decode(format!("{id} is no id: {e}").into()))?;
    Ok(Letter {
        id: EntryId::from_number(number),
        digest: row.try_get::<i64, _>(1)? as u64,
        fields: row.try_get(2)?,
        shortened: row.try_get(3)?,
    })
}

fn identity(batch: &Batch, index: usize) -> LetterId {
    (batch.entries()[index].id, batch.entries()[index].digest)
}

fn columns(letters: impl Iterator<Item = LetterId>) -> (Vec<String>, Vec<i64>) {
    letters.map(|(id, digest)| (id.number().to_string(), digest as i64)).unzip()
}
