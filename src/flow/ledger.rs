//! The ledger: rows that say which entries are in PostgreSQL already.
//!
//! Takes a connection and a batch or a range of ids; reads, locks and writes the rows it concerns. The ranges find a
//! redelivery at the price of one index probe; [`super::judge`] then decides by the digests in them. Fails with what
//! PostgreSQL says.

use std::collections::BTreeMap;
use std::ops::Range;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Row};

use super::batch::Batch;
use super::judge::Found;
use crate::lanes::LaneId;
use crate::model::entry::{DIGEST_VERSION, EntryId};

/// Bytes of one digest.
const DIGEST_BYTES: usize = 8;

/// The code with which `tidegate.all_or_nothing` ends a statement.
pub const REFUSED: &str = "TG001";

/// Ledger rows to be written, as columns ready to be bound.
#[derive(Debug, Default)]
pub struct NewRows {
    /// Whose they are.
    pub lanes: Vec<LaneId>,
    /// First ids, as decimal numbers: they have up to 39 digits, more than any binary type has.
    pub first: Vec<String>,
    /// Last ids.
    pub last: Vec<String>,
    /// Digests, 8 bytes an entry.
    pub digests: Vec<Vec<u8>>,
    /// Entries handled.
    pub entries: Vec<i32>,
}

impl NewRows {
    /// One row for each of these contiguous runs of a batch, which must ascend. `id`: the number of one of the batch's lanes.
    pub fn of(batch: &Batch, new_runs: &[Range<usize>], id: impl Fn(usize) -> LaneId) -> NewRows {
        let mut rows = NewRows::default();
        for stretch in new_runs {
            let entries = &batch.entries()[stretch.clone()];
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else { continue };
            rows.lanes.push(id(first.lane as usize));
            rows.first.push(first.id.number().to_string());
            rows.last.push(last.id.number().to_string());
            rows.digests.push(entries.iter().flat_map(|e| e.digest.to_le_bytes()).collect());
            rows.entries.push(entries.len() as i32);
        }
        rows
    }
}

/// Which runs of a batch meet a row of the ledger: indices of runs, ascending. `id`: the number of one of the batch's lanes.
pub async fn collisions(
    connection: &mut PgConnection,
    batch: &Batch,
    id: impl Fn(usize) -> LaneId,
) -> Result<Vec<usize>, sqlx::Error> {
    let (first, last) = bounds(batch);
    let lanes: Vec<LaneId> = batch.runs().iter().map(|run| id(batch.lane_of(run))).collect();
    let met: Vec<i64> = sqlx::query_scalar(
        "select p.n - 1
         from unnest($1::int4[], $2::text[], $3::text[]) with ordinality as p (lane, first, last, n)
         where exists (
             select from tidegate.ledger l
             where l.lane = p.lane and l.ids && numrange(p.first::numeric, p.last::numeric, '[]'))
         order by p.n",
    )
    .bind(lanes)
    .bind(first)
    .bind(last)
    .fetch_all(connection)
    .await?;
    Ok(met.into_iter().map(|n| n as usize).collect())
}

/// Locks the rows that a batch meets, lowest first, and reads them.
///
/// Lowest first, so that two careful workers cannot wait for each other. Locked even where all will turn out to be known:
/// the lock makes this transaction's COMMIT wait for the same standby that the first one's waited for.
pub async fn lock_met(connection: &mut PgConnection, lane: LaneId, batch: &Batch) -> Result<Vec<Found>, sqlx::Error> {
    let (first, last) = bounds(batch);
    let rows = sqlx::query(AssertSqlSafe(format!(
        "select {COLUMNS}
         from (select distinct m.ids
               from unnest($2::text[], $3::text[]) as p (first, last)
               join tidegate.ledger m
                 on m.lane = $1 and m.ids && numrange(p.first::numeric, p.last::numeric, '[]')) met
         join tidegate.ledger l on l.lane = $1 and l.ids = met.ids
         order by lower(l.ids)
         for update of l"
    )))
    .bind(lane)
    .bind(first)
    .bind(last)
    .fetch_all(connection)
    .await?;
    rows.iter().map(found).collect()
}

