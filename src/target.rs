//! Target: does a pipeline's table fit what is written into it?
//!
//! Takes a pipeline; gives nothing where its table fits, or what is missing with the statement that mends it ([`Unfit`]).
//! Fails with what PostgreSQL says.

use sqlx::postgres::PgConnection;

use crate::model::pipeline::Pipeline;

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
