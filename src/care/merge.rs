//! Merge: neighbouring ledger rows become one, with all their digests, so that a ledger of many small flushes stays small.
//!
//! Takes a lane and a frontier: everything below it is settled and acknowledged. Gives how many rows were merged, and where to go on.
//! The merged row covers the gaps between its parts and keeps their digests in the order of the parts: it judges each entry as
//! they did, and an unknown digest under an id in a gap is new content, as inside any row. Transactions are short, and give up
//! where anything is in the way.

use std::ops::Range;

use sqlx::Row;

use crate::failpoint;
use crate::lanes::LaneId;
use crate::model::entry::{DIGEST_VERSION, EntryId};
use crate::postgres::{Session, Transaction};

/// The most digests that one row holds: 320 KB.
const MOST_DIGESTS: i64 = 40_000;
/// A row with so many is not merged any more.
const FULL: i64 = MOST_DIGESTS * 4 / 5;
/// So many small rows at the ledger's end are worth a transaction. A digest is written anew when its row grows by this factor: eight
/// times at the most.
const FAN: usize = 4;
/// Rows looked at in one step.
const PAGE: i64 = 2_000;

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// So many rows became one, or none could be; there may be more from `next` on.
    Step {
        /// Rows merged.
        rows: usize,
        /// Where the next step begins.
        next: EntryId,
    },
    /// Nothing is left that is worth it; the next look begins at `next`.
    Done {
        /// Where the next look begins.
        next: EntryId,
    },
}

/// Where a row begins, and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slice {
    first: EntryId,
    /// Whether it lies below the frontier.
    is_below: bool,
    entries: i64,
    /// Whether it has digests of this version.
    is_mergeable: bool,
}

/// Merges one group of rows, the first one at or above `from`.
pub async fn merge(
    session: &mut Session,
    lane: LaneId,
    frontier: EntryId,
    from: EntryId,
) -> Result<Merged, sqlx::Error> {
    let mut transaction = session.begin().await?;
    let rows = sqlx::query(
        "select lower(ids)::text, upper(ids) < $3::numeric, entries::int8, coalesce(digest_version = $4, false)
         from tidegate.ledger where lane = $1 and lower(ids) >= $2::numeric
         order by lower(ids) limit $5",
    )
    .bind(lane)
    .bind(from.number().to_string())
    .bind(frontier.number().to_string())
    .bind(DIGEST_VERSION)
    .bind(PAGE)
    .fetch_all(&mut *transaction)
    .await?;
    let slices: Vec<Slice> = rows.iter().map(slice).collect::<Result<_, sqlx::Error>>()?;
    // The first row above the frontier is the end: it and all behind it come later.
    let below = slices.iter().take_while(|slice| slice.is_below).count();
    let is_end = below < PAGE as usize;
    let next = |index: usize| slices.get(index).or(slices.last()).map_or(from, |slice| slice.first);
    let group = match plan(&slices[..below], is_end) {
        Plan::Merge(group) => group,
        // What cannot grow any more is not looked at again.
        Plan::Nothing { settled } => {
            transaction.commit().await?;
            let next = next(settled);
            return Ok(if is_end || next == from { Merged::Done { next } } else { Merged::Step { rows: 0, next } });
        }
    };
    let (first, last) = (slices[group.start].first, slices[group.end - 1].first);
    let merged = replace(transaction, lane, first, last, group.len() as i64).await?;
    // Somebody was in the way: another time, and meanwhile what lies behind.
    let next = if merged { first } else { next(group.end) };
    Ok(Merged::Step { rows: if merged { group.len() } else { 0 }, next })
}

fn slice(row: &sqlx::postgres::PgRow) -> Result<Slice, sqlx::Error> {
    let text: String = row.try_get(0)?;
    let number = text.parse().map_err(|e| sqlx::Error::Decode(format!("{text} is no id: {e}").into()))?;
    Ok(Slice {
        first: EntryId::from_number(number),
        is_below: row.try_get(1)?,
        entries: row.try_get(2)?,
        is_mergeable: row.try_get(3)?,
    })
}

/// What to do with a page of rows.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// These become one.
    Merge(Range<usize>),
    /// Nothing now; the rows before this index never will be.
    Nothing { settled: usize },
}

/// Chooses the first group that makes a full row; or, at the ledger's end, a few small rows that make a larger one.
fn plan(slices: &[Slice], is_end: bool) -> Plan {
    let mut start = 0;
    while start < slices.len() {
        if !slices[start].is_mergeable || slices[start].entries >= FULL {
            start += 1;
            continue;
        }
        let (mut end, mut entries) = (start, 0);
        while let Some(slice) = slices.get(end).filter(|slice| slice.is_mergeable && slice.entries < FULL) {
            if entries + slice.entries > MOST_DIGESTS {
                break;
            }
            entries += slice.entries;
            end += 1;
        }
        // Before another row, or a page's end, the group will not get any larger.
        if entries >= FULL || end < slices.len() || !is_end {
            if end - start > 1 {
                return Plan::Merge(start..end);
            }
            start = end.max(start + 1);
            continue;
        }
        return tail(&slices[start..end])
            .map_or(Plan::Nothing { settled: start }, |tail| Plan::Merge(start + tail.start..start + tail.end));
    }
    Plan::Nothing { settled: slices.len() }
}

