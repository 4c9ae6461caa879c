//! The ledger: which entries are in PostgreSQL already.
//!
//! Takes a batch whose entries may have been flushed before, and the ledger's rows around it, locked; gives for each entry
//! whether it is settled, new, or cannot be judged. The ranges find a redelivery at the price of one index probe; the
//! digests in them decide, entry by entry (I1, I2, I4).

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Row};

use super::batch::Batch;
use crate::entry::{DIGEST_VERSION, EntryId};
use crate::pipeline::Pipeline;

/// Bytes of one digest.
const DIGEST_BYTES: usize = 8;

/// The code with which `tidegate.all_or_nothing` ends a statement.
pub const REFUSED: &str = "TG001";

/// The number that stands for one (source, pipeline, stream) in the ledger.
pub type Lane = i32;

/// Ledger rows to be written, as columns ready to be bound.
#[derive(Debug, Default)]
pub struct NewRows {
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
    /// One row for each of these contiguous stretches of a batch, which must ascend.
    pub fn of(batch: &Batch, stretches: &[Range<usize>]) -> NewRows {
        let mut rows = NewRows::default();
        for stretch in stretches {
            let entries = &batch.entries()[stretch.clone()];
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else { continue };
            rows.first.push(first.id.number().to_string());
            rows.last.push(last.id.number().to_string());
            rows.digests.push(entries.iter().flat_map(|e| e.digest.to_le_bytes()).collect());
            rows.entries.push(entries.len() as i32);
        }
        rows
    }
}

/// A ledger row, as found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its first id.
    pub first: EntryId,
    /// Its last id.
    pub last: EntryId,
    /// The digests of the entries it stands for; none if it cannot judge.
    pub digests: Option<HashSet<u64>>,
    /// How many entries it stands for.
    pub entries: i32,
    /// How many of them were reported lost upstream.
    pub lost: i32,
}

/// What the ledger says of the entries of a batch: indices into it, ascending.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Settled before: only the acknowledgement is missing.
    pub known: Vec<usize>,
    /// In a row that cannot tell.
    pub unjudgeable: Vec<usize>,
    /// Never settled: to be applied now.
    pub new: Vec<usize>,
    /// The new ones outside every row, in contiguous stretches: each becomes a row.
    pub stretches: Vec<Range<usize>>,
    /// The new ones inside a row (by the row's index): new content under a used id. Their digests join that row's.
    pub amended: BTreeMap<usize, Vec<usize>>,
}

/// Judges a batch against the rows around it, which must ascend and not overlap.
pub fn examine(batch: &Batch, rows: &[Found]) -> Findings {
    let mut findings = Findings::default();
    let mut row = 0;
    for span in batch.spans() {
        // The stretch that the next new entry continues, if nothing has come between.
        let mut open = None;
        for index in span.clone() {
            let entry = &batch.entries()[index];
            while rows.get(row).is_some_and(|r| r.last < entry.id) {
                row += 1;
                open = None;
            }
            match rows.get(row).filter(|r| r.first <= entry.id) {
                Some(found) => {
                    open = None;
                    match &found.digests {
                        None => findings.unjudgeable.push(index),
                        Some(digests) if digests.contains(&entry.digest) => {
                            findings.known.push(index);
                        }
                        Some(_) => {
                            findings.new.push(index);
                            findings.amended.entry(row).or_default().push(index);
                        }
                    }
                }
                None => {
                    findings.new.push(index);
                    let stretch = *open.get_or_insert_with(|| {
                        findings.stretches.push(index..index);
                        findings.stretches.len() - 1
                    });
                    findings.stretches[stretch].end = index + 1;
                }
            }
        }
    }
    findings
}