/// Adds digests to rows that were locked: new content under ids that the rows cover.
pub async fn amend(
    connection: &mut PgConnection,
    lane: LaneId,
    batch: &Batch,
    rows: &[Found],
    amended: &BTreeMap<usize, Vec<usize>>,
) -> Result<(), sqlx::Error> {
    for (row, indices) in amended {
        let more: Vec<u8> = indices.iter().flat_map(|&i| batch.entries()[i].digest.to_le_bytes()).collect();
        sqlx::query(
            "update tidegate.ledger set digests = digests || $4, entries = entries + $5
             where lane = $1 and ids = numrange($2::numeric, $3::numeric, '[]')",
        )
        .bind(lane)
        .bind(rows[*row].first.number().to_string())
        .bind(rows[*row].last.number().to_string())
        .bind(more)
        .bind(indices.len() as i32)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// The rows that overlap `first..=last`, lowest first, as they are committed.
pub async fn rows_within(
    connection: &mut PgConnection,
    lane: LaneId,
    first: EntryId,
    last: EntryId,
) -> Result<Vec<Found>, sqlx::Error> {
    let rows = sqlx::query(AssertSqlSafe(format!(
        "select {COLUMNS} from tidegate.ledger l
         where l.lane = $1 and l.ids && numrange($2::numeric, $3::numeric, '[]')
         order by lower(l.ids)"
    )))
    .bind(lane)
    .bind(first.number().to_string())
    .bind(last.number().to_string())
    .fetch_all(connection)
    .await?;
    rows.iter().map(found).collect()
}

/// What the ledger tells of ids whose entries are gone.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Gone {
    /// No row covers them: they were not flushed.
    pub unflushed: Vec<EntryId>,
    /// They lie within a row, whose digests tell entries, not ids: most likely they were flushed.
    pub unknown: Vec<EntryId>,
}

/// Tells of these ids, whose entries are gone, what can be known. Those at which a row begins or ends were flushed; so were those below
/// the trim line, for nothing else is trimmed.
pub async fn tell_gone(connection: &mut PgConnection, lane: LaneId, ids: &[EntryId]) -> Result<Gone, sqlx::Error> {
    let numbers: Vec<String> = ids.iter().map(|id| id.number().to_string()).collect();
    let told: Vec<(i64, bool)> = sqlx::query_as(
        "select p.n - 1, l.ids is not null
         from unnest($2::text[]) with ordinality as p (id, n)
         left join tidegate.ledger l on l.lane = $1 and l.ids @> p.id::numeric
         where l.ids is null
            or p.id::numeric not in (lower(l.ids), upper(l.ids))
               and p.id::numeric >= (select trimmed_below from tidegate.lanes where lane = $1)
         order by p.n",
    )
    .bind(lane)
    .bind(numbers)
    .fetch_all(connection)
    .await?;
    let of = |covered: bool| told.iter().filter(|told| told.1 == covered).map(|told| ids[told.0 as usize]).collect();
    Ok(Gone { unflushed: of(false), unknown: of(true) })
}

/// A row's range and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its first id.
    pub first: EntryId,
    /// Its last id.
    pub last: EntryId,
    /// How many entries it stands for.
    pub entries: i32,
}

/// A page of the rows that lie above the trim line, highest first, below `before`: what the stream should still have.
pub async fn retained(
    connection: &mut PgConnection,
    lane: LaneId,
    before: Option<EntryId>,
    count: i64,
) -> Result<Vec<Extent>, sqlx::Error> {
    let rows = sqlx::query(
        "select lower(l.ids)::text, upper(l.ids)::text, l.entries
         from tidegate.ledger l
         where l.lane = $1 and l.digests is not null
           and lower(l.ids) >= (select trimmed_below from tidegate.lanes where lane = $1)
           and lower(l.ids) < coalesce($2::numeric, 'infinity')
         order by lower(l.ids) desc limit $3",
    )
    .bind(lane)
    .bind(before.map(|id| id.number().to_string()))
    .bind(count)
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| Ok(Extent { first: id(row, 0)?, last: id(row, 1)?, entries: row.try_get(2)? })).collect()
}

