//! Compaction: old ledger rows are merged into one, without digests, so that the ledger's size is bounded by what the stream
//! still holds.
//!
//! Takes a lane and a floor below which no entry can come back; gives how many rows were merged. A merged row says "all
//! below here was handled, and cannot be judged any more". Only rows are touched that lie below the floor and are older than
//! any stopped worker may sleep; transactions are short, and give up where anything is in the way.

use std::time::Duration;

use sqlx::Row;

use crate::failpoint;
use crate::lanes::LaneId;
use crate::model::entry::EntryId;
use crate::postgres::Session;

/// Rows merged in one transaction: each may hold 320 KB of digests.
const STEP: i64 = 200;
/// The row that is left of the last time, and one more.
const WORTHWHILE: u64 = 2;

/// Merges a step of rows; gives how many. None: nothing is left that is worth it, for now.
pub async fn compact(
    session: &mut Session,
    lane: LaneId,
    floor: EntryId,
    margin: Duration,
) -> Result<u64, sqlx::Error> {
    let mut transaction = session.begin().await?;
    // Of the first few rows, everything up to the first one that is too young or too high: the merged row must not span one that stays.
    let row = sqlx::query(
        "with page as (
             select ids, flushed_at from tidegate.ledger where lane = $1 order by lower(ids) limit $4),
         edge as (
             select min(lower(ids)) filter (
                        where flushed_at >= now() - make_interval(secs => $3) or upper(ids) >= $2::numeric) as id,
                    max(lower(ids)) as last
             from page),
         old as (
             select l.ids from tidegate.ledger l, edge
             where l.lane = $1 and lower(l.ids) <= edge.last and (edge.id is null or lower(l.ids) < edge.id)
             order by lower(l.ids)
             for update of l skip locked),
         removed as (
             delete from tidegate.ledger l using old where l.lane = $1 and l.ids = old.ids
             returning l.ids, l.entries, l.lost, l.flushed_at)
         select count(*), min(lower(ids))::text, max(upper(ids))::text, coalesce(sum(entries), 0),
                coalesce(sum(lost), 0), max(flushed_at)::text
         from removed",
    )
    .bind(lane)
    .bind(floor.number().to_string())
    .bind(margin.as_secs_f64())
    .bind(STEP)
    .fetch_one(&mut *transaction)
    .await?;
    let merged = row.try_get::<i64, _>(0)? as u64;
    if merged < WORTHWHILE {
        transaction.rollback().await?;
        return Ok(0);
    }
    failpoint::reached("compact.removed");
    let kept = sqlx::query(
        "insert into tidegate.ledger (lane, ids, entries, lost, consumer, flushed_at)
         values ($1, numrange($2::numeric, $3::numeric, '[]'), least($4, 2147483647)::int4, least($5, 2147483647)::int4,
                 'compaction', $6::timestamptz)
         on conflict on constraint ledger_no_overlap do nothing",
    )
    .bind(lane)
    .bind(row.try_get::<String, _>(1)?)
    .bind(row.try_get::<String, _>(2)?)
    .bind(row.try_get::<i64, _>(3)?)
    .bind(row.try_get::<i64, _>(4)?)
    .bind(row.try_get::<String, _>(5)?)
    .execute(&mut *transaction)
    .await?
    .rows_affected();
    if kept == 0 {
        // Somebody flushed in between the rows: another time.
        transaction.rollback().await?;
        return Ok(0);
    }
    failpoint::during("compact.commit", transaction.commit()).await?;
    Ok(merged)
}