/// Registers the lane of a pipeline, or finds it.
pub async fn lane(connection: &mut PgConnection, source: &str, pipeline: &Pipeline) -> Result<Lane, sqlx::Error> {
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

/// Which spans of a batch meet a row of the ledger: indices of spans.
pub async fn collisions(connection: &mut PgConnection, lane: Lane, batch: &Batch) -> Result<Vec<usize>, sqlx::Error> {
    let (first, last) = bounds(batch);
    let met: Vec<i64> = sqlx::query_scalar(
        "select p.n - 1
         from unnest($2::text[], $3::text[]) with ordinality as p (first, last, n)
         where exists (
             select from tidegate.ledger l
             where l.lane = $1 and l.ids && numrange(p.first::numeric, p.last::numeric, '[]'))",
    )
    .bind(lane)
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
pub async fn lock_met(connection: &mut PgConnection, lane: Lane, batch: &Batch) -> Result<Vec<Found>, sqlx::Error> {
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
    lane: Lane,
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
    lane: Lane,
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

/// Of these ids, the ones that no row covers.
pub async fn uncovered(
    connection: &mut PgConnection,
    lane: Lane,
    ids: &[EntryId],
) -> Result<Vec<EntryId>, sqlx::Error> {
    let numbers: Vec<String> = ids.iter().map(|id| id.number().to_string()).collect();
    let missing: Vec<i64> = sqlx::query_scalar(
        "select p.n - 1 from unnest($2::text[]) with ordinality as p (id, n)
         where not exists (select from tidegate.ledger l where l.lane = $1 and l.ids @> p.id::numeric)
         order by p.n",
    )
    .bind(lane)
    .bind(numbers)
    .fetch_all(connection)
    .await?;
    Ok(missing.into_iter().map(|n| ids[n as usize]).collect())
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

/// The rows that lie above the trim line, highest first: what the stream should still have.
pub async fn retained(connection: &mut PgConnection, lane: Lane) -> Result<Vec<Extent>, sqlx::Error> {
    let rows = sqlx::query(
        "select lower(l.ids)::text, upper(l.ids)::text, l.entries
         from tidegate.ledger l join tidegate.lanes using (lane)
         where l.lane = $1 and lower(l.ids) >= trimmed_below and l.digests is not null
         order by lower(l.ids) desc",
    )
    .bind(lane)
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| Ok(Extent { first: id(row, 0)?, last: id(row, 1)?, entries: row.try_get(2)? })).collect()
}

/// The highest id the ledger knows of.
pub async fn highest(connection: &mut PgConnection, lane: Lane) -> Result<Option<EntryId>, sqlx::Error> {
    let row = sqlx::query("select coalesce(max(upper(ids)), -1)::text from tidegate.ledger where lane = $1")
        .bind(lane)
        .fetch_one(connection)
        .await?;
    if row.try_get::<&str, _>(0)? == "-1" { Ok(None) } else { id(&row, 0).map(Some) }
}

/// Records how many entries of a row are lost upstream, unless its range was given up to the trimmer meanwhile. Gives how
/// many nobody had recorded yet.
pub async fn mark_lost(
    connection: &mut PgConnection,
    lane: Lane,
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

const COLUMNS: &str = "lower(l.ids)::text, upper(l.ids)::text, l.digests, l.digest_version, l.entries, l.lost";

fn found(row: &sqlx::postgres::PgRow) -> Result<Found, sqlx::Error> {
    let digests: Option<Vec<u8>> = row.try_get(2)?;
    let version: Option<i16> = row.try_get(3)?;
    Ok(Found {
        first: id(row, 0)?,
        last: id(row, 1)?,
        digests: digests
            .filter(|_| version == Some(DIGEST_VERSION))
            .map(|bytes| bytes.as_chunks::<DIGEST_BYTES>().0.iter().map(|digest| u64::from_le_bytes(*digest)).collect()),
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
        batch.spans().iter().map(|span| batch.entries()[pick(span)].id.number().to_string()).collect()
    };
    (ends(|span| span.start), ends(|span| span.end - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::batch::{Filling, tests::origin};
    use proptest::prelude::*;

    fn id(ms: u64) -> EntryId {
        EntryId { ms, seq: 0 }
    }

    /// A batch of contiguous spans of ids; the content is the same everywhere.
    fn batch(spans: &[&[u64]]) -> Batch {
        let mut filling = Filling::new(origin(), 1000);
        for span in spans {
            span.iter().for_each(|ms| filling.push(id(*ms), [b"id".as_slice(), b"a"]));
            filling.close_span();
        }
        filling.seal(true)
    }

    /// A row that holds the digests of these entries of the batch.
    fn row(first: u64, last: u64, batch: &Batch, known: &[u64]) -> Found {
        let digests = batch.entries().iter().filter(|e| known.contains(&e.id.ms)).map(|e| e.digest).collect();
        Found { first: id(first), last: id(last), digests: Some(digests), entries: known.len() as i32, lost: 0 }
    }

    #[test]
    fn with_no_row_around_each_span_is_one_new_row() {
        let findings = examine(&batch(&[&[1, 2, 3], &[7, 8]]), &[]);
        assert_eq!(findings.stretches, [0..3, 3..5]);
        assert_eq!(findings.new, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn what_a_row_knows_is_settled_and_the_rest_is_new() {
        let b = batch(&[&[1, 2, 3, 4, 5]]);
        let findings = examine(&b, &[row(2, 3, &b, &[2, 3])]);
        assert_eq!(findings.known, [1, 2]);
        assert_eq!(findings.stretches, [0..1, 3..5]);
    }

    #[test]
    fn a_new_range_is_cut_at_a_row_even_if_no_entry_of_the_batch_is_in_it() {
        let b = batch(&[&[1, 5]]);
        assert_eq!(examine(&b, &[row(3, 3, &b, &[])]).stretches, [0..1, 1..2]);
    }

    #[test]
    fn new_content_under_a_used_id_is_applied_and_joins_the_row() {
        let b = batch(&[&[1, 2, 3]]);
        let findings = examine(&b, &[row(1, 3, &b, &[1, 3])]);
        assert_eq!((findings.known, findings.new), (vec![0, 2], vec![1]));
        assert_eq!(findings.amended, BTreeMap::from([(0, vec![1])]));
        assert!(findings.stretches.is_empty());
    }

    #[test]
    fn a_row_without_digests_cannot_judge() {
        let b = batch(&[&[1, 2]]);
        let compacted = Found { digests: None, ..row(1, 1, &b, &[]) };
        let findings = examine(&b, &[compacted]);
        assert_eq!((findings.unjudgeable, findings.new), (vec![0], vec![1]));
    }

    proptest! {
        #[test]
        fn every_entry_is_judged_once_and_no_new_row_meets_an_old_one(
            ids in prop::collection::btree_set(0u64..60, 1..30),
            cuts in prop::collection::btree_set(0u64..60, 0..10),
            known in prop::collection::btree_set(0u64..60, 0..40),
        ) {
            let all: Vec<u64> = ids.iter().copied().collect();
            let spans: Vec<&[u64]> = all.chunks(4).collect();
            let b = batch(&spans);
            // Rows from each second pair of cuts: disjoint and ascending.
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let known: Vec<u64> = known.into_iter().collect();
            let rows: Vec<Found> = cuts.as_chunks::<2>().0.iter().map(|[a, z]| {
                let inside: Vec<u64> = known.iter().copied().filter(|k| a <= k && k <= z).collect();
                row(*a, *z, &b, &inside)
            }).collect();
            let f = examine(&b, &rows);
            let mut seen: Vec<usize> = f.known.iter().chain(&f.new).chain(&f.unjudgeable).copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..b.len()).collect::<Vec<_>>());
            let covered = |ms: u64| rows.iter().any(|r| r.first.ms <= ms && ms <= r.last.ms);
            for &i in &f.known { prop_assert!(covered(b.entries()[i].id.ms) && known.contains(&b.entries()[i].id.ms)); }
            let in_stretches: usize = f.stretches.iter().map(|s| s.len()).sum();
            let in_rows: usize = f.amended.values().map(Vec::len).sum();
            prop_assert_eq!(in_stretches + in_rows, f.new.len());
            for s in &f.stretches {
                let (first, last) = (b.entries()[s.start].id.ms, b.entries()[s.end - 1].id.ms);
                prop_assert!(rows.iter().all(|r| last < r.first.ms || r.last.ms < first));
                prop_assert!(b.spans().iter().any(|span| span.start <= s.start && s.end <= span.end));
            }
        }
    }
}