/// The highest id the ledger knows of: the end of its last row, for rows do not overlap.
pub async fn highest(connection: &mut PgConnection, lane: LaneId) -> Result<Option<EntryId>, sqlx::Error> {
    let last = "select upper(ids)::text from tidegate.ledger where lane = $1 order by lower(ids) desc limit 1";
    let row = sqlx::query(last).bind(lane).fetch_optional(connection).await?;
    row.map(|row| id(&row, 0)).transpose()
}

/// Whether the stream should still have a row's entries: they lie above the trim line.
pub async fn is_retained(connection: &mut PgConnection, lane: LaneId, row: &Found) -> Result<bool, sqlx::Error> {
    let line = "select $2::numeric >= trimmed_below from tidegate.lanes where lane = $1";
    let above = sqlx::query_scalar(line).bind(lane).bind(row.first.number().to_string());
    Ok(above.fetch_optional(connection).await?.unwrap_or(false))
}

/// Records how many entries of a row are lost upstream, unless its range was given up to the trimmer meanwhile. Gives how
/// many nobody had recorded yet.
pub async fn mark_lost(
    connection: &mut PgConnection,
    lane: LaneId,
    row: &Found,
    lost: usize,
) -> Result<usize, sqlx::Error> {
    let more: Option<i32> = sqlx::query_scalar(
        "with old as (
             select ids, lost from tidegate.ledger
             where lane = $1 and ids = numrange($2::numeric, $3::numeric, '[]')
               and lower(ids) >= (select trimmed_below from tidegate.lanes where lane = $1)
             for update)
         update tidegate.ledger l set lost = $4 from old
         where l.lane = $1 and l.ids = old.ids and old.lost < $4
         returning $4 - old.lost",
    )
    .bind(lane)
    .bind(row.first.number().to_string())
    .bind(row.last.number().to_string())
    .bind(lost as i32)
    .fetch_optional(connection)
    .await?;
    Ok(more.unwrap_or(0).unsigned_abs() as usize)
}

const COLUMNS: &str = "lower(l.ids)::text, upper(l.ids)::text, l.digests, l.digest_version, l.entries, l.lost";

fn found(row: &sqlx::postgres::PgRow) -> Result<Found, sqlx::Error> {
    let digests: Option<Vec<u8>> = row.try_get(2)?;
    let version: Option<i16> = row.try_get(3)?;
    Ok(Found {
        first: id(row, 0)?,
        last: id(row, 1)?,
        digests: digests.filter(|_| version == Some(DIGEST_VERSION)).map(|bytes| {
            bytes.as_chunks::<DIGEST_BYTES>().0.iter().map(|digest| u64::from_le_bytes(*digest)).collect()
        }),
        entries: row.try_get(4)?,
        lost: row.try_get(5)?,
    })
}

/// Reads an id that is a number in its text form.
fn id(row: &sqlx::postgres::PgRow, column: usize) -> Result<EntryId, sqlx::Error> {
    let text: String = row.try_get(column)?;
    text.parse().map(EntryId::from_number).map_err(|e| sqlx::Error::Decode(format!("{text} is no id: {e}").into()))
}

fn bounds(batch: &Batch) -> (Vec<String>, Vec<String>) {
    let ends = |pick: fn(&Range<usize>) -> usize| -> Vec<String> {
        batch.runs().iter().map(|run| batch.entries()[pick(run)].id.number().to_string()).collect()
    };
    (ends(|run| run.start), ends(|run| run.end - 1))
}
