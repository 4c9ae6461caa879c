//! Lanes: a lane is a shard's place in the ledger, a small number that stands for (source, pipeline, stream).
//!
//! Takes a pipeline; gives its lane, registered or found, and keeps the trim line of a stream's lanes. Fails with what
//! PostgreSQL says.

use sqlx::postgres::PgConnection;

use crate::model::entry::EntryId;
use crate::model::pipeline::Pipeline;

/// The number that stands for one (source, pipeline, stream) in the ledger.
pub type LaneId = i32;

/// What a lane stands for. A worker remembers its lane's number; each flush proves that the number still stands for this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The Valkey deployment.
    pub source: String,
    /// The pipeline's name.
    pub pipeline: String,
    /// The stream.
    pub stream: String,
    /// The table.
    pub target: String,
    /// How entries become rows: [`Pipeline::mapping`]. A lane that was registered before this was recorded has none, and
    /// is taken for the same.
    pub mapping: String,
}

impl Identity {
    /// The identity of a pipeline's lane.
    pub fn of(source: &str, pipeline: &Pipeline) -> Identity {
        Identity {
            source: source.to_owned(),
            pipeline: pipeline.name.clone(),
            stream: pipeline.stream.clone(),
            target: pipeline.table.to_string(),
            mapping: pipeline.mapping(),
        }
    }
}

/// The expression that is true if lane $1 still has its identity, which is bound from parameter `from` on: source,
/// pipeline, stream, target, mapping. Otherwise it ends the statement with the code `TG002`. One probe of a primary key.
pub(crate) fn proof(from: usize) -> String {
    let p = |n: usize| from + n;
    format!(
        "tidegate.same_lane(exists (
             select from tidegate.lanes l
             where l.lane = $1 and l.source = ${} and l.pipeline = ${} and l.stream = ${} and l.target = ${}
               and (l.mapping is null or l.mapping = ${})), $1)",
        p(0),
        p(1),
        p(2),
        p(3),
        p(4)
    )
}

/// Registers the lane of a pipeline, or finds it; either way it now has this target and mapping.
pub async fn lane(connection: &mut PgConnection, identity: &Identity) -> Result<LaneId, sqlx::Error> {
    sqlx::query_scalar(
        // Always an update, changed or not: of two that register at once, the second one must see the row as well.
        "insert into tidegate.lanes (source, pipeline, stream, target, mapping) values ($1, $2, $3, $4, $5)
         on conflict (source, pipeline, stream) do update set target = excluded.target, mapping = excluded.mapping
         returning lane",
    )
    .bind(&identity.source)
    .bind(&identity.pipeline)
    .bind(&identity.stream)
    .bind(&identity.target)
    .bind(&identity.mapping)
    .fetch_one(connection)
    .await
}

/// A pipeline of another name that has flushed the same stream of the same source into the same table.
///
/// To start under a new name would find an empty ledger and apply again all that the stream retains.
pub async fn namesake(
    connection: &mut PgConnection,
    source: &str,
    pipeline: &Pipeline,
) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select pipeline from tidegate.lanes
         where source = $1 and stream = $3 and target = $4 and pipeline <> $2
         order by lane limit 1",
    )
    .bind(source)
    .bind(&pipeline.name)
    .bind(&pipeline.stream)
    .bind(pipeline.table.to_string())
    .fetch_optional(connection)
    .await
}

/// Gives everything below `line` up to the trimmer, in all lanes of the stream. To be called before each cut: what is
/// missing above the line was lost, and what is missing below it was trimmed.
pub async fn raise_trim_line(
    connection: &mut PgConnection,
    source: &str,
    stream: &str,
    line: EntryId,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update tidegate.lanes set trimmed_below = greatest(trimmed_below, $3::numeric)
         where source = $1 and stream = $2",
    )
    .bind(source)
    .bind(stream)
    .bind(line.number().to_string())
    .execute(connection)
    .await?;
    Ok(())
}
