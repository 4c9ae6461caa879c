//! PostgreSQL's side of a look: the lanes, the ledger's size, dead letters, pauses.
//!
//! Takes the database and the Valkey deployment's name; gives [`Books`]. Fails with what PostgreSQL says. A ledger that is too large to be
//! counted in time is not counted: the rest is told all the same.

use std::collections::BTreeMap;

use sqlx::Row;
use sqlx::postgres::PgRow;

use crate::model::pipeline::{Pipeline, Shard};
use crate::pauses::{self, Pause};
use crate::postgres::{Database, schema};
use crate::retry::Fault;

/// What PostgreSQL tells.
#[derive(Debug, Default)]
pub struct Books {
    /// How many migrations are missing; everything else is unknown then.
    pub missing_migrations: usize,
    /// The lanes of this source.
    pub lanes: Vec<Lane>,
    /// What the ledger takes on disk, in bytes, its indexes included.
    pub ledger_bytes: Option<u64>,
    /// The pauses in force.
    pub pauses: Vec<Pause>,
}

/// What the books hold of one stream of a pipeline.
#[derive(Debug, Clone, Default)]
pub struct Lane {
    /// Its number.
    pub lane: i32,
    /// The pipeline.
    pub pipeline: String,
    /// The stream.
    pub stream: String,
    /// The table.
    pub target: String,
    /// The size of its ledger; none if counting takes too long.
    pub ledger: Option<LedgerSize>,
    /// Open dead letters by reason.
    pub letters: BTreeMap<String, u64>,
}

/// How large a lane's ledger is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LedgerSize {
    /// Rows.
    pub rows: u64,
    /// Entries that they stand for.
    pub entries: u64,
    /// How many of these Valkey has lost after they were flushed.
    pub lost: u64,
    /// How long ago the last flush was, in milliseconds.
    pub last_flush_ms_ago: Option<u64>,
}

impl Books {
    /// The lane of a stream.
    pub fn lane_of(&self, shard: &Shard) -> Option<&Lane> {
        self.lanes.iter().find(|lane| lane.pipeline == shard.pipeline.name && lane.stream == shard.stream)
    }

    /// A pipeline's shards, and those that it had before.
    pub fn shards_of(&self, pipeline: &Pipeline) -> Vec<Shard> {
        let target = pipeline.table.to_string();
        let ours = |lane: &&Lane| lane.pipeline == pipeline.name && lane.target == target && pipeline.had(&lane.stream);
        let former = self.lanes.iter().filter(ours).map(|lane| pipeline.shard(lane.stream.clone()));
        pipeline.shards().into_iter().chain(former).collect()
    }

    /// A pipeline's pause, if it is paused.
    pub fn pause_of(&self, pipeline: &str) -> Option<&Pause> {
        self.pauses.iter().find(|pause| pause.pipeline == pipeline)
    }
}

/// Looks at the books of one source.
pub async fn look(database: &Database, source: &str) -> Result<Books, Fault> {
    let missing_migrations = match schema::missing(database.address()).await {
        Ok(missing) => missing.len(),
        Err(schema::Error::Fault(fault)) => return Err(fault),
        // One that was changed: the daemon refuses it, and what there is can be read all the same.
        Err(_) => 0,
    };
    if missing_migrations > 0 {
        return Ok(Books { missing_migrations, ..Books::default() });
    }
    let mut lanes = database.run(async |c| lanes(c, source).await).await?;
    let letters = database.run(async |c| letters(c, source).await).await?;
    for (lane, reason, count) in letters {
        if let Some(found) = lanes.iter_mut().find(|found| found.lane == lane) {
            found.letters.insert(reason, count);
        }
    }
    // A ledger of millions of rows may take longer than a statement may.
    match database.run(async |c| sizes(c, source).await).await {
        Ok(sizes) => {
            for lane in &mut lanes {
                lane.ledger = Some(sizes.get(&lane.lane).copied().unwrap_or_default());
            }
        }
        Err(Fault::Postgres { sqlstate, .. }) if sqlstate == "57014" => {}
        Err(fault) => return Err(fault),
    }
    let bytes = "select pg_total_relation_size('tidegate.ledger')";
    let bytes: i64 = database.run(async |c| sqlx::query_scalar(bytes).fetch_one(c).await).await?;
    let pauses = database.run(async |c| pauses::in_force(c, source).await).await?;
    Ok(Books { missing_migrations, lanes, ledger_bytes: u64::try_from(bytes).ok(), pauses })
}

async fn lanes(connection: &mut sqlx::PgConnection, source: &str) -> Result<Vec<Lane>, sqlx::Error> {
    let lanes = "select lane, pipeline, stream, target from tidegate.lanes where source = $1 order by lane";
    let rows = sqlx::query(lanes).bind(source).fetch_all(connection).await?;
    let lane = |row: &PgRow| {
        Ok(Lane {
            lane: row.try_get(0)?,
            pipeline: row.try_get(1)?,
            stream: row.try_get(2)?,
            target: row.try_get(3)?,
            ..Lane::default()
        })
    };
    rows.iter().map(lane).collect()
}

async fn letters(connection: &mut sqlx::PgConnection, source: &str) -> Result<Vec<(i32, String, u64)>, sqlx::Error> {
    let rows = sqlx::query(
        "select lane, d.reason, count(*) from tidegate.dead_letters d join tidegate.lanes l using (lane)
         where l.source = $1 and d.resolved_at is null group by 1, 2",
    )
    .bind(source)
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?, unsigned(row.try_get(2)?)))).collect()
}

async fn sizes(connection: &mut sqlx::PgConnection, source: &str) -> Result<BTreeMap<i32, LedgerSize>, sqlx::Error> {
    let rows = sqlx::query(
        "select lane, count(*), sum(r.entries)::bigint, sum(r.lost)::bigint, (extract(epoch from now() - max(r.flushed_at)) * 1000)::bigint
         from tidegate.ledger r join tidegate.lanes l using (lane) where l.source = $1 group by 1",
    )
    .bind(source)
    .fetch_all(connection)
    .await?;
    let size = |row: &PgRow| {
        let size = LedgerSize {
            rows: unsigned(row.try_get(1)?),
            entries: unsigned(row.try_get(2)?),
            lost: unsigned(row.try_get(3)?),
            last_flush_ms_ago: row.try_get::<Option<i64>, _>(4)?.map(unsigned),
        };
        Ok((row.try_get(0)?, size))
    };
    rows.iter().map(size).collect()
}

fn unsigned(number: i64) -> u64 {
    number.try_into().unwrap_or(0)
}
