//! Kept: what PostgreSQL keeps for Tidegate, in numbers.
//!
//! Takes lanes; gives how many rows the ledger has of each, how many of its dead letters are open, and how large the ledger is. It reads
//! counts and sizes only, within the limits of every statement. Fails with what PostgreSQL said.

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::lanes::LaneId;

/// What is kept of one lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// The lane.
    pub lane: LaneId,
    /// Rows of the ledger.
    pub ledger_rows: u64,
    /// Dead letters that nobody has resolved.
    pub dead_letters_open: u64,
}

/// What is kept of these lanes, and the size of the whole ledger with its index, in bytes.
pub async fn kept(connection: &mut PgConnection, lanes: &[LaneId]) -> Result<(Vec<Kept>, u64), sqlx::Error> {
    let rows = sqlx::query(
        "select l.lane, coalesce(g.rows, 0), coalesce(d.letters, 0), pg_total_relation_size('tidegate.ledger')
         from unnest($1::int4[]) as l (lane)
         left join (select lane, count(*) as rows from tidegate.ledger where lane = any($1) group by lane) g on g.lane = l.lane
         left join (select lane, count(*) as letters from tidegate.dead_letters
                    where resolved_at is null and lane = any($1) group by lane) d on d.lane = l.lane",
    )
    .bind(lanes)
    .fetch_all(connection)
    .await?;
    let number = |row: &sqlx::postgres::PgRow, n| Ok::<u64, sqlx::Error>(row.try_get::<i64, _>(n)?.unsigned_abs());
    let bytes = rows.first().map(|row| number(row, 3)).transpose()?.unwrap_or(0);
    let kept = rows.iter().map(|row| {
        Ok(Kept { lane: row.try_get(0)?, ledger_rows: number(row, 1)?, dead_letters_open: number(row, 2)? })
    });
    Ok((kept.collect::<Result<_, sqlx::Error>>()?, bytes))
}
