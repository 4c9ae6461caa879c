//! Pauses: pipelines that an operator has told to read nothing for now, in `tidegate.pauses`.
//!
//! Takes a source and a pipeline; keeps a pause, ends one, or tells which are in force. Times are PostgreSQL's. Fails with what
//! PostgreSQL says.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

/// A pause in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// The pipeline.
    pub pipeline: String,
    /// How long it has lasted.
    pub lasted: Duration,
    /// How long it will last yet; none if somebody must end it.
    pub left: Option<Duration>,
    /// Why, if that was said.
    pub reason: Option<String>,
    /// Who said so, if that is known.
    pub operator: Option<String>,
}

/// Pauses a pipeline from now on, for so long or until somebody resumes it. A pause that is in force gets this end and this reason.
pub async fn pause(
    connection: &mut PgConnection,
    source: &str,
    pipeline: &str,
    duration: Option<Duration>,
    reason: Option<&str>,
    operator: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into tidegate.pauses as p (source, pipeline, until, reason, operator)
         values ($1, $2, now() + $3::float8 * interval '1 second', $4, $5)
         on conflict (source, pipeline) do update
         set since = case when p.until <= now() then now() else p.since end,
             until = excluded.until, reason = excluded.reason, operator = excluded.operator",
    )
    .bind(source)
    .bind(pipeline)
    .bind(duration.map(|duration| duration.as_secs_f64()))
    .bind(reason)
    .bind(operator)
    .execute(connection)
    .await
    .map(|_| ())
}

/// Ends a pause. False: there was none in force.
pub async fn resume(connection: &mut PgConnection, source: &str, pipeline: &str) -> Result<bool, sqlx::Error> {
    let end = "delete from tidegate.pauses where source = $1 and pipeline = $2
               returning until is null or until > now()";
    let was_in_force: Option<bool> =
        sqlx::query_scalar(end).bind(source).bind(pipeline).fetch_optional(connection).await?;
    Ok(was_in_force.unwrap_or(false))
}

/// All pauses of this source that are in force.
pub async fn in_force(connection: &mut PgConnection, source: &str) -> Result<Vec<Pause>, sqlx::Error> {
    let rows = sqlx::query(
        "select pipeline, extract(epoch from now() - since)::float8, extract(epoch from until - now())::float8, reason, operator
         from tidegate.pauses where source = $1 and (until is null or until > now()) order by pipeline",
    )
    .bind(source)
    .fetch_all(connection)
    .await?;
    let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX);
    let pause = |row: &PgRow| {
        Ok(Pause {
            pipeline: row.try_get(0)?,
            lasted: seconds(row.try_get(1)?),
            left: row.try_get::<Option<f64>, _>(2)?.map(seconds),
            reason: row.try_get(3)?,
            operator: row.try_get(4)?,
        })
    };
    rows.iter().map(pause).collect()
}
