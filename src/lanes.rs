//! Lanes: a lane is a shard's place in the ledger, a small number that stands for (source, pipeline, stream).
//!
//! Takes a pipeline; gives its lane, registered or found, and keeps the trim line of a stream's lanes. Fails with what
//! PostgreSQL says.

use sqlx::postgres::PgConnection;

use crate::model::entry::EntryId;
use crate::model::pipeline::Pipeline;

/// The number that stands for one (source, pipeline, stream) in the ledger.
pub type LaneId = i32;

/// Registers the lane of a pipeline, or finds it.
pub async fn lane(connection: &mut PgConnection, source: &str, pipeline: &Pipeline) -> Result<LaneId, sqlx::Error> {
    sqlx::query_scalar(
        "with added as (
             insert into tidegate.lanes (source, pipeline, stream, target) values ($1, $2, $3, $4)
             on conflict (source, pipeline, stream) do nothing returning lane)
         select lane from added
         union all
         select lane from tidegate.lanes where source = $1 and pipeline = $2 and stream = $3
         limit 1",
    )
    .bind(source)
    .bind(&pipeline.name)
    .bind(&pipeline.stream)
    .bind(pipeline.table.to_string())
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