/// Of rows that do not fill one yet, the last ones that are small beside what they would become.
fn tail(slices: &[Slice]) -> Option<Range<usize>> {
    let mut size = MOST_DIGESTS;
    while size >= 1 {
        let small = slices.iter().rev().take_while(|slice| slice.entries < size).count();
        if small >= FAN {
            let begin = slices.len() - small;
            let (entries, largest) = slices[begin..]
                .iter()
                .fold((0, 0), |(sum, largest), slice| (sum + slice.entries, largest.max(slice.entries)));
            if largest * FAN as i64 <= entries * 2 {
                return Some(begin..slices.len());
            }
        }
        size /= FAN as i64;
    }
    None
}

/// Puts one row in the place of those that begin between these ids. False: they are not what they were, and nothing was done.
async fn replace(
    mut transaction: Transaction<'_>,
    lane: LaneId,
    first: EntryId,
    last: EntryId,
    rows: i64,
) -> Result<bool, sqlx::Error> {
    // Lowest first, as flushes lock them; a row that somebody holds is not waited for.
    let query = sqlx::query(
        "with old as (
             select l.ids from tidegate.ledger l
             where l.lane = $1 and lower(l.ids) between $2::numeric and $3::numeric
             order by lower(l.ids) for update skip locked),
         removed as (
             delete from tidegate.ledger l using old where l.lane = $1 and l.ids = old.ids
             returning l.ids, l.digests, l.digest_version, l.entries, l.lost, l.consumer, l.flushed_at)
         insert into tidegate.ledger (lane, ids, digests, digest_version, entries, lost, consumer, flushed_at)
         select $1, numrange(min(lower(ids)), max(upper(ids)), '[]'), string_agg(digests, '' order by lower(ids)),
                $4, sum(entries)::int4, sum(lost)::int4, 'merged', max(flushed_at)
         from removed
         having count(*) = $5 and bool_and(digest_version = $4 and length(digests) = 8 * entries)
         on conflict on constraint ledger_no_overlap do nothing",
    )
    .bind(lane)
    .bind(first.number().to_string())
    .bind(last.number().to_string())
    .bind(DIGEST_VERSION)
    .bind(rows);
    let inserted = failpoint::during("merge.sent", query.execute(&mut *transaction)).await?.rows_affected();
    if inserted == 0 {
        transaction.rollback().await?;
        return Ok(false);
    }
    failpoint::during("merge.commit", transaction.commit()).await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slices(sizes: &[i64]) -> Vec<Slice> {
        let slice = |(n, entries): (usize, &i64)| {
            let first = EntryId { ms: n as u64 + 1, seq: 0 };
            Slice { first, is_below: true, entries: *entries, is_mergeable: *entries > 0 }
        };
        sizes.iter().enumerate().map(slice).collect()
    }

    #[test]
    fn small_rows_become_a_full_one_in_one_step() {
        assert_eq!(plan(&slices(&[100; 500]), true), Plan::Merge(0..400));
        assert_eq!(plan(&slices(&[MOST_DIGESTS, 100, 100]), true), Plan::Nothing { settled: 1 });
    }

    #[test]
    fn a_few_small_rows_at_the_end_become_one_and_a_large_one_is_not_written_again_for_them() {
        assert_eq!(plan(&slices(&[1, 1, 1]), true), Plan::Nothing { settled: 0 });
        assert_eq!(plan(&slices(&[1, 1, 1, 1]), true), Plan::Merge(0..4));
        assert_eq!(plan(&slices(&[10_000, 1, 1, 1, 1]), true), Plan::Merge(1..5));
        assert_eq!(plan(&slices(&[4, 4, 4, 4]), true), Plan::Merge(0..4));
    }

    #[test]
    fn what_cannot_be_merged_divides_the_others() {
        assert_eq!(plan(&slices(&[1, 1, 0, 1, 1]), true), Plan::Merge(0..2));
        assert_eq!(plan(&slices(&[1, 0, 1]), true), Plan::Nothing { settled: 2 });
    }

    /// Merges until nothing is left to do; gives how many digests were written.
    fn settle(rows: &mut Vec<i64>) -> i64 {
        let mut written = 0;
        while let Plan::Merge(group) = plan(&slices(rows), true) {
            let sum: i64 = rows[group.clone()].iter().sum();
            assert!(sum <= MOST_DIGESTS && group.len() > 1);
            written += sum;
            rows.splice(group, [sum]);
        }
        written
    }

    #[test]
    fn at_any_rate_few_rows_remain_and_each_digest_is_written_a_few_times() {
        for (each, rows_a_look, looks) in
            [(1, 1, 20_000), (1, 10, 3_600), (8, 1_240, 400), (1_000, 100, 400), (39_000, 10, 20)]
        {
            let (mut rows, mut written, mut entries) = (Vec::new(), 0, 0);
            for _ in 0..looks {
                rows.extend(std::iter::repeat_n(each, rows_a_look));
                entries += each * rows_a_look as i64;
                written += settle(&mut rows);
            }
            let most = entries / FULL.min(each.max(FULL)) + 32;
            assert!(rows.len() as i64 <= most, "{} rows for {entries} entries of {each}", rows.len());
            assert!(written <= 9 * entries, "{each}: written {} times", written / entries);
        }
    }

    proptest! {
        #[test]
        fn merging_ends_and_loses_nothing(mut rows in prop::collection::vec(0i64..50_000, 0..200)) {
            let before: i64 = rows.iter().sum();
            settle(&mut rows);
            prop_assert_eq!(rows.iter().sum::<i64>(), before);
        }
    }
}
